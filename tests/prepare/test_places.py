"""What a URL names is read as the same files of a disk are."""

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.errors import UserError
from slm.prepare import scan
from slm.prepare.command import prepare
from slm.prepare.scan import BadText
from slm.prepare.sources import parse_sources
from text_helpers import files, write_records

ROWS = [{"text": f"record {i} of some words " + "x" * (i % 30)} for i in range(60)]

EVALUATION = " ".join("abcdefghijklmn")


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with every format that is read here, and the same in memory://in."""
    folder = tmp_path / "in"
    lines = write_records(folder / "lines.jsonl", *ROWS, {"text": f"so {EVALUATION}"})
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes(), mtime=0))
    (folder / "listed.json").write_text(json.dumps(ROWS[:20], indent=1))
    (folder / "prose.txt").write_text("\n\n".join(row["text"] for row in ROWS[20:]))
    (folder / "rows.csv").write_text(f"text\n{ROWS[5]['text']}\n{EVALUATION}\n")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=7)
    (folder / ".hidden.jsonl").write_text("no record\n")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in folder.iterdir():
        memory.pipe(f"/in/{path.name}", path.read_bytes())
    return folder


def test_the_corpus_is_that_of_the_files(tmp_path, here, bytes_folder, monkeypatch):
    """Byte for byte, in many units, with both sides, an exclusion and the plan."""
    monkeypatch.setattr(scan, "UNIT_BYTES", 600)
    made = []
    for out, root in (("local", str(here)), ("remote", "memory://in")):
        sources = [
            {"path": f"{root}/lines.jsonl", "name": "lines"},
            {"path": f"{root}/packed.jsonl.gz", "name": "packed", "weight": 1.5},
            {"path": root, "format": "parquet", "name": "rows"},
            {"path": f"{root}/*.json", "name": "listed"},
            {"path": f"{root}/prose.txt", "document": "paragraph"},
            {"path": f"{root}/rows.csv", "name": "table"},
        ]
        prepare(
            sources,
            tmp_path / out,
            tokenizer={"path": bytes_folder},
            exclude=[{"path": f"{root}/rows.csv", "name": "test"}],
            **{"seq_len": 8, "heldout_ratio": 0.3, "shard_tokens": 500, "num_proc": 1},
        )
        made.append(files(tmp_path / out))
    local, remote = (one.pop("excluded.jsonl") for one in made)
    assert local.replace(str(here).encode(), b"memory:///in") == remote
    assert b"lines" in remote and b"packed" in remote
    assert made[0] == made[1] and len(made[0]) > 12


def test_what_a_url_names(here):
    def found(path: str, **more: str) -> list[str]:
        (one,) = parse_sources([{"path": path, "name": "n", **more}], "sources")
        return [file.removeprefix("memory:///in/") for file in one.files]

    assert found("memory://in/lines.jsonl") == ["lines.jsonl"]
    assert found("memory://in", format="jsonl") == ["lines.jsonl", "listed.json", "packed.jsonl.gz"]
    assert found("memory://in/*.jsonl*") == ["lines.jsonl", "packed.jsonl.gz"]
    for path, sentence in [
        ("memory://in", "memory://in holds files of several formats .csv, jsonl"),
        ("memory://in/none*", "memory://in/none.*: there is no such file, folder or glob"),
        ("nosuch://a.jsonl", "nosuch://a.jsonl cannot be reached: Protocol not known: nosuch"),
    ]:
        with pytest.raises(UserError, match=sentence):
            found(path)


def test_a_file_that_changed_or_went_is_named(here):
    memory = fsspec.filesystem("memory")
    (one,) = parse_sources(["memory://in/lines.jsonl"], "sources")
    (seen,) = one.scans.values()
    memory.pipe("/in/lines.jsonl", (here / "lines.jsonl").read_bytes())
    seen.check_unchanged()  # written again, the same
    memory.pipe("/in/lines.jsonl", b'{"text": "another"}\n')
    with pytest.raises(BadText, match=r"memory://.*in/lines.jsonl has changed since the run began"):
        seen.check_unchanged()
    memory.rm("/in/lines.jsonl")
    with pytest.raises(UserError, match=r"memory://.*in/lines.jsonl cannot be reached"):
        seen.check_unchanged()
