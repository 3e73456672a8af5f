"""One writer of a file or a folder: a claim that others see, and that its owner looks at.

A claim is a file with host, pid, start of the process and a token: linked under its name with all
of it inside, so that of several one makes it, and removed by a rename that is looked at, so that
no other's goes. Its owner touches it; between hosts it may be taken after STALE_S seconds of
silence, by the file server's clock: that of a file that was touched beside it just now.

What holds, and what cannot:

* Where the file system has kernel locks that all hosts share, a claim is one: a suspended owner
  keeps it, a killed one loses it at once, two are never inside. On one host this holds without
  locks too, since the others see whether the owner's process (pid and start) lives.
* Between hosts without shared locks nobody can tell a paused owner from a dead one. It may wake
  inside after its claim was taken, so that execution is not exclusive, whatever is written there.
  What it publishes is: `check` raises ClaimLost before, and `publish` gives a file its name by a
  link, which never overwrites. An owner that finds a predecessor's file there replaces it. So of
  two that publish one file, the successor's stays; a set of files is whole where one of them,
  published last, has the hashes of the others.
* What remains: a process that is paused over STALE_S between a `check` and the next system call
  can remove a file, its successor's claim or what it was about to replace; never put one in its
  place. Whoever owned that claim finds it gone at its next `check`.
"""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm.errors import UserError

HEARTBEAT_S = 5.0
STALE_S = 60.0
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class ClaimLost(UserError):
    """Another process owns what this one had claimed."""


# ---- processes ----------------------------------------------------------------------------------


def start_of(pid: int) -> str:
    """When a process began, in clock ticks since the host did: with the pid it names the process.

    "0" where the system does not tell, "" where there is no such process.
    """
    if not is_alive(pid):
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def is_alive(pid: int) -> bool:
    """Is there such a process on this host?"""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def process_name() -> str:
    """For temporary files: host, pid and start of this process."""
    return f"{socket.gethostname()}-{os.getpid()}-{start_of(os.getpid())}"


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Temporary files and folders that are named after dead processes of this host.

    of: the file that they were to become; without it, all of the folder
    """
    host = re.escape(socket.gethostname())
    for path in folder.glob(".*.tmp" if of is None else f".{glob.escape(of)}.*.tmp"):
        made = re.fullmatch(rf"\..+\.{host}-(\d+)(?:-(\d+))?\.tmp", path.name)
        if made is None:
            continue
        pid, began = int(made[1]), made[2]
        if start_of(pid) != began if began else not is_alive(pid):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---- claims -------------------------------------------------------------------------------------


class Claim:
    """What `claim` yields to the owner."""

    def __init__(self, path: Path, descriptor: int, token: bytes):
        self.path, self.token = path, token
        self._descriptor, self._owner = descriptor, os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ClaimLost unless the claim is still this process's."""
        if not self._is_mine():
            raise ClaimLost(
                f"pid {self._owner} has lost {self.path} to {owner_of(self.path)}: it was silent "
                f"for over {STALE_S:.0f} s, or the file was removed"
            )

    def _is_mine(self) -> bool:
        try:
            return self.path.read_bytes() == self.token
        except FileNotFoundError:
            return False
        except OSError:  # a file server that does not answer takes no claim away
            return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            if not self._is_mine():
                return
            with suppress(OSError):
                os.utime(self._descriptor)  # this file, and none that has taken its place since

    def publish(self, temporary: Path, path: Path) -> None:
        """Give a file its name: in place of a predecessor's, never of a successor's."""
        while True:
            self.check()
            try:
                return move(temporary, path)
            except FileExistsError:
                self.check()
                path.unlink(missing_ok=True)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_mine():
                remove(self.path, self.token)
        close(self._descriptor)


class Unclaimed:
    """In place of a claim, of one who writes nothing or whom nobody can be beside."""

    def check(self) -> None: ...

    def publish(self, temporary: Path, path: Path) -> None:
        os.replace(temporary, path)


Owner = Claim | Unclaimed


@contextmanager
def claim(path: Path) -> Iterator[Claim | None]:
    """Yields the claim on `path` if it is this process's now; None: somebody else has it."""
    mine = take(path)
    try:
        yield mine
    finally:
        if mine is not None:
            mine.release()


def owner_of(path: Path) -> str:
    """For messages."""
    owner = read_owner(path)
    return "nobody" if owner is None else f"pid {owner['pid']} on {owner['host']}"


def read_owner(path: Path) -> dict[str, Any] | None:
    """None where the file is gone or says nothing that a claim says."""
    try:
        return parse_owner(path.read_bytes())
    except OSError:
        return None


def parse_owner(content: bytes) -> dict[str, Any] | None:
    try:
        owner = json.loads(content)
        if isinstance(owner["host"], str) and type(owner["pid"]) is int and owner["pid"] > 0:
            return owner
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def take(path: Path) -> Claim | None:
    token = new_token()
    while True:
        descriptor, now = create(path, token)
        if descriptor is not None:
            return Claim(path, descriptor, token)
        try:
            there = os.open(path, os.O_RDWR)
            _open.add(there)
        except FileNotFoundError:  # its owner removed it meanwhile
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        try:
            if not remove_free(path, there, now):
                return None
        finally:
            close(there)


def create(path: Path, token: bytes) -> tuple[int | None, float]:
    """A descriptor that no child keeps of a new claim, locked where there are locks; None: there is
    one already. And the file server's time.
    """
    temporary, now = temporary_of(path), 0.0
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _open.add(descriptor)
        try:
            os.pwrite(descriptor, token, 0)
            os.utime(descriptor)
            now = os.fstat(descriptor).st_mtime
            lock(descriptor)
            move(temporary, path)
        except BaseException:
            close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
    except FileExistsError:
        return None, now
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return descriptor, now


def remove_free(path: Path, descriptor: int, now: float) -> bool:
    """Remove a claim that nobody holds. True too where it went by itself: try again."""
    locked = lock(descriptor)
    if locked is False:
        return False
    if not is_same(path, descriptor):
        return True
    found = os.pread(descriptor, 1 << 16, 0)  # opened just now: no older than the server's
    if not is_free(found, now - os.fstat(descriptor).st_mtime, bool(locked)):
        return False
    remove(path, found)
    return True


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{process_name()}.tmp")


def move(temporary: Path, path: Path) -> None:
    """Raises FileExistsError where there is a file: a rename would take its place."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():  # the best that can be had there
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)
        return
    temporary.unlink()


def remove(path: Path, content: bytes) -> None:
    """Remove the claim that says `content`. Another's, made since that was read, is put back."""
    grave = temporary_of(path)
    with suppress(FileNotFoundError):
        os.rename(path, grave)
        if grave.read_bytes() == content:
            grave.unlink()
        else:
            with suppress(FileExistsError):
                move(grave, path)
            grave.unlink(missing_ok=True)


_open: set[int] = set()


# A worker that was forked would keep the lock of an owner that was killed.
def close(descriptor: int) -> None:
    if descriptor in _open:
        _open.remove(descriptor)
        os.close(descriptor)


os.register_at_fork(after_in_child=lambda: [close(descriptor) for descriptor in list(_open)])


def lock(descriptor: int) -> bool | None:
    """None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_free(found: bytes, age_s: float, locked: bool) -> bool:
    """May a claim that says `found` be taken? `locked`: this process has its lock."""
    owner = parse_owner(found)
    if owner is None:
        return locked or age_s > HEARTBEAT_S
    if owner["host"] != socket.gethostname():
        return age_s > STALE_S
    began = owner["began"] if "began" in owner else start_of(owner["pid"])
    return locked or not began or start_of(owner["pid"]) != began


def new_token() -> bytes:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "began": start_of(os.getpid())}
    return json.dumps(owner | {"token": uuid.uuid4().hex}).encode()
