"""One training step of the loss, as this package and its peers do it: score, select, backward.

A peer is a function of (problem, select_ratio) that leaves gradients in hidden.grad and
weight.grad. What is not installed, or not made for the device, is left out and named. Two ways to
select with a loss that cannot do it itself:

    masked     per-token losses with gradient, times the mask: all rows go through backward
    composed   losses without gradient, select, a second call on the gathered rows
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slm_kernels import select_top_k, selective_cross_entropy

CHUNK_ROWS = 2048
UNLIMITED = 2**60


class Problem(NamedTuple):
    hidden: Tensor  # (N, D), a leaf
    weight: Tensor  # (V, D), a leaf
    targets: Tensor  # (N,)
    reference_loss: Tensor  # (N,)


PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> (N,)
Peer = Callable[[Problem, float], Any]


def make_problem(
    num_tokens: int, width: int, vocab_size: int, dtype: torch.dtype, device: str
) -> Problem:
    """Random data: logits with a standard deviation of 2, losses about log(V) + 2."""
    random = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=random, device=device)  # noqa: E731
    targets = torch.randint(vocab_size, (num_tokens,), generator=random, device=device)
    return Problem(
        hidden=normal(num_tokens, width).to(dtype).requires_grad_(),
        weight=(normal(vocab_size, width) * 2 * width**-0.5).to(dtype).requires_grad_(),
        targets=targets,
        reference_loss=normal(num_tokens).abs() * 3,
    )


def _selected(losses: Tensor, problem: Problem, select_ratio: float) -> Tensor:
    excess = losses.detach().float() - problem.reference_loss
    return select_top_k(excess, torch.ones_like(excess, dtype=torch.bool), select_ratio)


def masked(per_token: PerToken) -> Peer:
    def step(problem: Problem, select_ratio: float) -> None:
        losses = per_token(problem.hidden, problem.weight, problem.targets)
        mask = _selected(losses, problem, select_ratio)
        ((losses * mask).sum() / mask.sum()).backward()

    return step


def composed(per_token: PerToken, mean: PerToken) -> Peer:
    def step(problem: Problem, select_ratio: float) -> None:
        with torch.no_grad():
            losses = per_token(problem.hidden, problem.weight, problem.targets)
        rows = _selected(losses, problem, select_ratio).nonzero().squeeze(1)
        hidden = problem.hidden.index_select(0, rows)
        mean(hidden, problem.weight, problem.targets[rows]).backward()

    return step


def ours(logits_cache_bytes: int, implementation: str = "auto") -> Peer:
    def step(problem: Problem, select_ratio: float) -> None:
        selective_cross_entropy(
            *problem,
            select_ratio=select_ratio,
            logits_cache_bytes=logits_cache_bytes,
            implementation=implementation,
        ).loss.backward()

    return step


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def _in_chunks(per_token: PerToken) -> PerToken:
    def chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
        done: Any = [checkpoint(per_token, h, weight, t, use_reentrant=False) for h, t in pieces]
        return torch.cat(done)

    return chunks


def _compiled_chunks() -> dict[str, Peer]:
    return {"torch.compile chunks, masked": masked(_in_chunks(torch.compile(_torch)))}


def _linear_cross_entropy() -> dict[str, Peer]:
    options = torch.nn.LinearCrossEntropyOptions()

    def with_reduction(reduction: str) -> PerToken:
        return lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, options=options
        )

    return {
        "F.linear_cross_entropy, masked": masked(with_reduction("none")),
        "F.linear_cross_entropy, composed": composed(
            with_reduction("none"), with_reduction("mean")
        ),
    }


def _liger() -> dict[str, Peer]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    def with_reduction(reduction: str) -> PerToken:
        return lambda hidden, weight, targets: liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction=reduction
        )

    return {
        "Liger, masked": masked(with_reduction("none")),
        "Liger, composed": composed(with_reduction("none"), with_reduction("mean")),
    }


def _cut_cross_entropy() -> dict[str, Peer]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    def with_options(**options: Any) -> PerToken:
        return lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, **options
        )

    exact = {"filter_eps": None}
    return {
        "CCE (drops small gradients), masked": masked(with_options(reduction="none")),
        "CCE (drops small gradients), composed": composed(
            with_options(reduction="none"), with_options(reduction="mean")
        ),
        "CCE exact, composed": composed(
            with_options(reduction="none"), with_options(reduction="mean", **exact)
        ),
    }


def _quack() -> dict[str, Peer]:
    from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]
    from quack.linear_cross_entropy import (  # type: ignore[import-not-found]
        chunked_linear_cross_entropy,
    )

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(hidden.split(4096), targets.split(4096), strict=True)
        return torch.cat([cross_entropy(h @ weight.T, t, reduction="none") for h, t in pieces])

    def mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, targets, reduction="mean")

    return {"Quack, composed": composed(losses, mean)}


def available(device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be imported here, and why the others cannot."""
    peers = {
        "ours": ours(0),
        "ours, full cache": ours(UNLIMITED),
        "plain torch, masked": masked(_torch),
    }
    groups = {"torch.compile": _compiled_chunks, "F.linear_cross_entropy": _linear_cross_entropy}
    if device == "cuda":
        peers["ours, chunked"] = ours(0, "chunked")
        groups |= {"Liger": _liger, "CCE": _cut_cross_entropy, "Quack": _quack}
    missing = {}
    for name, group in groups.items():
        try:
            peers |= group()
        except (ImportError, AttributeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return peers, missing
