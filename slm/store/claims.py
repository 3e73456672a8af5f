"""One writer of a file or a folder: a claim that others see, and that its owner looks at.

A claim is a file with host, pid, start of the process and a token. Where the file system has them
it is held under a kernel lock, which ends with its process and with nothing else: a suspended owner
keeps it, a killed one does not, and a restarted container knows its predecessor to be dead although
both are pid 1 of one host. Between hosts it counts as held as long as its owner touches it: after
STALE_S seconds of silence it may be taken over. So an owner asks `check` before whatever must be
written once; it raises ClaimLost where the token is another's.
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
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm.errors import UserError

HEARTBEAT_S = 5.0
STALE_S = 60.0
SETTLE_S = 0.5  # without locks: for another who took the same stale claim to show
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
                os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)
        close(self._descriptor)


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
        owner = json.loads(path.read_bytes())
        if isinstance(owner["host"], str) and type(owner["pid"]) is int and owner["pid"] > 0:
            return owner
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def take(path: Path) -> Claim | None:
    while True:
        descriptor, is_new = open_claim(path)
        try:
            locked = lock(descriptor)
            if locked and not is_same(path, descriptor):  # its owner removed it meanwhile
                close(descriptor)
                continue
            if locked is False or not (is_new or is_free(path, bool(locked))):
                close(descriptor)
                return None
            token = new_token()
            if locked or is_new:
                write_over(path, descriptor, token)
                return Claim(path, descriptor, token)
            return Claim(path, descriptor, token) if replace(path, token) else close(descriptor)
        except BaseException:
            close(descriptor)
            raise


def open_claim(path: Path) -> tuple[int, bool]:
    """A descriptor that no child keeps, and whether the file is new."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        try:
            found = os.open(path, flags | os.O_EXCL, 0o644), True
        except FileExistsError:
            found = os.open(path, flags, 0o644), False
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    _open.add(found[0])
    return found


# A worker that was forked would keep the lock of an owner that was killed.
_open: set[int] = set()


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


def is_free(path: Path, locked: bool) -> bool:
    """May a claim that was there be taken? `locked`: this process has its lock."""
    owner = read_owner(path)
    if owner is None:  # without a lock it may be one that is being written
        return locked or age_s(path) > HEARTBEAT_S
    if owner["host"] != socket.gethostname():
        return age_s(path) > STALE_S
    began = owner["began"] if "began" in owner else start_of(owner["pid"])
    return locked or not began or start_of(owner["pid"]) != began


def age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it is given back right now


def new_token() -> bytes:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "began": start_of(os.getpid())}
    return json.dumps(owner | {"token": uuid.uuid4().hex}).encode()


def write_over(path: Path, descriptor: int, token: bytes) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, token, 0)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def replace(path: Path, token: bytes) -> bool:
    """Take a stale claim where there are no locks: of several that do, the last one has it."""
    temporary = path.with_name(f".{path.name}.{process_name()}.tmp")
    temporary.write_bytes(token)
    os.replace(temporary, path)
    time.sleep(SETTLE_S)
    return path.read_bytes() == token
