"""The folder of a model: whether it is one, its identity, and how it is written."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from slm.errors import UserError
from slm.store.files import (
    Advance,
    check_files,
    check_records,
    check_regular,
    hash_file,
    hash_json,
    naming,
    read_json,
    sealed,
    sync_folder,
    write_record,
)
from slm.store.hub import check_model_folder, gguf_file, is_folder

HASHES = ".sha256.json"  # name -> [size, time in ns, sha256]
LARGE = 1 << 28
SETTLED_S = 2.0


def quiet_without_terminal() -> None:
    """Transformers draws its bars into log files as well."""
    if not sys.stderr.isatty():
        disable_progress_bar()


def check_savable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str | Path
) -> None:
    """What can only fail on saving is tried before training; the weights come later."""
    parts = {"config.json": model.config, "generation_config.json": model.generation_config}
    for file, part in (parts | {"tokenizer": tokenizer}).items():
        with tempfile.TemporaryDirectory() as temporary:
            try:
                if part is not None:
                    part.save_pretrained(temporary)
            except (TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{file} of {name} cannot be saved again: {reason}") from None


def model_sha256(folder: str | Path) -> str:
    """Identity of a saved model: its config (versions apart) and the hashes of its weights."""
    folder = Path(folder)
    if (gguf := gguf_file(folder)) is not None:
        return hash_json({"gguf": hash_file(gguf)})
    config = read_json(folder / "config.json")
    config.pop("transformers_version", None)
    # transformers reads those of PyTorch, tensors alone (weights_only), where there are no others.
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise UserError(
            f"{folder} holds no *.safetensors: transformers' from_pretrained and save_pretrained "
            "write them from other weights"
        )
    return hash_json({"config": config, "weights": hashes_of(weights)})


def hashes_of(paths: Sequence[Path]) -> list[str]:
    """sha256 of files of one folder. Of large ones it is read from HASHES there, while size and
    time are those of the file: a dozen processes need not read 14 GB each to name a model.
    """
    record = paths[0].parent / HASHES
    try:
        known = read_json(record) if record.exists() else {}
    except UserError:  # hashed anew
        known = {}
    found, before = [], dict(known)
    for path in paths:
        state = path.stat()
        key = [state.st_size, state.st_mtime_ns]
        if path.name not in known or known[path.name][:2] != key:
            known[path.name] = [*key, hash_file(path)]
        found.append(known[path.name][2])
        # A change within the clock's tick would not show.
        if state.st_size < LARGE or time.time() - state.st_mtime < SETTLED_S:
            del known[path.name]
    if known != before:
        with suppress(UserError, OSError):  # somebody else's folder
            write_record(record, known)
    return found


def init_identity(key: str, name: str) -> str:
    """Hash of a local folder; a hub name stands for itself."""
    if not is_folder(key, name):
        return name
    check_model_folder(key, name)
    return model_sha256(name)


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    lineage: dict[str, Any],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write model, tokenizer, model card and lineage to a temporary folder, then rename it.

    check: raises where the temporary folder is not what it should be; then nothing is left of it
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    quiet_without_terminal()
    with naming(folder, temporary, model.get_memory_footprint(return_buffers=False)):
        model.save_pretrained(temporary, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
        name_rope_twice(temporary / "config.json")
        (temporary / "README.md").write_text(card)
        if check is not None:
            check(temporary)
        seal_folder(temporary, lineage)
    replace_folder(temporary, folder)


def name_rope_twice(path: Path) -> None:
    """Rotary positions under their old names too: transformers 4, and what is built on it (vLLM
    before it took transformers 5), reads no rope_parameters, and would take the base for 10,000.

    transformers 5 goes by rope_parameters where both are there. Layers that have positions of their
    own have old names of their kinds' own, which are left to those.
    """
    config = json.loads(path.read_text())
    text = config["text_config"] if "text_config" in config else config
    rope = text["rope_parameters"] if "rope_parameters" in text else None
    if not rope or "rope_theta" not in rope:
        return
    others = {name: value for name, value in rope.items() if name != "rope_theta"}
    text["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        text["rope_scaling"] = others
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def seal_folder(folder: Path, lineage: dict[str, Any]) -> None:
    """The record with the hashes last; all of it synced, and readable by everybody."""
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    record = {"kind": "model", "lineage": lineage, "sha256": hashes}
    (folder / "slm.json").write_text(json.dumps(sealed(record), indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # save_pretrained writes 0600, which a serving account cannot read
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)
    sync_folder(folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. A crash before that leaves what `folder` was."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify_weights(path: Path, advance: Advance) -> str:
    weights = sorted(path.glob("*.safetensors"))
    for item in weights:
        check_structure(item)
    if not (path / "slm.json").exists():
        if not weights:
            raise UserError(f"{path} is no whole model: it has no *.safetensors")
        return "model of another origin: no hashes are recorded, only its structure was checked"
    expected = check_files(path / "slm.json", read_json(path / "slm.json"), advance)
    check_records(path, "slm.json")
    return f"model, {len(expected)} files"


def check_structure(weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    check_regular(weights)
    try:
        with safe_open(weights, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged: {error}") from None
