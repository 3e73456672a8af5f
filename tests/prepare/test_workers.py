"""Shards of one side by hand; results in order; what the hash of a document decides."""

import json
import pickle
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import warm
from slm.prepare.documents import Block
from slm.prepare.encoder import EncoderState, encoder_state
from slm.prepare.readers import BLOCK_BYTES, read_blocks
from slm.prepare.shard_writer import ShardWriter
from slm.prepare.sources import parse_sources
from slm.prepare.tally import Tally
from slm.prepare.workers import Job, group_blocks, is_kept, side_of, worker_pool, written
from slm.store.shards import BY_NEED
from slm.store.sidecars import read_sidecars
from slm.store.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def state() -> EncoderState:
    """A tokenizer without merges: every byte is a token."""
    return encoder_state(train_tokenizer(["a"], 258))


def make_job(state: EncoderState, path: Path, *lines: str, **settings) -> Job:
    path.write_text("".join(f"{line}\n" for line in lines))
    entry = {"path": str(path), "document": "line"} | settings
    return Job(parse_sources([entry], "sources"), state, None, 0.0, False, 2**20)


@pytest.mark.parametrize("by_need", [(), ("masks",), ("signal", "weights"), tuple(BY_NEED)])
@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("shard_tokens", [5, 9, 13, 1000])
def test_rows_and_bytes_of_long_and_short_documents(tmp_path, state, shard_tokens, step, by_need):
    lengths = np.array([38, 2, 5, 16, 13])  # EOS included
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(starts[-1], dtype=np.uint16)
    stream = {"tokens": tokens, "bytes": (tokens % 3).astype(np.uint8)}
    stream |= {name: (tokens % 5 > 1).astype(BY_NEED[name]) for name in by_need}
    rows = np.column_stack([lengths, np.zeros(5, int), np.arange(5)])
    with ShardWriter(tmp_path, 4, shard_tokens, state, by_need) as writer:
        for first in range(0, 5, step):
            last = min(5, first + step)
            span = slice(starts[first], starts[last])
            writer.add({name: c[span] for name, c in stream.items()}, rows[first:last])
        dropped = writer.finish()
    done = 0
    shards = read_sidecars(tmp_path, "tokens")
    assert len(shards) == writer.num_shards
    for shard in shards:
        assert shard.num_tokens % 4 == 1
        end = done + shard.num_tokens
        expected = [
            [start - done, 0, record, max(0, done - start)]
            for record, start in enumerate(starts[:-1])
            if start < end and starts[record + 1] > done
        ]
        assert set(shard.sha256) == {*stream, "documents"}
        columns = {c: np.load(shard.path(tmp_path, c)) for c in shard.sha256}
        assert columns.pop("documents").tolist() == expected
        for name, column in columns.items():
            assert column.dtype == stream[name].dtype
            assert column.tolist() == stream[name][done:end].tolist()
        done = end
    assert len(tokens) - done == dropped < 4 + 1


def test_a_side_shorter_than_a_window_has_no_shard(tmp_path, state):
    with ShardWriter(tmp_path, 4, 9, state) as writer:
        columns = {"tokens": np.zeros(4, np.uint16), "bytes": np.zeros(4, np.uint8)}
        writer.add(columns, np.array([[4, 0, 0]]))
        assert (writer.finish(), writer.num_shards) == (4, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_decides():
    assert side_of(b"\xff" * 16, 1) == 1
    assert side_of(b"\x00" * 16, 0) == 0
    assert side_of(b"\x80" + b"\x00" * 15, 0.5) == 0
    assert is_kept(b"\xff" * 16, 1)
    assert not is_kept(b"\x00" * 16, 0)
    assert is_kept(b"\xff" * 8 + b"\x00" * 8, 0.5)


def test_small_blocks_travel_together():
    def sizes(*given: int) -> list[list[int]]:
        blocks = [Block(0, 0, "", 0, 0, b"", size) for size in given]
        return [[block.size for block in batch] for batch in group_blocks(blocks)]

    assert sizes(1, BLOCK_BYTES, 2, 3) == [[1, BLOCK_BYTES], [2, 3]]
    assert sizes(BLOCK_BYTES) == [[BLOCK_BYTES]]
    assert sizes() == []


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_order_and_are_counted(tmp_path, state, num_proc):
    job = make_job(state, tmp_path / "a.txt", "ab", "c\0d", "efg", weight=2)
    batches = ([block] for block in read_blocks(job.sources, job.max_bytes))
    with worker_pool(job, num_proc) as run:
        results = list(run(batches))
    tally = Tally(job.sources)
    for result in results:
        one = Tally(job.sources)
        one.add(result)
        tally.add_json(json.loads(json.dumps(one.to_json())))  # as another process hands it over
        columns, rows = result.of_side(0)
        assert rows.tolist() == [[3, 0, 0], [4, 0, 2]]
        assert len(columns["tokens"]) == 7
        assert columns["bytes"].tolist() == [1, 1, 0, 1, 1, 1, 0]
        columns, rows = result.of_side(1)
        assert [len(part) for part in (*columns.values(), rows)] == [0, 0, 0]
    assert len(results) == 2
    counts = {"documents": 4, "tokens": 14, "bytes": 10}
    assert tally.of_side(0) == counts | {"sources": {"a": counts}}
    faults = tally.of_faults()
    assert (faults["skipped"], faults["sources"]) == (1, {"a": 1})  # of the first copy only
    assert faults["first"] == [f"{tmp_path}/a.txt, line 2: field 'text' contains NUL"]


DIES = """
import multiprocessing, sys
from dataclasses import replace
from multiprocessing import resource_tracker
from slm.errors import UserError
from slm.prepare.encoder import encoder_state
from slm.prepare.readers import read_blocks
from slm.prepare.sources import parse_sources
from slm.prepare.workers import Job, group_blocks, worker_pool
from slm.store.tokenizer import train_tokenizer

class Chat:
    "What a worker reads of its job ends it within a result that it sends."
    def __reduce__(self):
        return exec, (code,)

code = '''
import gc, os
(queue,) = [one for one in gc.get_objects() if type(one).__name__ == "SimpleQueue"]
queue._wlock.acquire()
os.write(queue._writer.fileno(), bytes([0, 0, 16, 0]) + bytes(100))
os._exit(9)
'''
sources = parse_sources([{"path": sys.argv[1], "name": "n" * 10**6}], "sources")
job = Job(sources, encoder_state(train_tokenizer(["a"], 258)), None, 0.0, False, 2**20)
if sys.argv[2] == "early":
    resource_tracker.ensure_running()  # which is started like a worker
    multiprocessing.set_executable("/bin/false")  # ends before it reads anything
else:
    job = replace(job, chat=Chat())
try:
    with worker_pool(job, 2) as run:
        list(run(group_blocks(read_blocks(sources, 2**20))))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("when", ["early", "as it sends"])
def test_a_worker_that_dies_at_any_time_is_reported(tmp_path, when):
    """Before it has its job, which is larger than a pipe; with half a result in another."""
    (tmp_path / "a.txt").write_text("some text")
    command = [sys.executable, "-c", DIES, tmp_path / "a.txt", when]
    done = warm.run(command, capture_output=True, text=True, timeout=60)
    assert "a worker process died" in done.stdout, done.stderr


def test_the_job_of_a_process_that_was_killed_goes_with_the_next_one(tmp_path, monkeypatch, state):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    dead = tmp_path / "tmp" / f".slm-job.x.{socket.gethostname()}-{2**22 + 1}-1.tmp"
    dead.write_bytes(b"left")
    job = make_job(state, tmp_path / "a.txt", "abc")
    with written(job) as file:
        assert [path for path in (tmp_path / "tmp").iterdir()] == [Path(file)]
        assert pickle.loads(Path(file).read_bytes()).sources == job.sources
        with written(job) as other:
            assert Path(file).exists() and other != file
    assert not list((tmp_path / "tmp").iterdir())
