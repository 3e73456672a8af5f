"""Completions of many prefixes at once, by a model that is loaded here.

The prefixes of all questions stand side by side, those of like length together; the keys and values
of each are computed once for all its samples. A completion has `max_new_tokens` tokens with its
prefix, so that what is sampled behind a prefix is what would have followed it. Draws depend on the
seed and on which prefixes share a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from slm.evaluate.generation import Sampling, check_room, continued, generation_config
from slm.model.build import SelectiveLM, load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.pivots.search import Node


class Draw(NamedTuple):
    """New ids behind a prefix, and their log-probs where those came with them."""

    ids: list[int]
    logprobs: list[float] | None = None


class Sampler(Protocol):
    """A model that is loaded here, or what a server answered."""

    stops: list[int]

    def batches(self, nodes: Sequence[Node], samples: int) -> list[list[Node]]: ...

    def sample(self, batch: Sequence[Node], samples: int, phase: str) -> list[list[Draw]]: ...

    def logprobs(self, question: str, ids: Sequence[int]) -> list[float]: ...


class OwnModel:
    """Samples of a model folder."""

    def __init__(
        self,
        folder: str,
        eos_id: int,
        prompts: Mapping[str, list[int]],  # of each question's key
        how: Sampling,
        *,
        seed: int,
        batch_size: int,
        dtype: str,
        device: str,
    ):
        self.prompts, self.how, self.seed = prompts, how, seed
        self.batch_size, self.dtype = batch_size, dtype
        model: Any = load_model(folder)
        check_room(folder, max(map(len, prompts.values())), model.config, how.max_new_tokens)
        self.model = model.to(pick_device(device), DTYPES[dtype]).eval()
        config: Any = generation_config(model, eos_id, how)
        self.config, self.stops = config, config.eos_token_id

    def batches(self, nodes: Sequence[Node], samples: int) -> list[list[Node]]:
        """Of one length where that can be: a batch takes as long as its longest completion."""
        ordered = sorted(nodes, key=lambda n: (len(n.prefix), len(self.prompts[n.question]), n))
        size = max(1, self.batch_size // samples)
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def sample(self, batch: Sequence[Node], samples: int, phase: str) -> list[list[Draw]]:
        """New ids: of each node `samples` of them."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(self.seed, phase, batch))
            return self.drawn(batch, samples)

    def drawn(self, batch: Sequence[Node], samples: int) -> list[list[Draw]]:
        prompts = [[*self.prompts[node.question], *node.prefix] for node in batch]
        room = [self.how.max_new_tokens - len(node.prefix) for node in batch]
        self.config.max_new_tokens = max(room)
        found: list[list[Draw]] = [[] for _ in batch]
        for copies in pieces(samples, max(1, self.batch_size // len(batch))):
            new = continued(self.model, prompts, self.config, self.dtype, copies)
            for row, ids in enumerate(new):
                found[row // copies].append(Draw(ids[: room[row // copies]]))
        return found

    @torch.no_grad()
    def logprobs(self, question: str, ids: Sequence[int]) -> list[float]:
        """Of each token of a completion, nats."""
        prompt = self.prompts[question]
        row = torch.tensor([[*prompt, *ids]], device=self.model.device)
        batch = {"input_ids": row[:, :-1], "targets": row[:, 1:].clone()}
        with computing(self.model.device, self.dtype):
            loss = SelectiveLM(self.model)(batch).loss  # (1, T)
        return (-loss[0, len(prompt) - 1 :].double()).tolist()


def pieces(count: int, most: int) -> list[int]:
    """5 by at most 2 -> 2, 2, 1"""
    return [min(most, count - first) for first in range(0, count, most)]


def seed_of(seed: int, phase: str, batch: Sequence[Node]) -> int:
    text = repr((seed, phase, [(node.question, node.prefix) for node in batch]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
