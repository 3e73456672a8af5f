"""The probability of success at a place: completions drawn there, judged, and kept."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from slm.console import progress
from slm.pivots.questions import Judge, Question
from slm.pivots.rollouts import Rollouts, Sample
from slm.pivots.sampling import Draw, Sampler
from slm.pivots.search import Node, Solution

PHASES = ("search", "confirm")


class Measured:
    """How many completions are right, each place measured once in each phase."""

    def __init__(
        self,
        store: Rollouts,
        sampler: Sampler,
        judge: Judge,
        questions: Mapping[str, Question],  # by key
        tokenizer: Any,
        samples: Mapping[str, int],  # by phase
    ):
        self.store, self.sampler, self.judge, self.tokenizer = store, sampler, judge, tokenizer
        self.questions, self.samples = questions, samples
        self.asked: set[tuple[str, Node]] = set()

    def right(self, phase: str, nodes: Sequence[Node]) -> dict[Node, int]:
        """What was not asked before is sampled now.

        Batches are made of all of it, whatever is in the store, so that a run that goes on draws
        what it would have drawn.
        """
        new = [node for node in nodes if (phase, node) not in self.asked]
        self.asked |= {(phase, node) for node in new}
        count = self.samples[phase]
        label = f"{phase}, {len(new):,} places"
        with progress(label, len(new) * count, "completions") as advance:
            for batch in self.sampler.batches(new, count):
                if any((phase, node) not in self.store.places for node in batch):
                    drawn = self.sampler.sample(batch, count, phase)
                    self.keep(phase, zip(batch, drawn, strict=True))
                advance(len(batch) * count)
        unanswered = [node for node in nodes if (phase, node) not in self.store.places]
        if unanswered:
            raise Unanswered(phase, unanswered)
        return {node: self.store.places[phase, node].tally.right for node in nodes}

    def keep(self, phase: str, found: Iterable[tuple[Node, list[Draw]]]) -> None:
        judged = [
            (node, [Sample(d.ids, self.is_right(node, d.ids), d.logprobs) for d in draws])
            for node, draws in found
            if draws and (phase, node) not in self.store.places
        ]
        self.store.add(phase, judged)

    def is_right(self, node: Node, ids: list[int]) -> bool:
        """One that did not end has said nothing yet."""
        if ids[-1] not in self.sampler.stops:
            return False
        text = self.tokenizer.decode([*node.prefix, *ids[:-1]], skip_special_tokens=True)
        return self.judge(self.questions[node.question], text)

    def solutions(self, question: str, most: int) -> list[Solution]:
        """Different completions of a question that ended, right and wrong ones in turn."""
        root = Node(question, ())
        ended = [s for s in self.store.samples("search", root) if s.ids[-1] in self.sampler.stops]
        different = list({tuple(one.ids): one for one in ended}.values())
        sides = [[one for one in different if one.right is side] for side in (True, False)]
        taken = [one for pair in zip_longest(*sides) for one in pair if one is not None][:most]
        return [
            Solution(
                question,
                tuple(one.ids),
                one.logprobs or self.sampler.logprobs(question, one.ids),
                one.right,
            )
            for one in taken
        ]


class Unanswered(Exception):
    """A server has yet to sample these."""

    def __init__(self, phase: str, nodes: list[Node]):
        super().__init__(f"{len(nodes)} places have no completions of {phase}")
        self.phase, self.nodes = phase, nodes
