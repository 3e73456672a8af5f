"""`slm <command> ...` replaces itself with `python -m slm.<command> ...`.

It imports nothing heavy: `slm --help` must answer at once. `command` makes a function a Hydra
application that works from a checkout and from an installed wheel, in any directory, and that ends
with one sentence where the input is wrong. A command's `__main__` composes and checks its keys, and
then imports the stage: a mistyped key does not wait for PyTorch.
"""

import difflib
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from slm.errors import NonFiniteError, UserError, fail, reported
from slm.version import __version__

COMMANDS = {  # name: (what it does, an example)
    "prepare": (
        "text -> token shards",
        "out=corpus 'sources=[{path: a.jsonl, text: \"{text}\"}]'",
    ),
    "import": (
        "token files of other trainers -> token shards",
        "format=megatron path=data.bin tokenizer.path=folder out=corpus",
    ),
    "export": (
        "token shards -> token files of other trainers, or what a run keeps",
        "corpus=corpus/train format=megatron out=folder",
    ),
    "train": (
        "corpus (+ references) -> model",
        "data.corpus=corpus/train selection=all max_tokens=1_000_000 out=run",
    ),
    "score": (
        "corpus + reference model -> log-prob shards",
        "corpus=corpus/train reference_model=run/model out=refs",
    ),
    "bind": (
        "scores of documents -> references of a corpus",
        "corpus=mixture/train scores=scores out=refs",
    ),
    "evaluate": (
        "models -> loss and bits per byte on named sets",
        "'models={a: run/model}' 'sets={b: corpus/heldout}'",
    ),
    "harness": (
        "models -> accuracy and bits per byte by lm_eval, offline",
        "'models={a: run/model}' problems=eval out=table.csv",
    ),
    "needle": (
        "models -> which value of a key they recall, by length and depth of real text",
        "'models={a: run/model}' 'sets={b: corpus/heldout}' out=needle.csv",
    ),
    "speak": (
        "models + prompts -> texts, how varied they are, what is copied",
        "'models={a: run/model}' prompts=prompts.txt corpus=corpus/train out=speech.jsonl",
    ),
    "annotate": (
        "documents -> requests to an annotator; its answers -> labels 0 to 5",
        "'sources=[web.jsonl]' served_model=NAME requests=requests.jsonl",
    ),
    "quality": (
        "labels -> a classifier of documents; a classifier -> scores of documents",
        "labels=labels.jsonl out=quality",
    ),
    "dynamics": (
        "checkpoints + frozen tokens -> classes H->H, L->H, H->L, L->L",
        "runs=runs/slm corpus=corpus/heldout references=refs",
    ),
    "report": ("runs of a sweep -> tables and figures", "runs=runs/sweep out=report"),
    "pilot": (
        "corpus + reference + base -> will selection pay?",
        "corpus=corpus/train reference_model=a model.init_from=b 'heldout={c: d}' out=pilot",
    ),
    "pivots": (
        "a model + problems + an oracle -> the tokens that decide, and preference pairs",
        "target_model=run/model problems=problems.jsonl oracle=answer out=pivots",
    ),
    "dashboard": ("runs -> a W&B workspace", "runs=runs/sweep group=runs-sweep"),
    "consolidate": (
        "a checkpoint in shards -> one file",
        "checkpoint=run/checkpoints/step-00000400.ckpt out=step-00000400.ckpt",
    ),
    "verify": ("is a corpus, reference, run, checkpoint or model whole?", "FOLDER ..."),
    "demo": ("the whole pipeline on the installed Python standard library, in minutes", ""),
}
SHOWS_ONLY = {"--help", "-h", "--hydra-help", "--info", "-i", "--cfg", "-c"}
HELP = {"--help", "-h"}
FULL_ERROR = "HYDRA_FULL_ERROR"
log = logging.getLogger("slm")


def usage() -> str:
    rows = [
        f"  {name:12}{what}\n            slm {name} {example}".rstrip()
        for name, (what, example) in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"slm {__version__}: selective language modeling",
            "\nusage: slm <command> [key=value ...]\n",
            *rows,
            "\n`slm <command> --help` shows every key with its value; `slm --version`.",
            "-m sweeps: slm train -m selection.select_ratio=0.4,0.6 ...",
            "A value with a comma, `=`, a brace or a colon needs quotes inside the shell's:",
            "slm score \"out='a,b=c'\" ...",
        ]
    )


def main() -> None:
    try:
        dispatch(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `slm --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        return print(usage())
    name, *arguments = words
    if name == "--version":
        return print(__version__)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        sys.exit(f"slm: no command {name!r}{hint} (commands: {', '.join(COMMANDS)})")
    if SHOWS_ONLY & {word.split("=")[0] for word in arguments} and root_file(name).exists():
        return show(name, arguments)
    # A new process image, because Lightning starts its ranks by running sys.argv again.
    safe = os.environ | {"PYTHONSAFEPATH": "1"}  # or -m imports what lies in the current folder
    os.execve(sys.executable, [sys.executable, "-m", f"slm.{name}", *arguments], safe)


def show(name: str, arguments: list[str]) -> None:
    """Hydra answers without the command's heavy imports; of a sweep, with its first job's keys."""
    jobs = jobs_of(name, arguments) if name == "train" and HELP & set(arguments) else {}
    sys.argv = [f"slm {name}", *(["--help", *next(iter(jobs.values()))] if jobs else arguments)]
    with suppress(SystemExit) if jobs else nullcontext():  # Hydra's, behind its help
        command(name)(unreachable)()
    if jobs:
        names = "\n".join(f"  {job}" for job in jobs)
        print(f"\nJobs of this sweep: {len(jobs)}, in folders of these names below `out`:\n{names}")


def jobs_of(name: str, arguments: list[str]) -> dict[str, list[str]]:
    """No job where the command line is wrong, which Hydra says."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return import_module("slm.hydra_names").sweep_jobs(name, arguments)
    except (HydraException, OmegaConfBaseException):
        return {}


def conf_folder() -> Path:
    """conf/ inside the installed wheel, else the checkout's."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def root_file(name: str) -> Path:
    return conf_folder() / f"{name}.yaml"


def unreachable(**settings: Any) -> None:
    raise AssertionError("Hydra was to print and stop")


# ---- Hydra applications -------------------------------------------------------------------------


def command(
    name: str, check: Callable[[dict[str, Any]], None] | None = None
) -> Callable[[Callable[..., Any]], Callable[[], None]]:
    """Decorator: a function of the keys of conf/<name>.yaml becomes that Hydra application.

    check: of the settings, before the function is called, which is what imports anything heavy
    """
    import hydra  # here, not above: `slm --help` does not need it
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    import_module("slm.hydra_names")  # the resolvers in the configurations

    def decorate(function: Callable[..., Any]) -> Callable[[], None]:
        @wraps(function)
        def job(config: Any) -> Any:
            try:
                settings = plain_settings(config)
                if check is not None:
                    check(settings)
                    say_loading(name)
                return function(**settings)
            except Exception as error:
                mine = reported(error)
                if mine is None:
                    raise
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise mine from None  # the launcher goes on with the other jobs
                fail(name, mine)

        path = str(conf_folder())
        application = hydra.main(version_base="1.3", config_path=path, config_name=name)(job)
        return wraps(function)(lambda: run(name, application))

    return decorate


def say_loading(name: str) -> None:
    """Where somebody watches: the imports take seconds, and on a cold disk a minute."""
    if sys.stderr.isatty() and "torch" not in sys.modules:
        print(f"slm {name}: loading PyTorch and what goes with it ...", file=sys.stderr, flush=True)


@contextmanager
def imports() -> Iterator[None]:
    """Around those of PyTorch and its like: a search for garbage among what stays takes seconds."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def plain_settings(config: Any) -> dict[str, Any]:
    """Python's own types: nothing below knows of OmegaConf."""
    from omegaconf import OmegaConf

    if missing := OmegaConf.missing_keys(config):
        raise UserError(must_be_given(missing))
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if settings.pop("task", None) is not None:  # of an array, whose jobs are all alike
        log.info("task %s", config.task)
    return settings


def run(name: str, application: Callable[[], Any]) -> None:
    """Run it; say in one sentence what is wrong with the command line."""
    from hydra.errors import CompactHydraException
    from omegaconf.errors import OmegaConfBaseException

    full = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # or Hydra prints several lines itself and exits
    try:
        application()
    except (UserError, NonFiniteError) as error:
        fail(name, error)
    except (CompactHydraException, OmegaConfBaseException) as error:
        if full is not None:
            raise
        fail(name, composition_error(name, error))
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's own, and of no class
            raise
        words = ", ".join(word for word in sys.argv if is_unknown_choice(word))
        fail(name, f"{words}: {error} (`slm {name} --help` lists the names)")
    except KeyboardInterrupt:
        print(f"slm {name}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        os.environ.pop(FULL_ERROR) if full is None else os.environ.update({FULL_ERROR: full})


def is_unknown_choice(word: str) -> bool:
    group, _, choice = word.partition("=")
    folder = conf_folder() / group
    return folder.is_dir() and not (folder / f"{choice}.yaml").exists()


def composition_error(name: str, error: Exception) -> str:
    """Hydra's several lines as one sentence that tells a user of this command what to do."""
    from hydra.errors import CompactHydraException, OverrideParseException
    from omegaconf import OmegaConf

    text = " ".join(str(error).partition("Config search path")[0].split())
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}; a value with a comma, `=`, `~`, a brace or a colon "
            "needs quotes inside the shell's: \"key='a,b=c'\" (in a dict, keys cannot have them)"
        )
    first = re.search(r"Missing mandatory value: (?P<key>\S+)", text)
    if first is not None:  # that Hydra itself needs; the others, unless the words need --config-dir
        words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
        missing = {first["key"]}
        with suppress(CompactHydraException):
            missing |= OmegaConf.missing_keys(composed(name, words))
        return must_be_given(missing)
    unknown = re.match(r"Could not override '(?P<key>[^']+)'\.", text)
    if unknown is None:
        return f"{text} ({FULL_ERROR}=1 shows where)"
    key, keys = unknown["key"], known_keys(name)
    new = re.search(r"full_key: (?P<key>\S+)", str(error.__cause__))
    if new is not None and new["key"].startswith(f"{key}."):  # the value is a dict with another key
        return f"there is no {new['key']} yet, and a dict is merged: +{new['key']}=... adds it"
    if key in keys:
        return f"the groups chosen here have no key {key!r}: it belongs to another choice"
    last = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = [*last, *difflib.get_close_matches(key, keys, n=1)]
    hint = f", did you mean {near[0]}?" if near else ""
    return f"no key {key!r}{hint} (`slm {name} --help` lists them)"


def must_be_given(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return f"{', '.join(names)} must be given: {' '.join(f'{name}=...' for name in names)}"


def known_keys(name: str) -> list[str]:
    """Every key of the command's config, in dotted form."""
    return list(dotted(composed(name)))


def composed(name: str, words: Sequence[str] = ()) -> Any:
    """The command's config as these words leave it, beside the application's own."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(name, list(words))


def dotted(config: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig, OmegaConf

    plain: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    for key, value in plain.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


if __name__ == "__main__":
    main()
