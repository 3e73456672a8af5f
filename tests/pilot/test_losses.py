"""Sums over documents against a walk over the tokens; which sets are read when."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_helpers import small_llama
from slm.evaluate.command import window_losses
from slm.model.build import SelectiveLM
from slm.pilot.losses import HeldoutSet, TokenLosses, evaluate_model, measured
from slm.store.windows import Windows

LENGTH = 4


@pytest.fixture
def held(tmp_path, make_corpus):
    """Two shards; the document that ends the first goes on in the second, as its record says."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 60, size) for size in (5 * LENGTH + 1, 3 * LENGTH + 1)]
    masks = [[True, True, False] * 7, [True] * 13]
    corpus = make_corpus(
        tmp_path / "held", ids, LENGTH, starts=[[0, 6, 9], [-4, 5]], masks=masks, sources=("a", "b")
    )
    rows = corpus.column("documents", 1)
    assert rows[:, 2].tolist() == [0, 1]  # make_corpus numbers a shard's documents anew
    return HeldoutSet("held", corpus, 100)


def by_hand(held, values, tokens):
    sums = defaultdict(float)
    for row in range(len(held.chosen)):
        for place in range(LENGTH):
            if tokens[row, place]:
                source, record = held.origins[row, place]
                sums[int(source), int(record)] += values[row, place]
    return [sums[pair] for pair in sorted({tuple(p) for p in held.origins.reshape(-1, 2)})]


def test_a_target_is_of_the_document_that_it_lies_in(held):
    rows = held.corpus.column("documents", 0)
    for target in range(1, 5 * LENGTH + 1):
        window, place = divmod(target - 1, LENGTH)
        wanted = rows[np.searchsorted(rows[:, 0], target, side="right") - 1, 1:3]
        assert held.origins[window, place].tolist() == wanted.tolist()
        assert held.origins[window, place, 0] == held.windows.sources(np.array([window]))[0, place]


def test_sums_are_those_of_the_tokens_that_count(held, tmp_path):
    values = np.random.default_rng(1).random(held.live.shape).astype(np.float32)
    assert not held.live.all()
    assert held.sums(values, held.live) == pytest.approx(by_hand(held, values, held.live))
    for point, scale in ((0, 2.0), (8, 1.0)):
        path = held.path(tmp_path / "run", point)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, scale * values)
    few = np.arange(values.size).reshape(values.shape) % 2 == 0
    found = measured(held, {"arm": {3: tmp_path / "run"}}, [0, 8], few, "half")
    wanted = np.array(by_hand(held, values, held.live & few))
    counts = np.array(by_hand(held, np.ones(values.shape), held.live & few))
    assert found.name == "half" and found.targets.tolist() == counts[counts > 0].tolist()
    assert found.nats["arm"][3] == pytest.approx(np.outer([2, 1], wanted[counts > 0]))


def test_token_losses_of_a_model_are_those_of_its_windows(held, tmp_path):
    torch.manual_seed(0)
    lm = SelectiveLM(small_llama(held.corpus.vocab_size)).eval()
    evaluate_model(lm, [held], tmp_path / "reference", batch_size=3)
    found = held.read(tmp_path / "reference", 0)
    with torch.no_grad():
        wanted = lm(Windows(held.corpus).batch(held.chosen)).loss.numpy()
    assert found == pytest.approx(wanted, abs=1e-5) and found.dtype == np.float32
    sums = window_losses(lm, held.corpus, 2)
    assert (found * held.live).sum(1) == pytest.approx(sums.nats, abs=1e-4)


def test_sets_that_are_read_at_the_ends_are_not_read_between(held, tmp_path):
    mine = TokenLosses(
        {"held": held}, ["other"], run_dir=str(tmp_path), every_tokens=8, batch_size=2
    )
    data = SimpleNamespace(heldout={"held": held.corpus, "other": held.corpus})

    def read(step: int) -> list[str]:
        trainer = SimpleNamespace(global_step=step, max_steps=4, datamodule=data)
        return list(mine.sets(trainer))  # type: ignore[arg-type]

    assert read(0) == read(4) == ["held", "other"] and read(2) == ["held"]
