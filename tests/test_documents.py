"""What README, the folders' pages and quickstart.sh print runs: less text, short budgets, a tiny
model."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import warm
from common import SKETCHED
from model_helpers import small_llama
from run_helpers import composed, with_tiny_model
from slm.cli import plain_settings
from slm.hydra_names import sweep_jobs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments/doors/README.md"]
PAGES += sorted(ROOT.glob("slm/**/*.md"))
STAGES = [
    "store",
    "prepare",
    "model",
    "selection",
    "score",
    "quality",
    "evaluate",
    "train",
    "dynamics",
    "report",
    "pilot",
    "pivots",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """The words of every command, as a shell splits them."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BUDGETS = {"max_tokens=": "4_096", "num_targets=": "500", "heldout_windows=": "8"}
BUDGET = rf"({'|'.join(BUDGETS)})[0-9_]+"


def run(words: list[str], folder: Path) -> None:
    """`slm x` and `python ...` as printed but for sizes, which are small; a process each."""
    words = [re.sub(BUDGET, lambda found: found[1] + BUDGETS[found[1]], word) for word in words]
    start = ["-m", f"slm.{words[1]}", *words[2:]] if words[0] == "slm" else words[1:]
    more = {"cwd": folder, "env": os.environ | {"WANDB_MODE": "disabled"}, "after": SKETCHED}
    done = warm.run(
        with_tiny_model([sys.executable, *start]), capture_output=True, text=True, **more
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.fixture
def text(tmp_path, cut_demo_texts) -> None:
    cut_demo_texts(tmp_path / "text", 600_000)


def run_all(script: str, folder: Path) -> None:
    """The text is there, which is made first."""
    first, *rest = [words for words in commands(script) if words[0] in ("slm", "python")]
    assert first == ["python", "-c", "from slm.demo import write_texts; write_texts('text')"]
    for words in rest:
        run(words, folder)


@pytest.mark.slow
@pytest.mark.usefixtures("text")
def test_the_blocks_of_the_readme_run(tmp_path):
    page = ROOT / "README.md"
    (script,) = blocks(page, "bash")
    run_all(script, tmp_path)
    for code in blocks(page, "python"):
        run(["python", "-c", code], tmp_path)
    assert (tmp_path / "losses.csv").exists() and (tmp_path / "runs" / "random" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("text")
def test_quickstart_runs(tmp_path):
    run_all((ROOT / "experiments" / "quickstart.sh").read_text(), tmp_path)
    assert (tmp_path / "report" / "report.html").exists()


def test_the_commands_of_the_quickstart_with_a_pretrained_model_compose():
    """Its model is downloaded, so it runs nowhere in here: every key is one, every choice is there,
    and what one command reads is what others write."""
    script = (ROOT / "experiments" / "quickstart_smollm2.sh").read_text()
    numbers = dict(re.findall(r"^(\w+)=\$\{\w+:-(\d+)\}", script, re.MULTILINE))
    script = re.sub(r"\$\(\((\w+) / \d+\)\)", r"$\1", script)
    script = re.sub(r"\$(\w+)", lambda found: numbers[found[1]], script)
    lines = [line for line in script.replace("\\\n", " ").splitlines() if line.startswith("slm ")]
    names = [shlex.split(line)[1] for line in lines]
    assert names[:6] == [*["prepare"] * 3, "train", "score", "score"]
    assert names[6:] == ["train", "report", "verify"]
    jobs = sweep_jobs("train", shlex.split(lines[6])[2:])
    assert list(jobs) == ["selection=all", "selection=random", "selection=excess"]
    plain_settings(composed("train", *jobs["selection=excess"], "run_dir=x"))
    for _, name, *words in map(shlex.split, lines[:6] + lines[7:8]):
        plain_settings(composed(name, *words, *(["run_dir=x"] if name == "train" else [])))


@pytest.mark.parametrize("folder", ["kernels", "slm/selection"])
def test_the_python_of_a_page_runs_as_printed(folder):
    exec("\n".join(blocks(ROOT / folder / "README.md", "python")), {})


@pytest.mark.slow
def test_the_python_of_the_doors_runs_as_printed(tmp_path, made_corpus):
    """All of it in order, beside the folders that the README's commands make; on a CPU."""
    for name in ("base", "reference"):
        path = tmp_path / "runs" / name / "model"
        shutil.copytree(made_corpus.folder / "tokenizer", path)
        small_llama(made_corpus.vocab_size).save_pretrained(path)
    page = ROOT / "experiments" / "doors" / "README.md"
    run(["python", "-W", "ignore", "-c", "\n".join(blocks(page, "python"))], tmp_path)


def test_readme_fits_a_screen_or_four():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("stage", [*STAGES, "integrations"])
def test_a_folder_has_a_page_of_one_screen_that_names_its_files(stage):
    folder = ROOT / "slm" / stage
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= 90 and "To add" in text
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in modules if f"`{name}`" not in text} == set()
    named = set(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE))
    files = {name for cell in named for name in re.findall(r"`(\w+\.py)`", cell)}
    assert files <= modules


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(
        r"`((?:slm|conf|kernels|experiments|tests)/[\w./-]+\.(?:py|yaml|md|sh|txt))`", text
    ):
        assert (ROOT / path).exists(), path
