"""What `slm prepare` says of what it made."""

import logging
from pathlib import Path

from slm.store.files import Json

log = logging.getLogger("slm.prepare")
SIDES = ("train", "heldout")


def say_report(out: Path, report: Json) -> None:
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
    """Where prompts are masked: how much is left to learn from."""
    if "targets" in counts:
        share = counts["targets"] / counts["tokens"]
        log.info(f"{folder}: {counts['targets']:,} of the tokens are targets ({share:.1%})")
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
