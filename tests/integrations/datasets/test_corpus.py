"""Rows become windows: every value of a row is there once; a row that is wrong leaves nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir

from run_helpers import TINY_MODEL, train
from slm.cli import conf_folder
from slm.errors import UserError
from slm.integrations.datasets import WindowDataset, from_hf_dataset, to_hf_dataset
from slm.integrations.datasets import corpus as dataset_corpus
from slm.prepare.encoder import token_bytes
from slm.store.shards import Corpus, References
from slm.store.windows import IGNORE_INDEX, Windows
from slm.verify import verify

X = IGNORE_INDEX
LENGTH = 6
ROWS: dict[
    str, Any
] = {  # of 6 tokens; prompts; documents inside; scores that say which token they are about
    "input_ids": [[10 * row + i for i in range(LENGTH)] for row in range(1, 8)],
    "seq_lengths": [[6], [2, 4], [5, 1], [1, 5], [3, 3], [6], [2, 2, 2]],
}
ROWS["labels"] = [[X if t % 10 == 3 or t == 21 else t for t in row] for row in ROWS["input_ids"]]
ROWS["reference_logprob"] = [[-t / 7 for t in row] for row in ROWS["input_ids"]]


def rows(**changes: Any) -> Dataset:
    """ROWS with other columns; None takes one out."""
    return Dataset.from_dict({k: v for k, v in (ROWS | changes).items() if v is not None})


@pytest.fixture
def made_by(tmp_path, tokenizer) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(params=[1 << 25, 3 * LENGTH + 1, LENGTH + 1])
def shard_tokens(request, monkeypatch) -> int:
    """All rows in a shard; three; one. Two rows are read at a time."""
    monkeypatch.setattr(dataset_corpus, "TOKENS_AT_ONCE", 2 * LENGTH)
    return request.param


def expected_targets(given: dict[str, Any]) -> np.ndarray:  # (rows, T): as the trainer shifts
    """Token by token: the label of the next token of the row, unless a document begins there."""
    found = np.full((len(given["input_ids"]), LENGTH), X)
    for row, ids in enumerate(given["input_ids"]):
        labels = given["labels"][row] if "labels" in given else ids
        lengths = given["seq_lengths"][row] if "seq_lengths" in given else [LENGTH]
        begins = {sum(lengths[:i]) for i in range(len(lengths))}
        for i in range(1, LENGTH):
            found[row, i - 1] = X if i in begins else labels[i]
    return found


@pytest.mark.parametrize("left_out", [(), ("labels",), ("seq_lengths",), ("labels", "seq_lengths")])
def test_a_window_is_its_row(tmp_path, made_by, shard_tokens, left_out):
    given = {name: column for name, column in ROWS.items() if name not in left_out}
    out = from_hf_dataset(
        Dataset.from_dict(given), tmp_path / "out", made_by, shard_tokens=shard_tokens
    )
    corpus, references = Corpus.open(out / "train", "full"), References.open(out / "references")
    assert len(corpus.shards) == {1 << 25: 1, 19: 3, 7: 7}[shard_tokens]
    batch = Windows(corpus, [references]).batch(np.arange(7))
    assert batch["input_ids"].tolist() == ROWS["input_ids"]
    assert np.array_equal(batch["targets"], expected_targets(given))
    live = batch["targets"] != X
    assert torch.allclose(-7 * batch["reference_logprob"][live], batch["targets"][live].float())
    assert torch.equal(torch.isnan(batch["reference_logprob"]), ~live)
    lengths = given["seq_lengths"] if "seq_lengths" in given else [[LENGTH]] * 7
    restarts = [[i for n in row for i in range(n)] for row in lengths]
    assert batch["position_ids"].tolist() == restarts
    assert all(whole for _, whole, _ in verify(out)), list(verify(out))
    assert references.manifest["corpus_fingerprint"] == corpus.fingerprint


def test_records_bytes_and_the_closing_token(tmp_path, made_by, tokenizer):
    out = from_hf_dataset(rows(), tmp_path / "out", made_by, shard_tokens=3 * LENGTH + 1)
    corpus = Corpus.open(out / "train")
    tokens = [corpus.column("tokens", i).tolist() for i in range(3)]
    eos = tokenizer.eos_token_id
    flat = [row[:] for row in ROWS["input_ids"]]
    assert tokens == [sum(flat[:3], []) + [eos], sum(flat[3:6], []) + [eos], flat[6] + [eos]]
    # start, source, row, place in the row
    assert corpus.column("documents", 0).tolist() == [
        [0, 0, 0, 0], [6, 0, 1, 0], [8, 0, 1, 2], [12, 0, 2, 0], [17, 0, 2, 5], [18, 0, 2, 6]
    ]  # fmt: skip
    assert corpus.column("documents", 2)[:, 2:].tolist() == [[6, 0], [6, 2], [6, 4], [6, 6]]
    sizes = token_bytes(tokenizer)[tokens[0]]
    assert sizes[-1] == 0 and sizes[:-1].min() > 0
    assert corpus.column("bytes", 0).tolist() == sizes.tolist()


def test_documents_by_position_ids_are_those_by_seq_lengths(tmp_path, made_by):
    restarts = [[i for n in row for i in range(n)] for row in ROWS["seq_lengths"]]
    ways = [rows(), rows(seq_lengths=None, position_ids=restarts), rows(position_ids=restarts)]
    made = [
        from_hf_dataset(way, tmp_path / str(i), made_by) / "train" for i, way in enumerate(ways)
    ]
    assert len({Corpus.open(folder).fingerprint for folder in made}) == 1


def test_there_and_back(tmp_path, made_by, monkeypatch):
    """The rows of the windows of rows; one token longer, since a window has its last target."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = from_hf_dataset(rows(), tmp_path / "out", made_by)
    back = to_hf_dataset(out / "train", out / "references")
    assert [row[:LENGTH] for row in back["input_ids"]] == ROWS["input_ids"]
    assert [row[1:] for row in back["labels"]] == expected_targets(ROWS).tolist()
    assert list(back["seq_lengths"]) == [[*row, 1] for row in ROWS["seq_lengths"]]


def test_weights_there_and_back(tmp_path, made_by, shard_tokens):
    """Of every target; a target of weight 0 is none, and needs no score."""
    weights = [[(t % 4) / 2 for t in row] for row in ROWS["input_ids"]]
    scores = [[-t / 7 if t % 4 else None for t in row] for row in ROWS["input_ids"]]
    made = rows(token_weight=weights, reference_logprob=scores)
    out = from_hf_dataset(made, tmp_path / "out", made_by, shard_tokens=shard_tokens)
    corpus = Corpus.open(out / "train", check="full")
    windows = Windows(corpus, [References.open(out / "references")])
    expected = expected_targets(ROWS)
    expected[expected % 4 == 0] = X
    assert windows.batch(range(7))["targets"].tolist() == expected.tolist()
    assert all(whole for _, whole, _ in verify(out)), list(verify(out))
    back = to_hf_dataset(out / "train", out / "references")
    item = WindowDataset(out / "train")[1]["token_weight"]
    assert item.tolist()[:-1] == weights[1][1:]
    assert [row[1:LENGTH] for row in back["token_weight"]] == [row[1:] for row in weights]
    assert [row[1:] for row in back["labels"]] == expected.tolist()
    for wrong in (-1.0, float("nan")):
        weights[1][4] = wrong
        with pytest.raises(
            ValueError, match=f"row 1: token_weight.4. is {wrong} under the label 24"
        ):
            from_hf_dataset(rows(token_weight=weights), tmp_path / "no", made_by)
    assert not (tmp_path / "no").exists()


def test_types_of_columns_and_nulls(tmp_path, made_by):
    """JSON has no NaN: a null is one. float64, int32 and large lists are read as well."""
    dead = [[None if label == X else s for s, label in zip(*pair, strict=True)]
            for pair in zip(ROWS["reference_logprob"], ROWS["labels"], strict=True)]  # fmt: skip
    one = from_hf_dataset(rows(reference_logprob=dead), tmp_path / "one", made_by)
    other = rows().with_format("torch", columns=["labels"])
    two = from_hf_dataset(other, tmp_path / "two", made_by)
    stores = [References.open(folder / "references") for folder in (one, two)]
    assert stores[0].fingerprint == stores[1].fingerprint


def changed(column: str, row: int, at: int, value: Any) -> dict[str, Any]:
    copy = [list(one) for one in ROWS[column]]
    copy[row][at] = value
    return {column: copy}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_ids": None}, "has no input_ids, it has seq_lengths"),
        (
            {"input_ids": [*ROWS["input_ids"][:5], [1, 2, 3], [1] * 6], "seq_lengths": None},
            "row 5: input_ids has 3 tokens, row 0 has 6",
        ),
        (changed("input_ids", 5, 2, 300), r"row 5: input_ids\[2\] is 300, the vocabulary has 300"),
        (changed("input_ids", 5, 2, -1), r"row 5: input_ids\[2\] is -1, the vocabulary has 300"),
        (changed("labels", 5, 4, 7), r"row 5: labels\[4\] is 7, input_ids there is 64"),
        ({"labels": [[X] * 6] * 6 + [[X] * 5]}, "row 6: labels has 5 entries, input_ids has 6"),
        (
            changed("reference_logprob", 5, 1, 0.5),
            r"row 5: reference_logprob\[1\] is 0.5 under the label 61, a finite number <= 0",
        ),
        (changed("reference_logprob", 5, 1, None), r"reference_logprob\[1\] is nan under"),
        (changed("reference_logprob", 5, 1, -np.inf), r"reference_logprob\[1\] is -inf under"),
        ({"seq_lengths": [[6]] * 6 + [[2, 3]]}, r"row 6: seq_lengths is \[2, 3\].*row's 6 tokens"),
        ({"seq_lengths": [[6]] * 6 + [[6, 0]]}, r"row 6: seq_lengths is \[6, 0\]"),
        (
            {"position_ids": [[*range(6)]] * 7},
            r"row 1: position_ids\[2\] is 2, 0 is expected: they count from 0",
        ),
        (
            {"seq_lengths": None, "position_ids": [[*range(6)]] * 6 + [[*range(1, 7)]]},
            r"row 6: position_ids\[0\] is 1, 0 is expected",
        ),
        (
            {"attention_mask": [[1] * 6] * 6 + [[1] * 5 + [0]]},
            r"row 6: attention_mask\[5\] is 0, 1 is expected",
        ),
        ({"labels": [[X] * 6] * 6 + [None]}, "row 6: labels is null"),
        ({"labels": ["a"] * 7}, "column labels holds string, a list of numbers is needed"),
        ({"labels": [[0.5] * 6] * 7}, "column labels holds double, 0 of them null"),
    ],
)
def test_a_row_that_is_wrong_is_named_and_nothing_is_left(tmp_path, made_by, changes, sentence):
    """It stands in the second or third shard: there are files by then."""
    with pytest.raises(ValueError, match=sentence):
        from_hf_dataset(rows(**changes), tmp_path / "out", made_by, shard_tokens=3 * LENGTH + 1)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_is_no_dataset_of_rows_is_refused(tmp_path, made_by):
    none = rows().select([])
    one = Dataset.from_dict({"input_ids": [[1], [2]]})
    cases: list[tuple[Any, str]] = [
        ([[1, 2]], "a datasets.Dataset is needed, found list"),
        (none, "the dataset has 0 rows"),
        (one, "row 0 has 1 tokens, at least 2"),
    ]
    for given, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            from_hf_dataset(given, tmp_path / "out", made_by)
    made: Any = object()
    with pytest.raises(ValueError, match="tokenizer is a object, it must be a folder or a name"):
        from_hf_dataset(rows(), tmp_path / "out", made)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="config.json cannot be written: Not a directory"):
        from_hf_dataset(rows(), made_by / "tokenizer_config.json", made_by)


def test_a_score_under_no_label_does_not_matter(tmp_path, made_by):
    """The first token of a row, and a prompt: what a model said of them, or NaN, or nonsense."""
    scores = [list(row) for row in ROWS["reference_logprob"]]
    scores[0][0], scores[0][3], scores[1][2] = 5.0, np.nan, np.inf
    out = from_hf_dataset(rows(reference_logprob=scores), tmp_path / "out", made_by)
    stored = References.open(out / "references").column("logprobs", 0)
    assert np.isnan(stored[[0, 3, 8]]).all()


def test_what_stands_there_is_not_touched(tmp_path, made_by):
    out = from_hf_dataset(rows(), tmp_path / "out", made_by)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    with pytest.raises(ValueError, match="holds a finished corpus; choose another folder"):
        from_hf_dataset(rows(), out, made_by)
    other = tmp_path / "other" / "references" / "mine"
    other.mkdir(parents=True)
    with pytest.raises(ValueError, match="references exists already; choose another folder"):
        from_hf_dataset(rows(), tmp_path / "other", made_by)
    begun = tmp_path / "begun" / "train"
    begun.mkdir(parents=True)
    (begun / "plan.json").write_text(json.dumps({"format": 1, "kind": "corpus"}))
    with pytest.raises(UserError, match="choose another output folder"):
        from_hf_dataset(rows(), tmp_path / "begun", made_by)
    assert other.exists() and (begun / "plan.json").exists()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before


def test_a_killed_call_starts_over(tmp_path, made_by, monkeypatch):
    """Killed before the last manifest: no cleaning up, as after SIGKILL; there were more shards."""
    whole = from_hf_dataset(rows(), tmp_path / "whole", made_by)
    with monkeypatch.context() as killed:
        killed.setattr(dataset_corpus, "write_manifest", lambda *_: 1 / 0)
        killed.setattr(dataset_corpus, "clear", lambda _: None)
        with pytest.raises(ZeroDivisionError):
            from_hf_dataset(rows(), tmp_path / "out", made_by, shard_tokens=7)
    with pytest.raises(UserError, match="it is unfinished"):
        Corpus.open(tmp_path / "out" / "train")
    out = from_hf_dataset(rows(), tmp_path / "out", made_by)
    for path in whole.rglob("*.*"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert len([*out.rglob("*")]) == len([*whole.rglob("*")])


def test_the_trainer_takes_it(tmp_path, made_by, tokenizer):
    """Rows of 16 in five shards, a score a token; selection by excess, three steps."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, len(tokenizer), (48, 16))
    given = {
        "input_ids": ids.tolist(),
        "reference_logprob": (-generator.random((48, 16))).tolist(),
        "seq_lengths": [[5, 11]] * 48,
    }
    out = from_hf_dataset(
        Dataset.from_dict(given), tmp_path / "out", made_by, scored_by="a friend", shard_tokens=200
    )
    words = [
        f"out='{tmp_path / 'run'}'", f"run_dir='{tmp_path / 'run'}'",
        f"data.corpus='{out / 'train'}'", f"data.references='{out / 'references'}'",
        "data.batch_size=8", "data.micro_batch_size=4", f"max_tokens={3 * 8 * 16}",
        "selection=excess", "selection.select_ratio=0.5", "logger=csv", *TINY_MODEL,
    ]  # fmt: skip
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        train(compose("train", overrides=words))
    record = json.loads((tmp_path / "run" / "model" / "slm.json").read_text())["lineage"]
    # 14 of the 16 tokens of a row are targets: the first of each document is none.
    assert record["tokens_selected"] == 3 * 8 * 14 // 2
    assert record["references"][0]["served_model"] == "a friend"
    assert "a friend" in (tmp_path / "run" / "model" / "README.md").read_text()
