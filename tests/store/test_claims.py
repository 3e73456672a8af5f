"""Claims among real processes: one owner, who keeps it while suspended and loses it by a kill."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slm.errors import UserError
from slm.store import claims
from slm.store.claims import ClaimLost, claim, remove_temporaries, start_of

OWNER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from slm.store import claims

    path = Path(sys.argv[1])
    claims.HEARTBEAT_S, claims.STALE_S = 0.05, 0.3
    if "nolocks" in sys.argv:
        claims.lock = lambda descriptor: None
    with claims.claim(path) as mine:
        if mine is None:
            sys.exit(f"{claims.owner_of(path)} has it")
        if "forks" in sys.argv:
            begun, begins = os.pipe()
            if os.fork() == 0:
                os.write(begins, b"x")  # what a fork closes is closed
                time.sleep(5)
                os._exit(0)
            os.read(begun, 1)
        print("has it", flush=True)
        while True:
            time.sleep(0.02)
            mine.check()
    """
)


@contextmanager
def owner(path: Path, *words: str) -> Iterator[subprocess.Popen]:
    line = [sys.executable, "-c", OWNER, str(path), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def silence(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture(params=["locks", "nolocks"])
def kind(request, monkeypatch) -> str:
    if request.param == "nolocks":
        no_locks(monkeypatch)
    return request.param


def test_exclusive_and_released(tmp_path, kind):
    path = tmp_path / "a.claim"
    with claim(path) as first:
        assert first is not None
        first.check()
        found = json.loads(path.read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        with claim(path) as second:
            assert second is None
        first.check()
    assert not path.exists()


def test_it_beats_while_it_is_held(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    path = tmp_path / "a.claim"
    with claim(path):
        os.utime(path, (0, 0))
        end = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_killed_owner_is_replaced_at_once_though_its_child_lives(tmp_path, kind):
    path = tmp_path / "a.claim"
    with owner(path, kind, "forks"), claim(path) as mine:
        assert mine is None
    with claim(path) as mine:
        assert mine is not None


def test_a_suspended_owner_keeps_it(tmp_path, kind):
    path = tmp_path / "a.claim"
    with owner(path, kind) as process:
        process.send_signal(signal.SIGSTOP)
        silence(path, 2 * claims.STALE_S)
        with claim(path) as mine:
            assert mine is None
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        assert process.poll() is None


def test_who_lost_it_says_so_ends_and_leaves_the_other_s_alone(tmp_path, kind):
    path = tmp_path / "a.claim"
    theirs = json.dumps({"host": "elsewhere", "pid": 7, "began": "1", "token": "t"})
    with owner(path, kind) as process:
        process.send_signal(signal.SIGSTOP)
        path.write_text(theirs)
        silence(path, 5)
        before = path.stat().st_mtime
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"ClaimLost: pid {process.pid} has lost {path} to pid 7 on elsewhere" in errors
    assert path.read_text() == theirs and path.stat().st_mtime == before


def test_a_removed_claim_is_lost(tmp_path, kind):
    path = tmp_path / "a.claim"
    with claim(path) as mine:
        assert mine is not None
        path.unlink()
        with pytest.raises(ClaimLost, match="to nobody"):
            mine.check()
        path.write_text("{}")
    assert path.read_text() == "{}"


def test_a_silent_host_is_replaced(tmp_path, kind):
    path = tmp_path / "a.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with claim(path) as mine:
        assert mine is None  # it may be alive
    silence(path, 2 * claims.STALE_S)
    with claim(path) as mine:
        assert mine is not None
        mine.check()


def test_a_restarted_container_replaces_its_predecessor_at_once(tmp_path, kind):
    """Same host name and same pid: another process by its start."""
    path = tmp_path / "a.claim"
    began = str(int(start_of(os.getpid())) - 1)
    before = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "token": "t"}
    path.write_text(json.dumps(before))
    with claim(path) as mine:
        assert mine is not None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"host": 1, "pid": 2}', '{"host": "a", "pid": -1}', "[" * 9999],
)
def test_odd_content_is_no_claim(tmp_path, kind, text):
    path = tmp_path / "a.claim"
    path.write_text(text)
    if kind == "nolocks":  # it may be one that is being written
        with claim(path) as mine:
            assert mine is None
        silence(path, 2 * claims.HEARTBEAT_S)
    with claim(path) as mine:
        assert mine is not None


def test_a_full_disk_leaves_no_claim(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.claim"
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="a.claim cannot be written: No space left"), claim(path):
        pass
    assert not path.exists()


@pytest.mark.parametrize("kind_", ["locks", "nolocks"])
def test_of_several_that_find_a_stale_claim_one_has_it(tmp_path, kind_):
    """Started together, again and again: they count in a file that only the owner may change."""
    racer = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from slm.store import claims

        folder, kind, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        if kind == "nolocks":
            claims.lock = lambda descriptor: None
        for number in range(rounds):
            path = folder / f"{number}.claim"
            (folder / f"{number}-{os.getpid()}.here").touch()
            while len(list(folder.glob(f"{number}-*.here"))) < 3:
                pass
            mine = claims.take(path)
            if mine is not None:
                mine.check()
                (folder / f"{number}-{os.getpid()}.won").touch()
            (folder / f"{number}-{os.getpid()}.done").touch()
            while len(list(folder.glob(f"{number}-*.done"))) < 3:
                time.sleep(0.001)
        """
    )
    rounds = 30 if kind_ == "locks" else 8
    for number in range(rounds):
        path = tmp_path / f"{number}.claim"
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        silence(path, 2 * claims.STALE_S)
    line = [sys.executable, "-c", racer, str(tmp_path), kind_, str(rounds)]
    processes = [subprocess.Popen(line) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for number in range(rounds):
        assert len(list(tmp_path.glob(f"{number}-*.won"))) == 1, number


# Each of three processes takes the claim again and again, and has a probe's kernel lock inside,
# which ends with its process: whoever finds it locked is the second inside.
WORKER = textwrap.dedent(
    """
    import fcntl, os, socket, sys, time
    from pathlib import Path
    from slm.store import claims

    folder, words = Path(sys.argv[1]), sys.argv[2:]
    claims.HEARTBEAT_S, claims.STALE_S = 0.02, 0.15
    if "nolocks" in words:
        claims.lock = lambda descriptor: None
    if "hosts" in words:
        socket.gethostname = lambda: f"host-{os.getpid()}"
    probe = os.open(folder / "probe", os.O_RDWR | os.O_CREAT)
    for number in range(1_000_000):
        with claims.claim(folder / "a.claim") as mine:
            if mine is None:
                time.sleep(0.001)
                continue
            name = f"{os.getpid()}-{number}"
            if "hosts" not in words:
                try:
                    fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    (folder / f"{name}.second").touch()
            time.sleep(0.002)
            slot = len([*folder.glob("*.slot")])
            new = folder / f".{name}.new"
            new.write_text(name)
            try:
                mine.publish(new, folder / f"{slot}.slot")
                (folder / f"{name}.published").touch()
            except claims.ClaimLost:
                (folder / f"{name}.lost").touch()
            fcntl.flock(probe, fcntl.LOCK_UN)
    """
)


@contextmanager
def working(folder: Path, *words: str) -> Iterator[list[subprocess.Popen]]:
    line = [sys.executable, "-c", WORKER, str(folder), *words]
    processes = [subprocess.Popen(line) for _ in range(3)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(folder: Path, count: int) -> None:
    end = time.monotonic() + 30
    while len([*folder.glob("*.slot")]) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("words", [("locks",), ("nolocks",), ("nolocks", "hosts")], ids="-".join)
def test_twenty_kills_and_pauses(tmp_path, words):
    """On one host no two are inside; between hosts, none that woke up too late publishes."""
    draw = random.Random(0)
    with working(tmp_path, *words) as processes:
        wait_for(tmp_path, 3)
        for event in range(20):
            chosen = draw.randrange(3)
            if event % 2:
                processes[chosen].send_signal(signal.SIGSTOP)
                time.sleep(draw.choice([0.02, 0.3]))
                processes[chosen].send_signal(signal.SIGCONT)
            else:
                processes[chosen].kill()
                processes[chosen].wait()
                processes[chosen] = subprocess.Popen(processes[chosen].args)
            wait_for(tmp_path, len([*tmp_path.glob("*.slot")]) + 1)  # somebody gets on
    assert [*tmp_path.glob("*.second")] == []
    slots = {path.read_text() for path in tmp_path.glob("*.slot")}
    published = {path.stem for path in tmp_path.glob("*.published")}
    assert len(slots) == len([*tmp_path.glob("*.slot")]) > 20
    assert published <= slots and len(slots - published) <= 20  # a kill came in between


def test_a_paused_owner_that_wakes_up_publishes_nothing(tmp_path, monkeypatch):
    """Of another host, silent for too long: its successor's file stays, and its claim."""
    path, place = tmp_path / "a.claim", tmp_path / "done.json"
    monkeypatch.setattr(socket, "gethostname", lambda: "first")
    first = claims.take(path)
    assert first is not None
    monkeypatch.setattr(claims, "lock", lambda descriptor: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "second")
    silence(path, 2 * claims.STALE_S)
    with claim(path) as second:
        assert second is not None
        for name in ("first", "second"):
            (tmp_path / name).write_text(name)
        (tmp_path / "done.json").write_text("of a predecessor")
        second.publish(tmp_path / "second", place)
        assert place.read_text() == "second"
        with pytest.raises(ClaimLost, match="to pid"):
            first.publish(tmp_path / "first", place)
        check, calls = first.check, []
        # Paused between its look at the claim and the next system call.
        monkeypatch.setattr(first, "check", lambda: calls.append(1) or len(calls) == 1 or check())
        with pytest.raises(ClaimLost, match="to pid"):
            first.publish(tmp_path / "first", place)
        assert place.read_text() == "second"
        first.release()
        second.check()
    assert not path.exists()


def test_age_is_by_the_file_server_s_clock(tmp_path, kind, monkeypatch):
    """This machine's may be an hour ahead, or behind."""
    path = tmp_path / "a.claim"
    for hours in (-3600, 3600):
        now = time.time
        monkeypatch.setattr(time, "time", lambda off=hours, now=now: now() + off)
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        with claim(path) as mine:
            assert mine is None
        os.utime(path, ns=(0, path.stat().st_mtime_ns - int(2e9 * claims.STALE_S)))
        with claim(path) as mine:
            assert mine is not None


def test_a_claim_that_was_made_meanwhile_is_put_back(tmp_path):
    path = tmp_path / "a.claim"
    with claim(path) as mine:
        assert mine is not None
        claims.remove(path, b"what was read before")
        mine.check()
    assert [*tmp_path.iterdir()] == []


def test_without_hard_links_it_is_as_exclusive_as_can_be(tmp_path, monkeypatch, kind):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with claim(tmp_path / "a.claim") as mine:
        assert mine is not None
        with claim(tmp_path / "a.claim") as second:
            assert second is None
        (tmp_path / "new").write_text("new")
        (tmp_path / "there").write_text("old")
        mine.publish(tmp_path / "new", tmp_path / "there")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_temporary_files_of_the_dead_are_removed_and_no_others(tmp_path):
    host, me = socket.gethostname(), os.getpid()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    began = int(start_of(me))
    gone = [f".a.npy.{host}-{dead.pid}.tmp", f".a.npy.{host}-{dead.pid}-77.tmp"]
    gone += [f".a.npy.{host}-{me}-{began - 1}.tmp"]  # the pid is another's now
    kept = [f".a.npy.{host}-{me}-{began}.tmp", ".a.npy.elsewhere-1-2.tmp", ".a.tmp", "a.tmp"]
    for name in [*gone, *kept]:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
