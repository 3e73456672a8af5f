"""A classifier of documents from labels, or a classifier's scores of documents: `slm quality`.

    slm quality labels=labels.jsonl features=hashed out=quality
    slm quality labels=labels.jsonl features=hidden base_model=runs/base/model out=quality
    slm quality classifier=quality 'sources=[web.jsonl]' out=scores

A classifier on hashed features is applied by `slm prepare` itself; one on hidden states scores the
documents first, once, and `slm prepare` looks them up by the hash of their text. Either is
`keep={by: FOLDER, over: 3}` there.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.command_keys import QUALITY
from slm.console import progress
from slm.errors import UserError
from slm.prepare.documents import Text
from slm.prepare.overlap import read_all
from slm.prepare.sources import Source, parse_sources
from slm.quality.classifier import How, Scores, scorer
from slm.quality.fit import (
    FIGURES,
    check_classes,
    check_installed,
    cross_validated,
    forest,
    hashed_matrix,
    linear,
)
from slm.quality.forest import arrays_of
from slm.quality.labels import read_labels
from slm.stage import Folder, stage
from slm.store.files import Json
from slm.store.quality import (
    CLASSIFIER,
    HASHED,
    HIDDEN,
    KEY_BYTES,
    SCORES,
    Quality,
    read_quality,
    write_quality,
)

log = logging.getLogger("slm.quality")
MAX_BYTES = 2**26  # of a document
AT_ONCE = 1024  # documents
Arrays = dict[str, np.ndarray]
T = TypeVar("T")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while found := list(islice(left, size)):
        yield found


# ---- labels -> a classifier ---------------------------------------------------------------------


def train(config: Any, how: How) -> tuple[Json, Arrays]:
    check_installed()
    paths = [config.labels] if isinstance(config.labels, str) else config.labels
    texts, given = read_labels([Path(path) for path in paths])
    labels = np.array(given)
    check_classes(labels, config.threshold, config.folds, ", ".join(paths))
    made: Json = {"kind": CLASSIFIER, "features": config.features, "seed": config.seed}
    made |= {"threshold": config.threshold}
    made["labels"] = {str(label): int((labels == label).sum()) for label in np.unique(labels)}
    if config.features == HASHED:
        model, matrix = linear(), hashed_matrix(texts)
    else:
        model, (matrix, about) = forest(config.seed), hidden_matrix(config, texts, how)
        made |= about
    asked = config.threshold, config.folds, config.seed
    made["cross_validation"] = cross_validated(model, matrix, labels, *asked)
    fitted = model.fit(matrix, labels)
    if config.features == HASHED:
        return made, {"weights": np.append(fitted.coef_, fitted.intercept_)}
    return made, arrays_of(fitted)._asdict()


def hidden_matrix(config: Any, texts: Sequence[str], how: How) -> tuple[np.ndarray, Json]:
    from slm.quality.hidden import Hidden  # imports torch

    hidden = Hidden(config.base_model, config.context, *how)
    with progress("reading labelled documents", len(texts), "documents") as advance:
        found = [tell(hidden(part), advance) for part in batches(texts, how.batch_size)]
    about = {"base_model": str(Path(config.base_model).absolute()), "context": config.context}
    return np.concatenate(found), about | {"model_sha256": hidden.sha256}


def tell(found: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    advance(len(found))
    return found


# ---- a classifier -> scores ---------------------------------------------------------------------


class Scored(NamedTuple):
    """Documents as they come, whatever was read before."""

    digests: list[bytes]
    sources: list[int]
    scores: list[np.ndarray]


def score_all(sources: list[Source], scores: Scores) -> Scored:
    done = Scored([], [], [])
    size = 0
    with progress("scoring", None, "documents") as advance:
        for part in batches(read_all(sources, MAX_BYTES), AT_ONCE):
            texts: list[Text] = [text for _, text in part]
            done.scores.append(scores([text.origin for text in texts]))
            done.digests.extend(text.digest for text in texts)
            done.sources.extend(source for source, _ in part)
            size += sum(len(text.data) for text in texts)
            advance(len(part), f"{size / 1e6:,.0f} MB")
    if not done.digests:
        raise UserError("sources: there is no document")
    return done


def score(quality: Quality, sources: list[Source], scores: Scores) -> tuple[Json, Arrays]:
    done = score_all(sources, scores)
    values, owners = np.concatenate(done.scores), np.array(done.sources)
    keys, first = np.unique(np.array(done.digests, f"S{KEY_BYTES}"), return_index=True)
    threshold = quality.manifest["threshold"]
    by_source = {
        one.name: summary(values[owners == number], threshold) for number, one in enumerate(sources)
    }
    made = {"kind": SCORES, "classifier": quality.fingerprint, "threshold": threshold}
    made["sources"] = by_source
    raw = keys.view(np.uint8).reshape(-1, KEY_BYTES)
    return made, {"keys": raw, "scores": values[first]}


def summary(values: np.ndarray, threshold: float) -> Json:
    kept = int((values >= threshold).sum())
    mean = float(values.mean()) if len(values) else None
    return {"documents": len(values), "kept": kept, "mean": mean}


# ---- the command --------------------------------------------------------------------------------


def check_keys(given: Mapping[str, Any]) -> None:
    """Which keys go together."""
    if (given["labels"] is None) == (given["classifier"] is None):
        raise UserError("exactly one of labels and classifier must be given")
    if (given["classifier"] is None) != (given["sources"] is None):
        raise UserError("sources are what a classifier scores: both must be given, or labels alone")
    is_hidden = given["features"] == HIDDEN
    if given["labels"] is not None and is_hidden != (given["base_model"] is not None):
        raise UserError(
            f"features is {given['features']!r} and base_model {given['base_model']!r}: hidden "
            "states are a base model's, hashed features need none"
        )


@stage(QUALITY)
def quality(
    out: Folder,
    *,
    labels: Folder | Sequence[Folder] | None = None,
    features: str = "hashed",
    base_model: Folder | None = None,
    context: int = 512,
    threshold: float = 3,
    folds: int = 5,
    seed: int = 0,
    classifier: Folder | None = None,
    sources: Sequence[Folder | Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "auto",
    modules: Sequence[str] = (),
) -> Quality:
    """A classifier of documents from labels, or a classifier's scores of documents.

    Args:
        out: folder to write; what this command made there before is replaced.
        labels: file or files of `slm annotate`, or lines of {"text", "label"}.
        features: "hashed": byte trigrams, linear; "hidden": mean last hidden state of `base_model`,
            a random forest (Phi-1's).
        base_model: a model folder; with a classifier: where its model lies, if it was moved.
        context: only so many tokens of a document, from its beginning; features="hidden".
        threshold: a document is good whose label, and kept whose score, is at least that.
        folds: of the cross-validation.
        seed: of the folds and the forest.
        classifier: instead of labels: a folder that this command made from them.
        sources: what it scores, as in `slm prepare`.
        batch_size: documents per forward.
        dtype: of the forward: "float32", "bfloat16" or "bf16-mixed".
        device: "auto" is cuda where there is one.
        modules: your own modeling code, files or dotted names, imported first.

    Returns:
        The folder: its manifest (with the cross-validation, or with what is kept of each source).

    Raises:
        UserError: the labels are all on one side of the threshold, or too few; a file is damaged;
            the base model is another than the classifier's; a setting is wrong.
    """
    config = SimpleNamespace(**locals())
    check_keys(vars(config))
    if modules:
        from slm.selection.registry import import_modules

        import_modules(modules)
    how, folder = How(batch_size, dtype, device), Path(out)
    if classifier is None:
        write_quality(folder, *train(config, how))
    else:
        given = read_quality(Path(classifier), "classifier")
        scores = scorer(given, None if base_model is None else str(base_model), how)
        write_quality(folder, *score(given, parse_sources(sources, "sources"), scores))
    return read_quality(folder, "out")


def rows_of(manifest: Json) -> Iterator[list[str]]:
    if manifest["kind"] == CLASSIFIER:
        labels = ", ".join(f"{count} of {label}" for label, count in manifest["labels"].items())
        yield ["labels", labels]
        found = manifest["cross_validation"]
        yield ["documents that it has not seen", f"{found['folds']} folds"]
        yield from ([name, f"{found[name]:.3f}"] for name in FIGURES)
        return
    yield ["source", "documents", f"at least {manifest['threshold']:g}", "share", "mean score"]
    for name, one in manifest["sources"].items():
        share, mean = one["kept"] / max(1, one["documents"]), one["mean"]
        counts = [f"{one['documents']:,}", f"{one['kept']:,}", f"{share:.1%}"]
        yield [name, *counts, "-" if mean is None else f"{mean:.2f}"]


def run(**settings: Any) -> None:
    made = quality(**settings)
    head, *rows = rows_of(made.manifest)
    table = Table(*map(escape, head))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
    log.info(f"{made.manifest['kind'].replace('_', ' ')}: {made.folder}")
