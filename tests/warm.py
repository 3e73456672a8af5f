"""`python ...` in a process of its own that needs not import PyTorch, Lightning and transformers.

A new interpreter takes seconds to import them. Here one process has, and `Popen` and `run` have it
fork instead: the child is a child of the caller with a pid, signals, streams and an exit code like
any other, and ends as an interpreter ends. Elsewhere than on Linux they are subprocess's own.
Variables that a library reads as it is imported (HF_HOME, TORCH_COMPILE_DISABLE) come too late.

    run([sys.executable, "-m", "slm.train", "out=x"], capture_output=True, text=True)

`after`: code that imports more. The first child with this code leaves a process that has run it,
from which the others are forked.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

SET_CHILD_SUBREAPER = 36  # prctl: orphans below become children of the caller
MODULES = [  # of the commands, and what they import when they run
    *("slm.prepare.command", "slm.score.command", "slm.evaluate.command", "slm.train.command"),
    *("slm.dynamics.command", "slm.report.command", "slm.verify", "hypothesis", "pytest"),
    *("wandb", "wandb.sdk.launch"),  # the latter is imported by wandb.init
    *("torch._dynamo", "transformers.models.llama.modeling_llama"),
]


class Request(NamedTuple):
    caller: int
    words: list[str]  # after `python`
    cwd: str
    environment: dict[str, str]
    leads_session: bool


# ---- the caller ---------------------------------------------------------------------------------


class Forked(subprocess.Popen[Any]):
    """Takes a command line that begins with sys.executable; of the options, cwd, env, streams, and
    start_new_session"""

    def __init__(self, args: Any, *, after: str = "", **options: Any):
        self._after = after
        super().__init__(args, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:  # in the order of CPython's own
        assert args[0] == sys.executable, args
        cwd, env, (p2cread, _, _, c2pwrite, _, errwrite) = rest[4], rest[5], rest[9:15]
        words, environment = [str(word) for word in args[1:]], dict(env or os.environ)
        request = Request(os.getpid(), words, str(cwd or os.getcwd()), environment, bool(rest[20]))
        streams = [p2cread, c2pwrite, errwrite]
        given = [mine if mine != -1 else number for number, mine in enumerate(streams)]
        self.pid = ask(request, given, self._after)
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])  # type: ignore[attr-defined]


def run(words: list[Any], **options: Any) -> subprocess.CompletedProcess[Any]:
    """subprocess.run of those options that the tests use"""
    check, timeout = options.pop("check", False), options.pop("timeout", 300)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(words, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def ask(request: Request, streams: list[int], after: str) -> int:
    """The pid of a new child of this process."""
    channel = server(after)
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.prctl(SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(channel, [json.dumps(request).encode()], streams)
        return int(channel.recv(32))
    finally:
        libc.prctl(SET_CHILD_SUBREAPER, 0)


def run_ranks(world: int, words: list[Any], after: str = "") -> tuple[list[int], str]:
    """As torchrun starts them, all at once: exit codes, and what they printed.

    They find what this process finds, the tests' helpers among it.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        Popen(words, after=after, env=os.environ | {k: str(v) for k, v in mine.items()}, **said)
        for mine in (common | {"RANK": r, "LOCAL_RANK": r, "GROUP_RANK": 0} for r in range(world))
    ]
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:  # one that hangs is not left to the tests after it
        for rank in ranks:
            rank.kill()
            rank.__exit__(None, None, None)
    return [rank.returncode for rank in ranks], "\n".join(texts)


channels: dict[str, socket.socket] = {}


def server(after: str = "") -> socket.socket:
    """Of this process, started at its first use; it ends with the other end of its socket."""
    if after not in channels:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        start = Forked if after else subprocess.Popen
        line = [sys.executable, __file__, after]
        process = start(line, stdin=its.fileno(), env=os.environ | threads)
        its.close()
        channels[after] = mine
        atexit.register(lambda: (mine.close(), process.wait()))
    return channels[after]


class Started(subprocess.Popen[Any]):
    def __init__(self, args: Any, *, after: str = "", **options: Any):
        if after:
            assert args[1] == "-c", args
            args = [*args[:2], f"{after}\n{args[2]}", *args[3:]]
        super().__init__(args, **options)


Popen = Forked if sys.platform == "linux" else Started


# ---- the server and its children ----------------------------------------------------------------


def serve(channel: socket.socket) -> Request | None:
    """Returns in a child, with what it is to run, and None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes in between
    while True:
        data, streams, _, _ = socket.recv_fds(channel, 2**20, 3)
        if not data:
            return None
        if os.fork() == 0:
            if os.fork() != 0:
                os._exit(0)
            request = Request(*json.loads(data))
            while os.getppid() != request.caller:
                time.sleep(0.001)
            if request.leads_session:
                os.setsid()  # before the caller can ask for its group, which it may signal
            channel.send(str(os.getpid()).encode())
            become(request, streams)
            return request
        for stream in streams:
            os.close(stream)


def become(request: Request, streams: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    tempfile.tempdir = None  # TMPDIR may be another
    keep_folders()
    rank_zero_only = import_module("lightning.fabric.utilities.rank_zero")
    rank_zero_only.rank_zero_only.rank = rank_zero_only._get_rank() or 0  # as it does on import


def keep_folders() -> None:
    """Temporary folders that were made on import are those of the process that imported."""
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    atexit.unregister(import_module("wandb.sdk.data_types._private").MEDIA_TMP.cleanup)
    atexit.unregister(import_module("wandb.sdk.artifacts.artifact").Artifact._TMP_DIR.cleanup)


def execute(words: list[str]) -> None:
    """As the interpreter does with its command line."""
    if words[0] == "-W":
        assert words[1] == "ignore", words
        warnings.simplefilter("ignore")
        words = words[2:]
    if words[0].startswith("-X"):
        words = words[1:]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[0:1] = paths
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif words[0] == "-m":
        sys.argv = words[1:]
        if words[1].startswith("slm."):  # what `import slm` does, which is done
            os.environ["PYTHONSAFEPATH"] = "1"
        else:
            sys.path.insert(0, os.getcwd())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def end(work: Callable[[], None]) -> int:
    """The exit code, after what an interpreter does at its end; its clean-up takes seconds."""
    code: Any = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int | None) else 1
        if code == 1 and ended.code != 1:
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def attend(channel: socket.socket, after: str) -> None:
    """What a server does, and each of its children; it does not return."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    gc.disable()  # on import nothing is garbage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it is the caller's
    for name in MODULES:
        import_module(name)
    exec(after, {"__name__": "after"})
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.freeze()  # a collection in a child would copy every page
    request = serve(channel)
    channel.close()
    gc.enable()
    os._exit(0 if request is None else end(lambda: execute(request.words)))


def fork_server() -> None:
    """The server of a process that is about to import much itself: both do it once."""
    for name in MODULES:
        import_module(name)
    gc.freeze()
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = os.fork()
    if process == 0:
        mine.close()
        attend(its, "")
    its.close()
    channels[""] = mine
    atexit.register(lambda: (mine.close(), os.waitpid(process, 0)))


if __name__ == "__main__":
    attend(socket.socket(fileno=os.dup(0)), sys.argv[1])
