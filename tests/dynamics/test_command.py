"""Token losses from checkpoints and during training: the same ones, and nothing disturbed."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import warm
from dynamics_helpers import SETTINGS, compose_dynamics, during, make_lm
from run_helpers import train
from slm.dynamics.__main__ import main
from slm.dynamics.analysis import analyse
from slm.dynamics.callback import TokenDynamics, even_part
from slm.dynamics.classes import CLASSES, classify
from slm.dynamics.command import attention_of, dynamics, load_checkpoint
from slm.dynamics.trajectories import TrajectoryStore, token_losses
from slm.errors import NonFiniteError, UserError
from slm.store.files import nested, read_json, write_json
from slm.store.shards import write_manifest
from slm.store.tokenizer import tokenizer_sha256, train_tokenizer
from slm.store.windows import Windows
from slm.train.checkpoint import sidecar
from slm.verify import verify
from train_helpers import TWO_RANKS, command, compose_train, crash_at, same_results
from wandb_helpers import media_file, wandb_history


def crash_and_go_on(config: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    crash_at(monkeypatch, step)
    with pytest.raises(RuntimeError, match="crash"):
        train(config)
    crash_at(monkeypatch, None)
    train(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, made_corpus) -> Path:
    words = during(made_corpus, "callbacks.checkpoints.keep=null")
    return train(compose_train(tmp_path_factory.mktemp("run"), made_corpus.folder, *words)).parent


@pytest.fixture
def run(tmp_path, trained) -> Path:
    """12 steps of 128 tokens, a checkpoint every second step; losses taken as it trained.

    A test's own copy.
    """
    return shutil.copytree(trained, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- during training ------------------------------------------------------------------------


def test_training_is_not_disturbed(tmp_path, text_corpus, run):
    train(compose_train(tmp_path / "bare", text_corpus.folder))
    same_results(tmp_path / "bare", run)


def test_losses_are_taken_from_step_0_to_the_end(run):
    store = TrajectoryStore(run / "dynamics" / "tokens")
    assert [c.tokens_seen for c in store.checkpoints] == [0, *range(256, 12 * 128 + 1, 256)]
    assert len(store.tokens.windows) == 7  # of 16 targets: 100 are asked for
    table = np.load(store.folder / "trajectories.npy")
    expected = classify(store.losses())
    for name in expected._fields:
        np.testing.assert_array_equal(table[name], getattr(expected, name))
    with open(store.folder / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES) * 7
    shares = [float(row["share"]) for row in rows[:4]]
    assert shares == [np.mean(expected.label == number) for number in range(4)]


@pytest.mark.parametrize("cut", [4, 5, 12])  # at a checkpoint and losses; after; at the end
def test_a_resumed_run_leaves_the_same_store(tmp_path, text_corpus, run, monkeypatch, cut):
    config = compose_train(
        tmp_path / "cut",
        text_corpus.folder,
        *during(text_corpus, "callbacks.checkpoints.keep=null"),
    )
    crash_and_go_on(config, monkeypatch, cut)
    same_results(run, tmp_path / "cut")
    assert files(run / "dynamics" / "tokens") == files(tmp_path / "cut" / "dynamics" / "tokens")


def test_what_came_after_the_checkpoint_is_made_again(tmp_path, text_corpus, run, monkeypatch):
    """Checkpoints are rarer than token losses: three columns are later than the last one."""
    words = during(text_corpus, "callbacks.checkpoints.every_tokens=768")
    config = compose_train(tmp_path / "cut", text_corpus.folder, *words)
    crash_at(monkeypatch, 11)
    with pytest.raises(RuntimeError, match="crash"):
        train(config)
    folder = tmp_path / "cut" / "dynamics" / "tokens"
    later = TrajectoryStore(folder)
    assert later.checkpoints[-1].tokens_seen == 1280
    later.append(1281, later.losses()[-1])  # of an attempt that went another way
    crash_at(monkeypatch, None)
    train(config)
    assert files(folder).keys() == files(run / "dynamics" / "tokens").keys()
    for one, other in zip(
        TrajectoryStore(folder).losses(),
        TrajectoryStore(run / "dynamics/tokens").losses(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_losses_missing_at_the_checkpoint_that_it_goes_on_from_are_made(
    tmp_path, text_corpus, run, monkeypatch
):
    """Killed between the checkpoint and the token losses of one step."""
    words = during(text_corpus, "callbacks.checkpoints.keep=null")
    config = compose_train(tmp_path / "cut", text_corpus.folder, *words)
    crash_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="crash"):
        train(config)
    folder = tmp_path / "cut" / "dynamics" / "tokens"
    TrajectoryStore(folder).forget_after(700)
    crash_at(monkeypatch, None)
    train(config)
    assert files(folder) == files(run / "dynamics" / "tokens")


def test_a_run_that_starts_anew_forgets_all(tmp_path, text_corpus, monkeypatch):
    words = during(text_corpus)
    crash_at(monkeypatch, 1)  # before the first checkpoint
    with pytest.raises(RuntimeError, match="crash"):
        train(compose_train(tmp_path / "run", text_corpus.folder, "seed=1", *words))
    crash_at(monkeypatch, None)
    train(compose_train(tmp_path / "run", text_corpus.folder, "seed=2", *words))
    assert len(TrajectoryStore(tmp_path / "run" / "dynamics" / "tokens").checkpoints) == 7


def test_a_name_that_leads_out_of_the_folder_is_refused_and_removes_nothing(tmp_path, text_corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    words = [*during(text_corpus), "callbacks.dynamics.name=.."]
    with pytest.raises(UserError, match=r"callbacks.dynamics.name is '\.\.', it must be one name"):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert (tmp_path / "run" / "status.json").exists()


def test_a_broken_model_stops_the_training(tmp_path, text_corpus, monkeypatch):
    def broken(*arguments: Any) -> np.ndarray:
        return np.full((len(arguments[2]), 16), np.nan, np.float32)

    monkeypatch.setattr("slm.dynamics.callback.token_losses", broken)
    with pytest.raises(NonFiniteError, match=r"step 0: the loss of 112 of the 112 tokens"):
        train(compose_train(tmp_path / "run", text_corpus.folder, *during(text_corpus)))


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_ranks_share_the_windows(text_corpus, tokenizer, count, monkeypatch):
    """Each rank's part, gathered, is what one process finds; all make as many forwards."""

    from slm.dynamics.token_set import read_windows

    windows, numbers = Windows(text_corpus), np.array([1, 4, 6, 9])
    tokens, lm = read_windows(windows, numbers, tokenizer), make_lm()
    found, forwards = [], []

    class Gathered(Exception):
        pass

    def gather(values: torch.Tensor, group: Any) -> torch.Tensor:
        found.append(values)
        raise Gathered

    callback = TokenDynamics.__new__(TokenDynamics)
    callback.tokens, callback.windows, callback.batch_size = tokens, windows, 2
    plugin = SimpleNamespace(forward_context=torch.no_grad)
    monkeypatch.setattr(lm, "forward", lambda *a, f=lm.forward: forwards.append(rank) or f(*a))
    trainer: Any = None
    for rank in range(count):
        ranks = {"world_size": count, "global_rank": rank, "strategy": None}
        trainer = SimpleNamespace(precision_plugin=plugin, **ranks)
        module = SimpleNamespace(lm=lm, device=torch.device("cpu"), all_gather=gather)
        with pytest.raises(Gathered):
            callback._losses(trainer, module)  # type: ignore
    assert len(set(np.bincount(forwards))) == 1
    module = SimpleNamespace(
        lm=lm, device=torch.device("cpu"), all_gather=lambda values, group: torch.stack(found)
    )
    together = callback._losses(trainer, module)  # type: ignore
    alone = token_losses(lm, windows, numbers, 2)[tokens.live]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


# ---- from checkpoints -----------------------------------------------------------------------


def test_checkpoints_give_the_losses_that_the_callback_saw(text_corpus, run):
    analyses = dynamics(**compose_dynamics(run, text_corpus.folder)).analyses
    later, live = TrajectoryStore(run / "dynamics" / "c"), TrajectoryStore(run / "dynamics/tokens")
    seen = [c.tokens_seen for c in later.checkpoints]
    assert seen == [c.tokens_seen for c in live.checkpoints]
    for one, other in zip(later.losses(), live.losses(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [analysis.name for analysis in analyses] == ["run"]


def test_a_second_run_makes_only_what_is_missing(text_corpus, run, monkeypatch):
    config = compose_dynamics(run, text_corpus.folder)
    dynamics(**config)
    folder = run / "dynamics" / "c"
    before = files(folder)
    for name in ("losses-000000000000768.json", "losses-000000000001024.npy"):
        (folder / name).unlink()
    (folder / "losses-000000000001024.json").unlink()
    loaded = []

    def load(path: Path, corpus: Any) -> Any:
        loaded.append(path.name)
        return load_checkpoint(path, corpus)

    monkeypatch.setattr("slm.dynamics.command.load_checkpoint", load)
    dynamics(**config)
    assert loaded == ["step-00000006.ckpt", "step-00000008.ckpt"]
    assert files(folder) == before


def test_two_runs_have_a_store_each(tmp_path, text_corpus, run):
    shutil.copytree(run, tmp_path / "more" / "a")
    shutil.copytree(run, tmp_path / "more" / "b")
    analyses = dynamics(**compose_dynamics(tmp_path / "more", text_corpus.folder)).analyses
    assert [analysis.name for analysis in analyses] == ["a", "b"]
    one, other = (files(tmp_path / "more" / name / "dynamics" / "c") for name in "ab")
    assert one == other


def test_references_give_excess_losses_and_keep_rates(tmp_path, text_corpus, make_references):
    scores = [np.full(len(text_corpus.column("tokens", i)), -2.0) for i in range(2)]
    references = make_references(tmp_path / "r", text_corpus, scores)
    named = f"'{references.folder}'"
    words = ["selection=excess", "selection.select_ratio=0.3", f"data.references={named}"]
    words += during(text_corpus, f"callbacks.dynamics.references={named}")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    store = TrajectoryStore(tmp_path / "run" / "dynamics" / "tokens")
    assert store.plan["run"]["selection"] == {
        "rule": "excess",
        "select_ratio": 0.3,
        "scope": "batch",
    }
    with open(store.folder / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last = rows[-4:]
    kept = sum(float(row["kept_frac"] or 0) * int(row["num_tokens"]) for row in last)
    # 7 windows in groups of 4 and 3: floor(0.3 * 64 + 0.5) + floor(0.3 * 48 + 0.5)
    assert kept == pytest.approx(19 + 14)
    excess_loss = analyse(store, "run").excess_loss(0)
    assert excess_loss is not None
    np.testing.assert_allclose(excess_loss, store.losses()[0] - 2.0)


def test_what_would_be_noticed_too_late_is_said_at_the_start(
    tmp_path, text_corpus, make_corpus, make_references, monkeypatch, caplog
):
    words = during(text_corpus, "selection=excess", "callbacks.dynamics.every_tokens=100_000")
    scores = [np.full(len(text_corpus.column("tokens", i)), -2.0) for i in range(2)]
    words += [f"data.references='{make_references(tmp_path / 'r', text_corpus, scores).folder}'"]
    crash_at(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="crash"):
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert "is what the run trains on: its tokens are not held out" in caplog.text
    assert "nothing on what excess k = 0.6 selects: it needs reference_logprob" in caplog.text
    assert "every_tokens is 100000 in a run of 1536 tokens: fewer than 3 times" in caplog.text
    caplog.clear()
    other = make_corpus(tmp_path / "other", [np.arange(161) % 290], 16)
    with pytest.raises(RuntimeError, match="crash"):
        train(compose_train(tmp_path / "fine", text_corpus.folder, *during(other)))
    assert "held out" not in caplog.text and "no classes" not in caplog.text


def test_the_default_is_even_in_whole_steps():
    for steps, expected in ((100, 3), (64, 2), (63, 2), (31, 1), (1000, 31)):
        data = SimpleNamespace(tokens_per_step=4096)
        trainer: Any = SimpleNamespace(max_steps=steps, datamodule=data)
        assert even_part(trainer) == expected * 4096


def test_a_flipped_byte_is_found_when_asked_for(text_corpus, run):
    dynamics(**compose_dynamics(run, text_corpus.folder))
    path = run / "dynamics" / "c" / "losses-000000000000768.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    before = path.read_bytes()
    path.write_bytes(data)
    dynamics(**compose_dynamics(run, text_corpus.folder))
    with pytest.raises(UserError, match="000768.npy is damaged: sha256"):
        dynamics(**compose_dynamics(run, text_corpus.folder, "check=full"))
    path.write_bytes(before)
    other = path.with_name("source.npy")
    data = bytearray(other.read_bytes())
    data[-2] ^= 1
    other.write_bytes(data)
    with pytest.raises(UserError, match="source.npy is damaged: sha256"):
        dynamics(**compose_dynamics(run, text_corpus.folder, "check=full"))


def test_a_kill_before_the_manifest_is_mended_by_the_next_run(text_corpus, run):
    dynamics(**compose_dynamics(run, text_corpus.folder))
    manifest = run / "dynamics" / "c" / "manifest.json"
    whole = manifest.read_bytes()
    found = json.loads(whole)
    del found["checkpoints"][-1]
    manifest.write_text(json.dumps(found))
    dynamics(**compose_dynamics(run, text_corpus.folder))
    assert manifest.read_bytes() == whole


def test_a_run_killed_before_its_last_checkpoint_has_its_classes(
    tmp_path, text_corpus, run, monkeypatch
):
    """Killed while the last token losses are taken: the checkpoint of that step must not exist."""
    words = during(text_corpus, "callbacks.checkpoints.keep=null")
    config = compose_train(tmp_path / "cut", text_corpus.folder, *words)

    def killed(self: Any, trainer: Any, seen: int) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(TokenDynamics, "_finish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    train(config)
    assert files(run / "dynamics" / "tokens") == files(tmp_path / "cut" / "dynamics" / "tokens")
    same_results(run, tmp_path / "cut")


def test_checkpoints_give_the_callbacks_losses_under_another_attention(tmp_path, text_corpus):
    keep = "callbacks.checkpoints.keep=null"
    words = during(text_corpus, keep, "model.attn_implementation=eager", "max_tokens=768")
    folder = tmp_path / "eager"
    train(compose_train(folder, text_corpus.folder, *words))
    dynamics(**compose_dynamics(folder, text_corpus.folder))
    mine, theirs = (TrajectoryStore(folder / "dynamics" / name) for name in ("c", "tokens"))
    for one, other in zip(mine.losses(), theirs.losses(), strict=True):
        np.testing.assert_array_equal(one, other)
    path = folder / "checkpoints" / "step-00000006.ckpt"
    assert load_checkpoint(path, text_corpus).model.config._attn_implementation == "eager"


def test_a_checkpoints_word_fetches_no_kernel(caplog):
    path = Path("step.ckpt")
    assert [attention_of(path, {"attn_implementation": n}) for n in ("eager", "sdpa")] == [
        "eager",
        "sdpa",
    ]
    assert attention_of(path, {"attn_implementation": None}) is None and not caplog.text
    assert attention_of(path, {"attn_implementation": "somebody/kernels"}) is None
    assert "attention 'somebody/kernels' is not taken" in caplog.text


def test_bf16_mixed_can_be_taken_from_checkpoints_too(text_corpus, run):
    dynamics(**compose_dynamics(run, text_corpus.folder, "dtype=bf16-mixed", "name=half"))
    half, full = (TrajectoryStore(run / "dynamics" / n) for n in ("half", "tokens"))
    for mine, theirs in zip(half.losses(), full.losses(), strict=True):
        assert not np.array_equal(mine, theirs)
        np.testing.assert_allclose(mine, theirs, atol=0.1)


def test_new_checkpoints_make_other_classes_and_it_is_said(text_corpus, run, caplog):
    dynamics(**compose_dynamics(run, text_corpus.folder))
    assert "has classes already" not in caplog.text
    (run / "dynamics" / "c" / "losses-000000000000768.json").unlink()
    dynamics(**compose_dynamics(run, text_corpus.folder))
    assert "has classes already: with more checkpoints they are others" in caplog.text


def test_words_of_a_run_become_a_tree():
    flat = {"seed": 1, "selection._target_": "x", "selection.select_ratio.points": [[0, 1]]}
    expected = {"_target_": "x", "select_ratio": {"points": [[0, 1]]}}
    assert nested(flat, "selection.") == expected


# ---- what is refused ------------------------------------------------------------------------


def test_too_few_checkpoints(text_corpus, run):
    for path in sorted((run / "checkpoints").glob("step-*"))[4:]:  # two are left, with their .json
        path.unlink()
    with pytest.raises(UserError, match="none of the 1 runs has 3 checkpoints: train with"):
        dynamics(**compose_dynamics(run, text_corpus.folder))


def test_a_checkpoint_that_a_live_run_removed_is_passed_over(text_corpus, run, monkeypatch, caplog):
    first = run / "checkpoints" / "step-00000002.ckpt"

    def load(path: Path, corpus: Any) -> Any:
        second = first.with_name("step-00000004.ckpt")
        if path == first:
            second.unlink()
            sidecar(second).unlink()
        return load_checkpoint(path, corpus)

    monkeypatch.setattr("slm.dynamics.command.load_checkpoint", load)
    dynamics(**compose_dynamics(run, text_corpus.folder))
    assert "step-00000004.ckpt is gone" in caplog.text
    assert not TrajectoryStore(run / "dynamics" / "c").has(512)


def test_a_damaged_checkpoint_is_named(text_corpus, run):
    path = run / "checkpoints" / "step-00000004.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000004.ckpt is damaged: sha256"):
        dynamics(**compose_dynamics(run, text_corpus.folder))


def test_another_tokenizer_is_refused(tmp_path, text_corpus, make_corpus, run, monkeypatch):
    other = make_corpus(tmp_path / "other", [np.arange(161) % 290], 16)
    tokenizer = train_tokenizer(["another text"], 258)
    tokenizer.save_pretrained(other.tokenizer_folder)
    sha256 = tokenizer_sha256(tokenizer)
    plan = read_json(other.folder / "plan.json") | {"tokenizer_sha256": sha256}
    write_json(other.folder / "plan.json", plan)
    write_manifest(other.folder, "tokens", 1)
    message = rf"has tokenizer \w+, {other.folder} has {sha256}"
    with pytest.raises(UserError, match=message):
        dynamics(**compose_dynamics(run, other.folder))
    config = compose_train(tmp_path / "new", text_corpus.folder, *during(other))
    with pytest.raises(UserError, match=f"has tokenizer {sha256}, the training corpus"):
        train(config)


def test_another_token_set_under_the_same_name_is_refused(text_corpus, run):
    dynamics(**compose_dynamics(run, text_corpus.folder))
    with pytest.raises(
        UserError,
        match="holds other losses: num_windows is 7 in plan.json, 13 now; choose another name",
    ):
        dynamics(**compose_dynamics(run, text_corpus.folder, "num_targets=200"))
    with pytest.raises(UserError, match="windows_sha256 is"):
        dynamics(**compose_dynamics(run, text_corpus.folder, "seed=1"))


def test_longer_windows_than_the_model_has_positions(tmp_path, text_corpus, make_corpus, run):
    other = make_corpus(tmp_path / "long", [np.arange(8193) % 290], 4096)
    with pytest.raises(UserError, match="seq_len is 4096, model max_position_embeddings is 2048"):
        dynamics(**compose_dynamics(run, other.folder))
    with pytest.raises(UserError, match="seq_len is 4096, model max_position_embeddings is 2048"):
        train(compose_train(tmp_path / "new", text_corpus.folder, *during(other)))


def test_a_record_without_its_tokens_seen_is_damaged(text_corpus, run):
    record = run / "checkpoints" / "step-00000004.ckpt.json"
    found = json.loads(record.read_text())
    del found["tokens_seen"], found["seal"]
    record.write_text(json.dumps(found))
    with pytest.raises(UserError, match="is damaged: it has no .tokens_seen"):
        dynamics(**compose_dynamics(run, text_corpus.folder))


def test_an_empty_folder_is_no_run(tmp_path, text_corpus):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        dynamics(**compose_dynamics(tmp_path / "empty", text_corpus.folder))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_targets=0", "num_targets is 0, it must be a whole number of at least 1"),
        ("threshold=-1", "threshold is -1, it must be a number of at least 0"),
        ("mean_loss=nan", "mean_loss is nan, it must be a number, or null"),
        ("threshold=true", "threshold is True, it must be a number of at least 0"),
        ("mean_loss=high", "mean_loss is 'high', it must be a number, or null"),
        ("name=a/b", "name is 'a/b', it must be one name"),
        ("name=..", "name is '..', it must be one name"),
        ("name=2024", "name is 2024, it must be one name"),
        ("dtype=float16", "dtype is 'float16', it must be one of"),
        ("device=tpu9", "device is 'tpu9', and PyTorch finds none of that name here: cpu"),
        ("combine=mean", r"combine is 'mean' for 0 reference\(s\); it is one of"),
    ],
)
def test_bad_settings(text_corpus, run, override, message):
    with pytest.raises(UserError, match=message):
        dynamics(**compose_dynamics(run, text_corpus.folder, override))


def test_the_command_prints_a_table(text_corpus, run, monkeypatch, call):
    monkeypatch.setenv("COLUMNS", "120")
    words = [f"runs='{run}'", f"corpus='{text_corpus.folder}'", *SETTINGS]
    code, out, err = call(main, *words)
    assert code == 0 and str(run / "dynamics" / "c") in err
    for text in ("H\u2192H", "L\u2192H", "H\u2192L", "L\u2192L", "share", "95%"):
        assert text in out


# ---- slm verify -----------------------------------------------------------------------------


def test_every_flipped_byte_of_the_store_is_found(run):
    folder = run / "dynamics" / "tokens"
    [(path, whole, text)] = list(verify(folder))
    assert (path, whole) == (folder, True)
    assert text == "token losses, 112 tokens at 7 checkpoints"
    for item in sorted(folder.iterdir()):
        if item.name in (
            "trajectories.npy",
            "classes.csv",
            "classes.json",
        ):  # made anew from the others
            continue
        before = item.read_bytes()
        after = bytearray(before)
        after[len(after) // 2] ^= 1
        item.write_bytes(after)
        [(_, whole, text)] = list(verify(folder))
        assert not whole and str(folder) in text, item
        item.unlink()
        if item.suffix == ".npy" or item.name in ("manifest.json", "plan.json"):
            [(_, whole, _)] = list(verify(folder))
            assert not whole, item
        item.write_bytes(before)


def test_a_run_is_verified_with_its_store(run):
    found = {path.name: whole for path, whole, _ in verify(run)}
    assert found["tokens"] and found["model"] and found["run"]


# ---- W&B and two processes ------------------------------------------------------------------


def test_wandb_has_what_the_store_has(tmp_path, text_corpus, make_references):
    scores = [np.full(len(text_corpus.column("tokens", i)), -2.0) for i in range(2)]
    references = f"'{make_references(tmp_path / 'r', text_corpus, scores).folder}'"
    words = ["selection=excess", "selection.select_ratio=0.3", f"data.references={references}"]
    words += during(text_corpus, f"callbacks.dynamics.references={references}")
    train(compose_train(tmp_path / "run", text_corpus.folder, *words, "logger=default"))
    store = TrajectoryStore(tmp_path / "run" / "dynamics" / "tokens")
    found = analyse(store, "run")
    history = wandb_history(tmp_path / "run")
    rows = {row["data/tokens_seen"]: row for row in history if "dynamics/loss" in row}
    assert list(rows) == found.tokens_seen.tolist()
    assert found.kept is not None
    for index, row in enumerate(rows.values()):
        assert row["dynamics/loss"] == pytest.approx(found.mean_losses[index])
        assert row["dynamics/loss_selected"] == pytest.approx(found.kept.loss_selected[index])
        for number, name in enumerate(CLASSES):
            if index < 2:
                assert f"dynamics/share/{name}" not in row
                continue
            share = found.share_history[index, number]
            assert row[f"dynamics/share/{name}"] == pytest.approx(share)
    last = [row for row in history if "dynamics/by_class/path" in row]
    assert len(last) == 1
    table = json.loads(media_file(tmp_path / "run", last[0], "dynamics/by_class"))
    assert len(table["data"]) == 7 * 4
    histograms = [row for row in history if "dynamics/excess_loss/values" in row]
    assert len(histograms) == 7
    assert sum(histograms[0]["dynamics/excess_loss/values"]) == 112
    with open(tmp_path / "run" / "dynamics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [float(row["dynamics/loss"]) for row in logged] == pytest.approx(found.mean_losses)


@pytest.mark.slow
def test_two_processes_leave_the_store_of_one(tmp_path, text_corpus):
    words = during(text_corpus, "data.micro_batch_size=2", "optimizer.adamw.lr=1e-4")
    words += ["max_tokens=768", "model.architecture.attention_dropout=0"]
    train(compose_train(tmp_path / "one", text_corpus.folder, *words))
    line = command(tmp_path / "two", text_corpus.folder, "data.heldout_windows=6", *words)
    codes, said = warm.run_ranks(2, [*line, *TWO_RANKS])
    assert codes == [0, 0], said
    one, two = (TrajectoryStore(tmp_path / name / "dynamics" / "tokens") for name in ("one", "two"))
    assert [c.tokens_seen for c in one.checkpoints] == [c.tokens_seen for c in two.checkpoints]
    for mine, theirs in zip(one.losses(), two.losses(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
    np.testing.assert_allclose(one.losses()[0], two.losses()[0], rtol=1e-5)
    assert not np.array_equal(one.losses()[0], one.losses()[-1])
