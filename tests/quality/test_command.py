"""Labels -> a classifier -> scores of documents it has not seen, from Python and by the command."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from model_helpers import small_llama
from slm.errors import UserError
from slm.model.folder import save_model
from slm.prepare.grams import linear_score
from slm.quality import __main__ as door
from slm.quality.command import quality
from slm.quality.fit import PENALTIES, hashed_matrix
from text_helpers import quote, write_records

GOOD = [f"We add {i} and {i + 1}, so that the sum is {2 * i + 1}." for i in range(60)]
BAD = [f"click here {i} >> home | login | page {i} of 60" for i in range(60)]


def label(text: str) -> int:
    return 4 + int("1" in text) if text in GOOD else int("2" in text)


def labels_of(tmp_path: Path, texts: list[str]) -> str:
    rows = [{"text": text, "label": label(text)} for text in texts]
    return str(write_records(tmp_path / "labels.jsonl", *rows))


@pytest.fixture
def labels(tmp_path) -> str:
    return labels_of(tmp_path, GOOD[:20] + BAD[:20])


@pytest.fixture
def rest(tmp_path) -> list[Any]:
    """The others, one of them twice, beside a source that is empty of good ones."""
    texts = [*GOOD[20:], GOOD[20], *BAD[20:40]]
    write_records(tmp_path / "mixed.jsonl", *[{"text": text} for text in texts])
    write_records(tmp_path / "bad.jsonl", *[{"body": text} for text in BAD[40:]])
    bad = {"path": str(tmp_path / "bad.jsonl"), "text": "{body}"}
    return [str(tmp_path / "mixed.jsonl"), bad]


def scores_by_text(found: Any) -> dict[bytes, float]:
    keys, scores = found.arrays["keys"], found.arrays["scores"]
    return {key.tobytes(): score for key, score in zip(keys, scores, strict=True)}


def key_of(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def test_hashed_features(tmp_path, labels, rest):
    made = quality(tmp_path / "q", labels=labels)
    texts = GOOD[:20] + BAD[:20]
    expected = RidgeCV(PENALTIES).fit(hashed_matrix(texts), [label(text) for text in texts])
    weights = made.arrays["weights"]
    np.testing.assert_allclose(weights, np.append(expected.coef_, expected.intercept_))
    found = made.manifest["cross_validation"]
    assert found["auc"] == 1 and found["f1"] == 1 and found["kept"] == 0.5
    assert sum(made.manifest["labels"].values()) == 40

    scored = quality(tmp_path / "s", classifier=tmp_path / "q", sources=rest)
    by_text = scores_by_text(scored)
    assert len(by_text) == 80 and sorted(by_text) == [*by_text]
    for text in GOOD[20:] + BAD[20:]:
        assert by_text[key_of(text)] == pytest.approx(linear_score(text.encode(), weights))
    assert scored.manifest["classifier"] == made.fingerprint
    sources = scored.manifest["sources"]
    counts = {name: (one["documents"], one["kept"]) for name, one in sources.items()}
    assert counts == {"mixed": (61, 41), "bad": (20, 0)}


def test_hidden_states(tmp_path, labels, rest, tokenizer, monkeypatch):
    monkeypatch.setattr("slm.quality.fit.TREES", 30)
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        save_model(tmp_path / name, small_llama(300), tokenizer, "card", {})
    given: dict[str, Any] = {"labels": labels, "features": "hidden", "context": 30, "device": "cpu"}
    made = quality(tmp_path / "q", base_model=tmp_path / "base", **given)
    assert made.manifest["cross_validation"]["auc"] > 0.95
    scored = quality(tmp_path / "s", classifier=tmp_path / "q", sources=rest, device="cpu")
    found = scores_by_text(scored)
    good = [found[key_of(text)] for text in GOOD[20:]]
    assert min(good) > max(found[key_of(text)] for text in BAD[20:])
    (tmp_path / "base").rename(tmp_path / "moved")
    again: dict[str, Any] = {"classifier": tmp_path / "q", "sources": rest, "device": "cpu"}
    with pytest.raises(UserError, match="base is no model folder: there is no such folder"):
        quality(tmp_path / "t", **again)
    with pytest.raises(UserError, match="other has model_sha256 .*, the classifier .* trained on"):
        quality(tmp_path / "t", base_model=tmp_path / "other", **again)
    moved = quality(tmp_path / "t", base_model=tmp_path / "moved", **again)
    assert scores_by_text(moved) == found


def test_what_does_not_go_together(tmp_path, labels, rest):
    out: Any = tmp_path / "q"
    with pytest.raises(UserError, match="exactly one of labels and classifier must be given"):
        quality(out)
    with pytest.raises(UserError, match="sources are what a classifier scores"):
        quality(out, labels=labels, sources=rest)
    with pytest.raises(UserError, match="features is 'hidden' and base_model None"):
        quality(out, labels=labels, features="hidden")
    with pytest.raises(UserError, match="features is 'hashed' and base_model 'x'"):
        quality(out, labels=labels, base_model="x")
    quality(out, labels=labels)
    scored = quality(tmp_path / "s", classifier=out, sources=rest)
    with pytest.raises(UserError, match="classifier .*s has scores of documents and is none"):
        quality(tmp_path / "t", classifier=scored.folder, sources=rest)
    assert not (tmp_path / "t").exists()


def test_the_command(tmp_path, labels, rest, call):
    code, out, err = call(door.main, f"labels={labels}", f"out={tmp_path / 'q'}", "folds=4")
    assert code == 0 and "auc" in out and "1.000" in out, err
    sources = ",".join(quote({"path": one} if isinstance(one, str) else one) for one in rest)
    words = [f"classifier={tmp_path / 'q'}", f"sources=[{sources}]", f"out={tmp_path / 's'}"]
    code, out, err = call(door.main, *words)
    assert code == 0 and "mixed" in out and "67.2%" in out, err
    one_class = labels_of(tmp_path, GOOD)
    code, out, err = call(door.main, f"labels={one_class}", f"out={tmp_path / 'r'}")
    assert (code, out, err.count("\n")) == (1, "", 1) and "all 60 labels (4 to 5) are at or" in err
    assert not (tmp_path / "r").exists()
    assert json.loads((tmp_path / "q" / "manifest.json").read_text())["threshold"] == 3
