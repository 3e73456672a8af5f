"""A tokenizer of the text itself: trained once, by one of the processes, before anything else."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm.prepare.keep import Keep
from slm.prepare.overlap import Overlap
from slm.prepare.readers import read_source
from slm.prepare.records import read_texts
from slm.prepare.sources import Source
from slm.prepare.work import when_free
from slm.prepare.workers import bad_record, side_of
from slm.store.claims import process_name
from slm.store.files import naming
from slm.store.tokenizer import load_tokenizer, train_tokenizer

log = logging.getLogger("slm.prepare")


def shared_tokenizer(
    config: Any,
    parts: Path,
    sources: list[Source],
    overlap: Overlap | None,
    keep: Keep | None,
    max_bytes: int,
    template: str | None,
) -> Any:
    """The one in `parts`; trained where it is not there.

    template: what it is to render chats with
    """
    folder = parts / "tokenizer"
    with when_free(parts / "tokenizer.claim", "it is trained by"):
        if folder.exists():
            return load_tokenizer(folder)
        log.info("training a tokenizer of %s entries", config.tokenizer.vocab_size)
        texts = sample_texts(sources, config, overlap, keep, max_bytes)
        tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
        if template is not None:
            tokenizer.chat_template = template
        new = parts / f".tokenizer.{process_name()}.tmp"
        with naming(folder, new):
            tokenizer.save_pretrained(new)
            os.replace(new, folder)
        return tokenizer


def save_tokenizer(tokenizer: Any, parts: Path, folder: Path) -> None:
    """Beside a corpus; what was trained is copied, since what was loaded is saved otherwise."""
    with naming(folder):
        tokenizer.save_pretrained(folder)
        if (parts / "tokenizer").exists():
            shutil.copytree(parts / "tokenizer", folder, dirs_exist_ok=True)


def sample_texts(
    sources: list[Source],
    config: Any,
    overlap: Overlap | None,
    keep: Keep | None,
    max_bytes: int,
) -> Iterator[str]:
    """For training a tokenizer: the first train documents of every source, train_mb in all."""
    budget = config.tokenizer.train_mb * 1e6
    for i, source in enumerate(sources):
        share, spent = budget / (len(sources) - i), 0
        texts = (
            text
            for block in read_source(source, max_bytes)
            for text in read_texts(block, source, max_bytes)
        )
        for text in texts:
            if text.fault is not None and config.on_bad_record == "stop":
                raise bad_record(text.fault)
            if text.fault is not None:
                continue  # the main pass counts it
            if side_of(text.digest, config.heldout_ratio) == 1:
                continue
            if keep is not None and not keep.keeps(text):
                continue
            if overlap is None or overlap.find(text.origin) is None:
                spent += len(text.data)
                yield text.text
            if spent >= share:
                break
        budget -= spent
