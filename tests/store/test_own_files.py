"""What a command that is run again may replace and remove, and what it must leave alone."""

import errno
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slm.errors import UserError
from slm.store import own_files
from slm.store.own_files import RECORD, check_own, replacing

BY = "slm report"


def make(folder: Path, **files: str) -> None:
    with replacing(folder, BY) as new:
        for name, text in files.items():
            path = new / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def files_of(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_own_files_are_replaced_and_removed(tmp_path):
    folder = tmp_path / "deep" / "out"
    make(folder, a="1", b="1", figures__c="1")
    (folder / "mine").write_text("kept")
    make(folder, a="2", figures__d="2")
    assert files_of(folder) == {"a": "2", "figures/d": "2", "mine": "kept"}
    make(folder, b="3")
    assert files_of(folder) == {"b": "3", "mine": "kept"}


def test_what_others_made_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(UserError, match=r"/a and 1 other files would be replaced, and made.json"):
        make(tmp_path, a="1", b="1", c="1")
    assert files_of(tmp_path) == {"a": "mine", "b": "mine"}
    with pytest.raises(UserError, match="/a would be replaced"):
        check_own(tmp_path, ["a", "c"], BY)


def test_what_was_changed_since_is_neither_replaced_nor_removed(tmp_path, caplog):
    make(tmp_path, a="1", b="1")
    (tmp_path / "a").write_text("edited")
    with pytest.raises(UserError, match="/a would be replaced"):
        make(tmp_path, a="2")
    make(tmp_path, b="2")
    assert files_of(tmp_path) == {"a": "edited", "b": "2"}
    assert "a was changed after it was made: it stays" in caplog.text


def test_what_fails_leaves_the_files_before_and_no_folder_of_its_own(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out", BY) as new:
        (new / "a").write_text("half")
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", a="1")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out", BY) as new:
        (new / "a").write_text("half")
        raise ZeroDivisionError
    assert files_of(tmp_path / "out") == {"a": "1"}
    assert sorted((tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize("at", range(5))
def test_killed_between_any_two_steps_the_next_one_takes_over(tmp_path, monkeypatch, at):
    make(tmp_path, a="1", b="1", c="1")
    steps = iter(range(100))

    def dying(step):
        def run(*arguments):
            if next(steps) == at:
                raise KeyboardInterrupt
            return step(*arguments)

        return run

    with monkeypatch.context() as patch:
        for module, name in ((own_files.os, "replace"), (own_files, "remove")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, a="2", b="2")
    make(tmp_path, a="3", b="3")
    assert files_of(tmp_path) == {"a": "3", "b": "3"}


def test_what_a_killed_one_left_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".new.{socket.gethostname()}-{dead.pid}-1.tmp", f".new.there-{dead.pid}-1.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    make(tmp_path, a="1")
    assert [path.name for path in tmp_path.glob(".new.*")] == names[1:]


@pytest.mark.parametrize("code", [errno.ENOSPC, None])
def test_a_full_disk_is_one_sentence_with_path_and_bytes(tmp_path, code):
    make(tmp_path, a="1")
    error = OSError("encoder error -2") if code is None else OSError(code, "No space left")
    with pytest.raises(UserError) as told, replacing(tmp_path, BY) as new:
        (new / "figures").mkdir()
        (new / "figures" / "b.png").write_bytes(bytes(1234))
        raise error
    start = f"{tmp_path}/figures/b.png cannot be written: "
    more = "encoder error -2" if code is None else "No space left; more than [0-9,]+ bytes are "
    assert re.match(re.escape(start) + more, str(told.value))
    assert files_of(tmp_path) == {"a": "1"}


def test_a_file_that_was_to_be_read_is_named_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), replacing(tmp_path / "out", BY):
        (tmp_path / "gone").read_text()


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"by": "other", "files": {}},
        {"by": BY, "files": []},
        {"by": BY, "files": {"a": "x"}},
        {"by": BY, "files": {"../precious": ["x"]}},
        {"by": BY, "files": {"/precious": ["x"]}},
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, record):
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="made.json is no list of the files that slm report made"):
        make(tmp_path, a="1")
