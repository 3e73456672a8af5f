"""Where a model or a tokenizer is: a folder or GGUF file here, or a name on the hub; said quickly.

transformers takes a mistyped path for a name, and asks the hub for each of its files again and
again: two minutes where there is no network. Here one question comes first, without retries.
"""

from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slm.errors import UserError
from slm.store.files import check_files, read_json

FOLDER = "pretrained_model_name_or_path"
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one of them is in every cache


def is_folder(key: str, name: str) -> bool:
    """Whether it is named by its folder; else the hub has it. UserError where it is neither.

    key: what it is named by, for the message
    """
    if Path(name).is_dir() or gguf_file(name) is not None:
        return True
    if Path(name).exists():
        raise UserError(
            f"{key} {name}, which is a file: a model or tokenizer is a folder, a GGUF file, or a "
            "name on the hub"
        )
    if not looks_like_hub_name(name):
        raise UserError(f"{key} {name}: there is no such folder")
    ask_hub(key, name)
    return False


def looks_like_hub_name(name: str) -> bool:
    """name or owner/name, and no folder has that owner's name."""
    owner, _, rest = name.partition("/")
    return "/" not in rest and not Path(name).exists() and not Path(owner or "/").exists()


@cache  # what it has said once
def ask_hub(key: str, name: str) -> None:
    """UserError where the hub has no model of that name, or cannot be asked."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    missing, hub = f"{key} {name}: there is no such folder", constants.ENDPOINT
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES):
            return
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{missing}, and {hub} is not asked: HF_HUB_OFFLINE is set")
        url, seconds = hf_hub_url(name, FILES[0]), constants.HF_HUB_ETAG_TIMEOUT
        get_hf_file_metadata(url, timeout=seconds)
    except EntryNotFoundError:
        return  # of a tokenizer alone
    except GatedRepoError:
        raise UserError(
            f"{key} {name}: {hub} wants a login that may read it (hf auth login)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{missing}, and no model of that name at {hub}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the client raises without a network
        reason = str(error).partition("\n")[0]
        raise UserError(f"{missing}, and {hub} cannot be asked ({reason})") from None


# ---- folders that hold no model -----------------------------------------------------------------


def check_model_folder(key: str, name: str, check: str = "size") -> None:
    """Say what a folder holds that is no model.

    check: "full" compares the hash of every file, where its slm.json knows them
    """
    reason = no_model(Path(name))
    if reason is not None:
        raise UserError(f"{key} {name} is no model folder: {reason}")
    if check == "full" and (Path(name) / "slm.json").is_file():
        check_files(Path(name) / "slm.json", read_json(Path(name) / "slm.json"))


def no_model(folder: Path) -> str | None:
    """Why a folder is no model that transformers can load; None where it looks like one."""
    has_config = (folder / "config.json").is_file()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if (gguf := gguf_file(folder)) is not None:
        return None if find_spec("gguf") else f"it is {gguf.name}, which pip install gguf can read"
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / "adapter_config.json").is_file():
        return adapter(folder / "adapter_config.json")
    if has_config and weights:
        return None
    if files := sorted(folder.glob("*.gguf")):
        return f"it holds {len(files)} GGUF files: name one of them, as in {files[0]}"
    if (folder / "model" / "config.json").is_file():
        return f"config.json is missing, did you mean {folder / 'model'}?"
    if has_config:
        return "it has no weights (*.safetensors)"
    if (folder / "tokenizer.json").is_file() and not weights:
        return "config.json is missing: it holds a tokenizer and no model"
    return "config.json is missing"


def adapter(path: Path) -> str:
    key, record = "base_model_name_or_path", {}
    with suppress(UserError):  # damaged, and an adapter nevertheless
        record = read_json(path)
    base = f" of {record[key]}" if key in record and record[key] else ""
    return f"it is a PEFT adapter{base}: merge it into its model (merge_and_unload)"


# ---- GGUF ---------------------------------------------------------------------------------------


def gguf_file(name: str | Path) -> Path | None:
    """What a name means: a GGUF file itself, or the only one of a folder without other weights."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path if path.is_file() else None
    if not path.is_dir() or [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        return None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def place(name: str | Path) -> dict[str, Any]:
    """As transformers' from_pretrained takes it."""
    file = gguf_file(name)
    return {FOLDER: name} if file is None else {FOLDER: file.parent, "gguf_file": file.name}
