"""Is a folder whole? `slm verify FOLDER ...` names what is not, and exits with 1.

Knows corpora, references, classifiers of documents and their scores (manifest.json), what `slm
prepare` made (train/, heldout/), runs (run.json), checkpoints, models, token losses (dynamics/) and
what made.json lists (reports, pivots, pilots), in the folder itself and in those below it. Every
file is read and its hash compared: it costs about a second a gigabyte. A model of ours must also be
one that an inference engine can load (slm.model.serving). Leftovers of killed processes are named;
they do no harm. Not covered, since no command reads it back: excluded.jsonl of a preparation, a
run's wandb/ and .hydra/, figures without made.json; and, since nothing has their hashes:
rollouts.jsonl of pivots, tokens/ of a pilot's runs.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.console import progress
from slm.errors import UserError
from slm.model.serving import broken_rules, notes
from slm.prepare.labels import LABELS
from slm.score.cost import references_cost
from slm.store.columns import COLUMNS, LOGPROBS
from slm.store.document_scores import DocumentScores
from slm.store.fields import CHECKPOINT, OBJECT, TEXT, check_fields, one_of
from slm.store.files import (
    Advance,
    Json,
    check_content,
    check_files,
    check_hash,
    check_records,
    nothing,
    read_json,
)
from slm.store.own_files import RECORD, check_made, resumed_by
from slm.store.quality import CLASSIFIER, SCORES, read_quality
from slm.store.shards import SCORED, Corpus, References, Store, make_manifest
from slm.store.sidecars import Shard, read_sidecars
from slm.store.tokenizer import load_corpus_tokenizer

STORES: dict[str, type[Store]] = {
    "corpus": Corpus,
    "reference": References,
    "document_scores": DocumentScores,
}
FIRST_COLUMN = {"corpus": "tokens", "reference": LOGPROBS.name, "document_scores": LOGPROBS.name}
RUN_RECORDS = (
    "run.json",
    "hparams.json",
    "lineage.json",
    "wandb_run.json",
    "status.json",
    "arm.json",
)
SIDES = ("train", "heldout")
SHARD_PATTERNS = tuple(f"{column}-*.npy" for column in FIRST_COLUMN.values())
BLOCK = 1 << 22


# ---- what there is ------------------------------------------------------------------------------


def parts(path: Path) -> list[Path]:
    """The stores, runs, checkpoints and models at and below `path`."""
    if path.is_file() or is_checkpoint(path):
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    found = list(walk(path))
    if not found:
        raise UserError(
            f"{path} is no corpus, reference, run, checkpoint or model folder, and has no {RECORD}"
        )
    return found


def walk(folder: Path) -> Iterator[Path]:
    if is_store(folder) or is_model(folder) or is_dynamics(folder):
        yield folder
        return
    if is_run(folder) or is_prepared(folder) or is_made(folder):
        yield folder
    yield from sorted(folder.glob("*.ckpt"))
    for item in sorted(folder.iterdir()):
        skipped = item.is_symlink() or item.name.startswith(".")
        if item.is_dir() and not skipped and not is_checkpoint(item):
            yield from walk(item)


def is_checkpoint(path: Path) -> bool:
    return path.suffix == ".ckpt"


def is_prepared(path: Path) -> bool:
    """The folder that `slm prepare` was given: its corpora are train/ and heldout/ in it."""
    there = (path / "plan.json").exists() and not resumed_by(path)
    return there and any((path / side).is_dir() for side in SIDES)


def is_dynamics(path: Path) -> bool:
    """Token losses: `slm dynamics`, or the callback of that name."""
    return (path / "token_set.json").exists() or next(path.glob("losses-*.npy"), None) is not None


def is_store(path: Path) -> bool:
    if is_prepared(path) or is_dynamics(path) or is_made(path):
        return False
    named = any((path / name).exists() for name in ("manifest.json", "plan.json"))
    return named or any(next(path.glob(pattern), None) for pattern in SHARD_PATTERNS)


def is_made(path: Path) -> bool:
    """By a command that replaces its files, or is to be; a classifier has a manifest, too."""
    listed = (path / RECORD).exists() and not (path / "manifest.json").exists()
    return listed or resumed_by(path) is not None


def is_model(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "slm.json").exists()


def is_run(path: Path) -> bool:
    return (path / "run.json").exists()


# ---- one part at a time -------------------------------------------------------------------------


def verify_store(path: Path, advance: Advance) -> str:
    if not (path / "manifest.json").exists():
        raise UserError(
            f"{path} is unfinished: manifest.json is missing; run the command that makes it again"
        )
    record = read_json(path / "manifest.json")
    check_fields(path / "manifest.json", record, {"kind": one_of(*STORES, CLASSIFIER, SCORES)})
    if record["kind"] not in STORES:
        return verify_quality(path, advance)
    kind = record["kind"]
    store = STORES[kind].open(path)
    check_manifest(store, record, FIRST_COLUMN[kind])
    store.check_hashes(advance)
    if isinstance(store, References):
        for shard in store.shards:
            for column in shard.sha256.keys() - {SCORED}:
                check_scores(store, shard, column)
    if isinstance(store, Corpus):
        check_values(store)
        load_corpus_tokenizer(store)
    if isinstance(store, DocumentScores):
        for shard in store.shards:
            store.check_documents(shard.index)
    if not isinstance(store, Corpus):
        references_cost(path)
        check_records(path, "cost-*.json", "lineage.json")
    tokens = int(store.shards.num_tokens.sum())
    size = f"{len(store.shards)} shards, {tokens:,} tokens"
    if isinstance(store, References) and store.is_partial:
        size += f", a part: {store.num_scored():,} of {len(store.scored):,} windows have scores"
    return f"{kind}, {size}, fingerprint {store.fingerprint}"


def verify_quality(path: Path, advance: Advance) -> str:
    found = read_quality(path, "folder", advance)
    check_records(path, "manifest.json")
    if found.manifest["kind"] == CLASSIFIER:
        return f"quality classifier, {found.manifest['features']}, fingerprint {found.fingerprint}"
    size = f"{len(found.arrays['scores']):,} documents"
    return f"quality scores, {size}, fingerprint {found.fingerprint}"


def check_manifest(store: Store, manifest: Json, column: str) -> None:
    """manifest.json is a function of plan.json and the sidecars; a flipped byte in any shows."""
    if not (store.folder / "plan.json").exists():
        raise UserError(f"{store.folder / 'plan.json'} is missing")
    made = make_manifest(store.folder, read_sidecars(store.folder, column))
    for name in sorted(made.keys() | manifest.keys()):
        if name not in made or name not in manifest or made[name] != manifest[name]:
            raise UserError(
                f"{store.folder / 'manifest.json'}: {name} is not what plan.json and the shards' "
                "sidecars say"
            )


def check_scores(store: References, shard: Shard, column: str) -> None:
    """Every score is finite and of its sign; NaN where there is none: with packing=concat and
    without masks, a shard's first, and the windows that were not asked for."""
    path, scores = shard.path(store.folder, column), store.column(column, shard.index)
    if column not in COLUMNS:
        raise UserError(f"{path}: a column of a reference is one of {sorted(COLUMNS)}")
    if len(scores) and not np.isnan(scores[0]):
        raise UserError(f"{path}: entry 0 is {scores[0]}, a shard's first token has no score: NaN")
    may_be_nan = store.manifest["packing"] == "documents" or "masks" in store.manifest
    scored = np.ones(len(scores) - 1, bool)
    if SCORED in shard.sha256:
        scored = np.repeat(store.scored_of(shard), store.manifest["seq_len"])
    for start in range(1, len(scores), BLOCK):
        block, asked = scores[start : start + BLOCK], scored[start - 1 : start - 1 + BLOCK]
        wrong = COLUMNS[column].is_wrong(block) & ~(np.isnan(block) & may_be_nan)
        wrong = np.where(asked, wrong, ~np.isnan(block))
        if wrong.any():
            index = int(wrong.argmax())
            raise UserError(
                f"{path}: entry {start + index} has {COLUMNS[column].refusal(block[index])}"
            )


def is_no_label(labels: np.ndarray) -> np.ndarray:
    return ~np.isin(labels, LABELS)


def is_no_weight(weights: np.ndarray) -> np.ndarray:
    return ~(np.isfinite(weights) & (weights >= 0))


VALUES = {
    "signal": (is_no_label, f"a label is one of {LABELS}"),
    "weights": (is_no_weight, "a weight is a finite number of at least 0"),
}


def check_values(corpus: Corpus) -> None:
    """Every label and weight is one; all shards have them or none."""
    for name, (is_wrong, wanted) in VALUES.items():
        having = [name in shard.sha256 for shard in corpus.shards]
        for shard in corpus.shards if any(having) else ():
            path = shard.path(corpus.folder, name)
            if not having[shard.index]:
                raise UserError(f"{path} is missing: other shards have one")
            values = corpus.column(name, shard.index)
            for start in range(0, len(values), BLOCK):
                bad = np.flatnonzero(is_wrong(values[start : start + BLOCK]))
                if len(bad):
                    index = start + int(bad[0])
                    raise UserError(f"{path}: entry {index} is {values[index]}, {wanted}")


def verify_model(path: Path, advance: Advance) -> str:
    """Its files are whole, and an inference engine finds in them what it needs."""
    from slm.model.folder import verify_weights  # imports torch

    about = verify_weights(path, advance)
    broken = broken_rules(path)
    if broken and (path / "slm.json").exists():
        raise UserError("; ".join(broken))
    return "; ".join([about, *broken, *notes(path)])


def verify_checkpoint(path: Path, advance: Advance) -> str:
    record = path.with_name(path.name + ".json")
    if path.suffix != ".ckpt":
        raise UserError(f"{path} is no checkpoint (*.ckpt); give a folder to check other files")
    if not record.exists():
        raise UserError(f"{path} is unfinished: {record.name} is missing")
    said = read_json(record)
    check_fields(record, said, CHECKPOINT)
    check_content(path, said, record.name, advance)
    check_records(path.parent, record.name)
    return f"checkpoint, {len(said['files'])} files" if "files" in said else "checkpoint"


def verify_run(path: Path, advance: Advance) -> str:
    check_records(path, *RUN_RECORDS)
    tables, lineage = path / "tables.json", path / "lineage.json"
    is_arm = (path / "arm.json").exists()
    if not is_arm and not (path / "model" / "slm.json").exists():
        raise UserError(f"{path} is unfinished: model/ is missing; run the same command again")
    if not is_arm and read_json(lineage) != read_json(path / "model/slm.json")["lineage"]:
        raise UserError(f"{lineage} is not what model/slm.json says")
    check_files(tables, read_json(tables), advance)
    return "run of a pilot, finished; its model is not kept" if is_arm else "run, finished"


def verify_made(path: Path, advance: Advance) -> str:
    check_records(path, "plan.json", "clock.json")
    return f"made by {check_made(path, advance)}"


def verify_dynamics(path: Path, advance: Advance) -> str:
    from slm.dynamics.trajectories import TrajectoryStore  # imports torch

    record = path / "token_set.json"
    if not record.exists():
        raise UserError(
            f"{path} is unfinished: token_set.json is missing; run `slm dynamics` again"
        )
    store = TrajectoryStore(path)
    check_files(record, read_json(record), advance)
    for column in store.checkpoints:
        file = store.path(column.tokens_seen)
        check_hash(file, column.sha256, file.with_suffix(".json").name, advance)
    if store.checkpoints and read_json(path / "manifest.json") != store.make_manifest():
        raise UserError(
            f"{path / 'manifest.json'} is not what plan.json, token_set.json and the sidecars say"
        )
    check_records(path, "classes.json")
    if (path / "classes.json").exists():
        check_files(path / "classes.json", read_json(path / "classes.json"), advance)
    return (
        f"token losses, {store.tokens.num_targets:,} tokens at {len(store.checkpoints)} checkpoints"
    )


def verify_part(path: Path, advance: Advance) -> str:
    if path.is_file() or is_checkpoint(path):
        return verify_checkpoint(path, advance)
    if is_dynamics(path):
        return verify_dynamics(path, advance)
    if is_store(path):
        return verify_store(path, advance)
    if is_model(path):
        return verify_model(path, advance)
    kinds = {is_made: verify_made, is_prepared: verify_prepared, is_run: verify_run}
    return "; ".join(check(path, advance) for is_one, check in kinds.items() if is_one(path))


def verify_prepared(path: Path, _: Advance) -> str:
    if not (path / "report.json").exists():
        raise UserError(f"{path} is unfinished: report.json is missing; run `slm prepare` again")
    record = path / "report.json"
    report = read_json(record)
    for side in [side for side in SIDES if side in report]:
        check_fields(record, report, {side: OBJECT})
        check_fields(record, report[side], {"fingerprint": TEXT})
        manifest, said = read_json(path / side / "manifest.json"), report[side]["fingerprint"]
        if manifest["fingerprint"] != said:
            raise UserError(
                f"{record}: fingerprint of {side} is {said}, that of {path / side} is "
                f"{manifest['fingerprint']}"
            )
    check_records(path, "plan.json", "report.json")
    plan = read_json(path / "plan.json") if (path / "plan.json").exists() else {}
    is_import = "kind" in plan and plan["kind"] == "import"
    return "report of an import" if is_import else "report of a preparation"


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and claims that a killed process left (or one that is at work now)."""
    if not folder.is_dir():
        return []
    return sorted([*folder.glob(".*.tmp"), *folder.glob("*.claim")])


def verify(path: Path, advance: Advance = nothing) -> Iterator[tuple[Path, bool, str]]:
    """(part, whole, what it is or what is wrong) for everything at and below `path`."""
    for part in parts(path):
        try:
            yield part, True, verify_part(part, advance)
        except UserError as error:
            yield part, False, str(error)
        except OSError as error:
            yield part, False, f"{error.filename or part} cannot be read: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield part, False, f"{part}: a JSON file in it is damaged ({error!r})"


# ---- the command --------------------------------------------------------------------------------


def size_bytes(path: Path) -> int:
    """What is going to be read."""
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(item.stat().st_size for item in files if item.is_file())


def report(path: Path) -> bool:
    """Print a line for each part; True if all are whole."""
    whole = True
    total = sum(size_bytes(part) for part in parts(path))
    with progress("verifying", total, "bytes") as advance:
        results = list(verify(path, advance))
    for part, good, text in results:
        print(f"{'whole' if good else 'NOT WHOLE'}: {part}: {text}")
        for item in leftovers(part):
            print(f"  left over, harmless: {item.name}")
        whole &= good
    return whole


def main() -> None:
    about, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(prog="slm verify", description=about, epilog=more)
    parser.add_argument("folder", type=Path, nargs="+", help="a folder, or a checkpoint file")
    whole = True
    for folder in parser.parse_args().folder:
        try:
            whole &= report(folder)
        except (UserError, OSError) as error:
            print(f"NOT WHOLE: {error}")
            whole = False
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `slm verify ... | head`
    main()
