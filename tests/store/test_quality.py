"""What was written is read; what was changed since, or is another thing, is said."""

import json

import numpy as np
import pytest

from slm.errors import UserError
from slm.store.files import nothing, read_json, write_json, write_record
from slm.store.quality import CLASSIFIER, SCORES, read_quality, write_quality
from slm.verify import verify_part

ABOUT = {"kind": SCORES, "classifier": "f" * 64, "sources": {}, "threshold": 3}
HIDDEN = {"kind": CLASSIFIER, "features": "hidden", "threshold": 3, "labels": {}}


@pytest.fixture
def folder(tmp_path):
    keys = np.arange(48, dtype=np.uint8).reshape(3, 16)
    write_quality(tmp_path / "q", ABOUT, {"keys": keys, "scores": np.array([1.0, 2.5, 5.0])})
    return tmp_path / "q"


def test_a_folder_is_read_as_it_was_written(folder):
    found = read_quality(folder, "keep.by")
    assert found.arrays["scores"].tolist() == [1.0, 2.5, 5.0] and found.arrays["keys"][2, 1] == 33
    assert found.manifest.items() >= ABOUT.items()
    assert verify_part(folder, nothing).startswith("quality scores, 3 documents, fingerprint ")


def test_the_place_of_a_model_is_no_part_of_the_identity(tmp_path):
    about = HIDDEN | {"model_sha256": "0" * 64, "context": 8}
    for name in ("a", "b"):
        write_quality(tmp_path / name, about | {"base_model": name}, {"value": np.zeros(2)})
    one, other = (read_quality(tmp_path / name, "by") for name in ("a", "b"))
    assert one.fingerprint == other.fingerprint
    write_quality(tmp_path / "b", about | {"base_model": "b"}, {"value": np.ones(2)})
    assert read_quality(tmp_path / "b", "by").fingerprint != one.fingerprint


def test_damage_and_other_folders(folder, tmp_path):
    with pytest.raises(UserError, match="keep.by .*nope is no folder of slm quality: it has no"):
        read_quality(tmp_path / "nope", "keep.by")
    path = folder / "scores.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(UserError, match="scores.npy is damaged: sha256"):
        read_quality(folder, "by")
    path.write_bytes(whole)
    manifest = read_json(folder / "manifest.json")
    write_record(folder / "manifest.json", manifest | {"kind": "corpus"})
    with pytest.raises(UserError, match="kind is 'corpus', expected one of quality_classifier, q"):
        read_quality(folder, "by")
    write_record(folder / "manifest.json", manifest | {"dtypes": manifest["rows"]})
    with pytest.raises(UserError, match="manifest.json: dtypes is .*, expected an object"):
        read_quality(folder, "by")
    sealed = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", sealed | {"threshold": 1})
    with pytest.raises(UserError, match="is damaged or was edited"):
        read_quality(folder, "by")


def test_scores_do_not_replace_a_classifier(folder):
    with pytest.raises(UserError, match="q has quality_scores, which quality_classifier would rep"):
        write_quality(folder, HIDDEN, {"value": np.zeros(2)})
    assert len(read_quality(folder, "by").arrays["scores"]) == 3
    write_quality(folder, ABOUT, {"keys": np.zeros((1, 16), np.uint8), "scores": np.zeros(1)})
    assert len(read_quality(folder, "by").arrays["scores"]) == 1


def test_files_of_others_stay(folder):
    (folder / "weights.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="weights.npy would be replaced"):
        write_quality(folder, ABOUT, {"weights": np.zeros(2)})
    assert (folder / "weights.npy").read_bytes() == b"mine" and (folder / "scores.npy").exists()
