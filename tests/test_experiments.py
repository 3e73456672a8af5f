"""What the scripts of experiments compute, on small models."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_helpers import make_batch, make_lm
from slm.model.selected import attention_through
from slm.selection.rules import Excess
from slm.train.curves import Curve

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch) -> Any:
    def load(folder: str, name: str) -> Any:
        for place in ("benchmarks", folder):
            monkeypatch.syspath_prepend(str(EXPERIMENTS / place))
        sys.modules.pop(name, None)  # several have a results.py
        return importlib.import_module(name)

    return load


def scored(seed: int) -> Any:
    batch = make_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    return batch | {"reference_logprob": -4 * torch.rand(2, 12, generator=generator)}


def flattened(lm: Any) -> np.ndarray:
    return np.concatenate([p.grad.double().numpy().ravel() for p in lm.parameters()])


def by_autograd(lm: Any, batch: Any, ratio: float, cuts: bool) -> np.ndarray:
    """Plain autograd of the loss of the selected tokens; `cuts`: keys and values are detached."""
    losses = lm(batch).loss.detach()
    score = (losses + batch["reference_logprob"]).where(batch["targets"] >= 0, -torch.inf)
    count = round(ratio * int((batch["targets"] >= 0).sum()))
    chosen = torch.zeros(score.shape, dtype=torch.bool).flatten()
    chosen[score.flatten().topk(count).indices] = True
    kept = chosen.view(2, 1, 12, 1)

    def cut(own: Any, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any):
        if cuts:
            key, value = (torch.where(kept, one, one.detach()) for one in (key, value))
        return own(module, query, key, value, *args, **kwargs)

    lm.zero_grad()
    with attention_through(cut):
        logits = lm.model(batch["input_ids"]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(
        logits[chosen], batch["targets"].flatten()[chosen], reduction="mean"
    )
    loss.backward()
    return flattened(lm)


def test_the_angle_of_both_gradients(script):
    gradients = script("2026-11-30_selected_backward", "gradients")
    lm, batches = make_lm("llama tied"), [scored(0), scored(1), scored(2)]
    found = gradients.compared(lm, batches, Excess(0.4))
    exact, selected = (
        np.array([by_autograd(lm, batch, 0.4, cuts) for batch in batches]) for cuts in (False, True)
    )
    sizes = [np.linalg.norm(one, axis=1) for one in (exact, selected)]
    cosines = (exact * selected).sum(1) / (sizes[0] * sizes[1])
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-5) and cosines.max() < 0.999
    assert found["norm_ratio"] == pytest.approx((sizes[1] / sizes[0]).mean(), abs=1e-5)
    pairs = [exact[i] @ exact[i + 1] / (sizes[0][i] * sizes[0][i + 1]) for i in (0, 1)]
    assert found["cosine_of_batches"] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_of_all_tokens_both_gradients_are_one(script):
    gradients = script("2026-11-30_selected_backward", "gradients")
    found = gradients.compared(make_lm("llama"), [scored(0), scored(1)], Excess(1.0))
    assert found["cosine"] == pytest.approx(1) and found["norm_ratio"] == pytest.approx(1)


def test_seconds_buy_a_loss_on_the_line_through_two_runs(script):
    results = script("2026-11-30_selected_backward", "results")

    class Run:
        def __init__(self, tokens: int, loss: float):
            self.lineage = {"tokens_seen": tokens}
            self.curves = {"math": Curve("", np.array([tokens]), np.array([loss]))}

    short, longer = Run(100, 5.0), Run(200, 4.0)
    found = [results.loss_at(tokens, short, longer, "math") for tokens in (100, 125, 200)]
    assert found == pytest.approx([5.0, 4.75, 4.0])


def test_differences_of_smollm2_pair_seeds_and_windows(script):
    """What has no seed stands against every one; a seed that only one arm has is left out."""
    results = script("2026-11-30_smollm2", "results")
    one = {"0": np.array([1.0, 2.0, 4.0]), "1": np.array([2.0, 2.0, 2.0]), "2": np.zeros(3)}
    other = {"0": np.array([1.0, 1.0, 1.0]), "1": np.array([1.0, 0.0, 2.0])}
    found = results.apart(one, other)  # by window 0.5, 1.5, 1.5; by seed 4/3 and 1
    assert (found["difference"], found["seeds"]) == ("+1.1667", "2")
    assert (found["lowest_seed"], found["highest_seed"]) == ("+1.0000", "+1.3333")
    error = np.std([0.5, 1.5, 1.5], ddof=1) / np.sqrt(3)
    assert float(found["half_interval"]) == pytest.approx(4.303 * error, rel=0.05)
    found = results.apart({"": np.array([0.0, 1.0, 5.0])}, other)
    assert (found["lowest_seed"], found["highest_seed"]) == ("+1.0000", "+1.0000")
    assert (found["difference"], found["seeds"]) == ("+1.0000", "2")
    assert results.apart({"5": np.zeros(3)}, other) == {}
