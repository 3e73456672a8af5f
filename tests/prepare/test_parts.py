"""Parts and their join: the bytes of one process in one unit, whoever makes what and is killed.

Of slm.prepare.parts, slm.prepare.join, slm.prepare.work and slm.prepare.vocabulary.
"""

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import warm
from slm.errors import UserError
from slm.prepare import join, parts, scan, vocabulary, work
from slm.prepare.command import prepare
from slm.store.claims import claim
from slm.store.files import ArrayWriter, read_json
from slm.store.shards import Corpus
from text_helpers import files, quote, write_records

UNIT_BYTES = 3000
WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, bytes_folder) -> dict[str, Any]:
    """Copies, by length too, both sides, masks, weights, labels, excluded and bad records."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(1)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))

    rows = [{"text": text()} for _ in range(60)]
    evaluation = " ".join(rng.choices(WORDS, k=15))
    for i in (7, 30, 55):
        rows[i] = {"text": f"{text()} {evaluation}"}
    rows[20], rows[41] = {"text": "a\0b"}, {"texts": "misspelt"}
    plain = write_records(folder / "plain.jsonl", *rows)
    asked = [{"q": text(), "a": text(), "w": i / 8} for i in range(40)]
    answers = write_records(folder / "qa.jsonl", *asked)
    (folder / "prose.txt").write_text("\n".join(text() for _ in range(40)))
    return {
        "sources": [
            {"path": str(plain), "weight": 2.5, "name": "more"},
            {"path": str(answers), "prompt": "{q}", "text": "{a}", "token_weight": "w"}
            | {"min_tokens": 110, "weight_long": {"over": 190, "times": 1.5}},
            {"path": str(folder / "prose.txt"), "document": "line"},
            {"path": str(plain), "noise": 0.2},
        ],
        "exclude": [str(write_records(folder / "e.jsonl", {"text": evaluation}))],
        "tokenizer": {"path": bytes_folder},
        "on_bad_record": "skip",
        "heldout_ratio": 0.2,
        "seq_len": 16,
        "shard_tokens": 3000,
        "num_proc": 1,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> dict[str, bytes]:
    """The files of one unit."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = prepare(out=out, **settings).report
    assert report["bad_records"]["skipped"] == 4 and report["train"]["shards"] > 3
    assert report["excluded"]["e"]["documents_dropped"] == 6
    assert report["short_documents"]["qa"]["documents"] > 5
    answers = report["train"]["sources"]["qa"]
    assert 0 < answers["long_documents"] < answers["documents"]
    return files(out)


@pytest.fixture(autouse=True)
def small_units(request, monkeypatch):
    if "whole" in request.fixturenames:
        request.getfixturevalue("whole")  # before units are small
    monkeypatch.setattr(scan, "UNIT_BYTES", UNIT_BYTES)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The parts that are made here."""
    indices, write_part = [], parts.write_part

    def count(work, index, *rest):
        write_part(work, index, *rest)
        indices.append(index)

    monkeypatch.setattr(parts, "write_part", count)
    return indices


def interrupted(monkeypatch, after: int, **given) -> None:
    """Ctrl-C in the midst of a part; SIGKILL of a process is in test_command.py."""
    write_part = parts.write_part

    def stop(work, index, *rest):
        if index >= after:
            raise KeyboardInterrupt
        write_part(work, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "write_part", stop)
        prepare(**given)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_joined_parts_are_the_one_unit(tmp_path, settings, whole, made, num_proc):
    prepare(out=tmp_path / "out", **settings | {"num_proc": num_proc})
    assert len(made) > 8 and made == list(range(len(made)))
    assert files(tmp_path / "out") == whole
    columns = Corpus.open(tmp_path / "out" / "train", check="full").shards[0].dtype
    assert {"masks", "signal", "weights"} < set(columns)


def test_an_interrupted_run_goes_on(tmp_path, settings, whole, made, monkeypatch):
    interrupted(monkeypatch, 4, out=tmp_path / "out", **settings)
    assert made == list(range(4)) and not (tmp_path / "out" / "train").exists()
    shown: list[int] = []

    def note(total: int, done: int):
        shown.append(done)
        return show_progress(total, done)

    show_progress = parts.show_progress
    monkeypatch.setattr(parts, "show_progress", note)
    prepare(out=tmp_path / "out", **settings)
    assert made == list(range(len(made))) and len(made) > 8
    sizes = [Path(source["path"]).stat().st_size for source in settings["sources"]]
    assert 0 < shown[0] < 3 * sizes[0] + sum(sizes[1:])
    assert files(tmp_path / "out") == whole


def test_a_kill_while_parts_are_joined_costs_the_shards_that_were_begun(
    tmp_path, settings, whole, made, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(join, "make_report", stop)
        prepare(out=tmp_path / "out", **settings)
    count, train = len(made), tmp_path / "out" / "train"
    last = len([*train.glob("tokens-*.json")]) - 1
    for number in (1, last):
        (train / f"tokens-{number:05d}.json").unlink()
        (train / f"documents-{number:05d}.npy").unlink()
    written, write_shard = [], join.Joined.write_shard

    def note(self, side, number, advance):
        written.append((side, number))
        write_shard(self, side, number, advance)

    monkeypatch.setattr(join.Joined, "write_shard", note)
    prepare(out=tmp_path / "out", **settings)
    assert len(made) == count and last > 2
    assert written == [(0, 1), (0, last)]  # each by itself, as it is among all
    assert files(tmp_path / "out") == whole


def test_a_tokenizer_is_trained_once(tmp_path, settings, made, monkeypatch):
    given = settings | {"tokenizer": {"vocab_size": 300, "train_mb": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(scan, "UNIT_BYTES", 10**9)
        prepare(out=tmp_path / "whole", **given)
    interrupted(monkeypatch, 2, out=tmp_path / "out", **given)
    monkeypatch.setattr(vocabulary, "train_tokenizer", None)
    prepare(out=tmp_path / "out", **given)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# Counts the parts that each process makes, in one file. Neither ends its first part before the
# other has one in hand: a process that began sooner would else make all of them alone.
COUNTING = f"""
import os, time
from slm.prepare import parts, scan
scan.UNIT_BYTES, write_part = {UNIT_BYTES}, parts.write_part
def count(work, index, *rest):
    folder, end = work.out.parent, time.monotonic() + 50
    (folder / f"begun-{{os.getpid()}}").touch()
    while len([*folder.glob("begun-*")]) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    write_part(work, index, *rest)
    with open(folder / "made", "a") as file:
        print(index, os.getpid(), file=file)
parts.write_part = count
"""


def test_two_processes_share_a_folder(tmp_path, settings, whole):
    simple = {key: settings[key] for key in settings if key not in ("sources", "tokenizer")}
    words = [f"{key}={json.dumps(value)}" for key, value in simple.items()]
    words += [f"sources=[{', '.join(map(quote, settings['sources']))}]", "out=out"]
    words += [f"tokenizer.path={settings['tokenizer']['path']}"]
    command = [sys.executable, "-m", "slm.prepare", *words]
    options: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    both = [warm.Popen(command, after=COUNTING, **options) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "out/train: " in said or "out is finished" in said  # none ends without a word
    rows = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(int(index) for index, _ in rows) == list(range(len(rows)))  # each once
    assert len({pid for _, pid in rows}) == 2
    assert files(tmp_path / "out") == whole


def test_a_file_that_changed_before_it_goes_on_is_named(
    tmp_path, settings, whole, made, monkeypatch
):
    interrupted(monkeypatch, 3, out=tmp_path / "out", **settings)
    path = Path(settings["sources"][2]["path"])
    before = path.read_text()
    path.write_text(before.replace("word1", "word2", 1))
    try:
        with pytest.raises(UserError, match=f"^{path} has changed since the run began: .* then, "):
            prepare(out=tmp_path / "out", **settings)
    finally:
        path.write_text(before)
    prepare(out=tmp_path / "out", **settings)
    assert made == list(range(len(made)))  # none of the first again
    assert files(tmp_path / "out") == whole


def test_a_file_that_changes_in_the_middle_ends_the_run(tmp_path, settings, monkeypatch):
    path = write_records(tmp_path / "a.jsonl", *({"text": f"word{i}"} for i in range(400)))
    write_part = parts.write_part

    def change(work, index, *rest):
        write_part(work, index, *rest)
        if index == 1:
            path.write_text(path.read_text().replace("word399", "word390"))

    monkeypatch.setattr(parts, "write_part", change)
    with pytest.raises(UserError, match="a.jsonl has changed since the run began"):
        prepare(out=tmp_path / "out", **settings | {"sources": [str(path)]})
    assert not (tmp_path / "out").exists()


def bad_at_the_end(folder: Path) -> dict[str, Any]:
    rows = [{"text": f"some words and {i}"} for i in range(200)]
    late = write_records(folder / "late.jsonl", *rows, {"text": "a\0b"})
    return {"sources": [str(late)], "on_bad_record": "stop"}


def test_a_full_disk_keeps_the_parts_and_a_bad_record_does_not(
    tmp_path, settings, whole, made, monkeypatch
):
    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "finish", full)  # as they are joined
        with pytest.raises(UserError, match="out cannot be written: .*No space left"):
            prepare(out=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "train").exists()
    count = len(made)
    prepare(out=tmp_path / "out", **settings)
    assert len(made) == count and files(tmp_path / "out") == whole
    with pytest.raises(UserError, match="late.jsonl, line 201: field 'text' contains NUL"):
        prepare(out=tmp_path / "bad", **settings | bad_at_the_end(tmp_path))
    assert len(made) > count and not (tmp_path / "bad").exists()


def test_who_fails_leaves_alone_what_others_work_on(tmp_path, settings, monkeypatch):
    given, folder = settings | bad_at_the_end(tmp_path), tmp_path / "out" / work.PARTS
    encoder, others = work.Work.chosen_encoder, ExitStack()

    def others_come(self):
        assert others.enter_context(claim(folder / "elsewhere.process")) is not None
        return encoder(self)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="line 201"):
        patch.setattr(work.Work, "chosen_encoder", others_come)
        prepare(out=tmp_path / "out", **given)
    assert (folder / "part-00000.json").exists() and (tmp_path / "out" / "plan.json").exists()
    others.close()
    with pytest.raises(UserError, match="line 201"):
        prepare(out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_report_names_every_encoder(tmp_path, settings, monkeypatch):
    interrupted(monkeypatch, 3, out=tmp_path / "out", **settings)
    record = read_json(tmp_path / "out" / work.PARTS / "part-00000.json")
    assert record["encoder"].startswith("tokenizers ")
    monkeypatch.setattr(parts, "encoder_name", lambda state: "another 1.0")
    report = prepare(out=tmp_path / "out", **settings).report
    assert report["encoder"] == f"another 1.0, {record['encoder']}"


def test_a_part_of_one_that_wakes_up_too_late_is_not_kept(
    tmp_path, settings, whole, made, monkeypatch, caplog
):
    """Its claim is gone before any of its files has its name; the part is made again."""
    finish, lost = parts.PartWriter.close, []

    def late(self: parts.PartWriter) -> Any:
        if not lost:
            lost.append(parts.part_path(self.work.parts, self.index, ".claim"))
            lost[0].unlink()
        return finish(self)

    monkeypatch.setattr(parts.PartWriter, "close", late)
    prepare(out=tmp_path / "out", **settings)
    assert f"has lost {lost[0]} to nobody" in caplog.text
    assert made[-1] == 0 and sorted(made) == list(range(len(made)))
    assert files(tmp_path / "out") == whole
