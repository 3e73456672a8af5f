"""The page: nothing in it is markup but its own, it asks no network, and a browser shows it."""

import csv
import html
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from page_helpers import make_analysis, prose, truth_rows
from run_helpers import compose_report, make_run
from slm.dynamics.analysis import Analysis, analyse
from slm.dynamics.classes import CLASSES
from slm.dynamics.figure import Figure
from slm.dynamics.figures import COMPARED, FIGURES, made
from slm.report.arms import arms_of, read_runs
from slm.report.command import report
from slm.report.differences import Difference
from slm.report.page import page as page_module
from slm.report.page.page import (
    SweepFigures,
    as_json,
    sweep_table,
    truth_ratios,
    truth_table,
    write_page,
)
from slm.report.page.tokens import draw_sample, shown_targets
from slm.report.provenance import Provenance, provenance
from slm.report.sweep_figures import (
    SWEEP_FIGURES,
    Curves,
    Sweep,
    difference_panel,
    ratio_figure,
    ratio_panel,
    tokens_figure,
)
from slm.report.table import control_runs, table_rows
from slm.train.curves import Curve

EVIL = [
    b"</script><img src=x onerror=window.hit=1>",
    b"<!--<script>",
    b"\"quotes'",
    b"\n",
    b"\t",
    b" &lt;b&gt;",
    "\U0001f600".encode(),
    "مرحبا".encode(),
    "שלום".encode(),
    b"\xe2\x80",
    b"\x99",
    "\u202eabc\u2028".encode(),
    b"\xff",
    b"  {{ 1 }}",
    b"plain",
    b"\r",
]
# What the browser shows of them, with its marks.
SHOWN = {
    b"\n": "↵\n",
    b"\t": "→\t",
    b"\xe2\x80": "⟨e2 80⟩",
    b"\x99": "\u2019",
    "\u202eabc\u2028".encode(): "⟨U+202E⟩abc⟨U+2028⟩",
    b"\xff": "\ufffd",
    b"\r": "⟨CR⟩",
}
EVIL_NAME = "</title><img src=x onerror=window.hit=2>"


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Analysis:
    folder = tmp_path_factory.mktemp("evil")
    texts = [EVIL, [b"plain"] * len(EVIL), EVIL]
    return make_analysis(folder / "d", texts, EVIL_NAME, sources=(EVIL_NAME, "b"))


def make_sweep(name: str = "excess") -> SweepFigures:
    seen = np.arange(5) * 1000.0
    curves = [Curve("k = 0.5", seen, np.array([9.0, 5, 4, 3.5, end])) for end in (3.25, 3.0)]
    control = [Curve("all tokens", seen, np.array([9.0, 5.5, 4, 3.5, 3.3]))]
    points: Any = {name: [(0.5, [3.25, 3.0]), (0.7, [3.5])]}
    found = {f"{name} 0.5": Difference(-0.175, 0.02, [-0.05, -0.3])}
    differences = Figure("", [difference_panel("math", found)])
    ratios = ratio_figure([ratio_panel("math", points, {}, {"all tokens": 3.3})])
    tokens = tokens_figure([[Curves(f"{name}, math", "math", curves, control)]])
    row = {"rule": "excess", "set": "math", "windows": 1256}
    row |= {"tokens_seen": 4000, "tokens_selected": 2000}
    rows = [
        row
        | {"arm": f"{name} 0.5", "mean": 3.125, "low": 3.0, "high": 3.25, "seeds": 2}
        | {"minus_all_tokens": -0.175, "minus_all_tokens_half_width": 0.0213}
        | {"tokens_to_all_tokens_loss": 3456},
        row
        | {"arm": "all", "mean": 3.3, "low": 3.3, "high": 3.3, "seeds": 1}
        | {"minus_all_tokens": None, "minus_all_tokens_half_width": None}
        | {"tokens_to_all_tokens_loss": None},
    ]
    return SweepFigures(
        dict(zip(SWEEP_FIGURES, (differences, ratios, tokens), strict=True)),
        ["math"],
        rows,
        ["Left out: `x`: failed"],
        Provenance({"model": "m"}, ["lr"], {f"{name} 0.5": ["0.1"], "all": [""]}),
        "3 runs in 2 arms, 1 to 2 seeds each",
    )


def embedded(page: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def box_of(run: Any, name: str) -> Any:
    boxes = [box for section in run["figures"].values() for box in section]
    (found,) = [box for box in boxes if box["figure"] == name]
    return found


def own_part(page: str) -> str:
    """Without Plotly: the last but one script."""
    parts = page.split("<script>")
    assert len(parts) == 3
    return parts[0] + parts[2]


# ---- the file -----------------------------------------------------------------------------------


def test_json_in_a_script_element_reads_the_same_and_holds_no_markup():
    value = {"<a>": ["</script>", "a&b", "\u2028\u2029", "é😀", None, 1.5, '"', "\\u003c"]}
    text = as_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set("<>&") & set(text)
    with pytest.raises(ValueError):
        as_json([float("nan")])


def test_no_text_becomes_markup(tmp_path, evil):
    write_page(tmp_path / "page.html", EVIL_NAME, [evil], make_sweep(EVIL_NAME))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in own_part(page) and "onerror=window" in own_part(page)
    assert own_part(page).count("</script>") == 2  # the data's and the page's own
    assert page.count("</title>") == 1 + page.split("<script>")[1].count("</title>")
    texts = embedded(page)["windows"].popitem()[1][0]["texts"]
    assert texts[0].encode() == EVIL[0] and texts[10] == "\u2019"


def test_what_models_say_stands_in_a_table_and_as_text(tmp_path):
    texts = [("m", "p", EVIL_NAME, 3), ("m", "p", "second of p", 1), ("n", "p", "b c b c", 0)]
    rows: list[dict[str, Any]] = [
        {"model": model, "prompt": prompt, "text": text, "num_tokens": 4, "ended": False}
        | {"copied_tokens": n, "longest_copied_tokens": n, "longest_copied": text[:n]}
        for model, prompt, text, n in texts
    ]
    write_page(tmp_path / "page.html", "t", [], make_sweep(), speech=rows)
    own = own_part((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "<img" not in own and "onerror=window" in own and "second of p" not in own
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)", line) for line in own.splitlines()]
    (m,), (n,) = ([line for line in cells if line[:1] == [name]] for name in "mn")
    assert m[1:4] == ["2", "4.0", "0.0%"] and m[-2:] == ["50.0%", "3"]
    assert n == ["n", "1", "4.0", "0.0%", "0.500", "0.667", "1.000", "0.0%", "0.0%", "0"]
    bare = [{k: v for k, v in row.items() if "copied" not in k} for row in rows[2:]]
    many = [bare[0] | {"prompt": f"prompt {i}"} for i in range(13)]
    write_page(tmp_path / "page.html", "t", [], make_sweep(), speech=many)
    own = own_part((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "opied" not in own.split("What the models say")[1].split("</section>")[0]
    assert "prompt 11" in own and "prompt 12" not in own and "The first 12 of 13 prompts" in own
    write_page(tmp_path / "page.html", "t", [], make_sweep())
    assert "What the models say" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_file_names_nothing_to_fetch(tmp_path, evil):
    write_page(tmp_path / "page.html", "t", [evil], make_sweep())
    own = own_part((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not re.findall(r"https?:|\bsrc=(?!x)|<link|@import|url\(", own)
    assert "default-src 'none'" in own


def test_the_data_are_the_analysis(tmp_path, evil):
    write_page(tmp_path / "page.html", "t", [evil], seed=3)
    run = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"][0]
    columns, found = run["columns"], evil.trajectories
    shown = shown_targets(evil.tokens, draw_sample(evil.tokens, 24, 12_000, 3))
    assert sorted(shown) == list(range(evil.tokens.num_targets))  # three windows: all are shown
    assert columns["class"] == found.label[shown].tolist()
    assert columns["last"] == pytest.approx(found.last[shown], abs=6e-4)
    assert evil.kept is not None and columns["times"] == evil.kept.times[shown].tolist()
    assert run["tokens_seen"] == evil.tokens_seen.tolist()
    assert run["sources"] == [EVIL_NAME, "b"]
    losses = {trace["name"]: trace["y"] for trace in box_of(run, "loss_by_class")["data"]}
    assert losses["all tokens"] == pytest.approx(evil.mean_losses, abs=6e-5)
    assert len(run["examples"]) == len(run["example_columns"]["class"])
    of_classes = len(run["examples"]) - sum(one["count"] for one in run["dropped"])
    found = run["example_columns"]["class"][:of_classes]
    assert found == sorted(found)


def test_runs_on_the_same_tokens_share_their_text(tmp_path):
    runs = [make_analysis(tmp_path / n, prose(4, 9), n) for n in "ab"]
    other = make_analysis(tmp_path / "c", prose(5, 9), "c")
    write_page(tmp_path / "page.html", "t", [*runs, other])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = embedded(page)
    assert len(data["windows"]) == 2 and [run["name"] for run in data["runs"]] == ["a", "b", "c"]
    assert data["runs"][0]["set"] == data["runs"][1]["set"] != data["runs"][2]["set"]
    assert "were scored on different tokens" in page
    write_page(tmp_path / "page.html", "t", runs)
    assert "different tokens" not in own_part((tmp_path / "page.html").read_text())


def test_either_part_may_be_absent(tmp_path, evil):
    write_page(tmp_path / "sweep.html", "t", [], make_sweep())
    write_page(tmp_path / "run.html", "t", [evil])
    sweep, run = ((tmp_path / f"{n}.html").read_text(encoding="utf-8") for n in ("sweep", "run"))
    assert 'id="sweep"' in sweep and 'id="dynamics"' not in sweep
    assert 'id="sweep"' not in run and 'id="dynamics"' in run
    assert (
        embedded(run)["compared"] == embedded(run)["sweep"] == {} and embedded(sweep)["runs"] == []
    )


def test_uneven_checkpoints_are_said(tmp_path):
    analysis = make_analysis(tmp_path / "d", prose(2, 9))
    write_page(tmp_path / "even.html", "t", [analysis])
    analysis.store.append(90_000, np.ones(analysis.tokens.num_targets))
    uneven = make_analysis(tmp_path / "d", prose(2, 9))
    write_page(tmp_path / "uneven.html", "t", [uneven])
    said = ["not evenly spaced" in (tmp_path / f"{n}.html").read_text() for n in ("even", "uneven")]
    assert said == [False, True]


def cells(page: str, table: int) -> list[list[str]]:
    body = re.findall(r"<table>(.*?)</table>", page, re.S)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    plain = [[re.sub(r"<[^>]*>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]
    return [[html.unescape(cell) for cell in row] for row in plain]


def test_the_tables_hold_the_numbers(tmp_path):
    analysis = make_analysis(tmp_path / "d", prose(4, 9))
    write_page(tmp_path / "page.html", "t", [analysis], make_sweep())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reach, minus = "tokens to all tokens’ loss, math", "minus all tokens, math"
    assert cells(page, 0) == [["arm", "lr"], ["excess 0.5", "0.1"], ["all", "–"]]
    assert cells(page, 1) == [
        ["arm", "math 1,256 windows", minus, "seeds", "tokens seen", "tokens selected", reach],
        ["excess 0.5", "3.12 3.00 to 3.25", "-0.175 ± 0.021", "2", "4,000", "2,000", "3,456"],
        ["all", "3.30", "–", "1", "4,000", "2,000", "–"],
    ]  # fmt: skip
    assert sweep_table(make_sweep())["best"] == {"math": 3.125}
    for row, name in zip(cells(page, 2)[1:], CLASSES, strict=True):
        share = analysis.shares[name]
        assert row[1:4] == [
            f"{100 * share.share:.1f}%",
            f"{100 * share.low:.1f}% to {100 * share.high:.1f}%",
            f"{share.num_tokens}",
        ]
        assert row[5] == f"{analysis.class_losses[-1, CLASSES.index(name)]:.3f}"
    assert f"level (mean loss) {analysis.mean_loss:.3f} nats" in page


def test_the_reports_own_panels_fit(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"half{seed}", ratio=0.5, seed=seed, final=3.0 + seed)
        make_run(tmp_path / "runs" / f"all{seed}", ratio=1.0, seed=seed, final=3.5 + seed)
        make_run(tmp_path / "runs" / f"soft{seed}", "Softmax", None, seed, 3.25)
    arms = arms_of(read_runs([str(tmp_path / "runs")])[0])
    controls = control_runs(arms)
    sweep = SweepFigures(
        made(SWEEP_FIGURES, Sweep(arms, [], controls, ["a"])),
        ["a"],
        table_rows(arms, ["a"], controls),
        [],
        provenance(arms),
        "",
    )
    write_page(tmp_path / "page.html", "t", [], sweep)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [row[:2] for row in cells(page, 1)[1:]] == [
        ["excess k = 0.5", "3.5 3.0 to 4.0"],
        ["excess k = 1", "4.0 3.5 to 4.5"],
        ["softmax", "3.2 3.2 to 3.2"],
    ]
    drawn = embedded(page)["sweep"]
    lines = {trace["name"]: trace["y"] for trace in drawn["ratios"][0]["data"]}
    assert lines == {"excess": [3.5, 4.0], "softmax": [3.25, 3.25], "all tokens": [4.0, 4.0]}
    assert len(drawn["tokens"]) == 2


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_said_of_seeds_is_said_where_there_are_several(tmp_path, seeds):
    for seed in range(seeds):
        for ratio in (0.5, 1.0):
            make_run(
                tmp_path / "runs" / f"{ratio}-{seed}", ratio=ratio, seed=seed, final=3.0 + seed
            )
    path = report(**compose_report(tmp_path / "runs", tmp_path / "out")).page
    page, table = path.read_text(encoding="utf-8"), (path.parent / "table.md").read_text()
    for words in ("Crosses are single seeds", "means over seeds", "mean over seeds (lowest to"):
        assert (words in own_part(page)) == (seeds > 1), words
    assert ("(lowest to highest)" in table) == (seeds > 1)


def test_the_table_of_signal_and_noise_is_of_the_last_checkpoint():
    found = truth_table(truth_rows())
    assert [(row["part"], row["label"]) for row in found] == [
        ("all", "high excess loss"),
        ("all", "random"),
        ("<web>", "high excess loss"),
        ("<web>", "random"),
    ]
    assert {row["tokens_seen"] for row in found} == {2000}
    assert found[0]["precision"] == [0.8 + 0.1, 0.8]
    assert truth_ratios(truth_rows()) == ["0.2", "0.4"]
    assert truth_table([]) == truth_ratios([]) == []


def test_every_figure_has_a_section_of_the_page():
    template = (Path(page_module.__file__).parent / "page.html").read_text()
    sections = set(re.findall(r'data-section="(\w+)"', template))
    kinds = (*FIGURES, *COMPARED, *SWEEP_FIGURES)
    assert {kind.section for kind in kinds} - {""} == sections


def test_many_runs_stay_small(tmp_path):
    runs = [
        make_analysis(tmp_path / str(n), prose(30, 257), f"run {n}", batch=32) for n in range(6)
    ]
    write_page(tmp_path / "page.html", "t", runs)
    assert (tmp_path / "page.html").stat().st_size < 8_000_000
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = sum(len(run["columns"]["class"]) for run in embedded(page)["runs"])
    assert 15_000 < shown <= 18_000


def test_a_page_that_is_too_large_is_said(tmp_path, evil, monkeypatch, caplog):
    write_page(tmp_path / "page.html", "t", [evil])
    assert caplog.text == ""
    monkeypatch.setattr(page_module, "MAX_BYTES", 1_000_000)
    write_page(tmp_path / "page.html", "t", [evil])
    assert "MB, browsers will be slow: show fewer runs" in caplog.text


def test_classes_of_other_checkpoints_are_not_compared_unsaid(tmp_path):
    runs = [make_analysis(tmp_path / n, prose(4, 9), n) for n in "ab"]
    write_page(tmp_path / "page.html", "t", runs)
    said = "scored at different checkpoints"
    assert said not in (tmp_path / "page.html").read_text()
    for other in (make_analysis(tmp_path / "c", prose(4, 9), "c", checkpoints=5),
                  replace(runs[1], threshold=0.5)):  # fmt: skip
        write_page(tmp_path / "page.html", "t", [runs[0], other])
        assert said in (tmp_path / "page.html").read_text()


def test_without_a_ratio_there_is_no_empty_figure(tmp_path):
    sweep = make_sweep()
    without = {kind: figure for kind, figure in sweep.figures.items() if kind.section == "tokens"}
    for figures, shown in ((sweep.figures, True), (without, False)):
        write_page(tmp_path / "page.html", "t", [], sweep._replace(figures=figures))
        page = (tmp_path / "page.html").read_text()
        assert ("Final loss against select_ratio" in page) == shown


@pytest.mark.slow
def test_the_page_of_320_000_tokens_at_64_checkpoints_is_small(tmp_path):
    analysis = make_analysis(tmp_path / "d", prose(160, 2001), checkpoints=64, batch=32)
    assert analysis.tokens.num_targets == 319_999
    write_page(tmp_path / "page.html", "t", [analysis])
    assert (tmp_path / "page.html").stat().st_size < 8_000_000


# ---- in a browser -------------------------------------------------------------------------------


def browser_path() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = "needs Chromium or Chrome on the PATH, e.g. apt-get install chromium"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.mark.parametrize(
    ("ci", "outcome"), [(False, pytest.skip.Exception), (True, pytest.fail.Exception)]
)
def test_without_a_browser_ci_fails_and_others_skip(monkeypatch, ci, outcome):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", "true")
    with pytest.raises(outcome, match="apt-get install chromium"):
        browser_path()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = browser_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, evil) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [
        make_analysis(folder / name, prose(30, 129), f"run {name}", dead=9, labels=name == "a")
        for name in "ab"
    ]
    truth = truth_rows("run a")
    write_page(folder / "page.html", "A page", [*runs, evil], make_sweep(), truth)
    return folder / "page.html"


class Watched(NamedTuple):
    """A page, what it complained of and what it fetched."""

    page: Page
    complaints: list[str]
    requests: list[str]

    def assert_quiet(self) -> None:
        assert self.complaints == [] and not self.page.evaluate("window.hit || 0")
        assert len(self.requests) == 1 and self.requests[0].startswith("file:")


@pytest.fixture(scope="module")
def open_page(browser) -> Callable[..., Watched]:
    """open_page(file, scheme): the figures are drawn."""

    def open_it(file: Path, scheme: Any = "light") -> Watched:
        found = Watched(browser.new_context(viewport=SIZE, color_scheme=scheme).new_page(), [], [])
        found.page.on("console", lambda message: found.complaints.append(message.text))
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(file.as_uri())
        wait_until(found.page, "document.querySelectorAll('.plot .main-svg').length > 0")
        return found

    return open_it


@pytest.fixture(scope="module")
def opened(open_page, page_file) -> Watched:
    return open_page(page_file)


@pytest.fixture(scope="module")
def opened_sweep(open_page, tmp_path_factory) -> Watched:
    path = tmp_path_factory.mktemp("sweep") / "sweep.html"
    write_page(path, "t", [], make_sweep())
    return open_page(path, "dark")


@pytest.fixture
def page(opened, request) -> Iterator[Page]:
    """As when it was opened, or with another run; then it has neither complained nor fetched."""
    page = opened.page
    page.set_viewport_size(SIZE)
    page.emulate_media(color_scheme="light")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    choose_run(page, getattr(request, "param", 0))
    page.check("input[value=class]")
    yield page
    opened.assert_quiet()


SIZE: Any = {"width": 1200, "height": 900}
GROUND = "getComputedStyle(document.documentElement).backgroundColor"
INK = "document.querySelector('.plot').layout.font.color"
TIP = (
    "[...document.querySelectorAll('#tip dt')].map(e => [e.textContent, e.nextSibling.textContent])"
)
GROUNDS = "[...document.querySelectorAll('.t')].map(e => getComputedStyle(e).backgroundColor)"
# WCAG's contrast of each token's text with what is behind it; a canvas resolves any colour.
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paper = getComputedStyle(document.documentElement).backgroundColor;
  const luminance = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = ".t, p, figcaption, dd, td, th, h1, h2, h3, #legend";
  return [...document.querySelectorAll(texts)].map((e) => {
    const style = getComputedStyle(e), ground = luminance(paper, style.backgroundColor);
    const text = luminance(paper, style.backgroundColor, style.color);
    return (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
  });
}"""


PLOTS = "[...document.querySelectorAll('.plot')].map(e => [e.clientWidth, e._fullLayout.width])"


def wait_until(page: Page, expression: str, seconds: float = 10) -> None:
    """`wait_for_function` evaluates strings in the page, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} never came true"
        page.wait_for_timeout(50)


def choose_run(page: Page, index: int) -> None:
    if page.locator("#run").input_value() != str(index):
        page.select_option("#run", str(index))


@pytest.mark.slow
def test_a_tooltip_has_the_numbers_of_its_token(page, page_file):
    data = embedded(page_file.read_text(encoding="utf-8"))
    run = data["runs"][0]
    window, columns = data["windows"][run["set"]][0], run["columns"]
    assert window["live"][:3] == [0, 1, 1]
    page.locator(".t").nth(2).hover()
    found = dict(page.evaluate(TIP))
    seen = run["tokens_seen"]
    below = columns["first_below"][1]

    def nats(name: str, sign: str = "") -> str:
        return f"{columns[name][1]:{sign}.3f}".replace("-", "−")

    assert found == {
        "token id": str(window["ids"][2]),
        "window": str(window["window"]),
        "source": run["sources"][columns["source"][1]],
        "class": data["classes"][columns["class"][1]]["name"],
        "loss, first and last": f"{nats('first')} → {nats('last')}",
        "fitted line": f"{nats('start')} → {nats('end')}",
        "delta": nats("delta", "+"),
        "variance around the line": nats("variance"),
        "crossings of the mean": str(columns["crossings"][1]),
        "first below the mean": f"after {seen[below]:,} tokens" if below >= 0 else "never",
        "reference loss": nats("reference"),
        "excess loss, last": nats("excess", "+"),
        "labelled as": columns["label"][1],
        "times selected": f"{columns['times'][1]} of {len(seen)}",
    }
    assert page.locator("#tip .head").text_content() == window["texts"][2]
    drawn = """[...document.querySelector("#tip canvas").getContext("2d")
      .getImageData(0, 0, 240, 56).data].some(value => value > 0)"""
    assert page.evaluate(drawn)


@pytest.mark.slow
def test_the_second_page_goes_on_where_the_first_ended(page, page_file):
    data = embedded(page_file.read_text(encoding="utf-8"))
    run = data["runs"][0]
    windows = data["windows"][run["set"]]
    page.click("#next")
    assert page.locator("#place").text_content() == f"windows 6 to 10 of {len(windows)}"
    number = sum(sum(window["live"]) for window in windows[:5]) + 6
    page.locator(".t").nth(7).hover()
    assert dict(page.evaluate(TIP))["loss, first and last"] == (
        f"{run['columns']['first'][number]:.3f} → {run['columns']['last'][number]:.3f}"
    )
    page.click("#previous")
    assert page.locator("#previous").is_disabled()


@pytest.mark.slow
def test_the_keyboard_moves_from_token_to_token(page):
    page.locator(".t").first.focus()
    assert dict(page.evaluate(TIP))[""] == "no target: no loss here"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".t").nth(2).evaluate("e => e === document.activeElement")
    assert page.locator("#tip").is_visible() and "delta" in dict(page.evaluate(TIP))
    assert page.locator('.t[tabindex="0"]').count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


@pytest.mark.slow
def test_the_switches_change_the_colours(page, page_file):
    data = embedded(page_file.read_text(encoding="utf-8"))
    run = data["runs"][0]
    live = [bit for window in data["windows"][run["set"]][:5] for bit in window["live"]]
    places = np.flatnonzero(live)
    columns = {
        name: np.array(run["columns"][name][: len(places)]) for name in ("class", "excess", "times")
    }
    grounds = {}
    for mode in ("class", "excess", "times"):
        page.check(f"input[value={mode}]")
        grounds[mode] = np.array(page.evaluate(GROUNDS))
        legend = page.locator("#legend").text_content() or ""
        assert {"class": "forgotten", "excess": "0", "times": "checkpoints"}[mode] in legend
        assert len(set(np.delete(grounds[mode], places))) == 1  # no targets
    by_class = grounds["class"][places]
    assert [len(set(by_class[columns["class"] == i])) for i in range(4)] == [1, 1, 1, 1]
    assert len(set(by_class)) == 4
    by_times = grounds["times"][places]
    for count in set(columns["times"].tolist()):
        assert len(set(by_times[columns["times"] == count])) == 1
    assert len(set(by_times)) == len(set(columns["times"].tolist()))
    order = np.argsort(columns["excess"])
    blue, orange = (grounds["excess"][places][order[place]] for place in (0, -1))
    reds = [float(re.findall(r"[\d.]+", text)[0]) for text in (blue, orange)]
    assert reds[0] < 0.7 * reds[1]


@pytest.mark.slow
def test_labels_colour_the_text(page, page_file):
    page.check("input[value=label]")
    labels = embedded(page_file.read_text(encoding="utf-8"))["runs"][0]["columns"]["label"]
    colour = "all => all.map(e => getComputedStyle(e).backgroundColor)"
    grounds = np.array(page.locator(".t:not(.dead)").evaluate_all(colour))
    shown = np.array(labels[: len(grounds)])
    of = {word: set(grounds[shown == word]) for word in ("signal", "noise", "neither")}
    assert all(len(found) == 1 for found in of.values())
    assert len(set.union(*of.values())) == 3


@pytest.mark.slow
def test_search_goes_from_one_place_to_the_next(page, page_file):
    texts = embedded(page_file.read_text(encoding="utf-8"))["windows"]
    joined = ["".join(window["texts"]).lower() for window in next(iter(texts.values()))]
    count = sum(text.count("token falls") for text in joined)
    page.fill("#search", "Token falls")
    assert page.locator("#found").text_content() == f"{count} found"
    for number in (1, 2):
        page.press("#search", "Enter")
        assert page.locator("#found").text_content() == f"{number} of {count}"
        assert page.locator(".hit").all_text_contents() == [" token", " falls"]
    page.fill("#search", "nowhere")
    assert page.locator("#found").text_content() == "0 found"
    page.fill("#search", "")


@pytest.mark.slow
def test_what_is_never_selected_is_shown_by_source(page, page_file):
    run = embedded(page_file.read_text(encoding="utf-8"))["runs"][0]
    titles = page.locator("#dropped h4").all_text_contents()
    assert titles == [f"{one['source']} ({one['kept']} selected)" for one in run["dropped"]]
    start, count = len(run["examples"]), sum(one["count"] for one in run["dropped"])
    assert run["example_columns"]["times"][start - count :] == [0] * count
    names = [run["sources"][index] for index in run["example_columns"]["source"][start - count :]]
    assert names == [one["source"] for one in run["dropped"] for _ in range(one["count"])]


@pytest.mark.slow
def test_contents_link_every_heading_that_is_shown(page):
    shown = page.locator("main :is(h2, h3)[id]:visible")
    headings = shown.evaluate_all("all => all.map(e => e.id)")
    links = page.locator("nav a").evaluate_all("all => all.map(e => e.hash.slice(1))")
    assert links == headings and {"sweep", "arms", "table", "dynamics", "text"} <= set(links)
    page.locator("nav a[href='#table']").click()
    page.wait_for_function("Math.abs(byId('table').getBoundingClientRect().top) < 5")


@pytest.mark.slow
def test_a_figures_csv_has_what_is_drawn(page):
    with page.expect_download() as download:
        page.locator("[data-section=ratios] .csv").first.click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.reader(file))
    x, y = "select_ratio (k): share of tokens trained on", "final held-out loss (nats per token)"
    assert rows[0] == ["series", x, y, "low", "high"]
    assert rows[1] == ["excess", "0.5", "3.125", "3", "3.25"]
    assert download.value.suggested_filename.endswith(".csv")


@pytest.mark.slow
def test_a_key_of_a_legend_hides_what_it_names(page):
    key = page.locator("[data-section=compared] .key").first
    figure = key.locator("xpath=ancestor::figure")
    visible = "box => box.querySelector('.plot').data.map((trace) => trace.visible)"
    assert set(figure.evaluate(visible)) == {True}
    key.click()
    assert key.get_attribute("aria-pressed") == "false" and False in figure.evaluate(visible)
    key.click()
    assert set(figure.evaluate(visible)) == {True}


def test_the_button_turns_the_page_light_and_back(opened_sweep, page):
    """The one page is as the system is, dark, the other light."""
    sweep = opened_sweep.page
    light = page.evaluate(GROUND), page.evaluate(INK)
    dark = sweep.evaluate(GROUND), sweep.evaluate(INK)
    assert light[0] != dark[0] and light[1] != dark[1]
    assert [shown.locator("#theme").text_content() for shown in (page, sweep)] == ["Dark", "Light"]
    sweep.click("#theme")
    assert (sweep.evaluate(GROUND), sweep.evaluate(INK)) == light
    assert sweep.locator("#theme").text_content() == "Dark"
    sweep.click("#theme")
    assert (sweep.evaluate(GROUND), sweep.evaluate(INK)) == dark
    opened_sweep.assert_quiet()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, tmp_path, scheme):
    page.emulate_media(color_scheme=scheme)
    wait_until(page, f"{INK} === getComputedStyle(document.documentElement).color")
    for width in (390, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        wait_until(page, f"({PLOTS}).every(([outer, inner]) => Math.abs(outer - inner) <= 1)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for mode in ("class", "excess", "times"):
            page.check(f"input[value={mode}]")
            assert min(page.evaluate(CONTRASTS)) >= 4.5, mode
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
        assert (tmp_path / f"{scheme}-{width}.png").stat().st_size > 50_000


@pytest.mark.slow
def test_plots_follow_the_window(page):
    page.set_viewport_size({"width": 1600, "height": 900})
    page.set_viewport_size({"width": 500, "height": 900})
    wait_until(
        page, f"({PLOTS}).every(([outer, inner]) => inner <= 500 && Math.abs(outer - inner) <= 1)"
    )


@pytest.mark.slow
def test_on_paper_plots_are_as_wide_as_their_place(page):
    page.set_viewport_size({"width": 1600, "height": 900})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate(PLOTS)
    assert {outer for outer, _ in widths} == {310, 640} and all(a == b for a, b in widths)
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    wait_until(
        page, f"({PLOTS}).every(([outer, inner]) => outer > 310 && Math.abs(outer - inner) <= 1)"
    )


@pytest.mark.slow
def test_an_example_is_pointed_out_in_its_plot(page, page_file):
    data = embedded(page_file.read_text(encoding="utf-8"))
    page.locator(".examples button").nth(1).focus()
    faint = "document.querySelector('[data-figure=trajectories]').data.map(t => t.opacity)"
    assert page.evaluate(faint)[:6] == [0.15, 0.15, 1, 1, 0.15, 0.15]
    assert dict(page.evaluate(TIP))["token id"] == str(data["runs"][0]["examples"][1]["id"])


@pytest.mark.slow
def test_a_page_with_one_part_works(open_page, opened_sweep, tmp_path):
    page = opened_sweep.page
    assert page.locator(".plot .main-svg").count() > 0 and page.locator("#run").count() == 0
    opened_sweep.assert_quiet()
    store = make_analysis(tmp_path / "d", prose(2, 9), references=False).store
    bare = analyse(store, "run", threshold=10)  # nothing rises or falls by so much
    write_page(tmp_path / "bare.html", "t", [bare])
    opened = open_page(tmp_path / "bare.html")
    page = opened.page
    assert page.locator("#run").is_hidden() and page.locator("input[value=excess]").is_hidden()
    assert page.locator("[data-figure=loss_by_selection]").count() == 0
    assert page.locator("text=The store has no reference losses").is_visible()
    examples = page.locator(".plot[data-figure=trajectories]")
    assert [plot.is_visible() for plot in examples.all()] == [True, False, False, True]
    opened.assert_quiet()


# Drawing a run's figures takes a second, so each run is chosen once.


@pytest.mark.slow
def test_signal_and_noise_are_shown_of_runs_that_have_labels(page):
    table = page.locator("table:visible", has_text="kept by")
    assert table.count() == 1
    cells = [row.split("\t") for row in table.inner_text().splitlines()]
    assert cells[1] == "all\thigh excess loss\t0.800\t90.0%\t80.0%\t75.0%\t40".split("\t")
    assert cells[3][0] == "<web>"
    assert page.locator("[data-figure=auc_of_scores] .main-svg").count() > 0
    choose_run(page, 1)
    assert page.locator("table:visible", has_text="kept by").count() == 0
    assert page.locator("[data-figure=auc_of_scores]").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", [1], indirect=True)
def test_another_run_has_its_own_figures(page, page_file):
    data = embedded(page_file.read_text(encoding="utf-8"))
    shown = "document.querySelector('[data-figure=loss_by_class]').data.map(t => [t.name, t.y])"
    for index in (1, 2):
        choose_run(page, index)
        expected = box_of(data["runs"][index], "loss_by_class")["data"]
        assert page.evaluate(shown) == [[t["name"], t["y"]] for t in expected]
        assert page.locator(".run:visible").count() == 1
    assert page.locator(".run:visible h3").text_content() == EVIL_NAME


@pytest.mark.slow
@pytest.mark.parametrize("page", [2], indirect=True)
def test_odd_tokens_are_shown_as_what_they_are(page):
    texts = page.evaluate("[...document.querySelectorAll('.t')].map(e => e.textContent)")
    expected = [SHOWN[piece] if piece in SHOWN else piece.decode() for piece in EVIL]
    assert texts[: len(EVIL)] == expected
    page.locator(".t").nth(9).hover()
    assert page.locator("#tip .head").text_content() == "⟨e2 80⟩  bytes ⟨e2 80⟩"
    page.locator(".t").nth(0).hover()
    assert (page.locator("#tip .head").text_content() or "").encode() == EVIL[0]
    boxes = [page.locator(".t").nth(i).bounding_box() for i in (7, 8)]  # Arabic, then Hebrew
    assert boxes[0] and boxes[1]
    assert (boxes[0]["y"], boxes[0]["x"]) < (boxes[1]["y"], boxes[1]["x"])
    isolated = page.locator(".t").nth(7).evaluate("e => getComputedStyle(e).unicodeBidi")
    assert isolated == "isolate"
    assert page.locator("#tokens img").count() == 0
