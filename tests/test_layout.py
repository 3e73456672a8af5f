"""What must stay as it is laid out: names, imports, one test file a module."""

import ast
import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "slm_kernels"
# What a kernel may import: triton on first use only, so it is not there after `import slm_kernels`.
KERNEL_IMPORTS = {"torch", "triton", "slm_kernels"}
UNTESTED = {
    "slm.errors",
    "slm.version",
    "slm.harness",
    "slm.speak",
    "slm.needle",
    "slm.annotate",
    "slm.dashboard",
    "slm.import",
    "slm.export",
    "slm.bind",
    "slm.consolidate",
}  # empty classes; doors of three lines
# What the tests of a command, `tests/<stage>/test_command.py`, go through.
UNTESTED |= {"slm.train.fit", "slm.train.identity", "slm.dynamics.stores"}
UNTESTED |= {"slm.quality.classifier"}
READERS = ("flat", "megatron", "datatrove", "olmo", "mds", "litdata", "datasets", "parts")
UNTESTED |= {f"slm.prepare.imports.{name}" for name in READERS}
GROUND = {
    "checks",
    "cli",
    "command_keys",
    "console",
    "errors",
    "hydra_names",
    "jobs",
    "names",
    "stage",
    "version",
}
# In the order of the data: a folder imports what stands before it, and the ground.
FLOORS = "store prepare model selection score quality evaluate train dynamics report".split()
FLOORS += ["pilot", "pivots"]
TOP = {"integrations", "verify", "demo", "harness", "dashboard", "import", "export", "bind"}
TOP |= {"speak", "needle", "consolidate", "annotate"}
# Tests of more than one module.
WHOLE = {"api", "layout", "conf", "pipeline", "older_build", "benchmarks", "doors"}
WHOLE |= {"documents", "notebook", "warm", "experiments"}


def imported(path: Path) -> Iterator[str]:
    """The first names of all imports of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield node.module.split(".")[0]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_is_no_package():
    # The name belongs to a Hugging Face package that transformers imports; a folder without
    # __init__.py gives way to it, one with __init__.py breaks `import transformers`.
    assert KERNELS.is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_slm_kernels_loads_nothing_but_torch_and_the_standard_library():
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport slm_kernels\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    allowed = set(sys.stdlib_module_names) | {"slm_kernels", "torch"}
    assert set(python(code).split()) - allowed == set()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_a_kernel_imports_nothing_else_later(path):
    assert set(imported(path)) - KERNEL_IMPORTS - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "slm").rglob("*.py")), ids=lambda path: path.stem)
def test_the_trainer_never_imports_experiments_or_tests(path):
    assert not {"experiments", "tests", "conftest"} & set(imported(path))


def test_no_module_hides_one_of_the_standard_library():
    names = {path.stem for path in (ROOT / "slm").glob("*.py") if path.stem != "__init__"}
    assert names & set(sys.stdlib_module_names) == set()


def modules() -> dict[str, Path]:
    """Dotted name -> file of everything in slm/."""
    files = sorted((ROOT / "slm").rglob("*.py"))
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def arrows(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of slm that a file imports: in functions and for the type checker, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


def floor_of(name: str) -> int:
    parts = name.split(".")
    if len(parts) == 1:
        return len(FLOORS) + 2  # `slm` names what is public
    if parts[1] in GROUND:
        return 0
    return FLOORS.index(parts[1]) + 1 if parts[1] in FLOORS else len(FLOORS) + 1


def test_a_folder_imports_only_folders_below_it():
    known = modules()
    up = {
        (name, other)
        for name, path in known.items()
        for other in arrows(path, known)
        if floor_of(other) > floor_of(name)
    }
    assert up == set()
    assert {name.split(".")[1] for name in known if floor_of(name) == len(FLOORS) + 1} == TOP


def test_no_two_modules_import_each_other_around_a_circle():
    known = modules()
    left = {name: arrows(path, known) - {name} for name, path in known.items()}
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}  # what is in a circle, and what imports it


def test_no_file_is_longer_than_a_reader_wants():
    lines = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert {path.name: count for path, count in lines.items() if count > 400} == {}


def test_every_module_is_tested():
    """By a file of its own, or by name in the tests of what it belongs to."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    for name, path in modules().items():
        own = ROOT / "tests" / path.relative_to(ROOT / "slm").with_name(f"test_{path.stem}.py")
        if path.stem not in ("__init__", "__main__") and name not in UNTESTED:
            assert own.exists() or any(name in text for text in texts), name


def test_a_test_file_stands_where_its_module_stands():
    known = {path.relative_to(ROOT / "slm").with_suffix("") for path in modules().values()}
    found = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    named = {path.with_name(path.stem.removeprefix("test_")) for path in found}
    strays = {path for path in named if path not in known and path.name != path.parent.name}
    elsewhere = ("kernels", "cluster")
    assert {str(path) for path in strays if path.parts[0] not in elsewhere} <= WHOLE


@pytest.mark.slow
def test_an_adapter_needs_its_framework_and_not_our_trainers():
    """People install us without dependencies beside frameworks that pin others.

    Those import next to the kernels folder: `python -c` puts the working directory, the root here,
    first on the path.
    """
    blocked = ["hydra", "omegaconf", "lightning", "plotly", "rich"]
    code = f"""
import sys, trl.trainer.dpo_trainer, trl.trainer.sft_trainer
for name in [name for name in sys.modules if name.split(".")[0] in {["slm", *blocked]}]:
    del sys.modules[name]
sys.modules |= dict.fromkeys({blocked})
import slm.integrations.transformers, slm.integrations.trl
from transformers import LlamaForCausalLM
print(LlamaForCausalLM)
"""
    done = warm.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "Llama" in done.stdout, done.stderr


def test_nothing_names_a_folder_of_one_machine():
    private = ("/" + "home/", "/" + "root/", "/" + "work/", "/" + "Users/")
    files = [path for folder in ("slm", "conf", "kernels") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".yaml", ".md")}
    assert [path for path, text in texts.items() if any(name in text for name in private)] == []


def readme_rows(path: Path) -> dict[str, list[str]]:
    """First cell -> the other cells of every table row of a Markdown file, without emphasis."""
    lines = path.read_text(encoding="utf-8").replace("**", "").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def test_readme_shows_the_results_of_the_experiment():
    path = ROOT / "experiments" / "2026-11-30_smollm2" / "math" / "results.csv"
    with open(path, newline="") as file:
        mean = {(row["arm"], row["set"]): float(row["mean"]) for row in csv.DictReader(file)}
    rows = readme_rows(ROOT / "README.md")
    labels = {
        "before": "base",
        "all tokens": "all",
        "random 40%": "random_0.4",
        "excess loss, 40%": "excess_0.4",
        "all tokens, curated text mixed in": "mixed",
        "the reference model itself": "reference",
    }
    for label, arm in labels.items():
        expected = [mean[arm, name] for name in ("gsm8k_test", "math_500", "wikitext")]
        assert [float(cell) for cell in rows[label]] == pytest.approx(expected, abs=5.1e-4), label


def test_the_account_of_dynamics_shows_its_results():
    folder = ROOT / "experiments" / "2026-11-21_dynamics"
    with open(folder / "results.csv", newline="") as file:
        found = {
            (row["run"], row["part"]): row for row in csv.DictReader(file) if row["seed"] == "0"
        }
    rows = readme_rows(folder / "README.md")
    labels = [(run, "all") for run in ("all tokens", "random 0.4", "excess 0.4")]
    labels += [(run, part) for run in ("all tokens", "excess 0.4") for part in ("signal", "noise")]
    for run, part in [*labels, ("excess 0.4", "gsm8k")]:
        expected = [float(found[run, part][name]) for name in ("HH", "LH", "HL", "LL")]
        label = run if part == "all" else f"{run}: {part}"
        assert [float(cell) for cell in rows[label]] == pytest.approx(expected, abs=5.1e-4), label


def test_the_sweeps_account_shows_its_results():
    folder = ROOT / "experiments" / "2026-11-21_sweep_k"
    with open(folder / "results.csv", newline="") as file:
        mean = {(row["arm"], row["set"]): float(row["mean"]) for row in csv.DictReader(file)}
    rows = readme_rows(folder / "README.md")
    labels = {
        "all tokens (k = 1)": "excess 1",
        **{
            f"{rule} {k}": f"{rule} {k}"
            for rule in ("excess", "random")
            for k in (0.2, 0.4, 0.6, 0.8)
        },
        "softmax of excess, 1 nat, cap 5": "softmax",
        "relu of excess, 1 nat, cap 5": "relu",
        "sigmoid of excess, 1 nat": "sigmoid",
        "0.1 all + 0.9 excess 0.6": "mixture 0.6",
        "low reference loss, 0.7": "reference_loss 0.7",
        "low reference loss and entropy, 0.7 each (53% kept)": "intersection",
        "middle of the loss, 0.6": "middle 0.6",
        "highest loss, 0.6": "loss 0.6",
        "*all tokens, curated text mixed in*": "curated text mixed in",
        "*the reference model itself (819,200 curated tokens)*": "reference model",
    }
    assert set(labels.values()) | {"random 1"} == {arm for arm, _ in mean}
    for label, arm in labels.items():
        expected = [mean[arm, name] for name in ("gsm8k_test", "math_500", "noisy")]
        assert [float(cell) for cell in rows[label][:3]] == pytest.approx(expected, abs=5.1e-4), (
            label
        )


def test_the_floor_of_transformers_is_the_release_that_ci_runs():
    """Below it nothing was tried, and tokenizers were read otherwise."""
    needed = re.findall(
        r'^    "transformers>=([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    pinned = re.findall(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert needed == pinned and len(needed) == 1


def test_the_account_of_the_selected_backward_shows_its_results():
    folder = ROOT / "experiments" / "2026-11-30_selected_backward"
    rows, sets = readme_rows(folder / "README.md"), ("gsm8k_test", "math_500", "noisy")
    with open(folder / "results.csv", newline="") as file:
        mean = {(row["arm"], row["set"]): float(row["mean"]) for row in csv.DictReader(file)}
    labels = {"all tokens": "all tokens", "*the reference model itself*": "reference model"}
    for k in (0.6, 0.4, 0.2):
        labels |= {f"{k} {b}": f"excess k = {k}, backward={b}" for b in ("exact", "selected")}
        labels[f"{k} selected, equal FLOPs"] = f"selected {k} at equal FLOPs"
    for label, arm in labels.items():
        found = [float(cell) for cell in rows[label][:3]]
        assert found == pytest.approx([mean[arm, name] for name in sets], abs=5.1e-4), label
    with open(folder / "differences.csv", newline="") as file:
        for row in csv.DictReader(file):
            cell = rows[f"{row['select_ratio']}, {row['at']}"][sets.index(row["set"])]
            assert float(cell.split()[0]) == pytest.approx(float(row["difference"]), abs=5.1e-4)
