"""A run that was stopped and continued equals one that was not, bit for bit; what is refused."""

import csv
import gc
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer

import slm
import warm
from common import swap_ids
from gguf_helpers import write_gguf
from model_helpers import ARCHITECTURES, LLAMA, small_llama
from run_helpers import leave_strays, train
from slm.cli import plain_settings
from slm.dynamics.analysis import analyse
from slm.dynamics.trajectories import TrajectoryStore
from slm.errors import NonFiniteError, UserError
from slm.evaluate.command import evaluate
from slm.model.architecture import new_model
from slm.model.build import check_model, load_model
from slm.model.flops import flops_per_token
from slm.model.folder import save_model
from slm.score.command import load_reference, score
from slm.store.claims import ClaimLost
from slm.store.files import read_json
from slm.store.shards import References
from slm.store.windows import Windows
from slm.train import build as building
from slm.train.__main__ import main
from slm.train.build import accelerator, check_device
from slm.train.callbacks.heldout import HeldoutLoss
from slm.train.checkpoint import check_checkpoint, remove_checkpoint
from slm.train.module import SelectiveModule
from slm.train.settings import warn_of_other_precision
from train_helpers import (
    TWO_RANKS,
    command,
    compose_train,
    crash_at,
    rows,
    same_results,
    train_with_copies,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, made_corpus) -> Path:
    return train(compose_train(tmp_path_factory.mktemp("trained"), made_corpus.folder)).parent


@pytest.fixture
def whole(tmp_path, trained) -> Path:
    """A finished run, a test's own copy."""
    return shutil.copytree(trained, tmp_path / "whole")


CUTS = [3, 4, 5, 7, 10]  # inside a pass, at its end (5, 10), in the next


@pytest.fixture(scope="module", params=[0, 2])
def cut_runs(request, tmp_path_factory, made_corpus) -> tuple[Path, str]:
    """A run with so many workers, cut at each of CUTS; the word for them."""
    folder, word = tmp_path_factory.mktemp("cut"), f"data.num_workers={request.param}"
    config = compose_train(folder / "whole", made_corpus.folder, word)
    train_with_copies(config, CUTS)
    return folder, word


@pytest.mark.parametrize("cut", CUTS)
def test_resumed_run_equals_the_uninterrupted_one(text_corpus, trained, cut_runs, cut):
    folder, word = cut_runs
    assert not (folder / str(cut) / "model").exists()
    torch.manual_seed(999)  # a new process would not have this one's random state either
    train(compose_train(folder / str(cut), text_corpus.folder, word))
    same_results(trained, folder / str(cut))


def test_a_run_leaves_neither_its_model_nor_its_signal_handlers(tmp_path, text_corpus, monkeypatch):
    """The jobs of a sweep share a process: what stays behind is memory that the next one lacks."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    gc.collect()
    others = {id(item) for item in gc.get_objects() if type(item) is SelectiveModule}
    train(compose_train(tmp_path / "run", text_corpus.folder))
    assert [signal.getsignal(number) for number in numbers] == before
    gc.collect()
    alive = {id(item) for item in gc.get_objects() if type(item) is SelectiveModule}
    assert alive <= others
    crash_at(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="crash"):
        train(compose_train(tmp_path / "crash", text_corpus.folder))
    assert [signal.getsignal(number) for number in numbers] == before


def test_logs_have_every_step_once_and_the_last_checkpoints_are_kept(whole):
    assert [int(row["step"]) for row in rows(whole / "train.csv")] == list(range(1, 13))
    assert [int(row["step"]) for row in rows(whole / "heldout.csv")] == [0, 3, 6, 9, 12]
    names = sorted(path.name for path in (whole / "checkpoints").glob("*.ckpt"))
    assert [name for name in names if name.startswith("step")] == [
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    ]
    losses = {int(r["step"]): float(r["heldout/held/loss"]) for r in rows(whole / "heldout.csv")}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert [name for name in names if name.startswith("best")] == [f"best-{best:08d}.ckpt"]


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, text_corpus, whole, monkeypatch):
    config = compose_train(tmp_path / "cut", text_corpus.folder, "callbacks.checkpoints.keep=null")
    crash_at(monkeypatch, 8)
    with pytest.raises(RuntimeError):
        train(config)
    folder = tmp_path / "cut" / "checkpoints"
    newest = sorted(folder.glob("step-*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    for path in folder.glob("best-*"):
        path.unlink()
    crash_at(monkeypatch, None)
    train(config)
    same_results(whole, tmp_path / "cut")
    check_checkpoint(newest)
    assert not list(folder.glob("*.damaged"))


def test_a_run_with_only_damaged_checkpoints_gets_on_though_it_is_preempted_again(
    tmp_path, text_corpus, whole, monkeypatch
):
    config = compose_train(tmp_path / "cut", text_corpus.folder)
    folder = tmp_path / "cut" / "checkpoints"
    crash_at(monkeypatch, 10)
    with pytest.raises(RuntimeError):
        train(config)
    for path in folder.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    for step in (3, 5):
        crash_at(monkeypatch, step)
        with pytest.raises(RuntimeError):
            train(config)
        newest = folder / f"step-{step - 1:08d}.ckpt"
        check_checkpoint(newest)
        assert newest == sorted(folder.glob("step-*.ckpt"))[-1]
    crash_at(monkeypatch, None)
    train(config)
    same_results(whole, tmp_path / "cut")


def test_the_order_of_the_run_is_not_disturbed_by_heldout_evaluation(
    tmp_path, text_corpus, whole, monkeypatch
):
    config = compose_train(
        tmp_path / "rarely", text_corpus.folder, "callbacks.heldout.every_tokens=1_000_000"
    )
    train(config)
    probe = "slm/mask_jaccard"  # is measured as often as the held-out loss
    one, other = (rows(folder / "train.csv") for folder in (whole, tmp_path / "rarely"))
    assert [bool(row[probe]) for row in one] == [False, False, True] * 4
    one, other = ([{k: r[k] for k in r if k != probe} for r in found] for found in (one, other))
    assert one == other


def test_finished_folder_loads_in_transformers_and_runs_once(whole, tmp_path, text_corpus):
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(whole / "model")
    ids = tokenizer("the loss of the model", return_tensors="pt").input_ids
    again = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert torch.equal(model(ids).logits, again(ids).logits)
    before = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    train(compose_train(whole, text_corpus.folder))
    assert (whole / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_evaluations_do_not_count_into_a_step(tmp_path, text_corpus, monkeypatch):
    """perf/step_s and train_seconds are of training; HeldoutLoss comes after Metrics."""
    evaluate, clock, slept = HeldoutLoss.evaluate, time.perf_counter, 0

    def slow(self: HeldoutLoss, trainer: Any, pl_module: Any) -> None:
        nonlocal slept
        slept += 1000
        evaluate(self, trainer, pl_module)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + slept)

    monkeypatch.setattr(HeldoutLoss, "evaluate", slow)
    words = ("callbacks.heldout.every_tokens=128", "max_tokens=512")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    with open(tmp_path / "run" / "train.csv", newline="") as file:
        steps = [float(row["perf/step_s"]) for row in csv.DictReader(file)]
    assert len(steps) == 4 and max(steps) < 300
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert slept >= 4000 and 0 < lineage["train_seconds"] < 900


def test_the_record_names_the_architecture_that_was_loaded(
    tmp_path, text_corpus, whole, monkeypatch
):
    words = [f"model.init_from='{whole / 'model'}'", "model.architecture.hidden_size=32"]
    config = compose_train(tmp_path / "run", text_corpus.folder, *words)
    train(config)
    hparams = json.loads((tmp_path / "run" / "hparams.json").read_text())
    assert hparams["model"]["architecture"]["hidden_size"] == 16
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not [field for field in identity if field.startswith("model.architecture")]
    command_line = SimpleNamespace(overrides=SimpleNamespace(task=words))
    monkeypatch.setattr(HydraConfig, "get", lambda: command_line)
    door: Any = main
    with pytest.raises(UserError, match="model.architecture.hidden_size=32 is given with model.in"):
        door.__wrapped__(**plain_settings(config))
    model = {"init_from": str(whole / "model"), "architecture": {"hidden_size": 32}}
    with pytest.raises(UserError, match="model.architecture is given with model.init_from="):
        slm.train(text_corpus.folder, tmp_path / "other", 1536, model=model)
    assert not (tmp_path / "other").exists()


def test_a_schedule_that_the_run_does_not_reach_is_named(tmp_path, text_corpus, caplog):
    points = "{shape: linear, points: [[0, 1.0], [3072, 0.5]]}"
    words = [f"selection.select_ratio={points}"]
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert "schedule lies at 3072 tokens, the run ends at 1536 with a ratio of 0.75" in caplog.text


def test_lineage_counts_seen_and_selected_tokens(whole):
    lineage = json.loads((whole / "lineage.json").read_text())
    assert lineage["tokens_seen"] == 12 * 8 * 16
    per_call = int(0.6 * 4 * 16 + 0.5)
    assert lineage["tokens_selected"] == 12 * 2 * per_call
    last = rows(whole / "train.csv")[-1]
    assert float(last["data/tokens_selected"]) == 12 * 2 * per_call


def test_all_excess_and_random_see_the_same_order(
    tmp_path, text_corpus, make_references, monkeypatch
):
    crash_at(monkeypatch, None)
    scores = [np.full(s.num_tokens, -1.0) for s in text_corpus.shards]
    references = make_references(tmp_path / "r", text_corpus, scores)
    orders = []

    class Spy(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            orders[-1].append(batch["window"].tolist())

    monkeypatch.setattr(building, "StepProgress", Spy)
    for rule in ("all", "random", "excess"):
        orders.append([])
        references_word = f"data.references='{references.folder}'"
        words = (f"selection={rule}", references_word, "max_tokens=512")
        train(compose_train(tmp_path / rule, text_corpus.folder, *words))
    assert orders[0] == orders[1] == orders[2]


def references_of(corpus: Any, make_references: Any, folder: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    scores = [-5 * generator.random(shard.num_tokens) for shard in corpus.shards]
    return make_references(folder, corpus, scores).folder


SCHEDULE_CUTS = [2, 5, 8]  # on all tokens, between the points, after the last


def test_a_run_along_selected_rows_resumes_exactly_and_says_what_it_costs(text_corpus, tmp_path):
    words = ("model.backward=selected", "model.attn_implementation=eager")  # with dropout
    train_with_copies(compose_train(tmp_path / "whole", text_corpus.folder, *words), [6])
    train(compose_train(tmp_path / "6", text_corpus.folder, *words))
    same_results(tmp_path / "whole", tmp_path / "6")
    record = json.loads((tmp_path / "6" / "lineage.json").read_text())
    model = load_model(tmp_path / "6" / "model")
    seen, selected = (record[f"tokens_{name}"] for name in ("seen", "selected"))
    costs = [flops_per_token(model, 16, share, "selected") for share in (0.0, 1.0)]
    assert record["train_flops"] == (seen - selected) * costs[0] + selected * costs[1]
    with pytest.raises(UserError, match="model.backward is 'selected' in run.json"):
        train(compose_train(tmp_path / "6", text_corpus.folder, words[1]))
    with pytest.raises(UserError, match="LlamaDecoderLayer has a dropout of 0.2 within sdpa"):
        train(compose_train(tmp_path / "new", text_corpus.folder, words[0]))


@pytest.fixture(scope="module")
def cut_schedule(tmp_path_factory, made_corpus, make_references) -> tuple[Path, list[str]]:
    """A run under a schedule, whole and cut; the words for it."""
    folder = tmp_path_factory.mktemp("schedule")
    folders = [references_of(made_corpus, make_references, folder / f"r{i}", i) for i in (1, 2)]
    words = [
        "selection=mixture",
        "selection.select_ratio={shape: cosine, points: [[384, 1.0], [1024, 0.3]]}",
        "selection_start=384",
        f"data.references=['{folders[0]}', '{folders[1]}']",
        "data.combine=mixture",
    ]
    config = compose_train(folder / "whole", made_corpus.folder, *words)
    train_with_copies(config, SCHEDULE_CUTS)
    return folder, words


@pytest.mark.parametrize("cut", SCHEDULE_CUTS)
def test_resumed_schedule_goes_on_exactly(text_corpus, cut_schedule, cut):
    folder, words = cut_schedule
    train(compose_train(folder / str(cut), text_corpus.folder, *words))
    same_results(folder / "whole", folder / str(cut))
    kept = [float(row["slm/kept_frac"]) for row in rows(folder / str(cut) / "train.csv")]
    assert kept[:3] == [1.0] * 3 and kept[3] == 1.0  # step 4 begins at the first point
    assert kept == sorted(kept, reverse=True)
    assert kept[8:] == pytest.approx([0.3] * 4, abs=0.01)


def test_online_reference_trains_as_its_stored_scores_do(tmp_path, text_corpus, monkeypatch):
    crash_at(monkeypatch, None)
    corpus = text_corpus.folder
    reference = train(compose_train(tmp_path / "ref", corpus, "selection=all", "seed=3"))
    score(corpus, tmp_path / "s", reference_model=reference)
    rule = ("selection=excess", "callbacks.mask_overlap.num_windows=5")
    train(compose_train(tmp_path / "store", corpus, *rule, f"data.references='{tmp_path}/s'"))
    online = f"online_reference='{reference}'"
    train(compose_train(tmp_path / "online", corpus, *rule, online))
    batch = Windows(text_corpus, [References.open(tmp_path / "s")]).batch(np.arange(40))
    loss = load_reference(str(reference), text_corpus, "cpu", "float32")(batch).loss
    torch.testing.assert_close(-loss, batch["reference_logprob"], rtol=0, atol=1e-5)
    hparams = json.loads((tmp_path / "store" / "hparams.json").read_text())
    record = hparams["reference_records"][0]
    assert record["scoring_cost"]["tokens"] == text_corpus.num_targets
    assert record["model_lineage"]["train_flops"] > 3 * record["scoring_cost"]["flops"]
    assert record["model_lineage"]["train_seconds"] > 0
    assert hparams["ranking"] == {"scope": "batch", "windows": 4}
    lineage = json.loads((tmp_path / "online" / "lineage.json").read_text())
    assert lineage["online_reference"] == record["model_sha256"] and lineage["references"] == []
    stored, live = (rows(tmp_path / name / "train.csv") for name in ("store", "online"))
    for one, other in zip(stored, live, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert float(other[key] or 0) == pytest.approx(float(one[key] or 0), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selection=excess"], "^selection excess needs data.references .* found null"),
        (["selection=reference_entropy"], "^selection reference_entropy needs .* found null"),
        (
            ["selection_start=1536"],
            "selection_start is 1536, max_tokens 1536: the rule would never",
        ),
        (["data.combine=mean"], "data.combine is 'mean' for 0 reference"),
        (
            ["selection=excess", "online_reference=/nowhere"],
            "online_reference /nowhere: there is no such folder",
        ),
        (
            ["selection.select_ratio={shape: linear, points: [[0, 1.0], [9, 0]]}"],
            r"select_ratio.points\[1\] is 0, .*a number in \(0, 1\]",
        ),
        (["selection.select_ratio=0"], r"select_ratio is 0.*\(0, 1\]"),
        (["selection.select_ratio=1.2"], r"select_ratio is 1.2.*\(0, 1\]"),
        (["selection.select_ratio=sixty"], "select_ratio is 'sixty', it must be a number in"),
        (["data.heldout=somewhere"], "data.heldout is 'somewhere', it must be {name: folder"),
        (["max_tokens=100"], r"max_tokens \(100\) is less than one optimizer step \(128 tokens\)"),
        (["data.micro_batch_size=3"], r"data.batch_size \(8\)"),
        (
            ["callbacks.checkpoints.best_of=other"],
            r"best_of is 'other', data.heldout has \['held'\]",
        ),
        (["+model.architecture.vocab_size=10"], "vocab_size is 10, the tokenizer has 300"),
        (
            ["model.init_from=/nowhere"],
            "model.init_from /nowhere: there is no such folder",
        ),
        (["data.corpus=/nowhere"], "/nowhere is not a finished corpus"),
        (["model.architecture.model_type=gru"], "gru"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, text_corpus, overrides, message):
    with pytest.raises(UserError, match=message):
        train(compose_train(tmp_path / "run", text_corpus.folder, *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_longer_windows_than_the_model_has_positions(tmp_path, text_corpus, make_corpus):
    """Of the corpus or of a held-out set."""
    longer = make_corpus(tmp_path / "longer", [np.arange(65) % 290], 32)
    sixteen = "model.architecture.max_position_embeddings=16"
    message = "seq_len is 32, model max_position_embeddings is 16: `slm train` with model.override="
    far = f"+data.heldout.far={longer.folder}"
    with pytest.raises(UserError, match=f"^held-out set far: {longer.folder} {message}"):
        train(compose_train(tmp_path / "run", text_corpus.folder, sixteen, far))
    with pytest.raises(UserError, match=f"^corpus {message}"):
        train(compose_train(tmp_path / "run", longer.folder, sixteen, "data.batch_size=1"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_begins_with_a_gguf_leaves_a_plain_folder(tmp_path, tokenizer):
    file = tmp_path / "m.gguf"
    write_gguf(file, new_model(LLAMA, len(tokenizer), None), tokenizer)
    (tmp_path / "a.txt").write_text("one two three four " * 400)
    settings = {"tokenizer": {"path": str(file)}, "seq_len": 16, "heldout_ratio": 0}
    slm.prepare([tmp_path / "a.txt"], tmp_path / "corpus", **settings)
    given = (f"model.init_from='{file}'", "selection=all", "max_tokens=128")
    folder = train(compose_train(tmp_path / "run", tmp_path / "corpus" / "train", *given))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.to_dict().keys().isdisjoint({"quantization_config"})
    record = json.loads((folder.parent / "lineage.json").read_text())
    assert (record["init_from"].endswith("/m.gguf"), record["init_from_is_folder"]) == (True, True)
    assert evaluate({"a": folder, "b": file}, {"x": tmp_path / "corpus" / "train"})[0]["loss"] > 0


@pytest.mark.parametrize("key", ["model.init_from", "online_reference"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "is no model folder: it is a PEFT adapter"),
        ("x.bin", r"is no model folder: config\.json"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path, text_corpus, key, file, message):
    (tmp_path / file).touch()
    config = compose_train(tmp_path / "run", text_corpus.folder, f"{key}='{tmp_path}'")
    with pytest.raises(UserError, match=f"^{key} {tmp_path} {message}"):
        train(config)


@pytest.mark.parametrize("key", ["model.init_from", "online_reference"])
def test_a_damaged_model_is_refused_with_check_full(tmp_path, text_corpus, tokenizer, key):
    save_model(tmp_path / "base", small_llama(300), tokenizer, "card", {})
    path = tmp_path / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    words = ["data.check=full", f"{key}='{tmp_path / 'base'}'"]
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: sha256 \w+, slm"):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_depend_on_the_mode_are_neither_trained_nor_exported(
    tmp_path, text_corpus, tokenizer, monkeypatch
):
    """Evaluated right before the save, RWKV's stock class leaves its weights divided."""
    words = [f"model.init_from='{tmp_path / 'base'}'", "max_tokens=256"]
    config = compose_train(tmp_path / "run", text_corpus.folder, *words)
    base = new_model(ARCHITECTURES["rwkv"] | {"rescale_every": 1}, 300, None)
    torch.nn.init.constant_(base.get_parameter("rwkv.blocks.1.feed_forward.value.weight"), 0.1)
    save_model(tmp_path / "base", base, tokenizer, "card", {})
    with pytest.raises(UserError, match="RwkvForCausalLM changes its weights .* rescale_every=0"):
        train(config)
    monkeypatch.setattr(building, "check_trainable", check_model)
    with pytest.raises(UserError, match="RwkvForCausalLM: the loss of one batch is .* as saved"):
        train(config)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"model", ".model.tmp", "lineage.json", "tables.json"}


def test_a_corpus_whose_tokenizer_is_damaged_is_refused(tmp_path, text_corpus):
    swap_ids(text_corpus.tokenizer_folder)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: sha256"):
        train(compose_train(tmp_path / "run", text_corpus.folder))


def test_scores_of_two_kinds_are_not_mixed_up(tmp_path, text_corpus, make_references, tokenizer):
    save_model(tmp_path / "model", small_llama(300), tokenizer, "card", {})
    folder = references_of(text_corpus, make_references, tmp_path / "r", 0)
    words = [f"data.references='{folder}'", f"online_reference='{tmp_path / 'model'}'"]
    with pytest.raises(
        UserError, match=f"online_reference is .*model and data.references {folder}"
    ):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    words = [f"data.references='{folder}'", "selection=intersection"]
    message = f"intersection needs one reference with entropy, found {folder}.*columns=.entropy."
    with pytest.raises(UserError, match=message):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))


def test_who_loses_the_folder_to_another_process_ends_before_it_writes(
    tmp_path, text_corpus, monkeypatch
):
    folder = tmp_path / "run"

    class Lose(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                (folder / "run.claim").write_text('{"host": "elsewhere", "pid": 7}')

    monkeypatch.setattr(building, "StepProgress", Lose)
    config = compose_train(folder, text_corpus.folder)
    with pytest.raises(ClaimLost, match="has lost .*run.claim to pid 7 on elsewhere"):
        train(config)
    assert [int(row["step"]) for row in rows(folder / "train.csv")] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*.ckpt")) == [
        "step-00000002.ckpt"
    ]
    message = "another process trains in .* \\(pid 7 on elsewhere, see run.claim\\)"
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (folder / "model").exists()


def test_leftovers_of_a_killed_start_are_no_other_run(tmp_path, text_corpus):
    folder = tmp_path / "run"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = f"{socket.gethostname()}-{dead.pid}-5.tmp"
    (folder / f".run.json.{left}").touch()
    train(compose_train(folder, text_corpus.folder, "max_tokens=256"))
    (folder / "checkpoints" / f".step-00000001.ckpt.{left}").touch()
    train(compose_train(folder, text_corpus.folder, "max_tokens=256"))
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_that_holds_something_else_is_refused(tmp_path, text_corpus):
    before = sorted(path.name for path in text_corpus.folder.iterdir())
    with pytest.raises(UserError, match=r"holds bytes-00000.json|holds .* and no run"):
        train(compose_train(text_corpus.folder, text_corpus.folder))
    assert sorted(path.name for path in text_corpus.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed is 0 in run.json, 1 now"),
        ("selection.select_ratio=0.5", "selection.select_ratio is 0.6 in run.json, 0.5 now"),
        ("data.batch_size=4", "data.batch_size is 8 in run.json, 4 now"),
        ("resume=never", "holds this run already"),
    ],
)
def test_a_folder_with_another_run_is_refused(whole, text_corpus, override, message):
    with pytest.raises(UserError, match=message):
        train(compose_train(whole, text_corpus.folder, override))


def test_a_run_whose_folder_names_class_paths_is_the_same_run(whole, text_corpus):
    path = whole / "run.json"
    identity = read_json(path)  # without its seal, which such folders lack
    paths = {"model._convert_": "all", "optimizer.adamw._partial_": True}
    for key, word, old in [
        ("selection.rule", "random", "slm.selection.Random"),
        ("optimizer.adamw.kind", "adamw", "slm.optim.adamw"),
        ("optimizer.schedule.kind", "warmup_cosine", "slm.optim.warmup_cosine"),
        ("model.kind", "build_lm", "slm.model.build_lm"),
    ]:
        assert identity.pop(key) == word
        paths[f"{key.rpartition('.')[0]}._target_"] = old
    path.write_text(json.dumps(identity | paths))
    before = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(compose_train(whole, text_corpus.folder)) == whole / "model"
    assert (whole / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="selection.rule is 'random' in run.json, 'middle' now"):
        train(compose_train(whole, text_corpus.folder, "selection=middle"))


OWN = """from dataclasses import dataclass
from slm.selection import Loss

@dataclass(frozen=True)
class Mine(Loss):
    pass
"""


def test_a_rule_of_ones_own_trains_and_is_a_word_in_its_folder(tmp_path, text_corpus):
    (tmp_path / "own_file.py").write_text(OWN)
    words = ["selection=loss", "selection._target_=own_file.Mine"]
    words += [
        f"modules=['{tmp_path / 'own_file.py'}']",
        "callbacks=dynamics",
        "callbacks.dynamics.num_targets=100",
    ]
    words += [f"callbacks.dynamics.corpus='{text_corpus.folder}'"]
    words += ["callbacks.dynamics.every_tokens=256"]
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["selection.rule"] == "mine" and "own_file" not in json.dumps(identity)
    assert "own_file" not in (tmp_path / "run" / "lineage.json").read_text()
    store = TrajectoryStore(tmp_path / "run" / "dynamics" / "tokens")
    assert "own_file" not in json.dumps(store.plan)
    found = analyse(store, "run")
    assert found.kept is not None and found.kept.rule == "mine k = 0.6"


def test_nan_stops_before_the_update_and_keeps_the_last_good_checkpoint(
    tmp_path, text_corpus, monkeypatch
):
    class Poison(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                next(pl_module.lm.parameters()).data[0] = torch.nan

    monkeypatch.setattr(building, "StepProgress", Poison)
    with pytest.raises(NonFiniteError, match="step 5: loss sum nan.*windows of this rank"):
        train(compose_train(tmp_path / "run", text_corpus.folder))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))
    assert names == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert not (tmp_path / "run" / "model").exists()


def test_heldout_losses_are_evaluates_in_the_precision_of_the_run(tmp_path, text_corpus, caplog):
    words = ["trainer.precision=bf16-mixed", "callbacks.heldout.every_tokens=768"]
    model = train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    expected = float(rows(tmp_path / "run" / "heldout.csv")[-1]["heldout/held/loss"])
    settings = {"batch_size": 4, "max_windows": 6, "device": "cpu", "check": "size"}
    found = {}
    for dtype in ("bf16-mixed", "float32"):
        [row] = evaluate({"m": model}, {"held": text_corpus}, dtype=dtype, **settings)
        found[dtype] = row["loss"]
        said = "was trained in bf16-mixed, and so were its held-out losses: dtype=bf16-mixed gives"
        assert (said in caplog.text) == (dtype == "float32")
    assert found["bf16-mixed"] == expected
    assert abs(found["float32"] - expected) > 1e-6


@pytest.mark.parametrize(
    ("scored", "precision", "warns"),
    [
        ("bf16-mixed", "bf16-mixed", False),
        ("bfloat16", "bf16-mixed", True),
        ("float32", "bf16-mixed", True),
        ("float32", "32-true", False),
        ("bf16-mixed", "32-true", True),
    ],
)
def test_scores_of_another_computation_are_named(scored, precision, warns, caplog):
    store: Any = SimpleNamespace(folder="r", manifest={"scoring": {"dtype": scored}})
    warn_of_other_precision(store, precision)
    assert ("was scored in" in caplog.text) == warns


def test_auto_never_takes_apples_gpu(monkeypatch):
    """Lightning's own auto asks for mps first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [accelerator(word) for word in ("auto", "cpu", "mps")] == ["cpu", "cpu", "mps"]
    with pytest.raises(UserError, match="chooses mps, which has no float64"):
        check_device(torch.device("mps"))
    check_device(torch.device("cpu"))


# ---- whole processes ------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_do_not_import_modules_of_the_current_folder(tmp_path, text_corpus):
    """Lightning starts the second in an interpreter of its own; the first has its imports."""
    leave_strays(tmp_path)
    start = command(tmp_path / "run", text_corpus.folder, *TWO_RANKS, "max_tokens=512")
    done = warm.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_signal_saves_a_checkpoint_and_tells_the_scheduler(tmp_path, text_corpus, number, code):
    out = tmp_path / "run"
    process = warm.Popen(command(out, text_corpus.folder, f"max_tokens={128 * 100_000}"))
    wait_for(out / "train.csv", process)
    process.send_signal(number)
    assert process.wait(60) == code
    assert list((out / "checkpoints").glob("step-*.ckpt.json"))
    assert not (out / "model").exists()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path, text_corpus):
    every = "callbacks.checkpoints.every_tokens=640"
    words = (text_corpus.folder, f"max_tokens={128 * 60}", every)
    assert warm.run(command(tmp_path / "whole", *words)).returncode == 0
    out = tmp_path / "a path, with = and spaces"
    for step in (12, 13, 22, 30):
        process = warm.Popen(command(out, *words))
        wait_for(out / "checkpoints", process)
        wait_until(partial(is_at, out / "train.csv", step), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert warm.run(command(out, *words)).returncode == 0
    same_results(tmp_path / "whole", out)
    steps = [int(row["step"]) for row in rows(out / "train.csv")]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_a_forked_rank_is_no_second_rank_zero():
    """Lightning reads its rank as it is imported, which was before the fork."""
    code = "from lightning.pytorch.utilities import rank_zero_only as r; print(r.rank)"
    assert warm.run_ranks(2, [sys.executable, "-c", code]) == ([0, 0], "0\n\n1\n")


@pytest.mark.slow
def test_rank_zero_adopts_the_folder_and_more_ranks_go_on_and_fewer(tmp_path, text_corpus):
    out = tmp_path / "run"
    words = ["max_tokens=1536", "callbacks.checkpoints.keep=null"]
    words.append("model.architecture.attention_dropout=0")  # which differs between ranks
    words.append("callbacks.checkpoints.every_tokens=128")
    line = command(out, text_corpus.folder, *words)
    warm.run(line, check=True)
    losses = [float(row["train/loss_all"]) for row in rows(out / "train.csv")]
    shutil.rmtree(out / "model")
    before, last, newest = sorted((out / "checkpoints").glob("step-*.ckpt"))[-3:]
    newest.write_bytes(b"torn")
    remove_checkpoint(last)
    codes, said = warm.run_ranks(2, [*line, *TWO_RANKS])
    assert codes == [0, 0], said
    assert said.count(f"{newest} is damaged") == 1
    assert said.count(f"continuing {before}") == said.count(f"model: {out}") == 1  # by one rank
    assert (out / "model" / "slm.json").exists()
    check_checkpoint(newest)
    assert [int(row["step"]) for row in rows(out / "train.csv")] == list(range(1, 13))
    shutil.rmtree(out / "model")  # and back: after 11 batches a rank, in the middle of two of one
    remove_checkpoint(newest)
    done = warm.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and f"continuing {last}" in done.stderr, done.stderr
    assert [float(row["train/loss_all"]) for row in rows(out / "train.csv")] == pytest.approx(
        losses, rel=1e-5
    )
    codes, said = warm.run_ranks(2, [*line, *TWO_RANKS, "seed=1"])  # both are told, none waits
    assert codes == [1, 1]
    assert said.count("holds another run: seed is 0 in run.json, 1 now") == 1


def is_at(table: Path, step: int) -> bool:
    """Counted in rows: a continued run drops those that come after its checkpoint."""
    return table.exists() and table.read_text().count("\n") > step


def wait_for(path: Path, process: subprocess.Popen) -> None:
    wait_until(path.exists, process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.time() < deadline
        time.sleep(0.05)
