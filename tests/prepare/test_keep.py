"""Which documents stay: by a classifier, by scores, by a field, in any number of processes."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm import prepare
from slm.errors import UserError
from slm.prepare import scan
from slm.prepare.documents import Text
from slm.prepare.grams import BUCKETS, linear_score
from slm.prepare.keep import Keep, open_keep
from slm.prepare.sources import parse_sources
from slm.store.quality import CLASSIFIER, SCORES, write_quality
from text_helpers import write_records

TEXTS = [f"{i} and {i + 1} words of a text, {i * 7919}" for i in range(400)]
ABOUT = {"kind": CLASSIFIER, "features": "hashed", "threshold": 3, "labels": {}}
WEIGHTS = np.random.default_rng(0).normal(size=BUCKETS + 1)
SCORE = {text: linear_score(text.encode(), WEIGHTS) for text in TEXTS}
BOUND = sorted(SCORE.values())[200]


def digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def of_text(text: str) -> Text:
    return Text("here", 0, text, text.encode(), None)


@pytest.fixture
def classifier(tmp_path) -> str:
    write_quality(tmp_path / "q", ABOUT, {"weights": WEIGHTS})
    return str(tmp_path / "q")


def write_scores(path: Path, scores: dict[str, float]) -> str:
    rows = sorted((digest(text), score) for text, score in scores.items())
    keys = np.array([[*key] for key, _ in rows], np.uint8)
    about = {"kind": SCORES, "classifier": "f", "sources": {}}
    write_quality(path, about, {"keys": keys, "scores": np.array([one for _, one in rows])})
    return str(path)


def opened(by: str, over: float = 3) -> Keep:
    return open_keep({"by": by, "over": over}, [])[0]


def documents(folder: Path) -> Any:
    """What a corpus spells; a byte is a token."""
    from slm.store.shards import Corpus

    corpus = Corpus.open(folder)
    tokens = np.concatenate([corpus.column("tokens", shard.index) for shard in corpus.shards])
    return corpus.manifest["fingerprint"], tokens


def test_a_score_of_at_least_the_bound_stays(classifier):
    kept = [opened(classifier, BOUND).keeps(of_text(text)) for text in TEXTS]
    assert kept == [score >= BOUND for score in SCORE.values()] and sum(kept) == 200
    noisy = of_text(TEXTS[0])._replace(clean=TEXTS[1])  # what was read counts
    assert opened(classifier).score(noisy) == SCORE[TEXTS[1]]


def test_scores_are_found_by_the_hash_of_the_text(tmp_path):
    ends_in_zero = next(text for text in map(str, range(9999)) if digest(text)[-1] == 0)
    scores = {text: i / 10 for i, text in enumerate([*TEXTS[:50], ends_in_zero])}
    keep = opened(write_scores(tmp_path / "s", scores))
    assert {text: keep.score(of_text(text)) for text in scores} == scores
    for text in TEXTS[50:60]:
        with pytest.raises(
            UserError, match="here: its text is none of the 51 that keep.by=.*s has"
        ):
            keep.score(of_text(text))


def made(tmp_path: Path, name: str, keep: Any, **settings: Any) -> Any:
    rows = [{"text": t, "score": i % 6, "n": i} for i, t in enumerate(TEXTS)]
    files = [write_records(tmp_path / "a.jsonl", *rows[:300])]
    files.append(write_records(tmp_path / "b.jsonl", *rows[300:]))
    given: dict[str, Any] = {"tokenizer": {"vocab_size": 270}, "seq_len": 16, "heldout_ratio": 0.2}
    given |= {"num_proc": 1} | settings
    return prepare([*map(str, files)], tmp_path / name, keep=keep, **given)


def test_what_stays_is_what_another_file_of_it_would_give(tmp_path, classifier):
    found = made(tmp_path, "kept", {"by": "{score}", "over": 4})
    assert found.report["kept"] == {
        "a": {"documents": 300, "kept": 100},
        "b": {"documents": 100, "kept": 32},
    }
    stay = [{"text": text} for i, text in enumerate(TEXTS) if i % 6 >= 4]
    write_records(tmp_path / "a.jsonl", *stay[:100])
    write_records(tmp_path / "b.jsonl", *stay[100:])
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    settings: dict[str, Any] = {"seq_len": 16, "heldout_ratio": 0.2, "num_proc": 1}
    alone = prepare(sources, tmp_path / "alone", tokenizer={"vocab_size": 270}, **settings)
    assert alone.report["kept"] == {}
    for side in ("train", "heldout"):  # the tokenizer, too, is of what stays
        own, same = found.report[side], alone.report[side]
        assert own["documents"] == same["documents"]
        (_, tokens), (_, others) = (documents(tmp_path / f / side) for f in ("kept", "alone"))
        assert np.array_equal(tokens, others)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_parts_and_processes_keep_the_same(tmp_path, classifier, num_proc, monkeypatch):
    keep = {"by": classifier, "over": BOUND}
    one = made(tmp_path, "one", keep)
    monkeypatch.setattr(scan, "UNIT_BYTES", 4000)
    other = made(tmp_path, "other", keep, num_proc=num_proc)
    assert other.report["kept"] == one.report["kept"]
    assert other.train.fingerprint == one.train.fingerprint
    kept = [one.report["kept"][name]["kept"] for name in "ab"]
    assert kept == [sum(SCORE[t] >= BOUND for t in part) for part in (TEXTS[:300], TEXTS[300:])]
    assert sum(kept) == 200


def test_another_bound_is_another_preparation(tmp_path, classifier):
    made(tmp_path, "k", {"by": classifier, "over": 2.5})
    with pytest.raises(UserError, match="keep.over is .*2.5"):
        made(tmp_path, "k", {"by": classifier, "over": 2})
    plan = json.loads((tmp_path / "k" / "plan.json").read_text())
    assert (plan["keep.over"], len(plan["keep.by"])) == (2.5, 64)


def test_what_cannot_be_kept_by(tmp_path, classifier):
    with pytest.raises(UserError, match=r"a.jsonl, line 1: field 'quality' is missing"):
        made(tmp_path, "x", {"by": "{quality}", "over": 3})
    with pytest.raises(UserError, match="line 1: field 'text' is '0 and .*, expected a number"):
        made(tmp_path, "x", {"by": "{text}", "over": 3})
    with pytest.raises(UserError, match="or keep, which leaves 400 documents out"):
        made(tmp_path, "x", {"by": "{n}", "over": 1000}, tokenizer=saved(tmp_path))
    with pytest.raises(UserError, match="keep.by .*nope is no folder of slm quality"):
        made(tmp_path, "x", {"by": str(tmp_path / "nope"), "over": 3})
    with pytest.raises(UserError, match="keep is .*, it must be {by: a folder of slm quality or"):
        made(tmp_path, "x", {"by": classifier})
    (tmp_path / "t.txt").write_text("text")
    sources = parse_sources([str(tmp_path / "t.txt")], "sources")
    with pytest.raises(UserError, match="keep.by={score} is a field of records, .*t.txt is text"):
        open_keep({"by": "{score}", "over": 3}, sources)
    about = ABOUT | {"features": "hidden", "base_model": "b", "model_sha256": "0", "context": 8}
    write_quality(tmp_path / "h", about, {"value": np.zeros(2)})
    with pytest.raises(UserError, match="h reads hidden states of b: let it score the documents"):
        opened(str(tmp_path / "h"))
    write_quality(tmp_path / "w", ABOUT, {"weights": np.zeros(9)})
    with pytest.raises(UserError, match="w/weights.npy has 9 weights, 65,537 are needed"):
        opened(str(tmp_path / "w"))
    assert not (tmp_path / "x").exists()


def saved(tmp_path: Path) -> dict[str, str]:
    made(tmp_path, "first", None)
    return {"path": str(tmp_path / "first" / "train" / "tokenizer")}
