"""The settings of `slm prepare`: their defaults, what is checked, and what two runs must share."""

import math
import os
import sys
from typing import Any, TypedDict

from slm.errors import UserError
from slm.prepare.chat import find_template
from slm.prepare.encoder import EncoderState
from slm.prepare.sources import Source
from slm.stage import Folder
from slm.store.files import Json
from slm.store.shards import FORMAT
from slm.store.tokenizer import check_vocab_size


class TokenizerKeys(TypedDict, total=False):
    path: Folder | None
    eos: str | None
    vocab_size: int | None
    train_mb: float
    chat_template: Folder | None
    encoder: str


TOKENIZER: TokenizerKeys = {
    **{"path": None, "eos": None, "vocab_size": None, "train_mb": 64},
    **{"chat_template": None, "encoder": "auto"},
}


def check_config(config: Any) -> None:
    if config.shard_tokens <= config.seq_len:
        raise UserError(
            f"shard_tokens is {config.shard_tokens}, it must be more than seq_len, {config.seq_len}"
        )
    if (config.tokenizer.path is None) == (config.tokenizer.vocab_size is None):
        raise UserError("exactly one of tokenizer.path and tokenizer.vocab_size must be set")
    if config.tokenizer.eos is not None and config.tokenizer.path is None:
        raise UserError(f"tokenizer.eos={config.tokenizer.eos!r} is a token of no tokenizer.path")
    if config.tokenizer.vocab_size is not None:
        check_vocab_size(config.tokenizer.vocab_size)
        if config.heldout_ratio == 1:
            raise UserError("tokenizer.vocab_size trains on train, and heldout_ratio=1 leaves none")


def chat_template(config: Any, sources: list[Source], tokenizer: Any) -> str | None:
    """What chats are rendered with; None where there are none."""
    file = config.tokenizer.chat_template
    if any(source.messages is not None for source in sources):
        return find_template(tokenizer, file)
    if file is not None:
        raise UserError(f"tokenizer.chat_template is {file}, and no source has messages")
    return None


def run_plan(
    config: Any, sources: list[Source], exclude: list[Source], tokenizer: Json, keep: Json
) -> Json:
    """What a second run is compared with, one flat field a setting; no path of a file is in it."""
    keys = ("seq_len", "packing", "heldout_ratio", "on_bad_record")
    keys += ("max_document_mb", "shard_tokens")
    plan: Json = {"format": FORMAT, "kind": "preparation"} | {
        key: vars(config)[key] for key in keys
    }
    plan |= {f"tokenizer.{key}": value for key, value in tokenizer.items()} | keep
    for name, group in (("sources", sources), ("exclude", exclude)):
        for i, source in enumerate(group):
            plan |= {f"{name}[{i}].{key}": value for key, value in source.plan().items()}
    return plan


def corpus_plan(
    config: Any, state: EncoderState, tokenizer: str, side: str, sources: list[str]
) -> Json:
    """tokenizer: its sha256; sources: their names."""
    return {
        "format": FORMAT,
        "kind": "corpus",
        "tokenizer_sha256": tokenizer,
        "vocab_size": state.vocab_size,
        "eos_id": state.eos_id,
        "seq_len": config.seq_len,
        "packing": config.packing,
        "split": side,
        "sources": sources,
    }


def input_bytes(sources: list[Source]) -> int | None:
    """Bytes to be read; None where that is not known beforehand."""
    sizes = [source.num_bytes for source in sources]
    return None if None in sizes else sum(filter(None, sizes))


def count_workers(sources: list[Source]) -> int:
    """The usable cores; fewer where starting a process costs more than it saves."""
    total = input_bytes(sources)
    useful = 2**20 if total is None else math.ceil(total / 4e6)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, useful))
