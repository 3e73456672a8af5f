"""Shards from a source whose scores are known, of a whole corpus and of a part of it.

What comes from a model is in test_command.py.
"""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from run_helpers import train
from slm.errors import UserError
from slm.integrations.datasets import to_hf_dataset
from slm.score.command import make_plan, score
from slm.score.cost import references_cost
from slm.score.scorer import Arrays, Scorer, Source, finish, is_finished, store_bytes, stored
from slm.store.columns import ENTROPY, LOGPROBS
from slm.store.files import write_json
from slm.store.shards import Corpus, References
from slm.store.sidecars import Shard
from slm.store.windows import Windows, open_windows
from slm.verify import check_scores, verify
from train_helpers import compose_train, rows

T = 16


class Counted(Source):
    """The log-prob of target t of window w is -(w * T + t), the entropy the negative."""

    columns = (LOGPROBS, ENTROPY)

    def scores(self, numbers: np.ndarray) -> Arrays:
        values = (numbers[:, None] * T + np.arange(T)).astype(np.float32)
        return {"entropy": values, "logprobs": -values}

    def cost(self, seconds: float, tokens: int) -> None: ...


@pytest.fixture
def scorer(tmp_path: Path, text_corpus: Corpus) -> Scorer:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "plan.json", make_plan(text_corpus, None, {}))
    return Scorer(Counted(), text_corpus, out, 3, "float32")


def test_every_column_is_at_the_index_of_its_token(scorer):
    done: list[int] = []
    assert store_bytes(scorer, scorer.corpus.shards) == 2 * 321 * 4 * 2
    assert scorer.run(done.append) == 640 == sum(done)
    finish(scorer)
    references = References.open(scorer.out, "full")
    for index in range(2):
        expected = np.r_[np.nan, np.arange(320) + 320 * index]
        np.testing.assert_array_equal(references.column("entropy", index), expected)
        np.testing.assert_array_equal(references.column("logprobs", index), -expected)
    assert not list(scorer.out.glob("cost-*"))  # this source knows of none
    assert is_finished(scorer) and store_bytes(scorer, scorer.corpus.shards) == 0


@pytest.mark.parametrize("column", ["logprobs", "entropy"])
def test_a_shard_is_done_with_all_of_its_columns(scorer, column):
    scorer.run(lambda count: None)
    assert scorer.missing() == []
    (scorer.out / f"{column}-00001.npy").unlink()
    assert [shard.index for shard in scorer.missing()] == [1] and not is_finished(scorer)


def test_a_score_that_float16_cannot_hold_is_refused():
    assert stored("logprobs", np.array([np.nan, -6e4], np.float32), "float16")[1] == np.float16(
        -6e4
    )
    with pytest.raises(UserError, match="float16 cannot hold log-prob -70000.0"):
        stored("logprobs", np.array([np.nan, -7e4], np.float32), "float16")


# ---- a part of a corpus ------------------------------------------------------------------------


class Noted(Source):
    """The log-prob of target t of window w is -(w * T + t) / 100; it notes what it was asked."""

    columns = (LOGPROBS, ENTROPY)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def scores(self, numbers: np.ndarray) -> Arrays:
        self.asked += numbers.tolist()
        values = ((numbers[:, None] * T + np.arange(T)) / 100).astype(np.float32)
        return {"entropy": values, "logprobs": -values}

    def cost(self, seconds: float, tokens: int) -> dict:
        return {"seconds": 1.0, "tokens": tokens, "flops": 2.0 * tokens, "device": "d"}


@pytest.fixture
def grow(tmp_path, text_corpus):
    """grow(name, max_tokens, batch_size) scores into a folder; returns who was asked."""

    def run(name: str, max_tokens: int | None, batch_size: int = 3) -> Noted:
        out = tmp_path / name
        if not out.exists():
            out.mkdir()
            write_json(out / "plan.json", make_plan(text_corpus, "by hand", {"dtype": "float32"}))
        scorer = Scorer(Noted(), text_corpus, out, batch_size, "float32", max_tokens)
        if not is_finished(scorer):
            scorer.run(lambda count: None)
            finish(scorer)
        return scorer.source  # type: ignore[return-value]

    return run


def files(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.iterdir() if not path.name.startswith("cost-")]
    return {path.name: path.read_bytes() for path in names}


def test_whole_batches_of_the_whole_corpus_are_scored(grow, tmp_path):
    asked = grow("refs", 200).asked
    store = References.open(tmp_path / "refs", "full")
    assert store.is_partial and sorted(asked) == np.flatnonzero(store.scored).tolist()
    assert 200 <= len(asked) * T < 200 + 3 * T and {n // 20 for n in asked} == {0, 1}
    for shard in range(2):
        found = store.column("logprobs", shard)[1:].reshape(20, T)
        for place in range(20):
            number = 20 * shard + place
            wanted = -(number * T + np.arange(T)) / 100 if number in asked else np.full(T, np.nan)
            np.testing.assert_array_equal(found[place], wanted.astype(np.float32))
    cost = references_cost(tmp_path / "refs")
    assert cost is not None and cost["tokens"] == len(asked) * T


@pytest.mark.parametrize("max_tokens", [1, 3 * T, 3 * T + 1, 20 * T, 39 * T, 10**6])
def test_batches_are_taken_in_one_order_until_there_are_enough(text_corpus, tmp_path, max_tokens):
    """By a loop; the last batch of each shard of 20 windows has two."""
    scorer = Scorer(Noted(), text_corpus, tmp_path, 3, "float32", max_tokens)
    batches = [range(at, min(at + 3, end)) for end in (20, 40) for at in range(end - 20, end, 3)]
    wanted, left = set[int](), max_tokens
    for number in np.argsort(np.arange(14) * 0.6180339887498949 % 1):
        if left > 0:
            wanted |= {*batches[number]}
            left -= len(batches[number]) * T
    found = np.concatenate([scorer.wants(shard) for shard in text_corpus.shards])
    assert set(np.flatnonzero(found).tolist()) == wanted


def test_what_grows_has_the_bytes_of_what_was_made_at_once(grow, tmp_path):
    first = grow("grown", 100).asked
    second = grow("grown", 400).asked
    assert not set(first) & set(second) and grow("grown", 300).asked == []  # it has more
    grow("at_once", 400)
    assert files(tmp_path / "grown") == files(tmp_path / "at_once")
    cost = references_cost(tmp_path / "grown")
    assert cost is not None and cost["tokens"] == len(first + second) * T
    rest = grow("grown", None).asked
    assert sorted(first + second + rest) == list(range(40))
    grow("whole", None)
    assert files(tmp_path / "grown") == files(tmp_path / "whole")
    assert not References.open(tmp_path / "grown").is_partial
    assert not list((tmp_path / "whole").glob("scored-*"))


def test_a_shard_without_a_scored_window_costs_no_column(grow, tmp_path):
    grow("refs", 1)
    with_scores = sorted(path.name for path in (tmp_path / "refs").glob("logprobs-*.npy"))
    assert len(with_scores) == 1 and len(list((tmp_path / "refs").glob("scored-*.npy"))) == 2
    assert all(whole for _, whole, _ in verify(tmp_path / "refs"))


def test_killed_while_it_grows_it_ends_the_same(grow, tmp_path, monkeypatch):
    grow("grown", 100)
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slm.score.scorer.write_sidecar", killed)
        with pytest.raises(KeyboardInterrupt):
            grow("grown", 500)
    with pytest.raises(UserError, match="is not a finished reference: it is unfinished"):
        References.open(tmp_path / "grown")
    grow("grown", 500)
    grow("at_once", 500)
    assert files(tmp_path / "grown") == files(tmp_path / "at_once")


def test_verify_says_what_is_there_and_finds_what_is_wrong(grow, tmp_path):
    grow("refs", 200)
    store = References.open(tmp_path / "refs")
    ((_, whole, said),) = verify(tmp_path / "refs")
    assert whole and f", a part: {store.scored.sum()} of 40 windows have scores" in said
    lacking = int(np.argmin(store.scored_of(store.shards[0])))
    for value, number in ((-1.0, lacking), (np.nan, int(np.argmax(store.scored)))):
        scores = np.array(store.column("logprobs", 0))
        scores[1 + number * T] = value
        with pytest.raises(UserError, match=f"entry {1 + number * T} has"):
            check_scores(Changed(store, scores), store.shards[0], "logprobs")  # type: ignore[arg-type]


class Changed:
    """A store with other scores in its first shard."""

    def __init__(self, store: References, scores: np.ndarray):
        self.folder, self.manifest, self.scored_of = store.folder, store.manifest, store.scored_of
        self.column = lambda name, index: scores


@pytest.mark.parametrize("user", ["windows", "dynamics", "dataset"])
def test_who_needs_all_of_them_says_so(grow, tmp_path, text_corpus, user):
    grow("refs", 200)
    corpus, refs = text_corpus.folder, tmp_path / "refs"
    openers = {
        "windows": lambda: Windows(text_corpus, [References.open(refs)]),
        "dynamics": lambda: open_windows(Corpus.open(corpus), [str(refs)], None),
        "dataset": lambda: to_hf_dataset(corpus, refs),
    }
    with pytest.raises(UserError, match=r"has scores of 1\d of 40 windows, and all are needed"):
        openers[user]()


def test_a_window_without_scores_is_named(grow, tmp_path, text_corpus):
    grow("refs", 200)
    windows = Windows(text_corpus, [References.open(tmp_path / "refs")], partial=True)
    assert len(windows) == 40 and windows.columns == (LOGPROBS, ENTROPY)
    lacking = int(np.setdiff1d(np.arange(40), windows.available[:])[0])
    with pytest.raises(UserError, match=f"refs has no scores of window {lacking}$"):
        windows.batch([int(windows.available[0]), lacking])


def test_a_run_reads_scored_windows_alone_whatever_its_rule(grow, tmp_path, text_corpus):
    grow("refs", 24 * T, 4)
    scored = set(np.flatnonzero(References.open(tmp_path / "refs").scored).tolist())
    assert len(scored) == 24
    words = (f"data.references='{tmp_path / 'refs'}'", f"max_tokens={24 * T}")
    seen: dict[str, list[int]] = {}
    for rule in ("excess", "all"):
        seen[rule] = []
        with pytest.MonkeyPatch.context() as patch:
            batch = Windows.batch

            def noted(self: Windows, numbers, rule=rule, batch=batch):
                if self.references:
                    seen[rule] += np.asarray(numbers).tolist()
                return batch(self, numbers)

            patch.setattr(Windows, "batch", noted)
            train(compose_train(tmp_path / rule, text_corpus.folder, *words, f"selection={rule}"))
        assert set(seen[rule]) == scored
    assert len(rows(tmp_path / "excess" / "train.csv")) == 3
    lineage = json.loads((tmp_path / "excess" / "lineage.json").read_text())
    assert lineage["references"][0]["scored_windows"] == 24


def test_a_run_of_more_windows_than_are_scored_is_refused(grow, tmp_path, text_corpus):
    grow("refs", 24 * T, 4)
    lacking = int(np.argmin(References.open(tmp_path / "refs").scored))
    words = (f"data.references='{tmp_path / 'refs'}'", f"max_tokens={32 * T}", "selection=excess")
    with pytest.raises(UserError) as refused:
        train(compose_train(tmp_path / "run", text_corpus.folder, *words))
    assert f"max_tokens={32 * T} reads 32 windows" in str(refused.value)
    assert f"scores of 24 of the 40 of {text_corpus.folder} (none of window {lacking}" in str(
        refused.value
    )
    assert f"`slm score max_tokens={32 * T}`" in str(refused.value)
    grow("refs", 32 * T, 4)
    train(compose_train(tmp_path / "run", text_corpus.folder, *words))


def test_a_run_that_would_need_more_scores_is_not_made_longer(grow, tmp_path, text_corpus):
    """And not with more scores either: the windows that it reads would come in another order."""
    grow("refs", 24 * T, 4)
    words = (f"data.references='{tmp_path / 'refs'}'", "selection=excess", "optimizer=wsd")
    words += ("optimizer.schedule.decay_fraction=0",)
    train(compose_train(tmp_path / "run", text_corpus.folder, *words, f"max_tokens={24 * T}"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for message in ("reads 32 windows", "references"):
        with pytest.raises(UserError, match=message):
            longer = (*words, f"max_tokens={32 * T}")
            train(compose_train(tmp_path / "run", text_corpus.folder, *longer))
        after = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert {path: path.read_bytes() for path in after} == before
        grow("refs", 32 * T, 4)


def test_a_server_is_asked_for_whole_corpora(text_corpus, tmp_path):
    with pytest.raises(UserError, match="max_tokens is 5, but requests goes by whole corpora"):
        score(text_corpus, requests=tmp_path / "r.jsonl", served_model="big", max_tokens=5)


def test_the_model_itself_in_two_parts(text_corpus, tmp_path, tokenizer):
    from model_helpers import small_llama
    from slm.model.folder import save_model

    save_model(tmp_path / "model", small_llama(vocab_size=300), tokenizer, "card", {})
    given = {"reference_model": tmp_path / "model", "batch_size": 4, "device": "cpu"}
    for tokens in (100, 300, None):
        score(text_corpus, tmp_path / "parts", max_tokens=tokens, **given)
    score(text_corpus, tmp_path / "once", **given)
    one, other = (References.open(tmp_path / name, "full") for name in ("parts", "once"))
    assert one.fingerprint == other.fingerprint and isinstance(text_corpus, Corpus)


def test_a_shard_is_written_while_the_next_is_scored(scorer, monkeypatch):
    begun, write = threading.Event(), Scorer.write

    def scores(numbers: np.ndarray) -> Arrays:
        if numbers[0] >= scorer.of_shard(scorer.corpus.shards[1]).start:
            begun.set()
        return Counted().scores(numbers)

    def wait_for_the_next(self: Scorer, shard: Shard, *rest: Any) -> None:
        assert shard.index == 1 or begun.wait(60)
        write(self, shard, *rest)

    monkeypatch.setattr(scorer.source, "scores", scores)
    monkeypatch.setattr(Scorer, "write", wait_for_the_next)
    assert scorer.run(lambda count: None) == 640 and scorer.missing() == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_shard_that_cannot_be_written_ends_the_run(scorer, monkeypatch, failing):
    write = Scorer.write

    def full(self: Scorer, shard: Shard, *rest: Any) -> None:
        if shard.index == failing:
            raise UserError("the disk is full")
        write(self, shard, *rest)

    monkeypatch.setattr(Scorer, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        scorer.run(lambda count: None)
    assert not list(scorer.out.glob("*.claim"))  # whoever comes next may have them
    assert [shard.index for shard in scorer.missing()] == ([0, 1] if failing == 0 else [1])
