"""The folders that a command names, opened before PyTorch is imported.

A wrong value or path is said in a second; what opens them for the work checks them again, and more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.checks import ABSENT, Table, check, select
from slm.errors import UserError

CORPORA = ("corpus", "data.corpus", "sets", "heldout", "data.heldout", "elsewhere", "curated")
SCORES = {"references": "corpus", "data.references": "data.corpus"}  # and of which corpus they are
MODELS = ("reference_model", "base_model", "target_model", "models", "model.init_from")
MODELS += ("online_reference",)


def check_command(settings: Mapping[str, Any], table: Table) -> None:
    check(settings, table)
    check_inputs(settings)


def check_inputs(settings: Mapping[str, Any]) -> None:
    # Here: a mistyped key need not wait for NumPy.
    from slm.store.hub import check_model_folder, is_folder
    from slm.store.shards import Corpus, References

    corpora = {key: list(map(Corpus.open, named(settings, key))) for key in CORPORA}
    for key, its_corpus in SCORES.items():
        for store in map(References.open, named(settings, key)):
            for corpus in corpora[its_corpus]:
                store.check_matches(corpus)
    for key in MODELS:
        for folder in named(settings, key):
            if is_folder(key, folder):
                check_model_folder(key, folder)
    for name in named(settings, "tokenizer.path"):
        is_folder("no tokenizer at", name)
    for folder in named(settings, "runs"):
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is no folder")


def named(settings: Mapping[str, Any], key: str) -> list[str]:
    """The folders at a key: one, several, or several by name."""
    found = select(settings, key)
    if found is ABSENT or found is None:
        return []
    if isinstance(found, Mapping):
        return [*found.values()]
    return [found] if isinstance(found, str) else [*found]
