import os
from dataclasses import replace

from slm.prepare.settings import count_workers, input_bytes
from text_helpers import source, write_records


def test_processes_are_as_many_as_the_bytes_need(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    path = write_records(tmp_path / "a.jsonl", {"text": "x" * 5_000_000})
    one, packed = source(path), tmp_path / "b.jsonl.gz"
    size = path.stat().st_size
    assert input_bytes([one, replace(one, weight=2.5)]) == 4 * size
    assert [count_workers([one] * n) for n in (1, 3, 100)] == [2, 4, 64]
    packed.write_bytes(b"")
    assert input_bytes([one, source(packed)]) is None
    assert count_workers([source(packed)]) == 64
