"""What `slm prepare` counts, and says as it works and at its end."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from slm.console import Progress, progress
from slm.prepare.encode import window_targets
from slm.prepare.scan import BadText
from slm.prepare.workers import Result
from slm.store.files import Json
from slm.store.shards import Corpus, write_manifest

log = logging.getLogger("slm.prepare")
SIDES = ("train", "heldout")


class Speed:
    """What was read and made of it so far, as the progress bar says it."""

    def __init__(self, show: Progress) -> None:
        self.show, self.started = show, time.monotonic()  # show: also what others have done
        self.text_bytes, self.tokens = 0, 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def __str__(self) -> str:
        mb, thousands = self.text_bytes / 1e6, self.tokens / 1e3
        return f"{mb / self.seconds:.2f} MB/s, {thousands / self.seconds:.0f}k tokens/s"

    def add(self, result: Result) -> None:
        self.text_bytes += int(result.documents[:, 4].sum())
        self.tokens += int(result.documents[:, 0].sum())
        self.show(result.num_input_bytes, str(self))


@contextmanager
def show_progress(total_bytes: int | None, done: int = 0) -> Iterator[Speed]:
    """total_bytes: not known of a compressed file, a table or the hub; done: before this process"""
    with progress("preparing", total_bytes, "bytes", done) as show:
        speed = Speed(show)
        yield speed
    if speed.text_bytes:
        log.info("%.1f MB of text in %.1f s: %s", speed.text_bytes / 1e6, speed.seconds, speed)


def finish_side(
    config: Any,
    folder: Path,
    counts: Json,
    num_shards: int,
    has_prompts: bool = True,
    left_out: Mapping[str, int] = MappingProxyType({}),  # documents, by what leaves them out
) -> Json:
    """Write the manifest; returns the side's report."""
    if num_shards == 0:
        hint = "lower seq_len, or change heldout_ratio (0: no held-out side)"
        for name, count in left_out.items():
            hint += f", or {name}, which leaves {count:,} documents out" if count else ""
        raise BadText(
            f"the {folder.name} side has {counts['tokens']} tokens in {counts['documents']} "
            "documents (a text file is one, see `document` of a source), fewer than the "
            f"{config.seq_len + 1} of one window (heldout_ratio={config.heldout_ratio}, "
            f"seq_len={config.seq_len}): {hint}"
        )
    manifest = write_manifest(folder, "tokens", num_shards)
    assert manifest is not None, "every sidecar was just written"
    in_windows = counts["tokens"] - counts["dropped_tail_tokens"] - num_shards
    counts |= {"windows": in_windows // config.seq_len, "shards": num_shards}
    corpus = Corpus.open(folder)
    if "targets" in counts and has_prompts:
        counts |= window_targets(corpus)
    if corpus.has_weights:
        counts["weights"] = weight_range(corpus)
    return counts | {"fingerprint": manifest["fingerprint"]}


def weight_range(corpus: Corpus) -> Json:
    """Least and largest weight of all tokens, EOS included, and how many have 0; the mean over
    targets, whose number is what a loss is divided by."""
    total, targets, zeros, ends = 0.0, 0, 0, []
    for shard in corpus.shards:
        weights = np.asarray(corpus.column("weights", shard.index))
        live = weights > 0
        zeros += len(weights) - int(np.count_nonzero(live))
        if corpus.has_masks:
            live &= corpus.column("masks", shard.index)
        targets += int(np.count_nonzero(live))
        total += float(weights[live].sum(dtype=np.float64))
        ends += [float(weights.min()), float(weights.max())]
    mean = total / max(1, targets)
    return {"mean": mean, "least": min(ends), "largest": max(ends), "tokens_of_0": zeros}


def say_report(out: Path, report: Json) -> None:
    """Of `slm prepare`: what was made, and what was left out."""
    say_sides(out, report)
    say_left_out(report)


def say_sides(out: Path, report: Json) -> None:
    for side in SIDES:
        if side in report:
            log.info(
                "{folder}: {documents:,} documents, {tokens:,} tokens, {windows:,} windows, "
                "{shards} shards, {dropped_tail_tokens} tokens dropped at the end".format(
                    folder=out / side, **report[side]
                )
            )
            say_targets(out / side, report[side])
            say_signal(out / side, report[side])
            say_weights(out / side, report[side])
            say_long(out / side, report[side])


def say_left_out(report: Json) -> None:
    for name, counts in report["short_documents"].items():
        log.info(
            "%s: %s documents of fewer than %s tokens (min_tokens) are left out",
            *(name, f"{counts['documents']:,}", f"{counts['min_tokens']:,}"),
        )
    for name, counts in report["kept"].items():
        seen, stay = counts["documents"], counts["kept"]
        log.info(f"keep: {stay:,} of the {seen:,} documents of {name} ({stay / seen:.1%})")
    for name, counts in report["excluded"].items():
        log.info(
            "exclude %s: %d of its %d records share a 13-gram with the text, %d documents dropped",
            name,
            counts["records_found"],
            counts["records"],
            counts["documents_dropped"],
        )
    if report["bad_records"]["skipped"]:
        log.info("bad records skipped: %d, the first ones:", report["bad_records"]["skipped"])
        for sentence in report["bad_records"]["first"]:
            log.info("  %s", sentence)


def say_targets(folder: Path, counts: Json) -> None:
    """Where some tokens are masked: how much is left to learn from, and without its prompt."""
    if "targets" in counts:
        share = counts["targets"] / counts["tokens"]
        log.info(f"{folder}: {counts['targets']:,} of the tokens are targets ({share:.1%})")
    if "targets_without_prompt" in counts:
        cut_off, whole = counts["targets_without_prompt"], counts["targets_in_windows"]
        log.info(
            f"{folder}: {cut_off:,} of the {whole:,} targets in windows "
            f"({cut_off / max(1, whole):.0%}) stand in a window that begins inside their document, "
            "after their prompt or a part of it (a larger seq_len makes them fewer)"
        )


def say_signal(folder: Path, counts: Json) -> None:
    """Where some tokens are labelled: how many, and how much of them is noise."""
    if "signal" in counts:
        labelled = counts["signal"] + counts["noise"]
        log.info(
            f"{folder}: {labelled:,} tokens are labelled: {counts['signal']:,} signal, "
            f"{counts['noise']:,} noise ({counts['noise'] / max(1, labelled):.1%})"
        )


def say_weights(folder: Path, counts: Json) -> None:
    """Where losses are weighted: they are divided by a number of tokens, so the mean is a scale."""
    if "weights" in counts:
        log.info(
            "{folder}: the tokens' weights are {least:g} to {largest:g}, {mean:.4g} in the mean of "
            "targets; {tokens_of_0:,} have 0 and are none".format(
                folder=folder, **counts["weights"]
            )
        )


def say_long(folder: Path, counts: Json) -> None:
    """Where long documents have a weight of their own: what they are of each source."""
    for name, own in counts["sources"].items():
        if "long_documents" in own:
            share = own["long_tokens"] / max(1, own["tokens"])
            log.info(
                f"{folder}: {own['long_documents']:,} of the {own['documents']:,} documents of "
                f"{name} are long (weight_long), with {share:.1%} of its tokens"
            )
