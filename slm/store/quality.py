"""Folders of `slm quality`: a classifier of documents, or scores of documents by their hash.

    manifest.json      what it is, sealed; the sha256, dtype and rows of every array
    <array>.npy        hashed: weights (65537,), the last one added to the sum; hidden: the nodes of
                       a forest; scores: keys (n, 16), ascending, and scores (n,)

Read whole and compared with their hashes: a classifier has some MB at most, scores have 24 bytes a
document. Nothing in them is executed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.store.fields import DTYPE, FILE, INDEX, NUMBER, OBJECT, TEXT, check_fields, mapping, one_of
from slm.store.files import (
    Advance,
    Json,
    check_files,
    hash_json,
    map_array,
    nothing,
    read_json,
    write_array,
    write_record,
)
from slm.store.own_files import replacing

FORMAT = 1
CLASSIFIER, SCORES = "quality_classifier", "quality_scores"
HASHED, HIDDEN = "hashed", "hidden"
COMMAND = "slm quality"
KEY_BYTES = 16  # of a text's hash, as `slm prepare` makes it
ARRAYS = {"rows": mapping(FILE, INDEX), "dtypes": mapping(FILE, DTYPE)}
BY_KIND = {
    CLASSIFIER: {"features": one_of(HASHED, HIDDEN), "threshold": NUMBER, "labels": OBJECT},
    SCORES: {"classifier": TEXT, "sources": OBJECT},
}
BY_KIND[HIDDEN] = {"base_model": TEXT, "model_sha256": TEXT, "context": INDEX}


class Quality(NamedTuple):
    """A folder, as it was read."""

    folder: Path
    manifest: Json
    arrays: dict[str, np.ndarray]

    @property
    def fingerprint(self) -> str:
        """Of all but where the model of a classifier lies."""
        return hash_json({k: v for k, v in self.manifest.items() if k != "base_model"})


def write_quality(out: Path, manifest: Json, arrays: Mapping[str, np.ndarray]) -> None:
    """In the place of what the command made there before; scores never in that of a classifier."""
    if (out / "manifest.json").exists():
        before = read_quality(out, "out").manifest["kind"]
        if before != manifest["kind"]:
            raise UserError(f"out={out} has {before}, which {manifest['kind']} would replace")
    with replacing(out, COMMAND) as new:
        made: Json = {"format": FORMAT} | manifest
        made |= {"sha256": {}, "rows": {}, "dtypes": {}}
        for name, array in arrays.items():
            made["sha256"][f"{name}.npy"] = write_array(new / f"{name}.npy", array)
            made["rows"][f"{name}.npy"] = len(array)
            made["dtypes"][f"{name}.npy"] = str(array.dtype)
        write_record(new / "manifest.json", made)


def read_quality(folder: Path, key: str, advance: Advance = nothing) -> Quality:
    """key: what names the folder, for the message"""
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{key} {folder} is no folder of {COMMAND}: it has no manifest.json")
    manifest = read_json(path)
    fields = {"format": one_of(FORMAT), "kind": one_of(CLASSIFIER, SCORES)}
    check_fields(path, manifest, fields)
    check_fields(path, manifest, ARRAYS | BY_KIND[manifest["kind"]])
    if manifest["kind"] == CLASSIFIER and manifest["features"] == HIDDEN:
        check_fields(path, manifest, BY_KIND[HIDDEN])
    arrays = {}
    for name in check_files(path, manifest, advance):
        check_fields(path, manifest["rows"], {name: INDEX})
        check_fields(path, manifest["dtypes"], {name: DTYPE})
        array = map_array(folder / name, manifest["dtypes"][name], manifest["rows"][name])
        arrays[name.removesuffix(".npy")] = np.array(array)
    return Quality(folder, manifest, arrays)
