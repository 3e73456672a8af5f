"""The workspace as W&B's own specification, read back from the file; nothing goes to a network."""

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from slm.errors import UserError
from slm.report.workspace import SECTIONS, dashboard, load_library
from slm.train import loggers as tracking

TRAIN = "step,tokens_seen,train/loss_all,slm/kept_frac,slm/kept_frac/web,perf/step_s"
HELDOUT = "step,tokens_seen,heldout/math/loss,heldout/math/bits_per_byte,heldout/a b/loss"
DYNAMICS = "step,tokens_seen,dynamics/loss,dynamics/share/HH,dynamics/share/LL"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, and whoever opens a connection fails the test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setattr(wandb, "init", refuse)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a test reached for the network")


def written(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    dashboard(out=tmp_path / "out.json", **keys)
    return json.loads((tmp_path / "out.json").read_text())


def panels(view: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """Section -> (kind of panel, what it shows)."""

    def shows(panel: dict[str, Any]) -> Any:
        settings = panel["config"]
        if panel["viewType"] == "Run History Line Plot":
            assert settings["xAxis"] == "data/tokens_seen"
            return settings["metricRegex"] if "metricRegex" in settings else settings["metrics"]
        if panel["viewType"] == "Media Browser":
            return settings["mediaKeys"]
        fields = settings["userQuery"]["queryFields"][0]["fields"]
        return [arg["value"] for field in fields for arg in field.get("args", [])]

    found = view["spec"]["section"]["panelBankConfig"]["sections"]
    kinds = {"Run History Line Plot": "plot", "Media Browser": "media", "Vega2": "chart"}
    return {
        section["name"]: [(kinds[p["viewType"]], shows(p)) for p in section["panels"]]
        for section in found
    }


def make_run(folder: Path, project: str | None = "mine", **tables: str) -> Path:
    folder.mkdir(parents=True)
    for name, header in tables.items():
        row = ",".join("1" for _ in header.split(","))
        (folder / f"{name}.csv").write_text(f"{header}\n{row}\n")
    if project is not None:
        record = {"id": "abc", "project": project, "url": None}
        (folder / "wandb_run.json").write_text(json.dumps(record))
    return folder


# ---- what is written ----------------------------------------------------------------------------


def test_a_project_has_every_section_over_tokens_seen(tmp_path):
    view = written(tmp_path, entity="team")
    assert (view["entity"], view["project"]) == ("team", "slm")
    assert view["displayName"] == "Selective language modeling"
    section = view["spec"]["section"]
    assert section["settings"]["xAxis"] == "data/tokens_seen"
    assert section["runSets"][0]["filters"]["filters"] == []
    assert section["runSets"][0]["grouping"] == []
    bank = section["panelBankConfig"]["sections"]
    assert {one["localPanelSettings"]["xAxis"] for one in bank} == {"data/tokens_seen"}
    assert all(one["isOpen"] for one in bank)
    found = panels(view)
    assert list(found) == ["Loss", "Selection", "Token dynamics", "Speed"]
    assert found["Loss"] == [
        ("plot", ["train/loss_all"]),
        ("plot", "^heldout/(.+)/loss$"),
        ("plot", "^heldout/(.+)/bits_per_byte$"),
        ("plot", ["train/loss_selected", "train/loss_unselected"]),
    ]
    for metric in ("kept_frac", "threshold", "mask_jaccard"):
        assert ("plot", [f"slm/{metric}"]) in found["Selection"]
    assert ("plot", ["slm/excess_mean", "slm/excess_mean_selected"]) in found["Selection"]
    assert ("plot", "^slm/kept_frac/(.+)$") in found["Selection"]
    dynamics = found["Token dynamics"]
    for name in ("share", "loss", "kept_frac"):
        of_classes = [f"dynamics/{name}/{label}" for label in ("HH", "LH", "HL", "LL")]
        assert ("plot", of_classes) in dynamics
    assert ("plot", ["dynamics/loss_selected", "dynamics/loss_unselected"]) in dynamics
    assert ("plot", ["dynamics/excess_loss"]) in dynamics
    assert ("chart", ["dynamics/loss_by_class_table"]) in dynamics
    assert ("media", ["dynamics/heat_map"]) in dynamics
    assert ("media", ["dynamics/examples"]) in dynamics
    assert [shown for _, shown in found["Speed"]] == [
        ["perf/tokens_per_s"],
        ["perf/step_s"],
        ["perf/mfu"],
        ["perf/peak_memory_bytes"],
    ]


def test_the_library_reads_its_own_specification(tmp_path):
    view = written(tmp_path, group="a=b")
    ws = load_library().workspaces
    model = ws.interface.internal.View.model_validate(view)
    read = ws.Workspace._from_model(model)
    assert [section.name for section in read.sections] == list(SECTIONS)
    assert read.sections[0].panels[0].y == [load_library().panels.Metric("train/loss_all")]


@pytest.mark.parametrize(
    "group",
    ["runs-sweep", "k=0.4,seed=1", "it's", 'a "b"', "a<b", "c within_last 5 days", "\u00e4\\x"],
)
def test_a_sweep_is_filtered_by_its_group_and_seeds_are_averaged(tmp_path, group):
    view = written(tmp_path, group=group)
    runs = view["spec"]["section"]["runSets"][0]
    assert runs["filters"]["filters"] == [
        {"key": {"section": "run", "name": "group"}, "op": "=", "value": group, "disabled": False}
    ]
    assert [key["name"] for key in runs["grouping"]] == [
        "selection.value.rule",
        "selection.value.select_ratio",
    ]
    found = panels(view)
    for label in ("HH", "LH", "HL", "LL"):
        assert ("plot", [f"dynamics/share/{label}"]) in found["Token dynamics"]
    first = view["spec"]["section"]["panelBankConfig"]["sections"][0]["panels"][0]["config"]
    assert (first["groupAgg"], first["groupArea"]) == ("mean", "minmax")


def test_a_run_gives_its_names_and_its_project(tmp_path):
    run = make_run(tmp_path / "run", train=TRAIN, heldout=HELDOUT, dynamics=DYNAMICS)
    view = written(tmp_path, runs=str(run))
    assert view["project"] == "mine"
    assert panels(view) == {
        "Loss": [
            ("plot", ["train/loss_all"]),
            ("plot", ["heldout/math/loss"]),
            ("plot", ["heldout/a b/loss"]),
            ("plot", ["heldout/math/bits_per_byte"]),
        ],
        "Selection": [("plot", ["slm/kept_frac"]), ("plot", ["slm/kept_frac/web"])],
        "Token dynamics": [
            ("plot", ["dynamics/share/HH", "dynamics/share/LL"]),
            ("chart", ["dynamics/loss_by_class_table"]),
            ("media", ["dynamics/heat_map"]),
            ("media", ["dynamics/examples"]),
            ("media", ["dynamics/by_class"]),
        ],
        "Speed": [("plot", ["perf/step_s"])],
    }
    bank = view["spec"]["section"]["panelBankConfig"]["sections"]
    titles = [panel["config"]["chartTitle"] for panel in bank[0]["panels"]]
    assert titles[1:3] == ["held-out loss: math", "held-out loss: a b"]


def test_runs_below_a_folder_add_up(tmp_path):
    make_run(tmp_path / "sweep" / "a", train=TRAIN)
    make_run(tmp_path / "sweep" / "b", train="step,tokens_seen,slm/threshold")
    found = panels(written(tmp_path, runs=str(tmp_path / "sweep")))
    assert found["Selection"] == [
        ("plot", ["slm/kept_frac"]),
        ("plot", ["slm/threshold"]),
        ("plot", ["slm/kept_frac/web"]),
    ]
    assert "Token dynamics" not in found
    given = written(tmp_path, runs=str(tmp_path / "sweep"), project="other")
    assert given["project"] == "other"


# ---- saving -------------------------------------------------------------------------------------


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workspaces that would have been sent."""
    sent: list[Any] = []
    workspace = load_library().workspaces.Workspace
    monkeypatch.setattr(workspace, "save", lambda self: sent.append(self))
    return sent


def test_without_a_login_nothing_is_sent(tmp_path, saved, caplog):
    caplog.set_level(logging.INFO, "slm.dashboard")
    assert written(tmp_path)["project"] == "slm" and saved == []
    assert "not saved to W&B: no login found" in caplog.text
    with pytest.raises(UserError, match="save is true, and W&B is offline: no login found"):
        dashboard(out=tmp_path / "other.json", save=True)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("save", ["auto", True])
def test_with_a_login_it_is_saved_once(tmp_path, saved, monkeypatch, save):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "answers", lambda url: True)
    assert written(tmp_path, save=save, entity="team", project="p")["project"] == "p"
    assert [(one.entity, one.project) for one in saved] == [("team", "p")]
    written(tmp_path, save=False)
    assert len(saved) == 1


def test_the_logins_own_entity_is_asked_for_when_saving_alone(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"default_entity": "me"}))
    assert written(tmp_path, save=True)["entity"] == ""
    assert [one.entity for one in saved] == ["me"]


def test_a_login_without_a_way_out_is_no_failure(tmp_path, saved, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "slm.dashboard")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "answers", lambda url: False)
    assert written(tmp_path) and saved == []
    assert "https://api.wandb.ai does not answer" in caplog.text


def test_a_server_that_refuses_leaves_the_file(tmp_path, monkeypatch):
    def failing(self: Any) -> None:
        raise ConnectionError("no such\nproject")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(load_library().workspaces.Workspace, "save", failing)
    with pytest.raises(UserError, match="out.json is written; W&B took no workspace: no such proj"):
        written(tmp_path, save=True, entity="team")
    assert json.loads((tmp_path / "out.json").read_text())["entity"] == "team"


# ---- mistakes -----------------------------------------------------------------------------------


def test_folders_that_hold_no_run_are_named(tmp_path):
    with pytest.raises(UserError, match="runs is .*nowhere, which is no folder"):
        written(tmp_path, runs=str(tmp_path / "nowhere"))
    make_run(tmp_path / "bare", heldout=HELDOUT)
    with pytest.raises(UserError, match="bare has no train.csv in it or below it"):
        written(tmp_path, runs=str(tmp_path / "bare"))
    assert not (tmp_path / "out.json").exists()


def test_projects_that_are_unclear_are_asked_for(tmp_path):
    run = make_run(tmp_path / "runs" / "a", project=None, train=TRAIN)
    with pytest.raises(UserError, match=r"no W&B project \(no wandb_run.json\); give project="):
        written(tmp_path, runs=str(run))
    make_run(tmp_path / "runs" / "b", project="one", train=TRAIN)
    make_run(tmp_path / "runs" / "c", project="two", train=TRAIN)
    with pytest.raises(UserError, match=r"several W&B projects: one \(.*/b\), two \(.*/c\); give"):
        written(tmp_path, runs=str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"save": "maybe"}, "save is 'maybe', it must be auto, true or false"),
        ({"group": ""}, "group is '', it must be a text that is not empty, or null"),
        ({"entity": 3}, "entity is 3, it must be a text that is not empty, or null"),
        ({"name": "k=0.4"}, "name is 'k=0.4', W&B refuses it: Value error, Emojis are not allowed"),
    ],
)
def test_wrong_values_are_refused(tmp_path, keys, message):
    with pytest.raises(UserError) as caught:
        written(tmp_path, **keys)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="out is '.*', it must be a file, no folder"):
        dashboard(out=tmp_path)


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="needs the package wandb-workspaces: pip install 'slm-tr"):
        written(tmp_path)
