import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from slm.train.lineage import lineage, model_card


def fake_datamodule(folder: Path) -> Any:
    (folder / "references").mkdir()
    (folder / "references" / "manifest.json").write_text('{"shards": [{"index": 0}]}')
    corpus = SimpleNamespace(folder=Path("/somewhere/else/math"), fingerprint="c" * 64)
    manifest = {"model_sha256": "e" * 64, "scoring": {"dtype": "float32"}}
    references = SimpleNamespace(
        fingerprint="f" * 64, manifest=manifest, folder=folder / "references", is_partial=False
    )
    held = SimpleNamespace(fingerprint="d" * 64, num_windows=40)
    return SimpleNamespace(
        corpus=corpus,
        corpora={"corpus": corpus},
        references=[references],
        heldout={"math": held},
        heldout_windows=16,
    )


def test_lineage_and_card(tmp_path: Path) -> None:
    selection = {"_target_": "slm.selection.Excess", "select_ratio": 0.6, "scope": "batch"}
    (tmp_path / "base").mkdir()
    record = lineage(
        datamodule=fake_datamodule(tmp_path),
        selection=selection,
        needs_references=True,
        online_reference=None,
        seed=7,
        init_from=str(tmp_path / "base"),
        init_from_sha256="a" * 64,
        tokens_seen=2_000_000,
        tokens_selected=1_200_000,
        train_seconds=12.5,
        train_flops=3e15,
        device=torch.device("cpu"),
        precision="32-true",
    )
    assert json.loads(json.dumps(record)) == record
    assert str(tmp_path) not in json.dumps(record) and "/somewhere" not in json.dumps(record)
    assert record["references"] == [
        {
            "fingerprint": "f" * 64,
            "model_sha256": "e" * 64,
            "served_model": None,
            "scoring_cost": None,
            "model_lineage": None,
        }
    ]
    assert record["init_from"] == f"{tmp_path.name}/base"
    assert record["packages"]["torch"] == torch.__version__
    assert record["heldout"] == {"math": {"fingerprint": "d" * 64, "windows": 16}}
    assert record["needs_references"]
    assert record["precision"] == "32-true"
    card = model_card(record, {"heldout/math/loss": 2.34567, "heldout/math/bits_per_byte": 0.9})
    header, body = card.split("---\n")[1:3]
    assert header.splitlines() == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- selective-language-modeling",
        "- rho-1",
    ]
    for text in (
        f"| base model | {tmp_path.name}/base (a local folder) |",
        "| selection rule | excess, select_ratio = 0.6, scope = batch |",
        "| tokens seen | 2,000,000 |",
        "| tokens selected | 1,200,000 (60.0%) |",
        "| heldout/math/loss | 2.3457 |",
        "Corpus `else/math`",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert text in body


def test_a_reference_that_a_server_scored_is_named_by_the_server(tmp_path: Path) -> None:
    datamodule = fake_datamodule(tmp_path)
    datamodule.references[0].manifest = {"model_sha256": None, "scoring": {"served_model": "big"}}
    record = lineage(
        datamodule=datamodule,
        selection={"_target_": "slm.selection.Excess", "select_ratio": 0.6},
        needs_references=True,
        online_reference=None,
        seed=7,
        init_from=None,
        init_from_sha256=None,
        tokens_seen=10,
        tokens_selected=6,
        train_seconds=None,
        train_flops=None,
        device=torch.device("cpu"),
        precision="32-true",
    )
    assert record["references"][0]["model_sha256"] is None
    assert record["references"][0]["served_model"] == "big"
    assert "| reference model | big |" in model_card(record, {})


def test_card_of_a_hub_model_and_of_new_weights(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "datamodule": SimpleNamespace(**vars(fake_datamodule(tmp_path)) | {"references": []}),
        "selection": {"_target_": "slm.selection.All"},
        "needs_references": False,
        "online_reference": None,
        "seed": 0,
        "init_from_sha256": None,
        "tokens_seen": 10,
        "tokens_selected": 10,
        "train_seconds": None,
        "train_flops": None,
        "precision": "32-true",
        "device": torch.device("cpu"),
    }
    card = model_card(lineage(init_from="org/name", **shared), {})
    assert 'base_model: "org/name"' in card and "None were measured." in card
    card = model_card(lineage(init_from=None, **shared), {})
    assert "base_model" not in card and "| base model | none (new weights) |" in card
    assert "| selection rule | all |" in card and "| reference model | none |" in card
    shared["online_reference"] = "a" * 64
    card = model_card(lineage(init_from=None, **shared), {})
    assert f"| reference model | {'a' * 64} |" in card
