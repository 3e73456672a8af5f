"""Files that are whole or not there, and reading what comes from anybody's disk."""

import os
import subprocess
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest

from slm.errors import UserError
from slm.store.files import (
    ArrayWriter,
    atomic_file,
    hash_file,
    map_array,
    read_json,
    write_array,
    write_record,
)


def test_array_writer_equals_numpy_save(tmp_path):
    whole = np.arange(1000, dtype=np.uint16)
    with atomic_file(tmp_path / "a.npy") as file:
        writer = ArrayWriter(file, "uint16")
        for block in np.split(whole, [1, 500, 500, 999]):
            writer.append(block)
        digest = writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), whole)
    assert digest == hash_file(tmp_path / "a.npy")
    assert np.array_equal(map_array(tmp_path / "a.npy", "uint16", 1000), whole)


def test_array_writer_with_columns(tmp_path):
    rows = np.arange(12).reshape(3, 4)
    with atomic_file(tmp_path / "a.npy") as file:
        writer = ArrayWriter(file, "int64", columns=4)
        writer.append(rows[:1])
        writer.append(rows[1:])
        writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.npy") as file:
        file.write(b"half")
        raise RuntimeError("crash")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("cannot reach"),
        FileNotFoundError(2, "No such file", "/other/a"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_only_a_failed_write_is_said_to_be_one(tmp_path, error):
    """A writer may say no more than that it wrote too little."""
    expected = UserError if error.errno is None else type(error)
    with pytest.raises(expected), atomic_file(tmp_path / "a.npy"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_file(tmp_path):
    with pytest.raises(UserError, match="/none/a.json cannot be written: No such file or dir"):
        write_record(tmp_path / "none" / "a.json", {})


def test_kill_during_a_write_leaves_no_finished_file(tmp_path):
    code = (
        "import os, pathlib, sys; from slm.store.files import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1]) / 'a.npy') as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.npy.") and left.suffix == ".tmp"
    write_record(tmp_path / "b.json", {})  # another file's temporary may be another's to remove
    assert left.exists()
    write_array(tmp_path / "a.npy", np.zeros(3))
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "b.json"}


def test_wrong_dtype_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.int64))
    with pytest.raises(UserError, match="holds 4 rows of int64, its manifest says 4 of uint16"):
        map_array(tmp_path / "a.npy", "uint16", 4)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\xff", "1" * 5000])
def test_json_that_is_none_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_every_flipped_bit_of_a_header_is_one_kind_of_error_or_none(tmp_path):
    path = tmp_path / "a.npy"
    write_array(path, np.arange(40, dtype=np.int64).reshape(10, 4))
    whole = path.read_bytes()
    for position in range(8 * 128):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of headers that Python 2 wrote
            with suppress(UserError):
                assert map_array(path, "int64", 10).nbytes == 320


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, hash_file, lambda path: map_array(path, "int64", 1)):
        with pytest.raises(UserError, match="pipe is no regular file"):
            read(tmp_path / "pipe")


def test_a_sealed_record_reads_as_it_was_written_and_every_flip_is_found(tmp_path):
    path, record = tmp_path / "a.json", {"a": [1, 2.5, None], "b": {"c": "d", "3": float("inf")}}
    write_record(path, record)
    assert read_json(path) == record
    whole = path.read_bytes()
    for position in [n for n, byte in enumerate(whole) if byte not in b" \n"]:
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with suppress(UserError):  # a seal of another name is an unknown field beside the others
            assert record.items() < read_json(path).items()
