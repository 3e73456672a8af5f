"""Recall over a distance: pairs of key and value in real text, one value asked for at its end.

    slm needle 'models={a: run/model}' 'sets={books: books/heldout}' out=needle.csv

Into text of a set come lines "The code of KEY is VALUE.", and at its end one of them begins again.
Its value is found where the model gives it a higher log-prob than every other value that stands in
the same text: to have stood there is no help, so chance is 1 / pairs, and models that are too small
to write the value still give a graded answer. The line that is asked for lies at `depth`, 0 at the
beginning and 1 before the question, the others at random places. Passkey retrieval (arXiv
2305.16300) asks for one such line, RULER (arXiv 2404.06654) for one of several keys, both by what a
model generates. Texts, keys and values depend on `seed`, length and depth alone: all models are
asked the same. Costs `pairs` forwards a sample.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.command_keys import NEEDLE
from slm.console import progress
from slm.errors import UserError
from slm.evaluate.command import Override, check_models
from slm.evaluate.figures import draw_needles
from slm.model.build import SelectiveLM, load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.files import Advance, Json, write_csv
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer
from slm.store.windows import IGNORE_INDEX, Batch, to_device

log = logging.getLogger("slm.needle")

ASKS, VALUE, ENDS = "\nThe code of {} is", " {}", ".\n"
KEYS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
VALUES = (1000, 10_000)


class Sample(NamedTuple):
    """One question, whose answer is the first of `values`."""

    prompt: np.ndarray  # (n,) token ids
    values: list[np.ndarray]  # token ids of each value that stands in it


Encode = Callable[[str], np.ndarray]


# ---- questions ----------------------------------------------------------------------------------


def make_sample(
    corpus: Corpus, encode: Encode, length: int, depth: float, pairs: int, draw: Any
) -> Sample:
    """Of at most `length` tokens with the longest value; draw: a NumPy generator"""
    keys = [KEYS[i] for i in draw.choice(len(KEYS), pairs, replace=False)]
    numbers = draw.choice(np.arange(*VALUES), pairs, replace=False)
    asks = [encode(ASKS.format(key)) for key in keys]
    values, end = [encode(VALUE.format(number)) for number in numbers], encode(ENDS)
    lines = [np.concatenate([*pair, end]) for pair in zip(asks, values, strict=True)]
    others = sum(map(len, lines)) + len(asks[0]) + max(map(len, values))
    if others >= length:
        raise UserError(
            f"lengths has {length}, and {pairs} pairs with their question take {others} tokens: "
            "a longer one, or fewer pairs"
        )
    text = stretch(corpus, length - others, draw)
    places = [round(depth * len(text)), *draw.integers(0, len(text) + 1, pairs - 1)]
    order = np.argsort(places, kind="stable")
    pieces, at = [], 0
    for line in order:
        pieces += [text[at : places[line]], lines[line]]
        at = places[line]
    return Sample(np.concatenate([*pieces, text[at:], asks[0]]), values)


def stretch(corpus: Corpus, count: int, draw: Any) -> np.ndarray:  # (count,)
    """Tokens that follow one another in a shard."""
    rooms = np.maximum(0, np.asarray(corpus.shards.num_tokens) - count + 1)
    if not rooms.any():
        raise UserError(f"{corpus.folder} has no shard of the {count} tokens that lengths asks for")
    place = int(draw.integers(rooms.sum()))
    shard = int(np.searchsorted(np.cumsum(rooms), place, side="right"))
    begin = place - int(rooms[:shard].sum())
    return np.asarray(corpus.column("tokens", shard)[begin : begin + count], np.int64)


class Kind(NamedTuple):
    """Questions of one length and depth."""

    length: int
    depth: float


def make_samples(
    corpus: Corpus, kinds: Sequence[Kind], pairs: int, samples: int, seed: int
) -> dict[Kind, list[Sample]]:
    tokenizer = load_corpus_tokenizer(corpus)

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)

    found = {}
    for kind in kinds:
        draw = np.random.default_rng([seed, kind.length, round(kind.depth * 10**6)])
        found[kind] = [make_sample(corpus, encode, *kind, pairs, draw) for _ in range(samples)]
    return found


# ---- answers ------------------------------------------------------------------------------------


def batch_of(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Prompts with values behind them, whose tokens are the targets; filled up at the right, where
    no target sees it."""
    width = max(len(prompt) + len(value) for prompt, value in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for row, (prompt, value) in enumerate(rows):
        whole = torch.from_numpy(np.concatenate([prompt, value]))
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return {"input_ids": ids, "targets": targets}


@torch.no_grad()
def value_nats(
    lm: SelectiveLM, samples: Sequence[Sample], batch_size: int, dtype: str, advance: Advance
) -> np.ndarray:  # (samples, pairs) float64
    """-log p of each value after the question."""
    rows = [(sample.prompt, value) for sample in samples for value in sample.values]
    found = []
    for first in range(0, len(rows), batch_size):
        batch = batch_of(rows[first : first + batch_size])
        with computing(lm.device, dtype):
            loss = lm(to_device(batch, lm.device)).loss
        found.append(loss.float().cpu().double().sum(1))
        advance(len(batch["targets"]))
    return torch.cat(found).view(len(samples), -1).numpy()


def answers(nats: np.ndarray) -> Json:  # (samples, pairs)
    """What is said of the questions of one kind."""
    logprobs = torch.from_numpy(-nats)
    return {
        "accuracy": float((nats[:, :1] < nats[:, 1:]).all(1).mean()),
        "probability": float(logprobs.softmax(1)[:, 0].mean()),
        "nats": float(nats[:, 0].mean()),
        "chance": 1 / nats.shape[1],
        "samples": len(nats),
    }


# ---- the command --------------------------------------------------------------------------------


@stage(NEEDLE)
def needle(
    models: Mapping[str, Folder],
    sets: Mapping[str, Folder],
    *,
    lengths: Sequence[int] = (128, 256, 512),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    pairs: int = 4,
    samples: int = 50,
    seed: int = 0,
    override: Override = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
    check: str = "size",
    out: Folder | None = None,
) -> list[dict[str, Any]]:
    """Which value of a key models recall, by how far back it stands in real text.

    Args:
        models: name -> model folder.
        sets: name -> corpus folder with the text, made with the models' tokenizer.
        lengths: tokens of a text with its question and answer.
        depths: where the line that is asked for lies: 0 at the beginning, 1 before the question.
        pairs: keys and values in a text, which are the answers to choose from.
        samples: texts of each length and depth.
        seed: of texts, keys and values.
        override: fields of the models' configs with other values, as model.override of training:
            {"max_position_embeddings": 512}.
        batch_size: texts per forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.
        check: "full" compares every file's hash first.
        out: a CSV file for the rows, and a figure beside it, .png.

    Returns:
        A row for every model, set, length and depth: accuracy (share of values found), probability
        (of the right one among those in the text), nats (its -log p), chance, samples.

    Raises:
        UserError: a folder is damaged, or no model or set of that tokenizer; a model has fewer
            positions than a length; a setting is wrong.
    """
    import_modules(modules)
    where = pick_device(device)
    corpora = {name: Corpus.open(folder, check) for name, folder in sets.items()}
    folders = {name: str(folder) for name, folder in models.items()}
    check_models(folders, corpora, {"lengths": max(lengths)}, override, check)
    kinds = [Kind(length, depth) for length in lengths for depth in depths]
    asked = {name: make_samples(c, kinds, pairs, samples, seed) for name, c in corpora.items()}
    rows = []
    count = len(models) * len(corpora) * len(kinds) * samples * pairs
    with progress("asking", count, "texts") as advance:
        for model, folder in folders.items():
            lm = SelectiveLM(load_model(folder, override=override)).to(where, DTYPES[dtype]).eval()
            for name, kind, questions in each(asked):
                nats = value_nats(lm, questions, batch_size, dtype, advance)
                rows.append({"model": model, "set": name} | kind._asdict() | answers(nats))
    if out is not None:
        write_csv(Path(out), rows)
        draw_needles(rows, Path(out).with_suffix(".png"))
    return rows


def each(
    asked: Mapping[str, Mapping[Kind, list[Sample]]],
) -> Iterator[tuple[str, Kind, list[Sample]]]:
    for name, of_set in asked.items():
        for kind, questions in of_set.items():
            yield name, kind, questions


def run(**settings: Any) -> None:
    rows = needle(**settings)
    table = Table("model", "set", "length", "depth", "found", "probability", "nats")
    for row in rows:
        place = (f"{row['length']:,}", f"{row['depth']:.0%}")
        numbers = (f"{row['accuracy']:.1%}", f"{row['probability']:.3f}", f"{row['nats']:.3f}")
        table.add_row(escape(row["model"]), escape(row["set"]), *place, *numbers)
    Console().print(table)
    log.info(f"{rows[0]['samples']} texts a row; chance is {rows[0]['chance']:.1%}")
    if settings["out"] is not None:
        log.info(f"table: {settings['out']}")
