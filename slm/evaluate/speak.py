"""Models go on with prompts: `slm speak`, texts as JSON lines and what speech.py says of them.

    slm speak 'models={slm: run/model}' prompts=prompts.txt corpus=corpus/train out=speech.jsonl

A text begins as in training: after an EOS in a folder that slm wrote, else after what the tokenizer
puts before a text. It ends at an EOS or after `max_new_tokens`. Sampling depends on `seed` and
`batch_size` alone. Costs the generation, token after token, and one reading of the corpus for all
models.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.command_keys import SPEAK
from slm.console import progress
from slm.errors import UserError
from slm.evaluate.copied import Sequences
from slm.evaluate.generation import (
    Sampling,
    check_room,
    continued,
    first_ids,
    generation_config,
)
from slm.evaluate.speech import summaries, write_speech
from slm.model.build import load_model
from slm.model.device import DTYPES, pick_device
from slm.prepare.overlap import read_all
from slm.prepare.sources import parse_sources
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Json
from slm.store.hub import check_model_folder, is_folder
from slm.store.shards import Corpus
from slm.store.tokenizer import check_same_tokenizer, load_tokenizer, with_eos_of

log = logging.getLogger("slm.speak")
MAX_BYTES = 2**26  # of a prompt
COPIED_TOKENS = 8  # of the shortest run that counts as copied


class Asked(NamedTuple):
    """What of `slm speak` says how; see there."""

    max_new_tokens: int
    prompt_tokens: int | None
    num_samples: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int
    dtype: str
    device: str


class Text(NamedTuple):
    """One that a model made."""

    row: Json
    ids: list[int]  # without the EOS that ended it
    tokenizer: Any


class Speech(NamedTuple):
    """Texts and what is said of all of them, see speech.py."""

    rows: list[Json]
    summaries: list[Json]  # one a model


# ---- prompts ------------------------------------------------------------------------------------


def read_prompts(prompts: Any) -> list[str]:
    """Of sources as in `slm prepare`, or of one file: a line or a record's `text` is a prompt."""
    if isinstance(prompts, str):
        lines = {"document": "line"} if prompts.endswith(".txt") else {}
        prompts = [{"path": prompts} | lines]
    found = [text.text for _, text in read_all(parse_sources(prompts, "prompts"), MAX_BYTES)]
    if not found:
        raise UserError("prompts: there is none")
    return found


def encode(
    prompts: Sequence[str], before: list[int], tokenizer: Any, prompt_tokens: int | None
) -> list[list[int]]:
    """Token ids of each prompt, of at most `prompt_tokens` tokens behind what stands `before`."""
    ids = (tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts)
    return [[*before, *one[:prompt_tokens]] for one in ids]


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    config: Any,
    how: Asked,
) -> list[list[int]]:
    """New ids of each prompt, with the EOS that ends them where one does."""
    found: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress("speaking", len(prompts), "texts") as advance:
        torch.manual_seed(how.seed)
        for first in range(0, len(prompts), how.batch_size):
            new = continued(model, prompts[first : first + how.batch_size], config, how.dtype)
            found += new
            advance(len(new))
    return found


# ---- the command --------------------------------------------------------------------------------


def row_of(model: str, tokenizer: Any, prompt: list[int], ids: list[int], ended: bool) -> Json:
    shown = tokenizer.decode(prompt, skip_special_tokens=True)
    row = {"model": model, "prompt": shown, "text": tokenizer.decode(ids)}
    return row | {"num_tokens": len(ids), "ended": ended}


def add_copied(texts: Sequence[Text], corpora: Sequence[Corpus]) -> None:
    """What of each text stands in the corpora; the EOS of a text is none of it."""
    sequences = Sequences([np.array(text.ids, np.int64) for text in texts], COPIED_TOKENS)
    total = sum(int(corpus.shards.num_tokens.sum()) for corpus in corpora)
    with progress("comparing with the corpus", total, "tokens") as advance:
        for corpus in corpora:
            sequences.mark(corpus, advance)
    for text, one in zip(texts, sequences.copied(), strict=True):
        longest = text.tokenizer.decode(text.ids[one.start : one.start + one.length])
        text.row["copied_tokens"] = one.num_tokens
        text.row["longest_copied_tokens"] = one.length
        text.row["longest_copied"] = longest


def check_inputs(folders: Mapping[str, str], corpora: Sequence[Corpus]) -> None:
    """All that can be refused before the first model is loaded."""
    for folder in folders.values():
        if is_folder("model", folder):
            check_model_folder("model", folder)
        own = load_tokenizer(folder)
        for corpus in corpora:
            tokenizer = with_eos_of(folder, own, corpus)
            check_same_tokenizer(f"model {folder}", tokenizer, corpus.folder, corpus)


def speak_one(name: str, folder: str, asked: Sequence[str], how: Asked) -> list[Text]:
    tokenizer: Any = load_tokenizer(folder)
    ids = encode(asked, first_ids(folder, tokenizer), tokenizer, how.prompt_tokens)
    lm: Any = load_model(folder)
    check_room(
        folder, max(map(len, ids)), lm.config, how.max_new_tokens, "prompt_tokens cuts prompts"
    )
    lm = lm.to(pick_device(how.device), DTYPES[how.dtype]).eval()
    sampling = Sampling(how.max_new_tokens, how.temperature, how.top_p)
    config: Any = generation_config(lm, tokenizer.eos_token_id, sampling)
    prompts = [prompt for prompt in ids for _ in range(how.num_samples)]
    found = []
    for prompt, new in zip(prompts, generate(lm, prompts, config, how), strict=True):
        ended = len(new) > 0 and new[-1] in config.eos_token_id
        bare = new[: len(new) - ended]
        found.append(Text(row_of(name, tokenizer, prompt, bare, ended), bare, tokenizer))
    return found


@stage(SPEAK)
def speak(
    models: Mapping[str, Folder],
    prompts: Folder | Sequence[Any],
    *,
    corpus: Folder | Sequence[Folder] | None = None,
    max_new_tokens: int = 200,
    prompt_tokens: int | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
    out: Folder | None = None,
) -> Speech:
    """Texts that models make of prompts, how varied they are and what of them is copied.

    Args:
        models: name -> model folder, GGUF included.
        prompts: a text file with a prompt a line, JSON lines with `text`, or sources as of
            `slm prepare`.
        corpus: folder or folders of tokens to look for copies in, made with the models' tokenizer.
        max_new_tokens: of a text.
        prompt_tokens: only the first so many of each prompt; None: all.
        num_samples: texts of each prompt.
        temperature: of sampling; 0 is greedy.
        top_p: sample from the likeliest tokens that have this probability together.
        seed: of the sampling.
        batch_size: prompts per forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        out: a JSONL file for the texts.

    Returns:
        The rows of that file, and a summary a model (distinct_1 to _3, repetition, ended, copied).

    Raises:
        UserError: a folder or file is damaged, or the corpus has another tokenizer; a prompt is too
            long; a setting is wrong.
    """
    import_modules(modules)
    how = Asked(
        max_new_tokens,
        prompt_tokens,
        num_samples,
        temperature,
        top_p,
        seed,
        batch_size,
        dtype,
        device,
    )
    pick_device(device)
    folders = {name: str(folder) for name, folder in models.items()}
    given: Any = [corpus] if isinstance(corpus, str) else corpus or []
    corpora, asked = [Corpus.open(one) for one in given], read_prompts(prompts)
    check_inputs(folders, corpora)
    texts = [text for name in folders for text in speak_one(name, folders[name], asked, how)]
    if corpora:
        add_copied(texts, corpora)
    rows = [text.row for text in texts]
    if out is not None:
        write_speech(Path(out), rows)
    return Speech(rows, summaries(rows))


def run(**settings: Any) -> None:
    speech = speak(**settings)
    table = Table("", *(escape(one["model"]) for one in speech.summaries))
    for name in [name for name in speech.summaries[0] if name != "model"]:
        values = [one[name] for one in speech.summaries]
        shown = ["-" if v is None else f"{v:,}" if type(v) is int else f"{v:.4f}" for v in values]
        table.add_row(name, *shown)
    Console().print(table)
    if settings["out"] is not None:
        log.info(f"texts: {settings['out']}")
