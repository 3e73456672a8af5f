"""Where a model comes from: what went in, what was counted, on which code and machine.

    lineage.json     in the run's folder, written when the run is complete
    model/slm.json   the same record, beside the hashes of the model's files
    model/README.md  the model card: the record and the held-out results for a reader

No path of this machine is in any of them.
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slm.model.device import device_name
from slm.score.cost import reference_lineage, references_cost
from slm.selection.registry import by_word
from slm.store.files import Json
from slm.store.shards import References
from slm.store.windows import spread
from slm.version import __version__

if TYPE_CHECKING:
    from slm.train.data import TokenData

PACKAGES = ("torch", "triton", "lightning", "transformers", "tokenizers", "datasets", "numpy")


def lineage(
    *,
    datamodule: "TokenData",
    selection: Mapping[str, Any],
    needs_references: bool,
    online_reference: str | None,
    seed: int,
    init_from: str | None,
    init_from_sha256: str | None,
    tokens_seen: int,
    tokens_selected: int,
    train_seconds: float | None,
    train_flops: float | None,
    precision: str,
    device: torch.device,
) -> Json:
    """What went into a model, as plain JSON without paths of this machine."""
    is_folder = init_from is not None and Path(init_from).exists()
    return {
        "init_from": short_name(str(init_from)) if is_folder else init_from,
        "init_from_is_folder": is_folder,
        "init_from_sha256": init_from_sha256,
        "corpus": " + ".join(short_name(one.folder) for one in datamodule.corpora.values()),
        "corpus_fingerprint": datamodule.corpus.fingerprint,
        "references": [reference_record(store) for store in datamodule.references],
        "online_reference": online_reference,
        "heldout": {
            name: {
                "fingerprint": held.fingerprint,
                "windows": len(spread(held.num_windows, datamodule.heldout_windows)),
            }
            for name, held in datamodule.heldout.items()
        },
        "selection": dict(selection),
        "needs_references": needs_references,
        "seed": seed,
        "tokens_seen": tokens_seen,
        "tokens_selected": tokens_selected,
        "train_seconds": train_seconds,
        "train_flops": train_flops,
        "git": git_commit(),
        "packages": {"slm": __version__} | installed(PACKAGES),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "precision": precision,
        "device": device_name(device),
    }


def reference_record(store: References) -> Json:
    """Who scored the corpus, and what it cost: training that model, and the scoring itself."""
    partial = {"scored_windows": store.num_scored()} if store.is_partial else {}
    return partial | {
        "fingerprint": store.fingerprint,
        "model_sha256": store.manifest["model_sha256"],
        "served_model": served_model(store.manifest),
        "scoring_cost": references_cost(store.folder),
        "model_lineage": reference_lineage(store.folder),
    }


def served_model(manifest: Json) -> str | None:
    """The name of the reference model on the server that scored; None where it was scored here."""
    scoring = manifest["scoring"]
    return scoring["served_model"] if "served_model" in scoring else None


def short_name(folder: str | Path) -> str:
    """The last two names: the last alone is `train` or `model` for nearly everything."""
    return "/".join(Path(folder).resolve().parts[-2:])


def git_commit() -> Json | None:
    """Commit of the checkout that this package runs from; None where it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no") != ""
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return None


def installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


CARD = """---
{header}
---

# A causal language model trained on selected tokens

Trained by selective language modeling (Rho-1, arXiv 2404.07965).

| | |
| --- | --- |
{facts}

Corpus `{corpus}`, fingerprint `{fingerprint}`.

## Held-out results

{results}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```

`slm.json` holds the hashes of the files and all that went in. The licence follows from the
corpus and the base model; none is stated here.
"""


def base_model(lineage: Json) -> str:
    """A folder's short name must not look like a name on the hub."""
    where = " (a local folder)" if lineage["init_from_is_folder"] else ""
    return f"{lineage['init_from']}{where}" if lineage["init_from"] else "none (new weights)"


def named_references(lineage: Json) -> list[str]:
    stored = [record["served_model"] or record["model_sha256"] for record in lineage["references"]]
    return [*stored, *filter(None, [lineage["online_reference"]])]


def model_card(lineage: Json, results: Mapping[str, float]) -> str:
    """A Hugging Face model card; `results`: heldout/<set>/<measure> -> value, may be empty."""
    rule = by_word(lineage["selection"])
    name = rule.pop("rule")
    share = lineage["tokens_selected"] / max(1, lineage["tokens_seen"])
    facts = {
        "base model": base_model(lineage),
        "selection rule": ", ".join([name, *(f"{key} = {rule[key]}" for key in rule)]),
        "tokens seen": f"{lineage['tokens_seen']:,}",
        "tokens selected": f"{lineage['tokens_selected']:,} ({share:.1%})",
        "reference model": ", ".join(named_references(lineage)) or "none",
        "seed": lineage["seed"],
        "device": lineage["device"],
    }
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(results.items())]
    table = ["| measure | value |", "| --- | --- |", *rows] if rows else ["None were measured."]
    header = ["library_name: transformers", "pipeline_tag: text-generation"]
    if lineage["init_from"] is not None and not lineage["init_from_is_folder"]:
        header.append(f"base_model: {json.dumps(lineage['init_from'])}")
    header += ["tags:", "- selective-language-modeling", "- rho-1"]
    return CARD.format(
        header="\n".join(header),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        corpus=lineage["corpus"],
        fingerprint=lineage["corpus_fingerprint"],
        results="\n".join(table),
    )
