"""Hashes and cuts that several processes share: those of one that looked at each file itself."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from slm.errors import UserError
from slm.prepare import scan, shared_scans
from slm.prepare.command import prepare
from slm.prepare.shared_scans import SCANS, share_scans
from slm.prepare.sources import parse_sources
from text_helpers import files, write_records


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scan, "UNIT_BYTES", 300)
    monkeypatch.setattr(shared_scans, "GROUP_BYTES", 700)


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    rows = [[{"text": f"{i}-{j} " + "word " * (j % 7)} for j in range(30)] for i in range(6)]
    return [write_records(tmp_path / f"{i}.jsonl", *some) for i, some in enumerate(rows)]


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    names, look = [], scan.scan_file

    def counted(file, cut_at):
        names.append(Path(file).name)
        return look(file, cut_at)

    monkeypatch.setattr(scan, "scan_file", counted)
    return names


def sources_of(texts: list[Path]):
    """One source of all, and some of them again, which may not be cut."""
    again = [{"path": str(path), "noise": 0.2, "name": f"n{path.stem}"} for path in texts[:2]]
    return parse_sources([str(texts[0].parent), *again], "sources")


def test_several_processes_look_at_each_file_once(tmp_path, texts, looked_at):
    out, tasks = tmp_path / "out", [sources_of(texts) for _ in range(4)]
    alone = [dict(source.scans) for source in sources_of(texts)]
    del looked_at[:]
    threads = [threading.Thread(target=share_scans, args=(out, task)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(looked_at) == sorted([path.name for path in [*texts, *texts[:2]]])
    for task in tasks:
        assert [source.scans for source in task] == alone
    first = alone[0][str(texts[0])]
    assert first.sha256 == hashlib.sha256(texts[0].read_bytes()).hexdigest()
    assert first.cuts and not alone[1][str(texts[0])].cuts


def test_one_that_was_killed_costs_its_group(tmp_path, texts, looked_at, monkeypatch):
    """What the others of a run, or an interrupted run, have seen is not read again."""
    out = tmp_path / "out"
    share_scans(out, sources_of(texts))
    made = sorted((out / SCANS).glob("*.json"))
    made[1].unlink()
    made[1].with_suffix(".claim").write_text("of a process that is gone")
    os.utime(made[1].with_suffix(".claim"), (0, 0))
    before = len(looked_at)
    share_scans(out, sources_of(texts))
    assert 0 < len(looked_at) - before < before
    assert sorted((out / SCANS).glob("*")) == made


def test_a_file_that_was_written_since_is_read(tmp_path, texts):
    out = tmp_path / "out"
    share_scans(out, sources_of(texts))
    texts[5].write_bytes(texts[5].read_bytes().replace(b"word", b"WORD"))
    sources = sources_of(texts)
    share_scans(out, sources)
    seen = sources[0].scans[str(texts[5])]
    assert seen.sha256 == hashlib.sha256(texts[5].read_bytes()).hexdigest()


def test_damage_is_said(tmp_path, texts):
    out = tmp_path / "out"
    share_scans(out, sources_of(texts))
    for path in (out / SCANS).glob("*.json"):
        path.write_text(path.read_text().replace('"sha256"', '"sha25"', 1).replace("0", "1", 3))
    with pytest.raises(UserError, match=r"\.scans/.* is damaged or was edited"):
        share_scans(out, sources_of(texts))


def test_little_input_leaves_nothing(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(scan, "UNIT_BYTES", 10**6)
    share_scans(tmp_path / "out", sources_of(texts))
    assert not (tmp_path / "out").exists()


def test_a_prepared_corpus_has_none(tmp_path, texts, bytes_folder, looked_at, monkeypatch):
    """Of several units; and the same run again, which has nothing to do."""
    given: dict[str, Any] = {"tokenizer": {"path": bytes_folder}, "seq_len": 16, "num_proc": 1}
    given |= {"heldout_ratio": 0.0, "sources": [str(path) for path in texts]}
    prepare(out=tmp_path / "out", **given)
    assert len(looked_at) == len(texts)
    prepare(out=tmp_path / "out", **given)
    assert not (tmp_path / "out" / SCANS).exists()
    monkeypatch.setattr(scan, "UNIT_BYTES", 10**6)
    prepare(out=tmp_path / "whole", **given)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_that_cannot_be_read_leaves_the_folder_as_it_was(tmp_path, texts, bytes_folder):
    texts[3].write_bytes(b"\xff\xfe")
    out, tokenizer = tmp_path / "out", {"path": bytes_folder}
    with pytest.raises(UserError):
        prepare(texts, out, seq_len=16, num_proc=1, heldout_ratio=0.0, tokenizer=tokenizer)
    assert not out.exists()
