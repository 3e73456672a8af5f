"""What a run trains on and is evaluated on, as a Lightning datamodule."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningDataModule

from slm.errors import UserError
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer
from slm.store.windows import open_windows
from slm.train.mixture import Mixture
from slm.train.order import NEW, MicroBatches, Mixed, Order, Steps
from slm.train.sharded import data_ranks


class TokenData(LightningDataModule):
    """Training windows (`corpus`, `references`; or `mixture`) and named held-out sets.

    references:        none, a folder, a list of folders, or {source: folder}, for each source of
                       the corpus its own; of a corpus that is scored in part,
                       the scored windows are what there is to read, whatever the rule
    combine:           what becomes of several references: mean, min or max of their losses, or
                       mixture (the mean of their probabilities)
    mixture:           {part: {corpus, references, share, max_epochs}} in place of these three
    batch_size:        windows of one optimizer step, over all ranks
    micro_batch_size:  windows of one forward on one rank
    heldout:           name -> corpus folder, evaluated during training
    heldout_windows:   at most this many windows of each held-out set, evenly spread; what is
                       read where callbacks/costs.py plans fewer
    order:             of the windows in each pass (slm.train.order); None: a folder's own, or keyed
    check:             "size", or "full" to compare every file's hash before training
    """

    def __init__(
        self,
        corpus: str | None,
        references: str | Sequence[str] | Mapping[str, str] | None,
        combine: str | None,
        heldout: Mapping[str, str] | None,
        heldout_windows: int,
        batch_size: int,
        micro_batch_size: int,
        num_workers: int,
        check: str,
        seed: int,
        order: str | None = None,
        mixture: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        self.mixture = None if mixture is None else Mixture.open(mixture, check)
        if self.mixture is not None:
            self.corpus: Corpus = self.mixture.corpus
            self.windows, self.references = self.mixture.windows, self.mixture.references
        else:
            self.corpus = Corpus.open(str(corpus), check)
            self.windows = open_windows(self.corpus, references, combine, check, partial=True)
            self.references = list(self.windows.references)
        named = {} if heldout is None else heldout
        self.heldout = {name: Corpus.open(folder, check) for name, folder in named.items()}
        self.heldout_windows = heldout_windows
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.num_workers, self.seed, self.order = num_workers, seed, order
        self.consumed_windows = 0
        for name, held in self.heldout.items():
            named_held = f"held-out set {name} ({held.folder})"
            check_same_tokenizer(named_held, held, self.corpus.folder, self.corpus)

    def accumulate(self, world_size: int) -> int:
        """Number of micro-batches of one optimizer step on each rank."""
        per_pass = self.micro_batch_size * world_size
        if self.batch_size % per_pass:
            raise UserError(
                f"data.batch_size ({self.batch_size}) must be a multiple of "
                f"data.micro_batch_size * ranks ({self.micro_batch_size} * {world_size})"
                f"{self.that_fits(world_size)}"
            )
        return self.batch_size // per_pass

    def that_fits(self, world_size: int) -> str:
        windows, rest = divmod(self.batch_size, world_size)
        if rest:
            return ""
        most = min(windows, self.micro_batch_size)
        fitting = next(n for n in range(most, 0, -1) if windows % n == 0)
        return f": data.micro_batch_size={fitting} does"

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.corpus.seq_len

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The folders that are trained on: of a mixture by the names of its parts, else one."""
        if self.mixture is None:
            return {"corpus": self.corpus}
        return dict(zip(self.mixture.shares, self.mixture.corpus.parts, strict=True))

    def samples(self) -> Order | Mixed:
        """Which window is the run's sample n."""
        kind = self.order or NEW
        if self.mixture is not None:
            return self.mixture.order(self.seed, kind)
        return Order(len(self.windows.available), self.seed, kind)

    def train_dataloader(self) -> MicroBatches:
        assert self.trainer is not None
        ranks = data_ranks(self.trainer)
        steps = Steps(
            self.windows,
            self.samples(),
            self.batch_size,
            self.micro_batch_size,
            ranks.rank,
            ranks.count,
        )
        start, rest = divmod(self.consumed_windows, self.batch_size)
        assert rest == 0, f"{self.consumed_windows=} is no multiple of {self.batch_size=}"
        return MicroBatches(steps, start, self.num_workers, torch.cuda.is_available())

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"consumed_windows": self.trainer.global_step * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed_windows = state_dict["consumed_windows"]
