"""Runs one after the other: a chain is what one run would be; what does not fit is said first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import warm
from run_helpers import TINY_MODEL, composed, train
from slm.errors import UserError
from slm.store.files import read_json
from slm.train.stages import check_ranks
from train_helpers import TWO_RANKS, command, compose_train, crash_at, rows

STEP = 8 * 16  # tokens


@pytest.fixture
def corpus(tmp_path, make_corpus) -> Any:
    """Windows that are all alike: in whatever order they come, a run sees the same batches."""
    return make_corpus(tmp_path / "corpus", [np.arange(40 * 16 + 1) % 16 + 7], 16)


def stages(*made: dict[str, Any]) -> str:
    return f"stages={json.dumps(list(made)).replace(chr(34), '')}"


def settings(out: Path, corpus: Any, *words: str) -> Any:
    """Twelve steps on all tokens, without dropout: nothing depends on the order of windows."""
    plain = ("selection=all", "model.architecture.attention_dropout=0.0")
    return compose_train(out, corpus.folder, *plain, *words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


FIRST = {"name": "first", "until_tokens": 5 * STEP}
REST = {"name": "rest", "until_tokens": 12 * STEP}


def test_a_schedule_that_goes_through_is_one_run(tmp_path, corpus, monkeypatch):
    """Killed in its second stage, too; a stage that starts its schedule anew is another run."""
    whole, chain, again = (tmp_path / name for name in ("whole", "chain", "again"))
    train(settings(whole, corpus))
    through = stages(FIRST, REST | {"schedule": "through"})
    crash_at(monkeypatch, 6)  # of the second stage's seven
    with pytest.raises(RuntimeError, match="crash"):
        train(settings(chain, corpus, through))
    assert (chain / "1-first" / "model").exists() and not (chain / "stages.json").exists()
    crash_at(monkeypatch, None)
    train(settings(chain, corpus, through))
    assert same(whole, chain / "2-rest")
    rates = [row["train/lr"] for row in rows(whole / "train.csv")]
    parts = [rows(chain / name / "train.csv") for name in ("1-first", "2-rest")]
    assert [row["train/lr"] for part in parts for row in part] == rates
    (first, last) = read_json(chain / "stages.json")["stages"]
    assert (first["from_tokens"], first["until_tokens"]) == (0, 5 * STEP)
    assert (last["from_tokens"], last["until_tokens"]) == (5 * STEP, 12 * STEP)
    assert last["heldout"] == {"held": float(rows(whole / "heldout.csv")[-1]["heldout/held/loss"])}
    train(settings(again, corpus, stages(FIRST, REST | {"lr": 0.001})))
    assert same(chain / "1-first", again / "1-first") is False  # its schedule ends at its own end
    assert read_json(again / "2-rest" / "run.json")["optimizer.adamw.lr"] == 0.001


def test_a_stage_may_have_other_data_and_another_base(
    tmp_path, corpus, make_corpus, capsys, monkeypatch
):
    longer = make_corpus(tmp_path / "longer", [np.arange(10 * 64 + 1) % 64 + 7], 64)
    second = {
        "name": "long",
        "until_tokens": 12 * STEP,
        "seq_len": 64,
        "data": {"corpus": str(longer.folder), "batch_size": 4},
        "model": {"override": {"rope_theta": 250000, "max_position_embeddings": 64}},
    }
    out = tmp_path / "out"
    architecture = "model.architecture.max_position_embeddings=16"
    monkeypatch.setenv("COLUMNS", "150")
    held = {"data": second["data"] | {"heldout": {"held": str(longer.folder)}}}
    train(settings(out, corpus, architecture, stages(FIRST, second | held)))
    said = capsys.readouterr().out
    assert "held, windows of 16" in said and "held, windows of 64" in said
    found = [row["heldout_seq_len"] for row in read_json(out / "stages.json")["stages"]]
    assert found == [{"held": 16}, {"held": 64}]
    config = read_json(out / "2-long" / "model" / "config.json")
    assert config["max_position_embeddings"] == 64
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 250000
    assert read_json(out / "2-long" / "run.json")["corpus"] == longer.fingerprint
    del second["model"]
    message = (
        f"^stage long: data {longer.folder} seq_len is 64, model max_position_embeddings is 16: "
        "model: {override: {max_position_embeddings: 64}} in the stage has as many$"
    )
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path / "other", corpus, architecture, stages(FIRST, second)))
    del second["data"], second["seq_len"]
    held = second | {"data": {"heldout": {"far": str(longer.folder)}}}
    with pytest.raises(UserError, match=f"^stage long: far {longer.folder} seq_len is 64, model"):
        train(settings(tmp_path / "other", corpus, architecture, stages(FIRST, held)))
    config = settings(tmp_path / "other", corpus, stages(FIRST, held))
    config.model.architecture, config.model.init_from = None, str(out / "1-first" / "model")
    with pytest.raises(UserError, match="^stage long: far .* is 64, model .* is 16: "):
        train(config)
    assert not (tmp_path / "other" / "1-first").exists()  # said before the first stage began


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"until_tokens": 5 * STEP}, r"stages\[1\] \(rest\) ends at until_tokens=640, before it"),
        ({"name": "first"}, r"stages\[1\].name is 'first': names are different"),
        ({"name": "a/b"}, r"stages\[1\].name is 'a/b'"),
        ({"until_tokens": 13 * STEP}, r"max_tokens is 1536, and the last .* \(rest\) ends at 1664"),
        ({"seq_len": 32}, "stage rest has seq_len 32, and .*corpus was prepared with 16"),
        ({"schedule": "again"}, r"stages\[1\].schedule is 'again', it must be one of"),
        ({"rate": 1}, r"stages\[1\].rate is given, and nothing reads it"),
        ({"data": {"corpus": "nowhere"}}, "nowhere is not a finished corpus"),
        ({"data": {"batch": 3}}, "data.batch is given, and nothing reads it"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_stage(tmp_path, corpus, change, message):
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path / "out", corpus, stages(FIRST, REST | change)))
    assert not (tmp_path / "out" / "1-first").exists()


def test_the_first_stage_has_nothing_to_go_on_from(tmp_path, corpus):
    wrong = stages(FIRST | {"schedule": "through"}, REST)
    with pytest.raises(UserError, match=r"stages\[0\].schedule is 'through', and there is no"):
        train(settings(tmp_path / "out", corpus, wrong))


def test_phi4_has_the_numbers_of_its_report_and_runs_scaled_down(
    tmp_path, make_corpus, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = composed("train", "experiment=phi4", "out=run", "run_dir=run")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    first, second = plain["stages"]
    assert first["until_tokens"] == pytest.approx(10e12, rel=1e-6)
    assert second["until_tokens"] - first["until_tokens"] == pytest.approx(250e9, rel=1e-3)
    shares = [part["share"] for part in first["data"]["mixture"].values()]
    assert shares == [0.15, 0.15, 0.4, 0.2, 0.1]
    recall = [part["share"] / 0.7 for part in second["data"]["mixture"].values()][1:]
    assert recall == pytest.approx(shares)
    assert plain["data"]["batch_size"] * 4096 == second["data"]["batch_size"] * 16384
    small = ["logger=csv", "max_tokens=8_200", "data.batch_size=32", *TINY_MODEL]
    config = composed("train", "experiment=phi4", "out=run", "run_dir=run", *small)
    for stage, length in zip(config.stages, (16, 64), strict=True):
        stage.seq_len = length
        for name, part in stage.data.mixture.items():
            ids = [np.arange(20 * length + 1) % 97 + len(name)]
            make_corpus(tmp_path / part.corpus, ids, length)
    config.stages[1].data.batch_size = 3
    folder = train(config)
    assert folder.resolve() == tmp_path / "run" / "2-midtraining" / "model"
    assert (tmp_path / "run" / "2-midtraining" / "mixture.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["through", "restart"])
def test_a_chain_on_two_ranks_is_that_of_one_process(tmp_path, text_corpus, schedule):
    """torchrun starts the ranks once for all stages."""
    chain = stages(FIRST, REST | {"schedule": schedule, "model": {"override": {"rope_theta": 5e4}}})
    words = ("selection=loss", "model.architecture.attention_dropout=0.0", "max_tokens=1536", chain)
    lines = {n: command(tmp_path / n, text_corpus.folder, *words) for n in ("one", "two")}
    warm.run(lines["one"], check=True)
    codes, said = warm.run_ranks(2, [*lines["two"], *TWO_RANKS])
    assert codes == [0, 0], said
    assert said.count("stage 2 of 2, rest") == 1
    for stage in ("1-first", "2-rest"):
        one, two = (weights(tmp_path / name / stage) for name in ("one", "two"))
        assert all((one[name] - two[name]).abs().max() <= 1e-5 for name in one)
        kept = [rows(tmp_path / name / stage / "train.csv") for name in ("one", "two")]
        for left, right in zip(*kept, strict=True):
            assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), rel=1e-5)
    tables = [read_json(tmp_path / name / "stages.json")["stages"] for name in ("one", "two")]
    assert [row["until_tokens"] for row in tables[1]] == [5 * STEP, 12 * STEP]
    assert tables[0][1]["heldout"]["held"] == pytest.approx(tables[1][1]["heldout"]["held"], 1e-5)
    codes, said = warm.run_ranks(2, [*lines["two"], *TWO_RANKS])  # all of it is complete
    assert codes == [0, 0] and "2-rest is complete already" in said, said


@pytest.mark.parametrize(("devices", "gpus", "count"), [(2, 0, 2), ("auto", 4, 4), (-1, 3, 3)])
def test_several_devices_are_torchruns_to_start(monkeypatch, devices, gpus, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    trainer = {"devices": devices, "num_nodes": 1, "accelerator": "auto"}
    with pytest.raises(UserError, match=f"^trainer.devices is .*, which are {count} here"):
        check_ranks(trainer)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_ranks(trainer | {"devices": "auto"})
