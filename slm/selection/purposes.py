"""Rules for other ends than Rho-1's: long context, and forgetting. Their references are special.

LongGain   the reference is the same corpus scored with a short context
Forget     two references of one base: data.references=[GENERAL,DOMAIN] data.combine=domain
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.checks import check_value, number, optional, whole, word
from slm.errors import UserError
from slm.selection.rule import Ranked, excess_loss, given
from slm.store.windows import Batch


@dataclass(frozen=True)
class LongGain(Ranked):
    """The highest reference_loss - token_loss, the reference being the corpus scored with a short
    context (`slm score context=`): what long context buys (LongCE, arXiv 2410.23771).

    With min_gain 2 and max_loss 2 (select_ratio null), the key tokens of its LongPPL.

    max_loss:  beside min_gain: of these, tokens of at most so many nats
    """

    needs = ("reference_logprob",)
    needs_token_loss = True
    short_context = True
    bound = "min_gain"
    min_gain: float | None = field(default=None, kw_only=True)
    max_loss: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.max_loss", self.max_loss, optional(number))
        if self.max_loss is not None and self.limit is None:
            raise UserError(
                f"selection.max_loss is {self.max_loss} and selection.min_gain null: long_gain "
                "has both, or the former null"
            )

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        gain = -excess_loss(batch, token_loss)
        if self.max_loss is None:
            return gain
        return gain.masked_fill(given(token_loss) > self.max_loss, -torch.inf)


@dataclass(frozen=True)
class Forget(Ranked):
    """The LOWEST s = log p_domain - log p_general: what a domain's reference expects more than a
    general one is kept out, of the loss, or of the context too (arXiv 2601.21571, whose probe of
    a sparse autoencoder's latents s stands for).

    mode:      "mask": no target; "replace": no input either
    smooth:    s is the mean over a token and so many candidates' places on either side of it, in
               place of the paper's neighbours
    max_gain:  nats, in place of the share that stays
    """

    needs = ("reference_logprob", "domain_logprob")
    bound = "max_gain"
    max_gain: float | None = field(default=None, kw_only=True)
    mode: str = field(default="mask", kw_only=True)
    smooth: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("selection.mode", self.mode, word("mask", "replace"))
        check_value("selection.smooth", self.smooth, whole(0))

    @property
    def replaces(self) -> bool:
        return self.mode == "replace"

    def score(self, batch: Batch, token_loss: Tensor | None) -> Tensor:
        gain = batch["domain_logprob"] - batch["reference_logprob"]
        return -smoothed(gain, self.candidates(batch), self.smooth)


def smoothed(values: Tensor, live: Tensor, reach: int) -> Tensor:  # (B, T)
    """Mean over the live places from `reach` before to `reach` behind, in the window."""
    width, live = 2 * reach + 1, live.to(values)
    total, count = (
        F.avg_pool1d(one, width, stride=1, padding=reach)
        for one in (values.masked_fill(live == 0, 0.0), live)
    )
    return total / count.clamp(min=torch.finfo(values.dtype).tiny)
