"""One line in a list puts a figure on the page, on paper and in W&B."""

import json
from typing import Any

import numpy as np
import pytest

from figure_helpers import rows_of
from page_helpers import make_analysis, prose
from slm.dynamics import figures as module
from slm.dynamics import wandb_media
from slm.dynamics.class_figures import Shown
from slm.dynamics.colours import BLUE
from slm.dynamics.figure import LOSS, Figure, Series, one_panel
from slm.dynamics.figures import FIGURES, Kind, made
from slm.report.page import page
from slm.report.paper import figures as paper


@pytest.fixture
def analysis(tmp_path):
    return make_analysis(tmp_path / "d", prose(8, 17), checkpoints=7)


def median_loss(shown: Shown) -> Figure:
    """A figure that is not ours."""
    values = np.array([np.median(column) for column in shown.analysis.losses])
    line = Series("median", BLUE, shown.analysis.tokens_seen, values)
    return one_panel("Median loss", LOSS, [line], "Of all frozen tokens.")


@pytest.mark.usefixtures("sketched")
def test_one_line_shows_a_figure_everywhere(tmp_path, analysis, monkeypatch):
    kinds = (*FIGURES, Kind(median_loss, "classes", wandb="median"))
    for reader in (page, paper, wandb_media):
        monkeypatch.setattr(reader, "FIGURES", kinds)
    medians = [float(np.median(column)) for column in analysis.losses]
    page.write_page(tmp_path / "page.html", "t", [analysis])
    text = (tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0]
    box = json.loads(text)["runs"][0]["figures"]["classes"][-1]
    assert (box["figure"], box["title"]) == ("median_loss", "Median loss")
    assert box["data"][0]["y"] == pytest.approx(medians, abs=6e-5)
    written = paper.paper_figures([analysis], tmp_path)
    path = tmp_path / "median_loss-run.png"
    assert path in written and path.with_suffix(".svg").exists()
    assert [float(row["loss_nats"]) for row in rows_of(path)] == medians
    lines: Any = wandb_media.final_media(analysis)["dynamics/median_loss"]
    assert lines == ("median", {"median": (analysis.tokens_seen.tolist(), medians)})


def test_what_cannot_be_drawn_is_left_out(tmp_path, caplog):
    blind = make_analysis(tmp_path, prose(2, 9), references=False)
    with caplog.at_level("INFO"):
        found = made(FIGURES, Shown(blind), module.logging.INFO)
    names = [kind.name for kind in found]
    assert names == ["shares", "loss_by_class", "classes", "trajectories"]
    assert "kept_frac_by_class is not drawn" in caplog.text
    assert "has no reference scores, excess k = 0.5 needs them" in caplog.text
