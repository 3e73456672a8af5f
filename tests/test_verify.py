"""Every kind of folder, whole and damaged in every way."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slm import verify as verification
from slm.errors import UserError
from slm.model.build import set_special_ids
from slm.model.folder import save_model
from slm.score.cost import write_cost
from slm.store import shards
from slm.store.claims import Unclaimed
from slm.store.files import hash_file, write_array, write_json, write_record
from slm.store.own_files import replacing
from slm.store.shards import References, write_manifest
from slm.store.sidecars import Shard, write_sidecar
from slm.train.checkpoint import VerifiedCheckpointIO
from slm.verify import verify


def only(path: Path) -> tuple[bool, str]:
    """Of a path with one part: whole?, and what is said."""
    results = list(verify(path))
    assert len(results) == 1, results
    return results[0][1:]


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")


RUN_FILES = ["run.json", "hparams.json", "status.json", "lineage.json", "train.csv", "tables.json"]
RUN_FILES += ["checkpoints/step-00000010.ckpt.json", "model/slm.json"]
DAMAGES = [flip, truncate, extend, Path.unlink]


@pytest.fixture
def references(tmp_path, text_corpus, make_references) -> References:
    scores = [np.r_[np.nan, -np.ones(320)] for _ in range(2)]
    return make_references(tmp_path / "references", text_corpus, scores)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads))
    set_special_ids(model, tokenizer)
    save_model(folder, model, tokenizer, "card", {})
    return folder


@pytest.fixture
def run(tmp_path, saved) -> Path:
    """A finished run: two checkpoints and the model."""
    folder = tmp_path / "runs" / "one"
    (folder / "wandb" / "offline-run").mkdir(parents=True)
    write_record(folder / "run.json", {"seed": 0})
    write_record(folder / "lineage.json", {})
    write_record(folder / "tables.json", {"kind": "tables", "sha256": {}})
    for step in (10, 20):
        checkpoint = {
            "global_step": step,
            "about": {"tokens_seen": step},
            "weights": torch.arange(step),
        }
        path = folder / "checkpoints" / f"step-{step:08d}.ckpt"
        VerifiedCheckpointIO(Unclaimed()).save_checkpoint(checkpoint, path)
    shutil.copytree(saved, folder / "model")
    return folder


# ---- corpora and references ---------------------------------------------------------------------


def test_a_whole_corpus_and_reference(text_corpus, references):
    good, text = only(text_corpus.folder)
    assert good and text.startswith("corpus, 2 shards, 642 tokens, fingerprint ")
    assert text_corpus.fingerprint in text
    good, text = only(references.folder)
    assert good and text.startswith("reference, 2 shards, 642 tokens")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("column", ["tokens", "documents", "bytes"])
def test_a_damaged_file_of_a_corpus_is_named(text_corpus, column, damage):
    path = text_corpus.folder / f"{column}-00001.npy"
    damage(path)
    good, text = only(text_corpus.folder)
    assert not good and str(path) in text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mask_is_named(tmp_path, make_corpus, damage):
    masks = [[False, True, True] * 11]
    corpus = make_corpus(tmp_path / "c", [np.arange(33)], 16, masks=masks)
    assert only(corpus.folder)[0]
    other = make_corpus(tmp_path / "d", [np.arange(33)], 16, masks=[[True] * 33])
    assert corpus.fingerprint != other.fingerprint
    damage(corpus.folder / "masks-00000.npy")
    good, text = only(corpus.folder)
    assert not good and "masks-00000.npy" in text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_labels_are_named(tmp_path, make_corpus, damage):
    signal = [[-1, 0, 1] * 11]
    corpus = make_corpus(tmp_path / "c", [np.arange(33)], 16, signal=signal)
    assert only(corpus.folder)[0]
    other = make_corpus(tmp_path / "d", [np.arange(33)], 16, signal=[[1] * 33])
    assert corpus.fingerprint != other.fingerprint
    damage(corpus.folder / "signal-00000.npy")
    good, text = only(corpus.folder)
    assert not good and "signal-00000.npy" in text


def test_a_label_that_is_none_is_found(monkeypatch, tmp_path, make_corpus):
    monkeypatch.setattr(verification, "BLOCK", 7)
    shards = [np.arange(33), np.arange(33)]
    signal = [[-1, 0, 1] * 11, [0] * 20 + [2] + [1] * 12]
    good, text = only(make_corpus(tmp_path / "c", shards, 16, signal=signal).folder)
    assert not good and "signal-00001.npy: entry 20 is 2, a label is one of (-1, 0, 1)" in text


def test_a_weight_that_is_none_is_found(tmp_path, make_corpus):
    good = make_corpus(tmp_path / "c", [np.arange(33)], 16, weights=[[0.5] * 33])
    assert only(good.folder)[0]
    other = make_corpus(tmp_path / "d", [np.arange(33)], 16, weights=[[0.5] * 20 + [-1.0] * 13])
    assert good.fingerprint != other.fingerprint
    found, text = only(other.folder)
    assert not found and "weights-00000.npy: entry 20 is -1.0, a weight is a finite" in text


def test_labels_of_one_shard_alone_are_found(tmp_path, make_corpus):
    shards = [np.arange(33), np.arange(33)]
    folder = make_corpus(tmp_path / "c", shards, 16, signal=[[1] * 33] * 2).folder
    one = json.loads((folder / "tokens-00001.json").read_text())
    for name in ("sha256", "dtype", "rows"):
        del one[name]["signal"]
    write_sidecar(folder, "tokens", Shard(**one))
    write_manifest(folder, "tokens", 2)
    good, text = only(folder)
    assert not good and "signal-00001.npy is missing: other shards have one" in text


@pytest.mark.parametrize("name", ["plan.json", "tokens-00001.json", "manifest.json"])
def test_every_flipped_byte_of_the_records_is_found(text_corpus, name):
    path = text_corpus.folder / name
    whole = path.read_bytes()
    positions = [n for n, byte in enumerate(whole) if byte not in b" \n"]
    for position in positions[:: max(1, len(positions) // 40)]:
        flip(path, position)
        good, text = only(text_corpus.folder)
        assert not good and text, (position, whole[position - 20 : position + 20])
        path.write_bytes(whole)
    assert only(text_corpus.folder)[0]


def test_a_damaged_tokenizer_is_found(text_corpus):
    path = text_corpus.tokenizer_folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))
    good, text = only(text_corpus.folder)
    assert not good and f"{path} is damaged: sha256" in text
    path.unlink()
    good, text = only(text_corpus.folder)
    assert not good and "tokenizer.json is missing" in text


@pytest.mark.parametrize("value", [0.5, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [1, 200, 320])
def test_a_score_that_is_no_log_prob_is_found(
    tmp_path, text_corpus, make_references, value, position
):
    scores = [np.r_[np.nan, -np.ones(320)] for _ in range(2)]
    scores[1][position] = value
    folder = make_references(tmp_path / "r", text_corpus, scores).folder
    good, text = only(folder)
    assert not good
    assert (
        f"logprobs-00001.npy: entry {position} has log-prob {value}, a finite number <= 0" in text
    )


@pytest.fixture
def with_entropy(references) -> Path:
    """The store with a second column."""
    folder = references.folder
    for shard in references.shards:
        digest = write_array(shard.path(folder, "entropy"), np.r_[np.nan, np.ones(320)])
        hashes, dtype = shard.sha256 | {"entropy": digest}, shard.dtype | {"entropy": "float64"}
        rows = shard.rows | {"entropy": 321}
        write_sidecar(folder, "logprobs", Shard(shard.index, 321, hashes, dtype, rows))
    write_manifest(folder, "logprobs", 2)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("column", ["logprobs", "entropy"])
def test_a_damaged_column_of_a_reference_is_named(with_entropy, column, damage):
    assert only(with_entropy)[0]
    path = with_entropy / f"{column}-00001.npy"
    damage(path)
    good, text = only(with_entropy)
    assert not good and str(path) in text


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_an_entropy_that_is_none_is_found(with_entropy, value):
    path = with_entropy / "entropy-00001.npy"
    digest = write_array(path, np.r_[np.nan, np.ones(319), value])
    shard = References.open(with_entropy).shards[1]
    hashes = shard.sha256 | {"entropy": digest}
    write_sidecar(with_entropy, "logprobs", Shard(1, 321, hashes, shard.dtype, shard.rows))
    write_manifest(with_entropy, "logprobs", 2)
    good, text = only(with_entropy)
    assert not good
    assert f"{path}: entry 320 has entropy {value}, a finite number >= 0" in text


def test_a_first_token_with_a_score_is_found(tmp_path, text_corpus, make_references):
    scores = [np.r_[np.nan, -np.ones(320)], -np.ones(321)]
    good, text = only(make_references(tmp_path / "r", text_corpus, scores).folder)
    assert not good and "logprobs-00001.npy: entry 0 is -1.0, a shard's first token" in text


def test_documents_packing_may_have_more_tokens_without_a_score(
    tmp_path, make_corpus, make_references
):
    corpus = make_corpus(tmp_path / "c", [np.arange(13)], 4, "documents", [[0, 3, 8]])
    scores = np.r_[np.nan, -np.ones(12)]
    scores[[3, 8]] = np.nan
    assert only(make_references(tmp_path / "r", corpus, [scores]).folder)[0]
    scores[5] = np.inf
    assert not only(make_references(tmp_path / "s", corpus, [scores]).folder)[0]


def test_scores_are_read_block_by_block(monkeypatch, tmp_path, text_corpus, make_references):
    monkeypatch.setattr(verification, "BLOCK", 7)
    scores = [np.r_[np.nan, -np.ones(320)] for _ in range(2)]
    assert only(make_references(tmp_path / "r", text_corpus, scores).folder)[0]
    scores[0][50] = 1
    good, text = only(make_references(tmp_path / "s", text_corpus, scores).folder)
    assert not good and "entry 50 has log-prob 1.0" in text


def test_float16_scores_are_checked_too(tmp_path, references):
    folder = tmp_path / "half"
    folder.mkdir()
    shutil.copy(references.folder / "plan.json", folder)
    scores = np.array([np.nan, -1, -np.inf], np.float16)
    digest = write_array(folder / "logprobs-00000.npy", scores)
    columns = {"logprobs": digest}, {"logprobs": "float16"}, {"logprobs": 3}
    write_sidecar(folder, "logprobs", Shard(0, 3, *columns))
    write_manifest(folder, "logprobs", 1)
    good, text = only(folder)
    assert not good and "entry 2 has log-prob -inf" in text


def test_what_prepare_made_has_two_parts(tmp_path, make_corpus):
    for name in ("train", "heldout"):
        make_corpus(tmp_path / "corpus" / name, [np.arange(13)], 4)
    flip(tmp_path / "corpus" / "heldout" / "tokens-00000.npy")
    results = {path.name: good for path, good, _ in verify(tmp_path / "corpus")}
    assert results == {"heldout": False, "train": True}


def test_the_folder_that_prepare_was_given_is_finished_with_its_report(tmp_path, make_corpus):
    make_corpus(tmp_path / "corpus" / "train", [np.arange(13)], 4)
    write_record(tmp_path / "corpus" / "plan.json", {})
    results = {path.name: (good, text) for path, good, text in verify(tmp_path / "corpus")}
    assert results["train"][0]
    assert not results["corpus"][0] and "report.json is missing" in results["corpus"][1]
    write_record(tmp_path / "corpus" / "report.json", {})
    assert all(good for _, good, _ in verify(tmp_path / "corpus"))


def test_an_unfinished_store_is_not_whole(tmp_path, text_corpus):
    (text_corpus.folder / "manifest.json").unlink()
    good, text = only(text_corpus.folder)
    assert not good and "is unfinished: manifest.json is missing" in text
    (tmp_path / "begun").mkdir()
    shutil.copy(text_corpus.folder / "plan.json", tmp_path / "begun")
    assert not only(tmp_path / "begun")[0]
    (tmp_path / "foreign").mkdir()
    shutil.copy(text_corpus.folder / "tokens-00000.npy", tmp_path / "foreign")
    assert not only(tmp_path / "foreign")[0]


def test_leftovers_are_named_and_do_no_harm(references, capsys):
    for name in (".logprobs-00001.npy.host-7.tmp", "logprobs-00001.claim"):
        (references.folder / name).write_bytes(b"half")
    assert verification.report(references.folder)
    said = capsys.readouterr().out
    assert "left over, harmless: .logprobs-00001.npy.host-7.tmp" in said
    assert "left over, harmless: logprobs-00001.claim" in said


# ---- runs, checkpoints, models ------------------------------------------------------------------


def test_a_whole_run(run):
    results = [(path.name, good) for path, good, _ in verify(run)]
    names = ["one", "step-00000010.ckpt", "step-00000020.ckpt", "model"]
    assert results == [(name, True) for name in names]
    assert [path for path, _, _ in verify(run.parent)] == [path for path, _, _ in verify(run)]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-00000010.ckpt",
        "model/model.safetensors",
        "model/config.json",
        "model/README.md",
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, name, damage):
    if damage is Path.unlink and name.endswith(".ckpt"):
        return  # a checkpoint that is not there is none
    damage(run / name)
    bad = [text for _, good, text in verify(run) if not good]
    assert len(bad) == 1 and str(run / name) in bad[0]


def test_a_checkpoint_without_its_sidecar_is_unfinished(run):
    path = run / "checkpoints" / "step-00000010.ckpt"
    assert only(path) == (True, "checkpoint")
    sidecar = path.with_name(path.name + ".json")
    sidecar.write_text('{"kind": "checkpoint"}')
    assert only(path) == (False, f"{sidecar} is damaged: it has no 'sha256'")
    sidecar.unlink()
    assert only(path) == (False, f"{path} is unfinished: {path.name}.json is missing")


def test_a_run_without_its_model_is_unfinished(run):
    shutil.rmtree(run / "model")
    good = {path.name: (good, text) for path, good, text in verify(run)}
    assert not good["one"][0] and "is unfinished: model/ is missing" in good["one"][1]
    assert good["step-00000020.ckpt"][0]


def test_a_model_of_another_origin_has_no_hashes(tmp_path, saved):
    folder = tmp_path / "foreign"
    shutil.copytree(saved, folder)
    (folder / "slm.json").unlink()
    good, text = only(folder)
    assert good and "no hashes are recorded" in text
    truncate(folder / "model.safetensors")
    good, text = only(folder)
    assert not good and "model.safetensors is damaged" in text
    (folder / "model.safetensors").unlink()
    assert not only(folder)[0]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": 3}', "\xff"])
def test_a_damaged_slm_json_is_one_sentence(tmp_path, saved, text):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "slm.json").write_text(text, encoding="latin-1")
    good, said = only(tmp_path / "model")
    assert not good and "slm.json" in said or "JSON file" in said


def test_a_file_that_may_not_be_read_is_named(text_corpus, monkeypatch):
    path = text_corpus.folder / "bytes-00001.npy"

    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "check_hash", refuse)
    assert only(text_corpus.folder) == (False, f"{path} cannot be read: Permission denied")


def make_files(folder: Path, by: str) -> Path:
    with replacing(folder, by) as to:
        (to / "page.html").write_text("so it is")
        (to / "rows.csv").write_text("a,b")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_made_json_lists_are_compared(tmp_path, damage):
    folder = make_files(tmp_path / "report", "slm report")
    assert only(folder) == (True, "made by slm report")
    damage(folder / "rows.csv")
    good, text = only(folder)
    assert not good and str(folder / "rows.csv") in text
    assert ("is missing: slm report made it; run it again" in text) == (damage is Path.unlink)


def test_pivots_are_unfinished_until_made_json_is_there(tmp_path):
    folder = tmp_path / "pivots"
    folder.mkdir()
    write_record(folder / "plan.json", {"kind": "pivots"})
    missing = "made.json is missing; the same `slm pivots` command goes on"
    assert only(folder) == (False, f"{folder} is unfinished: {missing}")
    make_files(folder, "slm pivots")
    assert only(folder) == (True, "made by slm pivots")
    record = json.loads((folder / "made.json").read_text())
    record["files"]["rows.csv"] *= 2  # as while they are replaced
    write_json(folder / "made.json", record)
    assert only(folder) == (
        False,
        f"{folder} is unfinished: slm pivots was replacing its files; run it again",
    )
    make_files(folder, "slm pivots")
    flip(folder / "plan.json", 13)
    assert not only(folder)[0] and "plan.json is damaged" in only(folder)[1]


def test_runs_of_a_pilot_keep_no_model(tmp_path, run, make_corpus):
    pilot = tmp_path / "pilot"
    make_corpus(pilot / "heldout", [np.arange(13)], 4)
    write_record(pilot / "plan.json", {"kind": "pilot"})
    for name in ("model", "checkpoints"):
        shutil.rmtree(run / name)
    shutil.move(run, pilot / "seed-0" / "all")
    unfinished = {path.name: text for path, good, text in verify(pilot) if not good}
    assert "the same `slm pilot` command goes on" in unfinished["pilot"]
    assert "model/ is missing" in unfinished["all"]
    write_record(pilot / "seed-0" / "all" / "arm.json", {"tokens_seen": 12})
    make_files(pilot, "slm pilot")
    results = {path.name: (good, text) for path, good, text in verify(pilot)}
    assert results["pilot"] == (True, "made by slm pilot") and results["heldout"][0]
    assert results["all"] == (True, "run of a pilot, finished; its model is not kept")
    flip(pilot / "seed-0" / "all" / "arm.json", -6)
    assert [path.name for path, good, _ in verify(pilot) if not good] == ["all"]


def test_a_report_beside_a_run_hides_nothing_of_it(run):
    make_files(run, "slm report")
    assert next(verify(run))[1:] == (True, "made by slm report; run, finished")
    flip(run / "run.json")
    assert not next(verify(run))[1]


def test_empty_missing_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist"):
        list(verify(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is no corpus, reference, run, checkpoint or model"):
        list(verify(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="is no corpus"):
        list(verify(tmp_path))
    assert not only(tmp_path / "notes.txt")[0]


# ---- the command --------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slm verify", *words])
    with pytest.raises(SystemExit) as ended:
        verification.main()
    return ended.value.code  # type: ignore[return-value]


def test_exit_codes_and_one_line_a_part(monkeypatch, capsys, text_corpus, references):
    corpus, scores = str(text_corpus.folder), str(references.folder)
    assert command(monkeypatch, corpus, scores) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["whole", "whole"]
    flip(references.folder / "logprobs-00000.npy")
    assert command(monkeypatch, scores, corpus, "nowhere") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["NOT WHOLE", "whole", "NOT WHOLE"]
    assert "logprobs-00000.npy is damaged: sha256" in lines[0]
    assert lines[2] == "NOT WHOLE: nowhere does not exist"


def test_progress_counts_the_bytes_that_are_read(text_corpus, run):
    for folder in (text_corpus.folder, run):
        counts: list[int] = []
        advance: Callable[[int], None] = counts.append
        assert all(good for _, good, _ in verify(folder, advance))
        hashed = [p for p in folder.rglob("*") if p.suffix in (".npy", ".ckpt", ".safetensors")]
        assert sum(counts) >= sum(path.stat().st_size for path in hashed)


def test_a_reader_that_leaves_gets_no_traceback(references):
    words = [sys.executable, "-m", "slm.verify", str(references.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"BrokenPipe" not in process.stderr.read()


def test_help_and_checking_a_reference_import_no_torch(references):
    code = (
        "import sys; from slm import verify\n"
        "sys.argv = ['slm verify', sys.argv[1]]\n"
        "try:\n    verify.main()\nfinally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(references.folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole: ") and os.linesep in done.stdout


# ---- records that nothing but their own seal vouches for ----------------------------------------


def test_a_flipped_digit_of_any_record_is_found(tmp_path, text_corpus, references, run):
    """What no manifest covers: cost and lineage, a run's records and tables, a checkpoint's."""
    write_cost(references.folder, 0, {"seconds": 5.0, "tokens": 5, "flops": 5, "device": "5"})
    write_record(references.folder / "lineage.json", {"seed": 5})
    for name in ("run.json", "hparams.json", "status.json"):
        write_record(run / name, {"seed": 5})
    write_record(run / "lineage.json", {})
    (run / "train.csv").write_text("loss\n5\n")
    tables = {"train.csv": hash_file(run / "train.csv")}
    write_record(run / "tables.json", {"sha256": tables})
    prepared = tmp_path / "prepared"
    shutil.copytree(text_corpus.folder, prepared / "train")
    write_record(prepared / "plan.json", {"seq_len": 5})
    said = {"fingerprint": text_corpus.fingerprint, "tokens": 5}
    write_record(prepared / "report.json", {"train": said})
    names = ["cost-00000.json", "lineage.json"]
    paths = [references.folder / name for name in names] + [run / name for name in RUN_FILES]
    paths += [prepared / "plan.json", prepared / "report.json"]
    for path in paths:
        part = run if path.is_relative_to(run) else path.parent
        assert all(good for _, good, _ in verify(part)), part
        whole = path.read_bytes()
        flip(path, max(n for n in range(len(whole)) if whole[n : n + 1].isdigit()))
        bad = [text for _, good, text in verify(part) if not good]
        assert bad and str(path) in bad[0], path
        path.write_bytes(whole)


def test_a_record_whose_hash_is_gone_is_named(run):
    write_json(run / "run.json", {"seed": 6})
    good, text = next((good, text) for path, good, text in verify(run) if path == run)
    assert not good and "run.json is damaged or was edited: the hash of its content is gone" in text


def test_a_model_names_files_of_its_own_folder_alone(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "secret").write_text("")
    write_record(tmp_path / "model" / "slm.json", {"sha256": {"../secret": "0" * 64}})
    good, said = only(tmp_path / "model")
    assert not good and "sha256 is {'../secret': " in said
