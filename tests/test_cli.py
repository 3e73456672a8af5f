"""The command line: help at once, one sentence for a mistake, any directory, any path."""

import csv
import gc
import os
import pty
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from transformers import LlamaConfig, LlamaForCausalLM

import slm
import warm
from run_helpers import STRAYS, leave_strays
from slm import cli, verify
from slm.cli import COMMANDS, command, conf_folder, dispatch
from slm.errors import NonFiniteError, UserError, reported
from slm.evaluate import __main__ as evaluate
from slm.model.build import set_special_ids
from slm.model.folder import save_model
from slm.score import __main__ as score
from slm.store.shards import References

SLM = [sys.executable, "-m", "slm.cli"]
HEAVY = {"torch", "transformers", "lightning", "wandb", "datasets", "matplotlib"}
AWKWARD = "with space, comma=and {brace}"
TOY = "defaults: [base, _self_]\nneeded: ???\nnumber: 1\nnest: {inner: 2}\n"


@pytest.fixture
def application(monkeypatch, tmp_path) -> Callable[..., Callable[[], None]]:
    """application(function) is the command `toy` with two keys, one of them required."""
    (tmp_path / "conf").mkdir()
    shutil.copy(conf_folder() / "base.yaml", tmp_path / "conf")
    (tmp_path / "conf" / "toy.yaml").write_text(TOY)
    monkeypatch.setattr(cli, "conf_folder", lambda: tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return command("toy")


def slm_command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SLM, *words], capture_output=True, text=True, timeout=300, **options)


# ---- slm ----------------------------------------------------------------------------------------


def test_usage_names_every_command(call):
    for words in ([], ["--help"], ["-h"], ["help"]):
        code, out, err = call(cli.main, *words)
        assert (code, err) == (0, "")
        assert all(f"\n  {name} " in out for name in COMMANDS)
    assert call(cli.main, "--version")[1] == f"{slm.__version__}\n"


def test_an_unknown_command_gets_a_suggestion(monkeypatch):
    with pytest.raises(SystemExit, match="no command 'scoer', did you mean score?"):
        dispatch(["scoer"])
    with pytest.raises(
        SystemExit, match=r"no command 'xyz' \(commands: prepare, import, export, train"
    ):
        dispatch(["xyz"])


def test_a_command_becomes_a_module_in_a_new_process_image(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *words: seen.append(words))
    dispatch(["score", "out=a b"])
    dispatch(["verify", "--help"])  # not Hydra's
    start = [sys.executable, "-m"]
    assert seen[0][:2] == (sys.executable, [*start, "slm.score", "out=a b"])
    assert seen[1][:2] == (sys.executable, [*start, "slm.verify", "--help"])
    assert all(words[2] == os.environ | {"PYTHONSAFEPATH": "1"} for words in seen)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["score", "--cfg", "job"]])
def test_help_imports_nothing_heavy(words):
    code = (
        f"import sys; sys.argv = ['slm', *{words}]\n"
        "from slm import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slm" in done.stdout or "batch_size" in done.stdout


def test_help_into_a_closed_pipe_is_silent():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SLM, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(path.stem for path in conf_folder().glob("*.yaml")))
def test_help_of_every_root_shows_its_keys(call, name):
    if name in ("base", "array"):
        return
    code, out, err = call(cli.main, name, "--help")
    assert (code, err) == (0, "")
    key = "runs" if name == "dynamics" else "out"  # it writes into the runs' own folders
    assert out.startswith(f"slm {name}: ") and f"\n{key}: " in out
    assert not re.search(r"\$[A-Z]|\.\./", out)  # no variable, no path of whoever wrote it


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ["experiment=sweep_k", "selection.select_ratio=0.3,0.5", "seed=4"],
            [
                f"selection={s},selection.select_ratio={k}"
                for s in ("excess", "random")
                for k in (0.3, 0.5)
            ],
        ),
        (
            ["-m", "optimizer.adamw.lr=choice(1,2)", "seed=0"],
            ["optimizer.adamw.lr=1", "optimizer.adamw.lr=2"],
        ),
    ],
)
def test_help_of_a_sweep_lists_its_jobs(call, words, wanted):
    code, out, err = call(cli.main, "train", *words, "--help")
    assert (code, err) == (0, "") and out.startswith("slm train: ")
    told, _, jobs = out.partition("Jobs of this sweep: ")
    count, *names = jobs.splitlines()
    assert count.startswith(f"{len(wanted)}, ") and [name.strip() for name in names] == wanted
    assert f"\nseed: {words[-1].removeprefix('seed=')}\n" in told


# ---- mistakes -----------------------------------------------------------------------------------


def refuse(number: int, **others: Any) -> None:
    raise UserError(f"number is {number}")


def test_a_user_error_is_one_line_and_exit_1(call, application):
    assert call(application(refuse), "needed=1") == (1, "", "slm toy: number is 1\n")
    assert [path.name for path in Path().iterdir()] == ["conf"]  # no log file, no folder


def test_under_multirun_the_other_jobs_go_on_and_the_end_is_1(call, application):
    seen: list[int] = []

    def job(number: int, **others: Any) -> None:
        seen.append(number)
        if number == 2:
            refuse(number)

    code, _, err = call(application(job), "-m", "needed=1", "number=1,2,3", "hydra.sweep.dir=s")
    assert (code, seen) == (1, [1, 2, 3])
    assert err.splitlines()[-1] == "slm toy: number is 2" and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["needed=1", "numbr=2"],
            "no key 'numbr', did you mean number? (`slm toy --help` lists them)",
        ),
        (["needed=1", "nest.iner=2"], "no key 'nest.iner', did you mean nest.inner? (`slm toy"),
        (["needed=1", "other.inner=2"], "no key 'other.inner', did you mean nest.inner?"),
        (
            ["needed=1", "nest={inner: 1, other: 2}"],
            "there is no nest.other yet, and a dict is merged: +nest.other=... adds it",
        ),
        (["needed=1", "zzzz=2"], "no key 'zzzz' (`slm toy --help` lists them)"),
        ([], "needed must be given: needed=..."),
        (["needed=a=b"], "cannot read 'needed=a=b'; a value with a comma"),
        (["needed=a,b"], "Ambiguous value for argument 'needed=a,b'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(call, application, words, message):
    code, out, err = call(application(refuse), *words)
    assert (code, out) == (1, "")
    assert err.startswith(f"slm toy: {message}") and err.count("\n") == 1


def test_an_unknown_choice_of_a_group_lists_the_known(call):
    code, out, err = call(command("train")(refuse), "selection=foo", "out=x")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "Could not find 'selection/foo'" in err and "all entropy excess" in err


def test_a_group_takes_no_number(call):
    code, out, err = call(command("train")(refuse), "model=3", "selection=all", "out=x")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("slm train: model=3: Config group override must be a string or a list")


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], "max_tokens, out must be given: max_tokens=... out=..."),
        (["max_tokens=1"], "out must be given: out=..."),
        (
            ["experiment=continue_small"],
            "max_tokens, model.init_from, out must be given: "
            "max_tokens=... model.init_from=... out=...",
        ),
    ],
)
def test_required_keys_are_named_at_once(call, words, asked):
    """Also where Hydra itself stops at the first, which it needs for its folder."""
    assert call(command("train")(refuse), *words) == (1, "", f"slm train: {asked}\n")


def test_a_bug_keeps_its_traceback(call, application):
    def broken(**settings: Any) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        call(application(broken), "needed=1")
    assert cli.FULL_ERROR not in os.environ


def test_a_file_that_cannot_be_opened_is_named(call, application, tmp_path):
    def job(**settings: Any) -> None:
        open(tmp_path)

    code, _, err = call(application(job), "needed=1")
    assert (code, err) == (1, f"slm toy: {tmp_path}: Is a directory\n")


def test_ctrl_c_ends_with_130(call, application):
    def job(**settings: Any) -> None:
        raise KeyboardInterrupt

    assert call(application(job), "needed=1") == (130, "", "slm toy: interrupted\n")


class Picky:
    """A constructor that Hydra's instantiate calls."""

    def __init__(self, value: int):
        raise UserError(f"value is {value}")


def test_an_error_that_hydra_wrapped_is_found():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": f"{__name__}.Picky", "value": 3}, _convert_="all")
    assert str(reported(caught.value)) == "value is 3"
    assert isinstance(reported(NonFiniteError("nan")), NonFiniteError)
    assert reported(ValueError("a bug")) is None
    assert reported(OSError("no file")) is None


# ---- commands as a user runs them ---------------------------------------------------------------


@pytest.fixture
def awkward(tmp_path, tokenizer, make_corpus) -> Path:
    """A folder of an awkward name with a corpus and a model in it."""
    folder = tmp_path / AWKWARD
    make_corpus(folder / "corpus", [np.arange(33), np.arange(33)[::-1]], 8)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads))
    set_special_ids(model, tokenizer)
    save_model(folder / "model", model, tokenizer, "card", {})
    return folder


def test_awkward_paths_from_another_directory(call, awkward, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [
        f"corpus='{AWKWARD}/corpus'",
        f"reference_model='{AWKWARD}/model'",
        f"out='{AWKWARD}/refs'",
        "device=cpu",
    ]
    code, _, err = call(score.main, *words)
    assert code == 0 and "scored 64 tokens" in err
    assert len(References.open(awkward / "refs").shards) == 2
    assert "is finished already, nothing to do" in call(score.main, *words)[2]
    models, sets = f"{{a: '{AWKWARD}/model'}}", f"{{b: '{AWKWARD}/corpus'}}"
    words = [f"models={models}", f"sets={sets}", f"out='{AWKWARD}/t.csv'", "device=cpu"]
    code, out, _ = call(evaluate.main, *words)
    assert code == 0 and "bits per byte" in out
    with open(awkward / "t.csv", newline="") as file:
        assert [(row["model"], row["set"]) for row in csv.DictReader(file)] == [("a", "b")]
    assert call(verify.main, AWKWARD)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [AWKWARD]  # and nothing else


@pytest.mark.parametrize("main", [score.main, evaluate.main])
def test_required_keys_are_asked_for(call, main):
    code, _, err = call(main)
    assert code == 1 and "must be given: " in err and err.count("\n") == 1


def test_config_dir_adds_a_users_own_file(call, tmp_path, monkeypatch):
    (tmp_path / "mine" / "selection").mkdir(parents=True)
    (tmp_path / "mine" / "selection" / "own.yaml").write_text("_target_: mine.Rule\nkey: 7\n")
    monkeypatch.chdir(tmp_path)
    words = ["train", "selection=own", "out=x", "--config-dir", "mine", "--cfg", "job"]
    code, out, err = call(cli.main, *words)
    assert (code, err) == (0, "") and "_target_: mine.Rule\n  key: 7\n" in out
    code, _, err = call(command("train")(refuse), "selection=own", "--config-dir", "mine")
    assert (code, err) == (1, "slm train: out must be given: out=...\n")


@pytest.mark.parametrize("words", [["slm.cli", "verify", "."], ["slm.verify", "."]])
def test_modules_of_the_current_folder_are_not_imported(tmp_path, monkeypatch, words):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    leave_strays(tmp_path)
    start = [sys.executable, "-m", *words]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert "stray" not in done.stdout + done.stderr
    assert "NOT WHOLE: " in done.stdout


# As sitecustomize.py: the first import of torch, which takes seconds as what follows it does, ends
# the process with the files that these imports would be of.
GATE = f"""
import sys
from importlib.util import find_spec
class Gate:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            sys.meta_path.remove(Gate)
            sys.exit(" ".join(find_spec(stray).origin for stray in {STRAYS}))
sys.meta_path.insert(0, Gate)
"""


ALL_GIVEN = {
    "train": ["data.corpus=CORPUS", "max_tokens=1_000_000", "out=x"],
    "score": ["corpus=CORPUS"],
    "evaluate": ["models={a: MODEL}", "sets={b: CORPUS}"],
    "dynamics": ["runs=MODEL", "corpus=CORPUS"],
    "report": ["runs=MODEL", "out=x"],
    "dashboard": [],
}


@pytest.mark.parametrize("name", ALL_GIVEN)
def test_nor_are_those_that_come_with_torch(tmp_path, monkeypatch, made_corpus, name):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    strays, gate = tmp_path / "strays", tmp_path / "gate"
    strays.mkdir()
    gate.mkdir()
    leave_strays(strays)
    (gate / "sitecustomize.py").write_text(GATE)
    for file in ("config.json", "model.safetensors"):
        (gate / file).write_text("{}")
    folders = {"CORPUS": made_corpus.folder, "MODEL": gate}
    given = [re.sub("CORPUS|MODEL", lambda m: str(folders[m[0]]), w) for w in ALL_GIVEN[name]]
    start = [sys.executable, "-m", f"slm.{name}", *given]
    environment = os.environ | {"PYTHONPATH": str(gate)}
    done = subprocess.run(start, capture_output=True, text=True, cwd=strays, env=environment)
    assert "torch/__init__.py" in done.stderr and str(strays) not in done.stderr, done.stderr


def test_a_library_import_leaves_the_path_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "mine.py").write_text("import sys, slm\nprint(sys.path[0])")
    for start in (["-m", "mine"], ["mine.py"]):
        done = subprocess.run(
            [sys.executable, *start], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stdout.strip() == str(tmp_path), done.stderr


def test_garbage_is_looked_for_again_after_imports():
    with pytest.raises(ImportError), cli.imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


@pytest.mark.slow
def test_slm_and_python_m_run_the_command_from_another_directory(awkward):
    """Scoring shows tokens per second on a real terminal; test_harness.py starts `slm` itself."""
    line = [sys.executable, "-m", "slm.score", f"corpus='{AWKWARD}/corpus'", "device=cpu"]
    line += [f"reference_model='{AWKWARD}/model'"]
    code, said = on_a_terminal([*line, f"out='{AWKWARD}/one'"], awkward.parent)
    assert code == 0 and re.search(rb"64/64 tokens\s+[\d,]+/s", said), said
    again = [*line, f"out='{AWKWARD}/two'"]
    done = warm.run(again, capture_output=True, text=True, cwd=awkward.parent)
    assert done.returncode == 0, done.stderr
    fingerprints = {References.open(awkward / name).fingerprint for name in ("one", "two")}
    assert len(fingerprints) == 1
    assert slm_command("verify", AWKWARD, cwd=awkward.parent).returncode == 0


def on_a_terminal(line: list[str], folder: Path) -> tuple[int, bytes]:
    """Exit code, and what it showed."""
    parent, child = pty.openpty()
    process = warm.Popen(line, cwd=folder, stderr=child, stdout=child)
    os.close(child)
    said = b""
    with suppress(OSError):  # the other end is closed
        while block := os.read(parent, 4096):
            said += block
    os.close(parent)
    return process.wait(60), said


@pytest.mark.slow
def test_slm_from_an_installed_wheel(tmp_path):
    """Built, installed without its dependencies, run from /: conf/ is inside."""
    root = conf_folder().parent
    build = [sys.executable, "-m", "pip", "wheel", str(root), "--no-deps", "-w", str(tmp_path)]
    build += ["--no-build-isolation", "--quiet"]  # the backend is among the dev dependencies
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, "--quiet", str(wheel)], check=True, capture_output=True)
    # A plain .pth line adds our dependencies, and not the .pth files among them: no editable slm.
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    program = str(tmp_path / "venv" / "bin" / "slm")
    where = subprocess.run(
        [python, "-c", "from slm.cli import conf_folder; import slm_kernels; print(conf_folder())"],
        capture_output=True, text=True, cwd="/", check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(site / "slm" / "conf")
    for words, expected in [
        (["--help"], "usage: slm"),
        (["train", "--help"], "selection: all, entropy, excess"),
        (["score", "--help"], "reference_model: null"),
        (["verify", "--help"], "usage: slm verify"),
    ]:
        done = subprocess.run([program, *words], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    done = subprocess.run([program, "verify", "nowhere"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and done.stdout == "NOT WHOLE: nowhere does not exist\n"
