"""Windows over token shards -> batches.

A batch is a dict of tensors (B windows, T = seq_len positions):

    input_ids          (B, T) int64
    targets            (B, T) int64    the next tokens, already shifted; -100: no target, a prompt
    reference_logprob  (B, T) float32  with references: log-prob of each target under the reference,
                                       and the other columns that were stored (slm.store.columns)
    token_weight       (B, T) float32  what each target's loss is multiplied by (only where the
                                       corpus has weights); a target of weight 0 is none
    position_ids       (B, T) int64    restarting at each document (only with packing=documents)
    window, epoch      (B,)   int64    which window, in which pass over the corpus

Nothing here imports Lightning: reading a corpus must not take seconds to start.

Costs: reading is a gather from memory maps, about 5 ns a token on one core.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from slm.errors import UserError
from slm.store.available import Available
from slm.store.columns import COLUMNS, DOMAIN, DTYPE, LOGPROBS, Column
from slm.store.files import Recent
from slm.store.shards import WEIGHT, Corpus, References, Store

IGNORE_INDEX = -100
FEW_ROWS = 16  # of a shard: copied one by one, else twice and together
COMBINE = ("mean", "min", "max", "mixture", DOMAIN.name)
SOURCE = "source"  # instead of these: every target has the score of its own source's reference
Batch = dict[str, Tensor]


def combine(logprobs: np.ndarray, how: str) -> np.ndarray:  # (R, B, T) -> (B, T)
    """Several references as one: the mean, min or max of their losses, or their mixture.

    mixture: log of the mean probability, as if one of them were drawn for every token
    """
    if how == "mixture":
        highest = logprobs.max(0)
        return highest + np.log(np.exp(logprobs - highest).mean(0))
    # The lowest loss is the highest log-prob.
    return {"mean": np.mean, "min": np.max, "max": np.min}[how](logprobs, axis=0)


class Windows:
    """Random access to the windows of a corpus and, with `references`, to their scores.

    combine:  how several references become one (see above); None for one or none; "source": there
              is one for each source of the corpus, in their order; "domain": the second of two
              is a column beside the first
    partial:  references may have scores of some windows alone, `available`
    """

    def __init__(
        self,
        corpus: Corpus,
        references: Sequence[References] = (),
        combine: str | None = None,
        partial: bool = False,
    ):
        for store in references:
            store.check_matches(corpus)
            if not partial:
                store.check_whole()
        if corpus.num_windows == 0:
            raise UserError(f"{corpus.folder} holds no window of {corpus.seq_len} tokens")
        self.corpus, self.references, self.combine = corpus, tuple(references), combine
        self.first_window = np.cumsum([0, *corpus.windows_per_shard])
        self._views = Recent()

    def __len__(self) -> int:
        return self.corpus.num_windows

    @cached_property
    def available(self) -> Available:
        """The numbers of those that every reference has scores of."""
        return Available(self)

    def shards_of(self, windows: np.ndarray) -> np.ndarray:  # (n,) -> (n,) int64
        """In which shard each window lies."""
        return np.searchsorted(self.first_window, windows, side="right") - 1

    def scored_of(self, shard: int) -> np.ndarray:  # (windows of the shard,) bool
        """Of which every reference has scores."""
        scored = [store.scored_of(store.shards[shard]) for store in self.references]
        return np.logical_and.reduce(scored)

    def _view(self, store: Store, column: str, shard: int) -> np.ndarray:
        """A shard's windows as rows of a strided view, (n, T) or (n, T + 1): nothing is read."""

        def view() -> np.ndarray:
            length, values = self.corpus.seq_len, store.column(column, shard)
            if column == "tokens":
                return sliding_window_view(values, length + 1)[::length]
            # Entry i is about the token at i, so a window's targets start at index 1.
            return sliding_window_view(values[1:], length)[::length]

        return self._views.get((store.folder, column, shard), view)

    def _gather(
        self, store: Store, column: str, windows: np.ndarray, out: np.ndarray
    ) -> np.ndarray:
        shards = self.shards_of(windows)
        places, there = windows - self.first_window[shards], np.unique(shards)
        views = {shard: self._view(store, column, shard) for shard in there.tolist()}
        if len(windows) < FEW_ROWS * len(there):
            for row, (shard, place) in enumerate(
                zip(shards.tolist(), places.tolist(), strict=True)
            ):
                out[row] = views[shard][place]
            return out
        for shard, view in views.items():
            rows = shards == shard
            out[rows] = view[places[rows]]
        return out

    def tokens(self, windows: np.ndarray) -> np.ndarray:  # (B, T + 1) int64
        """The inputs and, one further, the targets, prompts included."""
        shape = (len(windows), self.corpus.seq_len + 1)
        tokens = self._gather(self.corpus, "tokens", windows, np.empty(shape, np.int64))
        if tokens.max() >= self.corpus.vocab_size:
            window = windows[tokens.max(1).argmax()]
            shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
            raise UserError(
                f"{self.corpus.file('tokens', shard)}: window {window} of {self.corpus.folder} "
                f"holds token id {tokens.max()}, the tokenizer has {self.corpus.vocab_size}"
            )
        return tokens

    def batch(self, windows: np.ndarray | Sequence[int]) -> Batch:
        """The windows with these global numbers, (B,) int64, as a batch of tensors."""
        windows = np.asarray(windows, np.int64)
        size, length = len(windows), self.corpus.seq_len
        ids = torch.from_numpy(self.tokens(windows))
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        if self.corpus.manifest["packing"] == "documents":
            first = self.document_starts(windows)
            batch["targets"] = ids[:, 1:].masked_fill(torch.from_numpy(first[:, 1:]), IGNORE_INDEX)
            batch["position_ids"] = torch.from_numpy(positions(first[:, :-1]))
        if self.corpus.has_masks:
            live = self._gather(self.corpus, "masks", windows, np.empty((size, length), bool))
            batch["targets"] = batch["targets"].masked_fill(torch.from_numpy(~live), IGNORE_INDEX)
        if self.corpus.has_weights:
            batch[WEIGHT] = weight = torch.from_numpy(self.weights(windows))
            batch["targets"] = batch["targets"].masked_fill(weight == 0, IGNORE_INDEX)
        if self.references:
            batch |= self._scores(batch["targets"], windows)
        batch["window"] = torch.from_numpy(windows)
        return batch

    def target_bytes(self, windows: np.ndarray) -> Tensor:  # (B, T) int64
        """UTF-8 bytes of every target; EOS has none."""
        shape = (len(windows), self.corpus.seq_len)
        return torch.from_numpy(
            self._gather(self.corpus, "bytes", windows, np.empty(shape, np.int64))
        )

    def weights(self, windows: np.ndarray) -> np.ndarray:  # (B,) -> (B, T) float32
        """What the loss of every target is multiplied by."""
        shape = (len(windows), self.corpus.seq_len)
        weights = self._gather(self.corpus, "weights", windows, np.empty(shape, DTYPE))
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise UserError(
                f"{self.corpus.folder}: target {place} of window {windows[row]} has weight "
                f"{weights[row, place]}, expected a finite number of at least 0"
            )
        return weights

    @property
    def has_signal(self) -> bool:
        """Does the corpus say of some tokens whether they are signal or noise?"""
        return self.corpus.has_signal

    def signal(self, windows: np.ndarray) -> np.ndarray:  # (B,) -> (B, T) int8
        """Of every target: 1 signal, 0 noise, -1 unknown."""
        if not self.has_signal:
            raise UserError(f"{self.corpus.folder} has no labels: no source had signal or noise")
        shape = (len(windows), self.corpus.seq_len)
        return self._gather(self.corpus, "signal", windows, np.empty(shape, np.int8))

    def _scores(self, targets: Tensor, windows: np.ndarray) -> Batch:
        """The columns of the references, combined."""
        return {
            column.key: torch.from_numpy(self._column(column, targets, windows))
            for column in self.columns
        }

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """All that one reference has; what is required of several, and none of none."""
        if self.combine == DOMAIN.name:
            return LOGPROBS, DOMAIN
        stores = self.references if len(self.references) == 1 else ()
        there = {name for store in stores for name in store.shards.names}
        found = [c for c in COLUMNS.values() if c.required or c.name in there]
        return tuple(found) if self.references else ()

    def _column(self, column: Column, targets: Tensor, windows: np.ndarray) -> np.ndarray:  # (B, T)
        stores, stored = self.references, column
        if self.combine == DOMAIN.name:
            stores, stored = (stores[int(column is DOMAIN)],), LOGPROBS
        values = np.empty((len(stores), len(windows), self.corpus.seq_len), DTYPE)
        for store, out in zip(stores, values, strict=True):
            self._check_scored(store, windows)
            self._gather(store, stored.name, windows, out)
            self._check_scores(store, stored, out, targets, windows)
        if self.combine == SOURCE:
            return np.take_along_axis(values, self.sources(windows)[None], axis=0)[0]
        return values[0] if len(stores) == 1 else combine(values, str(self.combine))

    def sources(self, windows: np.ndarray) -> np.ndarray:  # (B,) -> (B, T) int64
        """Which source of the corpus every target comes from: an index into its `sources`."""
        return self.origins(windows)[..., 0]

    def origins(self, windows: np.ndarray) -> np.ndarray:  # (B,) -> (B, T, 2) int64
        """Source and record of every target: one pair a document, whatever shards it lies in."""
        length = self.corpus.seq_len
        found = np.empty((len(windows), length, 2), np.int64)
        shards = self.shards_of(windows)
        for row, (window, shard) in enumerate(zip(windows, shards, strict=True)):
            documents = self._document_rows(int(shard))
            begin = (window - self.first_window[shard]) * length
            targets = np.arange(begin + 1, begin + length + 1)
            at = np.searchsorted(documents[:, 0], targets, side="right") - 1
            found[row] = documents[at, 1:3]
        return found

    def _document_rows(self, shard: int) -> np.ndarray:  # (documents of the shard, 4)
        """Mapped once: with packing=documents every window of every batch asks for it."""
        key = (self.corpus.folder, "documents", shard)
        return self._views.get(key, lambda: self.corpus.column("documents", shard))

    def document(self, window: int) -> tuple[int, int, int, int]:
        """(start, source, record, first token) of the document that a window begins in."""
        shard = int(self.shards_of(np.array(window)))
        rows = self._document_rows(shard)
        begin = (window - self.first_window[shard]) * self.corpus.seq_len
        start, source, record, first = rows[np.searchsorted(rows[:, 0], begin, side="right") - 1]
        return int(start), int(source), int(record), int(first)

    def document_starts(self, windows: np.ndarray) -> np.ndarray:  # (B, T + 1) bool
        """True at the first token of a document."""
        length = self.corpus.seq_len
        first = np.zeros((len(windows), length + 1), dtype=bool)
        shards = self.shards_of(windows)
        for row, (window, shard) in enumerate(zip(windows, shards, strict=True)):
            starts = self._document_rows(int(shard))[:, 0]
            begin = (window - self.first_window[shard]) * length
            low, high = np.searchsorted(starts, [begin, begin + length + 1])
            first[row, starts[low:high] - begin] = True
        return first

    def _check_scored(self, store: References, windows: np.ndarray) -> None:
        shards = self.shards_of(windows)
        for shard in np.unique(shards) if store.is_partial else ():
            mine = windows[shards == shard]
            lacking = ~store.scored_of(store.shards[shard])[mine - self.first_window[shard]]
            if lacking.any():
                raise UserError(f"{store.folder} has no scores of window {mine[lacking][0]}")

    def _check_scores(
        self,
        store: References,
        column: Column,
        scores: np.ndarray,  # (B, T)
        targets: Tensor,
        windows: np.ndarray,
    ) -> None:
        """A live target without a score, or with one of the wrong sign, is a broken reference."""
        wrong = column.is_wrong(scores)
        if not wrong.any():
            return
        wrong &= targets.numpy() != IGNORE_INDEX
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise UserError(
                f"{store.folder}: target {place} of window {windows[row]} has "
                f"{column.refusal(scores[row, place])}"
            )


def positions(first: np.ndarray) -> np.ndarray:  # (B, T) bool -> (B, T) int64
    """Position of each token within its document; a window's first token counts as position 0."""
    index = np.arange(first.shape[1])
    return index - np.maximum.accumulate(np.where(first, index, 0), axis=1)


def open_windows(
    corpus: Corpus,
    folders: str | Sequence[str] | Mapping[str, str] | None,
    combine: str | None,
    check: str = "size",
    prefix: str = "data.",
    partial: bool = False,
) -> Windows:
    """With references: one, several to combine, or by name one for each source.

    prefix: what stands before the keys in messages
    """
    if isinstance(folders, Mapping):
        folders, combine = of_sources(corpus, folders, combine, prefix), SOURCE
        opened = {folder: References.open(folder, check) for folder in dict.fromkeys(folders)}
        return Windows(corpus, [opened[folder] for folder in folders], combine, partial)
    if combine == SOURCE:
        raise UserError(
            f"{prefix}references is {folders!r}, and each source of the corpus has one of its own: "
            f"it must be {{{': ..., '.join(corpus.manifest['sources'])}: ...}}"
        )
    return Windows(corpus, open_references(folders, combine, check, prefix), combine, partial)


def of_sources(
    corpus: Corpus, folders: Mapping[str, str], combine: str | None, prefix: str
) -> list[str]:
    """In the order of the corpus's sources."""
    sources = corpus.manifest["sources"]
    if combine not in (None, SOURCE):
        raise UserError(
            f"{prefix}combine is {combine!r}, and {prefix}references names one of each source: "
            "leave the former null"
        )
    if set(folders) != set(sources):
        raise UserError(
            f"{prefix}references names the sources {sorted(folders)}, those of {corpus.folder} "
            f"are {sorted(set(sources))}"
        )
    return [folders[name] for name in sources]


def open_references(
    folders: str | Sequence[str] | None, combine: str | None, check: str, prefix: str
) -> list[References]:
    named = [folders] if isinstance(folders, str) else list(folders or [])
    if combine is None and len(named) > 1:
        raise UserError(
            f"{prefix}references names {len(named)} folders: {prefix}combine must be one of "
            f"{COMBINE}"
        )
    if combine is not None and (len(named) < 2 or combine not in COMBINE):
        raise UserError(
            f"{prefix}combine is {combine!r} for {len(named)} reference(s); it is one of "
            f"{COMBINE} for two or more in {prefix}references, else null"
        )
    opened = [References.open(folder, check) for folder in named]
    if combine == DOMAIN.name:
        check_pair(opened, prefix)
    return opened


def check_pair(references: Sequence[References], prefix: str) -> None:
    """The general reference and the domain's: what one lacks that the other knows must be the text
    that they were tuned on, not what they are. UserError where their records say so.
    """
    if len(references) != 2:
        raise UserError(
            f"{prefix}combine is {DOMAIN.name!r} for {len(references)} references: "
            f"{prefix}references names two, a general one and one of the domain"
        )
    general, domain = references
    if None not in (general.base, domain.base) and not general.origins & domain.origins:
        raise UserError(
            f"{general.folder} and {domain.folder} come from different bases ({general.base} and "
            f"{domain.base}): tune both references from one model"
        )


def spread(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the numbers below `count`, evenly spread, ascending."""
    chosen = count if limit is None else min(limit, count)
    return np.arange(chosen) * count // chosen


def turns(count: int, rank: int = 0, ranks: int = 1) -> range:
    """Which of `count` parts a rank computes in turn with the others, which compute as many.

    Where they do not come out even, a rank has a number from `count` on: a turn that is not used.
    """
    return range(rank, -(-count // ranks) * ranks, ranks)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
