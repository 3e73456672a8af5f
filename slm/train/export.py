"""What leaves the project: `slm export format=...` and, of a run, `slm export as=...`.

`format` writes a corpus as another trainer's token files (slm.prepare.export). `as` writes a
corpus that a rule has concentrated:

    documents   documents.jsonl: texts, with the share of their tokens that the rule keeps
    spans       spans.jsonl: texts, with the characters of what is kept (`signal`) and of the rest
                (`mask`), as the sources of `slm prepare` take them
    rows        rows.parquet: windows with labels, -100 where a token is not kept

The rule and the model are a run's, or given. The model scores the corpus once, by `slm score`, into
a store that stays: a call that was interrupted goes on, and one with another threshold starts with
the scores. `out` appears when all of it is written.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from slm.command_keys import EXPORT
from slm.errors import UserError, shown
from slm.prepare.export import export_files
from slm.prepare.imports.command import new_folder
from slm.selection.names import selection_name
from slm.selection.registry import import_modules, in_words, make_rule, takes_all_tokens
from slm.selection.soft import Soft
from slm.stage import Folder, stage
from slm.store.fields import SIZE, check_fields, of_what
from slm.store.files import Json, nested, read_json, write_record
from slm.store.shards import Corpus, References
from slm.store.windows import Windows, open_windows

log = logging.getLogger("slm.train")
TABLE = {"form" if key == "as" else key: kind for key, kind in EXPORT.items()}
OF_A_RULE = ("run", "target_model", "keep", "references", "combine", "scores")
OF_DOCUMENTS = ("by", "least", "max_tokens")
WINDOWS_TOGETHER = 32  # where no run says it
EXAMPLE = "{rule: excess, select_ratio: 0.6}"


class Chosen(NamedTuple):
    """Of a run's folder, or of the keys in its place."""

    model: str
    selection: Json
    windows: Windows  # with the references
    together: int  # windows that are ranked together with scope=batch
    seed: int
    tokens_seen: int


@stage(TABLE)
def export_corpus(
    corpus: Folder,
    format: str | None = None,
    out: Folder | None = None,
    *,
    form: str | None = None,
    run: Folder | None = None,
    references: Folder | Sequence[Folder] | Mapping[str, Folder] | None = None,
    combine: str | None = None,
    target_model: Folder | None = None,
    keep: Mapping[str, Any] | None = None,
    scores: Folder | None = None,
    by: str | None = None,
    least: float | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
    check: str = "size",
) -> Path:
    """A corpus as files that another trainer reads, or what a rule keeps of it.

    Args:
        corpus: folder of shards: corpus/train.
        format: nanogpt, llmc, megatron, olmo, datatrove, mds, litdata or datasets (Parquet).
        out: folder to write, which must not exist: the files and export.json.
        form: instead of format (on the command line `as`): documents, spans or rows.
        run: a finished training run on this corpus: its rule, its last model, its seed.
        references: those of the run, or what the rule needs.
        combine: of several references, without a run: mean, min, max or mixture.
        target_model: a model folder, without a run.
        keep: a rule, without a run: {"rule": "excess", "select_ratio": 0.6}.
        scores: store of the model's log-probs, made where it is not there; by default <out>.scores.
        by: documents are ranked by the "share" of their tokens that is kept (the default), or by
            their mean "excess" loss.
        least: only documents of at least so much.
        max_tokens: only the highest documents that have no more tokens together.
        batch_size: windows of a forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own rules and modeling code, files or dotted names, imported first.
        check: "full" compares the hash of every file of corpus and references first.

    Returns:
        `out`.

    Raises:
        UserError: the corpus is damaged or unfinished, or another than the run's; `out` exists; two
            keys do not go together.
    """
    settings = SimpleNamespace(**locals())
    if out is None:
        raise UserError("out is null, it must be a folder that does not exist yet")
    if (format is None) == (form is None):
        raise UserError(
            f"exactly one of format and as must be set, found {shown(format)}, {shown(form)}"
        )
    check_keys(settings)
    if format is not None:
        return export_files(corpus, format, out, check)
    if Path(out).expanduser().exists():
        raise UserError(f"out={out} exists; choose another output folder")
    import_modules(modules)
    return concentrate(settings, Corpus.open(corpus, check))


# ---- settings -----------------------------------------------------------------------------------


def check_keys(config: Any) -> None:
    """What is given and would not be read."""
    given = [key for key in (*OF_A_RULE, *OF_DOCUMENTS) if vars(config)[key] is not None]
    if config.format is not None and given:
        raise UserError(f"{given[0]} is given, and format={config.format} writes the whole corpus")
    if config.format is not None:
        return
    if config.form == "rows" and (unread := [key for key in OF_DOCUMENTS if key in given]):
        raise UserError(f"{unread[0]} is given, and as=rows writes every window")
    by_hand = [key for key in ("target_model", "keep") if key in given]
    if config.run is not None and (own := [*by_hand, *(["combine"] if config.combine else [])]):
        raise UserError(f"{own[0]} and run are both given: the run has its own")
    if config.run is None and len(by_hand) < 2:
        raise UserError(f"as={config.form} needs run, or both target_model and keep")
    if config.keep is not None and not isinstance(config.keep, Mapping):
        raise UserError(
            f"keep is {shown(config.keep)}, it must be a rule with its fields, {EXAMPLE}"
        )
    if config.by == "excess" and config.references is None:
        raise UserError("by=excess needs references: it is the loss above theirs")


def chosen_by(config: Any, corpus: Corpus) -> Chosen:
    if config.run is not None:
        return chosen_by_run(Path(config.run).expanduser(), config, corpus)
    windows = open_windows(corpus, config.references, config.combine, config.check, prefix="")
    rest = (windows, WINDOWS_TOGETHER, 0, 0)
    return Chosen(config.target_model, config.keep, *rest)


def chosen_by_run(run: Path, config: Any, corpus: Corpus) -> Chosen:
    """run.json names corpus and references by their fingerprints: folders may have moved."""
    path = run / "run.json"
    if not path.exists() or not (run / "model" / "slm.json").exists():
        raise UserError(f"{run} is no finished run of slm train: it has no run.json and model/")
    record = in_words(read_json(path))
    counts = {name: SIZE for name in ("max_tokens", "data.micro_batch_size")}
    check_fields(path, record, counts)
    same(path, "corpus", record["corpus"], corpus.fingerprint, corpus.folder)
    combine = record["data.combine"]
    windows = open_windows(corpus, config.references, combine, config.check, prefix="")
    named = [store.fingerprint for store in windows.references]
    if record["online_reference"] is not None:
        raise UserError(
            f"{path}: the run's reference scored every batch (online_reference): score the corpus "
            "with `slm score`, and give target_model and keep instead of run"
        )
    if record["references"] and config.references is None:
        raise UserError(
            f"{path} names the run's references by their fingerprints, "
            f"{', '.join(record['references'])}, since folders move: give references=FOLDER"
        )
    same(path, "references", record["references"], named, config.references)
    return Chosen(
        str(run / "model"),
        nested(record, "selection."),
        windows,
        record["data.micro_batch_size"],
        record["seed"],
        record["max_tokens"],
    )


def same(path: Path, field: str, theirs: Any, ours: Any, folder: Any) -> None:
    if theirs != ours:
        raise UserError(
            f"{path}: {field} is {theirs!r} in the run, {ours!r} of {field}={folder}"
            f"{of_what(field, theirs, ours)}; give those that the run was trained with"
        )


def checked_rule(config: Any, selection: Json) -> Any:
    rule = make_rule(selection)
    if isinstance(rule, Soft):
        raise UserError(
            f"selection is {selection_name(selection)}, which weighs tokens and leaves none out: "
            "give a rule that selects"
        )
    if takes_all_tokens(selection):
        if config.by != "excess" and (config.least is not None or config.max_tokens is not None):
            raise UserError(
                f"selection is {selection_name(selection)}, so that every document has a share of "
                "1: nothing ranks them but by=excess"
            )
        log.warning("%s keeps every token", selection_name(selection))
    return rule


# ---- the work -----------------------------------------------------------------------------------


def concentrate(config: Any, corpus: Corpus) -> Path:
    # Here: what else `slm export` writes needs no PyTorch.
    from slm.train.concentrated import count_kept, write_rows, write_texts
    from slm.train.kept import Kept, choose, documents_of

    out, chosen = Path(config.out).expanduser(), chosen_by(config, corpus)
    rule = checked_rule(config, chosen.selection)
    windows = chosen.windows
    lacking = [column for column in rule.needs if column not in {c.key for c in windows.columns}]
    if lacking:
        raise UserError(
            f"{selection_name(chosen.selection)} needs {', '.join(lacking)}, and references="
            f"{shown(config.references)} has none"
        )
    losses = None
    if rule.needs_token_loss or windows.references:
        losses = Windows(corpus, [model_scores(config, chosen, corpus, out, rule.needs_entropy)])
    with new_folder(out) as made:
        work = made / "work"
        work.mkdir()
        way = {"together": chosen.together, "seed": chosen.seed, "tokens_seen": chosen.tokens_seen}
        kept = Kept.of(rule, windows, losses, work, **way)
        found = documents_of(corpus, kept)
        taken = choose(found, config.by or "share", config.least, config.max_tokens)
        if config.form == "rows":
            write_rows(windows, kept, made)
            shutil.copytree(corpus.tokenizer_folder, made / "tokenizer")
        else:
            write_texts(corpus, kept, found, taken, made, config.form == "spans")
        counts = {
            "documents": int(taken.sum()),
            "of_documents": len(taken),
            "tokens": int(found.tokens[taken].sum()),
            "of_tokens": int(found.tokens.sum()),
            "kept_tokens": int(found.kept[taken].sum()),
            "of_kept_tokens": count_kept(corpus, kept),
        }
        shutil.rmtree(work)
        record: Json = {"as": config.form, "corpus": corpus.fingerprint}
        record |= {"selection": chosen.selection, "by": config.by or "share"}
        record |= {"least": config.least, "max_tokens": config.max_tokens}
        record["references"] = [store.fingerprint for store in chosen.windows.references]
        write_record(made / "export.json", record | counts)
    say(out, config, counts)
    return out


def model_scores(
    config: Any, chosen: Chosen, corpus: Corpus, out: Path, entropy: bool
) -> References:
    """The log-probs of the model, from a store that is there, whole or in part, or new."""
    from slm.score.command import score

    folder = config.scores or out.with_name(f"{out.name}.scores")
    log.info("scores of %s: %s", chosen.model, folder)
    keys = {"batch_size": config.batch_size, "dtype": config.dtype, "device": config.device}
    found = score(corpus.folder, folder, reference_model=chosen.model, entropy=entropy, **keys)
    assert isinstance(found, References), "no requests were asked for"
    return found


def say(out: Path, config: Any, counts: Json) -> None:
    log.info(
        "{out}: {documents:,} of {of_documents:,} documents, {tokens:,} of {of_tokens:,} tokens, "
        "{kept_tokens:,} of the {of_kept_tokens:,} that the rule keeps".format(out=out, **counts)
    )
    if counts["documents"] < counts["of_documents"]:
        log.info(
            "the scores were made behind documents and tokens that are not there any more: what "
            "is trained on %s reads others (slm/train/concentrated.md)",
            out,
        )
