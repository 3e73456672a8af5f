"""A reference model over a corpus -> log-prob shards: `slm score` (see `slm score --help`).

Every target of every window gets log p(token | the tokens before it in its window), from float32
accumulators; no logits are kept. `columns` stores more beside it (slm.store.columns), as
`entropy=true` does the entropy of the distribution that predicts the token (Rho-1, equation 8). A
shard is the unit of work: any number of processes may run the same command on one folder, each
takes shards that nobody has claimed, and one that was killed is replaced by running the command
again. Costs one forward pass over the corpus and 4 bytes a token and column; cost.py tells what it
did cost.

A model that only a server has is asked through files: see served.py.
"""

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from slm.command_keys import SCORE
from slm.console import duration, progress
from slm.errors import UserError
from slm.model.architecture import check_length
from slm.model.build import SelectiveLM, check_model, load_model
from slm.model.device import DTYPES, pick_device
from slm.model.folder import model_sha256
from slm.model.sharded import is_building, refused_together
from slm.score.asked import check_way
from slm.score.batch import response_files
from slm.score.cost import copy_lineage
from slm.score.documents import score_documents
from slm.score.pieces import first_piece, short_context
from slm.score.reference import ModelScores, how_it_computes, window_scores
from slm.score.scorer import (
    Scorer,
    check_space,
    finish,
    is_finished,
    store_bytes,
)
from slm.score.served import Responses, check_packing, write_requests
from slm.score.together import ShardedScores, TensorParallelScores, join_others, load_in_shards
from slm.selection.registry import import_modules
from slm.stage import Folder, stage
from slm.store.columns import columns_named
from slm.store.files import Json
from slm.store.hub import check_model_folder
from slm.store.shards import FORMAT, IDENTITY, SHORT, Corpus, References, adopt_plan
from slm.store.sidecars import Shard
from slm.store.tokenizer import check_same_tokenizer, load_tokenizer, with_eos_of
from slm.store.windows import Windows, to_device

log = logging.getLogger("slm.score")


# ---- the model ----------------------------------------------------------------------------------


def check_fits(lm: SelectiveLM, corpus: Corpus, context: int | None = None) -> None:
    """Refuse a model that our loss does not reproduce, on two windows.

    context: tokens that a forward sees, where these are fewer than a window has
    """
    length = context or corpus.seq_len
    check_length(lm.model.config, length)
    windows = Windows(corpus)
    numbers = np.arange(min(2, len(windows)))
    window_scores(lm, windows, numbers, columns_named([]), length)
    batch = first_piece(windows.batch(numbers), length)
    check_model(lm, to_device(batch, lm.model.device))


def load_reference(
    folder: str,
    corpus: Corpus,
    device: str,
    dtype: str,
    check: str = "size",
    direct: bool = False,
    tp_size: int = 1,
    context: int | None = None,
    fsdp_size: int = 1,
) -> SelectiveLM:
    check_model_folder("reference_model", folder, check)
    tokenizer = with_eos_of(folder, load_tokenizer(folder, needs_eos=False), corpus)
    check_same_tokenizer(f"model {folder}", tokenizer, corpus.folder, corpus)
    where = pick_device(device)
    if fsdp_size > 1:
        lm = load_in_shards(folder, fsdp_size, where, DTYPES[dtype])
        with refused_together():
            check_fits(lm, corpus, context)
        return lm
    if direct or tp_size > 1:
        if importlib.util.find_spec("accelerate") is None:
            raise UserError("direct=true needs accelerate: pip install accelerate")
        placed = join_others(tp_size, where) if tp_size > 1 else {"device_map": {"": where}}
        lm = SelectiveLM(load_model(folder, dtype=DTYPES[dtype], placed=placed)).eval()
        check_fits(lm, corpus, context)
        return lm
    lm = SelectiveLM(load_model(folder)).eval()
    if is_building():  # whoever fills it checks it
        return lm
    check_fits(lm, corpus, context)  # in float32: bfloat16 logits would differ by their rounding
    return lm.to(where, DTYPES[dtype])


def make_plan(corpus: Corpus, model: str | None, scoring: Json) -> Json:
    """What the scores depend on."""
    # So that `slm verify` knows why some are NaN.
    masks = {"masks": True} if corpus.has_masks or corpus.has_weights else {}
    body = {
        "format": FORMAT,
        "kind": "reference",
        "corpus_fingerprint": corpus.fingerprint,
        "model_sha256": model,
        "scoring": scoring,
    }
    return body | masks | {field: corpus.manifest[field] for field in IDENTITY}


def model_plan(corpus: Corpus, config: Any, lm: SelectiveLM) -> Json:
    scoring = how_it_computes(config, lm)
    # Named only where asked for: the plans of stores without them stay what they were.
    more = {name: True for name in config.more}
    # What a model keeps in float32 (positions) is not rounded to its weights'.
    if config.direct or config.fsdp_size > 1:
        more["direct"] = True
    if config.tp_size > 1:  # sums are rounded in parts
        more["tp_size"] = config.tp_size
    plan = make_plan(corpus, model_sha256(config.reference_model), scoring | more)
    if short := short_context(config, corpus):
        plan |= dict(zip(SHORT, short, strict=True))
    return plan


def responses_plan(corpus: Corpus, config: Any) -> Json:
    """A server tells neither its weights nor how it computed."""
    scoring = {
        "dtype": None,
        "store_dtype": config.store_dtype,
        "attn_implementation": None,
        "device": None,
        "served_model": config.served_model,
    }
    return make_plan(corpus, None, scoring)


# ---- the command --------------------------------------------------------------------------------


def announce(scorer: Scorer, todo: list[Shard]) -> None:
    """Store size, free disk and a first estimate of the time, before the work starts."""
    count, needed = scorer.num_tokens(todo), store_bytes(scorer, todo)
    free = check_space(scorer.out, needed)
    numbers = next(batch for shard in todo for batch in scorer.batches(shard))
    scorer.source.scores(numbers[:1])  # the first forward is slow
    start = time.perf_counter()
    scorer.source.scores(numbers)
    size = numbers.size * scorer.corpus.seq_len
    seconds = count / size * (time.perf_counter() - start)
    log.info(
        f"{count:,} tokens to score: {needed / 1e6:,.1f} MB on disk ({free / 1e6:,.0f} MB free), "
        f"about {duration(seconds)} for one process"
    )


def score_missing(scorer: Scorer, todo: list[Shard]) -> None:
    tokens = scorer.num_tokens(todo)
    if tokens:
        announce(scorer, todo)
    start = time.perf_counter()
    with progress("scoring", tokens, "tokens") as advance:
        own = scorer.run(advance)
    seconds = time.perf_counter() - start
    log.info(f"scored {own:,} tokens in {seconds:.1f} s ({own / seconds:,.0f} tokens/s)")


def score_with_model(config: Any, corpus: Corpus) -> References:
    short = short_context(config, corpus)
    way = (config.device, config.dtype, config.check, config.direct, config.tp_size)
    more = (short[0] if short else None, config.fsdp_size)
    lm = load_reference(config.reference_model, corpus, *way, *more)
    held = TensorParallelScores if config.tp_size > 1 else ModelScores
    kind = ShardedScores if config.fsdp_size > 1 else held
    source = kind(lm, Windows(corpus), config.more, config.dtype, short)
    with source.leading() as leads:
        if leads:
            return fill(config, corpus, source)
    return References.open(config.out)


def fill(config: Any, corpus: Corpus, source: ModelScores) -> References:
    out = Path(config.out)
    adopt_plan(out, model_plan(corpus, config, source.lm))
    size = (config.batch_size, config.store_dtype, config.max_tokens)
    scorer = Scorer(source, corpus, out, *size)
    if is_finished(scorer):
        return References.open(out)
    if todo := scorer.missing():
        score_missing(scorer, todo)
    copy_lineage(config.reference_model, out)
    return finish(scorer)


def score_with_engine(config: Any, corpus: Corpus) -> References:
    from slm.score.engine import EngineScores, check_engine, engine_scoring

    check_packing(corpus)
    check_engine(config, corpus)
    out = Path(config.out)
    plan = make_plan(corpus, model_sha256(config.reference_model), engine_scoring(config))
    adopt_plan(out, plan)
    source = EngineScores(corpus, config)
    scorer = Scorer(source, corpus, out, config.batch_size, config.store_dtype, config.max_tokens)
    if todo := scorer.missing():
        score_missing(scorer, todo)
    copy_lineage(config.reference_model, out)
    return finish(scorer)


def score_from_responses(config: Any, corpus: Corpus) -> References:
    """Every response is read and checked before the folder is made."""
    out, plan = Path(config.out), responses_plan(corpus, config)
    paths = response_files(config.responses)
    if (out / "plan.json").exists():
        adopt_plan(out, plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without a name, so that nothing is left of it if this process is killed.
    with tempfile.TemporaryFile(dir=out.parent) as file:
        source = Responses(corpus, config.served_model, file)
        scorer = Scorer(source, corpus, out, config.batch_size, config.store_dtype)
        if is_finished(scorer):
            return References.open(out)
        check_space(out.parent, store_bytes(scorer, corpus.shards) + source.num_bytes)
        source.read(paths)
        adopt_plan(out, plan)
        todo = scorer.missing()
        with progress("writing", scorer.num_tokens(todo), "tokens") as advance:
            scorer.run(advance)
    return finish(scorer)


def more_columns(names: Sequence[str], entropy: bool) -> list[str]:
    """Beside those that every store has."""
    asked = columns_named([*names, *(["entropy"] if entropy else [])])
    return [column.name for column in asked if not column.required]


@stage(SCORE)
def score(
    corpus: Folder,
    out: Folder | None = None,
    *,
    reference_model: Folder | None = None,
    requests: Folder | None = None,
    responses: Folder | Sequence[Folder] | None = None,
    served_model: str | None = None,
    layout: str = "windows",
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    entropy: bool = False,
    columns: Sequence[str] = (),
    batch_size: int = 32,
    dtype: str = "float32",
    store_dtype: str = "float32",
    device: str = "auto",
    direct: bool = False,
    tp_size: int = 1,
    fsdp_size: int = 1,
    scores: str = "transformers",
    modules: Sequence[str] = (),
    check: str = "size",
) -> References | Path:
    """Log-probs of every token of a corpus under a reference model, once.

    One of reference_model, requests and responses says where the scores come from.

    Args:
        corpus: a corpus or its folder.
        out: folder of the log-prob shards; any number of processes may fill one.
        reference_model: a model folder with the corpus's tokenizer.
        requests: a file to write: what to ask a server that has the model.
        responses: the files with what the server answered.
        served_model: with requests and responses: the server's name of the model.
        layout: "windows" scores the windows of this corpus; "documents" each document by itself,
            into a store that `bind_scores` lays onto any corpus.
        context: tokens that a forward sees at most. With layout="documents" the corpus's window
            length where neither this nor the store says another; of windows all, or with fewer
            a short context, for the rule long_gain (slm.score.pieces says which tokens see what).
        stride: after so many tokens the context is refreshed; half the context.
        max_tokens: score whole batches until there are so many tokens, from all over the
            corpus, for a shorter run. The same call with more of them, or without, adds the rest.
        entropy: also the entropy of the model's prediction at every token.
        columns: names of more columns (slm.store.columns); entropy is one of them.
        batch_size: windows per forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        store_dtype: on disk: "float32" or "float16".
        device: "auto" is cuda where there is one: of several processes that torchrun or srun has
            started on a machine, each has its own.
        direct: weights go to the device in `dtype` as they are read, without a copy in float32
            that the model is checked in.
        tp_size: so many processes of one torchrun hold the model together (transformers' tensor
            parallel plan of it), its weights read as with `direct`.
        fsdp_size: so many processes of one torchrun hold any model in shards (FSDP2) and compute
            a part of each batch each; its weights are as with `direct`, its scores those.
        scores: "transformers", or "vllm": its engine, where it is installed, on `tp_size` GPUs.
        modules: your own modeling code, files or dotted names, imported first.
        check: "full" compares every file's hash first.

    Returns:
        The references; with `requests` the file with them, with layout="documents" the store.

    Raises:
        UserError: the model is not of the corpus's tokenizer or does not reproduce, an answer is
            wrong, `out` holds other scores; a setting is wrong.
    """
    settings = SimpleNamespace(**locals(), more=more_columns(columns, entropy))
    pick_device(device)
    import_modules(modules)
    check_way(vars(settings))
    opened = Corpus.open(corpus, check)
    if layout == "documents":
        return score_documents(settings, opened)
    if reference_model is not None:
        way = score_with_engine if scores == "vllm" else score_with_model
        return way(settings, opened)
    check_packing(opened)
    if requests is not None:
        return write_requests(opened, Path(requests), settings.served_model)
    return score_from_responses(settings, opened)


def run(**settings: Any) -> None:
    made = score(**settings)
    what = "scores" if settings["layout"] == "documents" else "references"
    log.info(f"{what if settings['requests'] is None else 'requests'}: {os.fspath(made)}")
