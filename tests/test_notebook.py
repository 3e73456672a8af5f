"""experiments/notebook.ipynb runs from text to a figure; it is committed without what it showed."""

import json
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from jupyter_client import launcher

import warm

NOTEBOOK = Path(__file__).resolve().parents[1] / "experiments" / "notebook.ipynb"


def test_it_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


SMALLER = {  # what only takes time
    "st_size < 20_000": "st_size < 6_000",
    "0.6, 200_000, 80_000": "0.6, 4_096, 4_096",
    '\\"heldout_windows\\": 32': '\\"heldout_windows\\": 8',
    "num_targets=5_000": "num_targets=500",
}


def read_smaller() -> Any:
    text = NOTEBOOK.read_text(encoding="utf-8")
    for mine, smaller in SMALLER.items():
        assert text.count(mine) == 1
        text = text.replace(mine, smaller)
    notebook: Any = nbformat.reads(text, as_version=4)
    # ipykernel asks for it with a variable, which comes too late where matplotlib is imported.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%matplotlib inline"))
    return notebook


@pytest.mark.slow
def test_it_runs_from_text_to_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(launcher, "Popen", warm.Popen)  # a real kernel that has the imports
    notebook = read_smaller()
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    shown: list[Any] = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell["outputs"]
    ]
    assert sum("image/png" in output.data for output in shown if "data" in output) == 1
    said = "".join(
        o["text"] for o in shown if o["output_type"] == "stream" and o["name"] == "stdout"
    )
    # The sentence says what the table above it says.
    table = dict(re.findall(r"^(\w+) +docs +([\d.]+) nats", said, re.M))
    assert table.keys() == {"base", "reference", "all", "random", "excess"}
    order = re.search(r"best first: (.+?)\.", said)
    assert order and order[1].split(", ") == sorted(table, key=lambda name: float(table[name]))
    (page,) = tmp_path.rglob("report.html")
    assert page.stat().st_size > 100_000
