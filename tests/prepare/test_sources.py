"""Sources: which files are found, what a plan says of them, and which settings are refused."""

import math
from pathlib import Path

import datasets
import pytest

from slm.errors import UserError
from slm.prepare.sources import parse_sources
from text_helpers import source, texts, write_records


def test_hidden_files_of_a_folder_are_not_read(tmp_path):
    root = tmp_path / ".cache" / "data"  # what stands above the folder may be hidden
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "b/.c.jsonl", "b/._a.jsonl"):
        write_records(root / name, {"text": name})
    assert [text for _, text in texts(root)] == ["a.jsonl"]
    assert [text for _, text in texts(root / "**" / "*.jsonl")] == ["a.jsonl"]
    assert texts(root / "b" / ".c.jsonl") == [(0, "b/.c.jsonl")]  # who names it, means it


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("web/a.jsonl", "a"),
        ("web", "web"),
        ("web/*.jsonl", "web"),
        ("web/**/*.jsonl.gz", "web"),
        ("**/*.jsonl", "**"),  # nothing has a name
        ("web/[ab]*.jsonl", "[ab]*"),
    ],
)
def test_a_source_is_named_by_what_has_a_name(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    for file in ("web/a.jsonl", "web/b.jsonl", "web/c/d.jsonl.gz", "web/c/e.jsonl.gz"):
        write_records(tmp_path / file, {"text": file})
    assert source(path).name == name


@pytest.mark.parametrize("pattern", [".", "*.arrow"])
def test_a_saved_dataset_is_read_without_its_cache(tmp_path, pattern):
    folder = tmp_path / "saved"
    given = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    given.save_to_disk(folder, num_shards=2)
    datasets.load_from_disk(folder).map(lambda row: {"text": row["text"] * 2})
    assert len(list(folder.glob("cache-*.arrow"))) == 1
    assert texts(folder / pattern) == [(0, "a"), (1, "b"), (2, "c")]
    next(folder.glob("data-00001*")).unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00001.*, which is not there"):
        source(folder / pattern)
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json names no _data_files: it is damaged"):
        source(folder / pattern)
    (folder / "state.json").unlink()  # as in the cache of the hub's data sets
    assert texts(folder / pattern) == [(0, "a"), (1, "b")]


def test_a_saved_dictionary_of_datasets_is_read(tmp_path):
    splits = datasets.DatasetDict()
    for name in ("test", "train"):
        splits[name] = datasets.Dataset.from_dict({"text": [name]})
    splits.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == [(0, "test"), (1, "train")]


def test_a_plan_says_what_is_masked(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"q": "1"})
    plans = [source(path, **given).plan() for given in ({}, {"prompt": "{q}\\n"})]
    assert {"prompt", "messages", "roles"}.isdisjoint(plans[0])  # as in plans of before there were
    assert plans[1] == plans[0] | {"prompt": "{q}\n"}
    plan = source(path, messages="m").plan()
    assert plan == plans[0] | {"messages": "m", "roles": ["assistant"]}


def test_a_plan_says_what_is_labelled(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"text": "1"})
    plan = source(path).plan()
    assert {"signal", "noise", "noise_seed"}.isdisjoint(plan)  # as in plans of before there were
    assert source(path, signal="meta.body").plan() == plan | {"signal": "meta.body"}
    assert source(path, noise=0.2).plan() == plan | {"noise": 0.2, "noise_seed": 0}
    assert source(path, noise=0, noise_seed=5).plan() == plan | {"noise": 0, "noise_seed": 5}
    assert {"min_tokens", "weight_long"}.isdisjoint(plan)
    longer = {"min_tokens": 3, "weight_long": {"over": 5, "times": 2}}
    assert source(path, **longer).plan() == plan | longer
    more = {"mask": "m", "token_weight": "w.x"}
    assert source(path, **more).plan() == plan | more
    assert source(path, **more).columns == ["m", "text", "w"]


def test_a_folder_of_files_that_tell_no_format_is_said(tmp_path, caplog):
    for name in ("a.md", "b/c.md", "d.rst", "LICENSE", ".hidden.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    said = (
        r"4 files are not read, .* \(2 .md, 1 without one, 1 .rst\); .*/\*\*/\*.md', format: text}"
    )
    with pytest.raises(UserError, match=said):
        parse_sources([str(tmp_path)], "sources")
    (tmp_path / "e.txt").write_text("more")
    (source,) = parse_sources([str(tmp_path)], "sources")
    assert source.files == (str(tmp_path / "e.txt"),) and "4 files are not read" in caplog.text
    (source,) = parse_sources([{"path": f"{tmp_path}/**/*.md", "format": "text"}], "sources")
    assert [Path(file).name for file in source.files] == ["a.md", "c.md"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x.jsonl"}, "x.jsonl: there is no such file"),
        ({"pth": "x"}, r"sources\[0\] must have a path"),
        ({"path": "a.txt", "wieght": 2}, "unknown setting 'wieght', did you mean weight"),
        (
            {"path": "a.txt", "weight": "2"},
            r"sources\[0\].weight is '2', it must be a number",
        ),
        ("", r"sources\[0\].path is '', it must be a text that is not empty"),
        ({"path": "a.txt", "name": ""}, "name is '', it must be a text that is not empty"),
        ({"path": "a.txt", "weight": 0}, "weight is 0, it must be a number above 0"),
        ({"path": "a.jsonl", "weight": "q"}, r"weight is 'q', .* \(token_weight names a field"),
        ({"path": "a.txt", "token_weight": "q"}, "token_weight is for records, a.txt is text"),
        ({"path": "a.jsonl", "token_weight": 2}, "token_weight is 2, it must be a text"),
        ({"path": "a.txt", "min_tokens": 0}, "min_tokens is 0, it must be a whole number of at"),
        ({"path": "a.txt", "weight_long": 2}, r"weight_long is 2, it must be {over: tokens, times"),
        ({"path": "a.txt", "weight_long": {"over": 9}}, r"weight_long is {'over': 9}, it must be"),
        (
            {"path": "a.txt", "weight_long": {"over": 9, "times": 0}},
            r"weight_long is {'over': 9, 'times': 0}, it must be {over: tokens, times: a number",
        ),
        ({"path": "a.jsonl", "mask": "s[]"}, r"mask is 's\[\]', it must name a list"),
        ({"path": "a.txt", "mask": "s"}, "mask is for records, a.txt is text"),
        ({"path": "a.jsonl", "mask": "s", "text": "{a}{b}"}, "mask counts the characters of one"),
        ({"path": "a.jsonl", "mask": "s", "messages": "m"}, "has both mask and messages"),
        ({"path": "a.jsonl", "mask": "s", "noise": 0.1}, "has both mask and noise"),
        ({"path": "a.txt", "text": 3}, "text is 3, it must be a text"),
        ({"path": "a.txt", "document": "page"}, r"document is 'page', it must be one of \('file'"),
        ({"path": "a.txt", "format": "xml"}, r"format is 'xml', it must be one of \('jsonl'"),
        ({"path": "a.jsonl", "document": "line"}, "document is for text files"),
        ({"path": "a.jsonl", "split": "test"}, "split and revision are for the hub"),
        ({"path": "a.jsonl", "prompt": "Q:"}, "template 'Q:' has no field"),
        ({"path": "a.jsonl", "prompt": ["{q}"]}, r"prompt is \['{q}'\], it must be a text"),
        ({"path": "a.jsonl", "roles": ["user"]}, r"roles is \['user'\], and .*messages is not set"),
        ({"path": "a.jsonl", "messages": "m", "text": "{a}"}, "has both messages and text"),
        ({"path": "a.jsonl", "messages": "m", "prompt": "{a}"}, "has both messages and prompt"),
        ({"path": "a.jsonl", "messages": "m[]"}, r"messages is 'm\[\]', it must name a list"),
        (
            {"path": "a.jsonl", "messages": "m", "roles": "user"},
            "roles is 'user', it must be a list of at least 1, each one of",
        ),
        ({"path": "a.jsonl", "messages": "m", "roles": []}, r"roles is \[\], it must be a list"),
        (
            {"path": "a.jsonl", "messages": "m", "roles": ["asistant"]},
            r"roles is \['asistant'\], it must be a list of at least 1, each one of",
        ),
        ({"path": "a.txt", "messages": "m"}, "messages is for records, a.txt is text"),
        ({"path": "a.jsonl", "signal": 3}, "signal is 3, it must be a text"),
        ({"path": "a.jsonl", "signal": "s[]"}, r"signal is 's\[\]', it must name a list"),
        ({"path": "a.txt", "signal": "s"}, "signal is for records, a.txt is text"),
        (
            {"path": "a.jsonl", "signal": "s", "text": "{title}\\n{text}"},
            r"signal counts the characters of one field, and .*text is '{title}\\\\n{text}'",
        ),
        ({"path": "a.jsonl", "signal": "s", "text": " {text}"}, "signal counts the characters"),
        ({"path": "a.jsonl", "signal": "s", "text": "{a[]}"}, "signal counts the characters"),
        ({"path": "a.jsonl", "signal": "s", "prompt": "{q}"}, "has both signal and prompt"),
        ({"path": "a.jsonl", "signal": "s", "messages": "m"}, "has both signal and messages"),
        ({"path": "a.jsonl", "noise": 0.1, "prompt": "{q}"}, "has both noise and prompt"),
        ({"path": "a.jsonl", "noise": 0.1, "messages": "m"}, "has both noise and messages"),
        ({"path": "a.jsonl", "noise": 0.1, "signal": "s"}, "has both signal and noise"),
        ({"path": "a.txt", "noise": 1}, r"noise is 1, it must be a number in \[0, 0\.9\]"),
        ({"path": "a.txt", "noise": -0.1}, "noise is -0.1, it must be a number"),
        ({"path": "a.txt", "noise": math.nan}, "noise is nan, it must be a number"),
        ({"path": "a.txt", "noise": True}, "noise is True, it must be a number"),
        ({"path": "a.txt", "noise_seed": 1}, "noise_seed is 1, and .*noise is not set"),
        (
            {"path": "a.txt", "noise": 0.1, "noise_seed": 0.5},
            "noise_seed is 0.5, it must be a whole number",
        ),
        ({"path": "a.tex"}, "its suffix tells no format"),
        ({"path": "."}, r"several formats \(jsonl, text\)"),
        ({"path": ".", "format": "parquet"}, "no such file.* of format parquet"),
    ],
)
def test_mistakes_in_settings(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl", "a.tex"):
        Path(name).write_text("x")
    with pytest.raises(UserError, match=message):
        parse_sources([entry], "sources")


@pytest.mark.parametrize("name", ["b.zip", "b.tar", "b.tar.gz", "b.jsonl.zip"])
def test_archives_are_named_and_not_passed_over(tmp_path, caplog, name):
    write_records(tmp_path / "a.jsonl", {"text": "1"})
    (tmp_path / name).write_bytes(b"PK")
    assert texts(tmp_path) == [(0, "1")]
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{tmp_path / name} is not read: unpack what belongs to the data"]
    for given in (tmp_path / name, tmp_path / "*"):
        for more in ({}, {"format": "jsonl"}):
            with pytest.raises(UserError, match=f"{name} is an archive, its files are not read"):
                parse_sources([{"path": str(given)} | more], "sources")


def test_two_sources_need_two_names(tmp_path):
    path = str(write_records(tmp_path / "a.jsonl", {"text": "1"}))
    with pytest.raises(UserError, match="two entries have the name 'a'; set name"):
        parse_sources([path, path], "sources")
    with pytest.raises(UserError, match="sources must be a list"):
        parse_sources(path, "sources")


def test_identity_of_files_is_not_their_folder(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_records(tmp_path / folder / "a.jsonl", {"text": "same"})
    one, two = (source(tmp_path / folder / "a.jsonl").plan() for folder in ("one", "two"))
    assert one == two
    write_records(tmp_path / "two" / "a.jsonl", {"text": "sane"})
    assert source(tmp_path / "two" / "a.jsonl").plan() != one
