"""What the figures draw: the values of the rows, where they belong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.evaluate import figures
from slm.evaluate.figures import draw_needles, draw_positions


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that are drawn here."""
    found, save = [], figures.save

    def keep(figure: Any, path: Path) -> Path:
        found.append(figure)
        return save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    return found


def test_losses_by_position(tmp_path, drawn):
    spans = [(0, 2), (2, 6), (6, 8)]
    rows = [
        {"model": model, "set": name, "from_position": a, "to_position": b, "loss": loss + shift}
        for model, shift in (("a", 0.0), ("b$", 1.0))
        for name in ("one", "two")
        for (a, b), loss in zip(spans, (3.0, 2.0, 1.5), strict=True)
    ]
    assert draw_positions(rows, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["one", "two"]
    for panel in figure.axes:
        found = [patch.get_data() for patch in panel.patches]
        assert [line.values.tolist() for line in found] == [[3.0, 2.0, 1.5], [4.0, 3.0, 2.5]]
        assert found[0].edges.tolist() == [0, 2, 6, 8]


def test_a_heat_map_a_model(tmp_path, drawn):
    rows = [
        {"model": model, "set": "s", "length": n, "depth": depth, "accuracy": n * share + depth / 9}
        | {"chance": 0.25}
        for model, share in (("a", 0.001), ("b", 0.002))
        for n in (128, 256)
        for depth in (0.0, 0.5, 1.0)
    ]
    assert draw_needles(rows, tmp_path / "a.png").exists()
    (figure,) = drawn
    maps = {panel.get_title(): panel.images[0].get_array() for panel in figure.axes if panel.images}
    for model, share in (("a", 0.001), ("b", 0.002)):
        expected = [[n * share + depth / 9 for n in (128, 256)] for depth in (0.0, 0.5, 1.0)]
        np.testing.assert_allclose(maps[model], expected)  # depth goes down, length to the right
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["128", "256"]
