"""Problems to solve, and torch.empty filled with NaN: an output left unwritten fails a test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import warm


class Problem(NamedTuple):
    hidden: Tensor  # (N, D), a leaf
    weight: Tensor  # (V, D), a leaf
    bias: Tensor  # (V,), a leaf
    targets: Tensor  # (N,)
    reference_loss: Tensor  # (N,)
    token_weight: Tensor  # (N,)


@pytest.fixture(autouse=True)
def poisoned_empty_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """But for tests of what only a GPU shows, which run what a user runs."""
    torch.use_deterministic_algorithms("gpu" not in request.keywords)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(
        num_tokens: int = 37,
        width: int = 7,
        vocab_size: int = 29,
        dtype: torch.dtype = torch.float64,
        ignored: float = 0.2,
        seed: int = 0,
    ) -> Problem:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        targets = torch.randint(vocab_size, (num_tokens,), generator=random)
        hole = torch.rand(num_tokens, generator=random) < ignored
        return Problem(
            hidden=normal(num_tokens, width).to(dtype).requires_grad_(),
            weight=normal(vocab_size, width).to(dtype).requires_grad_(),
            bias=normal(vocab_size).to(dtype).requires_grad_(),
            targets=targets.masked_fill(hole, -100),
            reference_loss=normal(num_tokens).abs().float() * 3,
            token_weight=normal(num_tokens),
        )

    return make


@pytest.fixture
def run_on_ranks() -> Callable[[Callable[[int, int, str], None], int, Path], None]:
    """Run a test file's `work(rank, world, folder)` in processes of their own."""

    def run(work: Callable[[int, int, str], None], world: int, folder: Path) -> None:
        file = Path(work.__code__.co_filename)
        code = f"import os, sys; sys.path.insert(0, {str(file.parent)!r}); import {file.stem} as it"
        call = f"{code}; it.{work.__name__}(int(os.environ['RANK']), {world}, {str(folder)!r})"
        codes, said = warm.run_ranks(world, [sys.executable, "-c", call])
        assert codes == [0] * world, said

    return run
