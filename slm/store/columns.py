"""The columns of a reference store: an entry each, for all that makes, checks or uses scores.

A column has a float32 for every token of a corpus (float16 on disk by score.store_dtype). Entry i
of a shard is about token i given the tokens before it in its window, so the targets of a window and
their scores are the same slice. NaN says that the token has none: it is no target.

A new column is its producer and its entry in COLUMNS. Then `slm score columns=[NAME]` makes it,
`slm verify` knows its sign, and batches, token sets and rows of datasets have it under its key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from slm_kernels import TokenCrossEntropy

DTYPE = "float32"
SIDES = {-1: " <= 0", 0: "", 1: " >= 0"}


@dataclass(frozen=True)
class Column:
    """What is known of a column without its values.

    name:      of its files in a store
    key:       in batches, in rows of datasets, and in what a rule needs
    noun:      what a value is, for messages
    sign:      -1: no value is above 0, 1: none is below, 0: any will do
    produce:   what the loss says of a batch, the batch, and the SelectiveLM -> (B, T); None: it is
               another reference's
    asks:      options of the loss that `produce` needs
    negated:   the name of the negative, which a token set holds in place of the value
    required:  every store has it; of several references it is combined, the others are left out
    """

    name: str
    key: str
    noun: str
    sign: int
    produce: Callable[[TokenCrossEntropy, dict[str, Tensor], Any], Tensor] | None
    asks: tuple[str, ...] = ()
    negated: str | None = None
    required: bool = False

    @property
    def needed(self) -> str:
        return f"a finite number{SIDES[self.sign]} is needed"

    def is_wrong(self, values: np.ndarray) -> np.ndarray:
        """NaN too: only the caller knows where there is no score."""
        return ~(np.isfinite(values) & (self.sign * values >= 0))

    def refusal(self, value: Any) -> str:
        return f"{self.noun} {value}, {self.needed}"

    @property
    def frozen_name(self) -> str:
        """In a token set."""
        return self.negated or self.key

    def frozen(self, values: np.ndarray) -> np.ndarray:
        """As a token set holds them; and back."""
        return values if self.negated is None else -values


# ---- the producers, and the entries -------------------------------------------------------------


def logprobs(output: TokenCrossEntropy, batch: dict[str, Tensor], lm: Any) -> Tensor:
    return -output.loss


def entropy(output: TokenCrossEntropy, batch: dict[str, Tensor], lm: Any) -> Tensor:
    """Of the distribution that predicts the token (Rho-1, Eq 8)."""
    assert output.entropy is not None, "asked for"
    return output.entropy


LOGPROBS = Column(
    name="logprobs",
    key="reference_logprob",
    noun="log-prob",
    sign=-1,
    produce=logprobs,
    negated="reference_loss",
    required=True,
)
ENTROPY = Column(
    name="entropy",
    key="reference_entropy",
    noun="entropy",
    sign=1,
    produce=entropy,
    asks=("want_entropy",),
)
DOMAIN = Column(  # of two references: the second's log-probs (slm.store.windows)
    name="domain",
    key="domain_logprob",
    noun="log-prob",
    sign=-1,
    produce=None,
    negated="domain_loss",
)
COLUMNS = {column.name: column for column in (LOGPROBS, ENTROPY, DOMAIN)}


# ---- which of them ------------------------------------------------------------------------------


def columns_named(names: Iterable[str]) -> tuple[Column, ...]:
    """Those that every store has, and these; in the order of COLUMNS."""
    wanted, known = set(names), {c.name for c in COLUMNS.values() if c.produce is not None}
    if unknown := wanted - known:
        raise UserError(f"columns names {sorted(unknown)}, known are {sorted(known)}")
    return tuple(c for c in COLUMNS.values() if c.required or c.name in wanted)


def columns_needed(keys: Iterable[str]) -> tuple[Column, ...]:
    """Those that every store has, and those that a rule needs by these keys."""
    wanted = set(keys)
    return tuple(c for c in COLUMNS.values() if c.required or c.key in wanted)
