"""A reference model over a corpus -> log-prob shards: `slm score` (see `slm score --help`).

Every target of every window gets log p(token | the tokens before it in its window), from float32
accumulators; no logits are kept. A shard is the unit of work: any number of processes may run the
same command on one folder, each takes shards that nobody has claimed, and one that was killed is
replaced by running the command again. Costs one forward pass over the corpus, 4 bytes a token.
"""

import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm.cli import command, duration, progress
from slm.data import IGNORE_INDEX, Windows, to_device
from slm.errors import UserError
from slm.model import (
    SelectiveLM,
    check_length,
    check_model,
    check_model_folder,
    load_model,
    model_sha256,
)
from slm.shards import (
    FORMAT,
    IDENTITY,
    Corpus,
    References,
    Shard,
    adopt_plan,
    claim,
    claim_is_stale,
    is_alive,
    shard_path,
    write_array,
    write_manifest,
    write_sidecar,
)
from slm.tokenizer import load_tokenizer, tokenizer_sha256

log = logging.getLogger("slm.score")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORE_DTYPES = ("float32", "float16")
POLL_S = 1.0


# ---- what is asked for --------------------------------------------------------------------------


def check_settings(config: Any) -> None:
    for key, known in (("dtype", tuple(DTYPES)), ("store_dtype", STORE_DTYPES)):
        if config[key] not in known:
            raise UserError(f"{key} is {config[key]!r}, it must be one of {known}")
    check_count("batch_size", config.batch_size)


def check_count(key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{key} is {value!r}, it must be a whole number of at least 1")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device  # a device that is not there says so here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here: {reason}") from None


def check_tokenizer(model: str, corpus: Corpus) -> None:
    found, expected = tokenizer_sha256(load_tokenizer(model)), corpus.manifest["tokenizer_sha256"]
    if found != expected:
        raise UserError(
            f"model {model} has tokenizer {found}, {corpus.folder} was made with {expected}"
        )


def check_fits(lm: SelectiveLM, corpus: Corpus) -> None:
    """Refuse a model that our loss does not reproduce, on two windows."""
    check_length(lm.model.config, corpus.seq_len)
    windows = Windows(corpus)
    numbers = np.arange(min(2, len(windows)))
    batch = windows.batch(numbers)
    with torch.no_grad():
        check_finite(lm(batch).loss, batch["targets"], numbers)
    check_model(lm, batch)


def check_finite(values: Tensor, targets: Tensor, numbers: np.ndarray) -> None:
    bad = ~torch.isfinite(values) & (targets != IGNORE_INDEX)
    if bad.any():
        window = numbers[int(bad.any(1).nonzero()[0])]
        raise UserError(f"the model gives a non-finite log-prob in window {window}")


def load_reference(folder: str, corpus: Corpus, device: str, dtype: str) -> SelectiveLM:
    check_model_folder("reference_model", folder)
    check_tokenizer(folder, corpus)
    where = pick_device(device)
    lm = SelectiveLM(load_model(folder)).eval()
    check_fits(lm, corpus)  # in float32: bfloat16 logits would differ by their rounding
    return lm.to(where, DTYPES[dtype])


def make_plan(corpus: Corpus, config: Any, lm: SelectiveLM) -> dict[str, Any]:
    """What the scores depend on."""
    masks = {"masks": True} if corpus.has_masks else {}  # so `slm verify` knows why some are NaN
    return (
        masks
        | {
            "format": FORMAT,
            "kind": "reference",
            "corpus_fingerprint": corpus.fingerprint,
            "model_sha256": model_sha256(config.reference_model),
            "scoring": {
                "dtype": config.dtype,
                "store_dtype": config.store_dtype,
                "attn_implementation": lm.model.config._attn_implementation,
                "device": lm.model.device.type,
            },
        }
        | {field: corpus.manifest[field] for field in IDENTITY}
    )


# ---- scoring ------------------------------------------------------------------------------------


def window_logprobs(lm: SelectiveLM, windows: Windows, numbers: np.ndarray) -> np.ndarray:
    """log p of every target of these windows, (B, T) float32; NaN where there is no target."""
    batch = windows.batch(numbers)
    with torch.no_grad():
        logprob = -lm(to_device(batch, lm.model.device)).loss.float().cpu()
    check_finite(logprob, batch["targets"], numbers)
    return logprob.masked_fill(batch["targets"] == IGNORE_INDEX, torch.nan).numpy()


class Scorer:
    """Scores shards of one corpus into one folder."""

    def __init__(self, lm: SelectiveLM, corpus: Corpus, out: Path, batch_size: int, dtype: str):
        self.lm, self.corpus, self.out = lm.eval(), corpus, out
        self.batch_size, self.dtype = batch_size, dtype
        self.windows = Windows(corpus)

    def path(self, shard: Shard, suffix: str) -> Path:
        return shard_path(self.out, "logprobs", shard.index, suffix)

    def is_done(self, shard: Shard) -> bool:
        return self.path(shard, ".json").exists() and self.path(shard, ".npy").exists()

    def missing(self) -> list[Shard]:
        return [shard for shard in self.corpus.shards if not self.is_done(shard)]

    def batches(self, shard: Shard) -> Iterator[np.ndarray]:
        """The numbers of the shard's windows, batch by batch."""
        first = int(self.windows.first_window[shard.index])
        last = int(self.windows.first_window[shard.index + 1])
        for start in range(first, last, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, last))

    def score_shard(self, shard: Shard, advance: Callable[[int], None]) -> None:
        scores = np.full(shard.num_tokens, np.nan, np.float32)
        offset = 1  # the shard's first token has no score
        for numbers in self.batches(shard):
            logprob = window_logprobs(self.lm, self.windows, numbers).reshape(-1)
            scores[offset : offset + logprob.size] = logprob
            offset += logprob.size
            advance(logprob.size)
        self.write(shard, stored(scores, self.dtype))

    def write(self, shard: Shard, scores: np.ndarray) -> None:
        path = self.path(shard, ".npy")
        with naming(path):
            digest = write_array(path, scores)
            column = {"logprobs": self.dtype}, {"logprobs": len(scores)}
            done = Shard(shard.index, len(scores), {"logprobs": digest}, *column)
            write_sidecar(self.out, "logprobs", done)

    def take(self, shard: Shard, advance: Callable[[int], None]) -> bool:
        """Score a shard unless somebody else has done it or is at it."""
        if self.is_done(shard):
            return False
        with claim(self.path(shard, ".claim")) as mine:
            if not mine or self.is_done(shard):
                return False
            self.score_shard(shard, advance)
        return True

    def run(self, advance: Callable[[int], None]) -> int:
        """Score until the whole store is there; returns the number of tokens scored here.

        What others finish meanwhile counts as progress too. The claim of a dead one is taken over.
        """
        own, missing = 0, self.missing()
        while missing:
            mine = {shard.index for shard in missing if self.take(shard, advance)}
            own += num_targets([shard for shard in missing if shard.index in mine])
            before, missing = missing, self.missing()
            left = mine | {shard.index for shard in missing}
            if theirs := [shard for shard in before if shard.index not in left]:
                advance(num_targets(theirs))
            if missing and not mine:
                time.sleep(POLL_S)
        return own


def num_targets(shards: list[Shard]) -> int:
    return sum(shard.num_tokens - 1 for shard in shards)


def stored(scores: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = scores.astype(dtype)
    if np.isinf(cast).any():
        raise UserError(
            f"store_dtype {dtype} cannot hold log-prob {np.nanmin(scores)}; use store_dtype=float32"
        )
    return cast


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk does not say for which file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


# ---- the command --------------------------------------------------------------------------------


def announce(scorer: Scorer, todo: list[Shard]) -> None:
    """Store size, free disk and a first estimate of the time, before the work starts."""
    count = num_targets(todo)
    needed, free = count * np.dtype(scorer.dtype).itemsize, shutil.disk_usage(scorer.out).free
    if needed > free:
        raise UserError(f"{scorer.out}: {needed:,} bytes are needed, the disk has {free:,} free")
    numbers = next(scorer.batches(todo[0]))
    window_logprobs(scorer.lm, scorer.windows, numbers[:1])  # the first forward is slow
    start = time.perf_counter()
    size = window_logprobs(scorer.lm, scorer.windows, numbers).size
    seconds = count / size * (time.perf_counter() - start)
    log.info(
        f"{count:,} tokens to score: {needed / 1e6:,.1f} MB on disk ({free / 1e6:,.0f} MB free), "
        f"about {duration(seconds)} for one process"
    )


def score_missing(scorer: Scorer, todo: list[Shard]) -> None:
    announce(scorer, todo)
    start = time.perf_counter()
    with progress("scoring", num_targets(todo), "tokens") as advance:
        own = scorer.run(advance)
    seconds = time.perf_counter() - start
    log.info(f"scored {own:,} tokens in {seconds:.1f} s ({own / seconds:,.0f} tokens/s)")


def remove_leftovers(out: Path) -> None:
    """Claims and temporary files of processes on this host that were killed."""
    for path in out.glob("logprobs-*.claim"):
        if claim_is_stale(path):
            path.unlink(missing_ok=True)
    prefix = f"{socket.gethostname()}-"
    for path in out.glob(".*.tmp"):
        owner = path.name.removesuffix(".tmp").rpartition(prefix)[2]
        if owner.isdecimal() and not is_alive(int(owner)):
            path.unlink(missing_ok=True)


def score(config: Any) -> Path:
    check_settings(config)
    out, corpus = Path(config.out), Corpus.open(config.corpus, config.check)
    lm = load_reference(config.reference_model, corpus, config.device, config.dtype)
    adopt_plan(out, make_plan(corpus, config, lm))
    scorer = Scorer(lm, corpus, out, config.batch_size, config.store_dtype)
    if todo := scorer.missing():
        score_missing(scorer, todo)
    elif (out / "manifest.json").exists():
        log.info(f"{out} is finished already, nothing to do")
        return out
    with naming(out / "manifest.json"):
        write_manifest(out, "logprobs", len(corpus.shards))
    References.open(out)
    remove_leftovers(out)
    return out


@command("score")
def main(config: Any) -> None:
    log.info(f"references: {score(config)}")


if __name__ == "__main__":
    main()
