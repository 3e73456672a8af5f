"""LitGPT's own GPT and `litgpt.pretrain.setup`, beside the definition."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import warm
from door_folder import DOORS, door
from slm.errors import UserError
from slm_kernels import selective_cross_entropy_from_logits, token_cross_entropy
from text_helpers import DATA, needs_data

HERE = Path(__file__).resolve()
TEXT = DATA / "curated" / "gsm8k_train.jsonl"
L = 16
PROGRAM = f"""
import sys
sys.path += [{str(DOORS)!r}, {str(HERE.parent)!r}]
import torch._dynamo
torch._dynamo.config.disable = True  # a minute of a C++ compiler
import litgpt_helpers
litgpt_helpers.main()
"""


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    with door("litgpt") as module:
        yield module


def unigram() -> np.ndarray:
    """Log-probs of the bytes, add-one smoothed."""
    ids = np.frombuffer(TEXT.read_bytes()[: 40 * L + 1], np.uint8)
    return np.log((np.bincount(ids, minlength=256) + 1) / (len(ids) + 256)).astype(np.float32)


@pytest.fixture
def folders(tmp_path, make_corpus, make_references) -> dict[str, str]:
    """A corpus of real bytes, unigram log-probs as its scores, and held-out windows."""
    ids = np.frombuffer(TEXT.read_bytes()[: 40 * L + 1], np.uint8).astype(np.uint16)
    corpus = make_corpus(tmp_path / "train", [ids[: 30 * L + 1]], L)
    make_corpus(tmp_path / "heldout", [ids[30 * L :]], L)
    logprobs = unigram()[ids[: 30 * L + 1]]
    logprobs[0] = np.nan
    make_references(tmp_path / "references", corpus, [logprobs])
    names = {"corpus": "train", "references": "references", "heldout": "heldout"}
    return {name: str(tmp_path / folder) for name, folder in names.items()}


def tiny(adapter: Any) -> Any:
    sys.path.append(str(HERE.parent))
    try:
        import litgpt_helpers  # with LitGPT's folder on sys.path, as `adapter` has put it there
    finally:
        sys.path.remove(str(HERE.parent))
    return adapter.pretrain.GPT(litgpt_helpers.tiny()), litgpt_helpers.LR


@needs_data
def test_data_yields_the_windows_with_their_scores(adapter, folders):
    data = adapter.SelectiveData(**folders)
    data.connect(None, batch_size=4, max_seq_length=L)
    ids = np.frombuffer(TEXT.read_bytes(), np.uint8)
    rows = []
    for batch in data.train_dataloader():
        assert batch["tokens"].shape == (4, L + 1) and batch["tokens"].dtype == torch.int64
        wanted = torch.from_numpy(unigram())[batch["tokens"][:, 1:]]
        assert torch.equal(batch["reference_logprob"], wanted)
        rows += batch["tokens"].tolist()
    windows = [ids[start * L : (start + 1) * L + 1].tolist() for start in range(40)]
    assert len(rows) == 28 and all(row in windows[:30] for row in rows)
    assert rows != windows[:28]  # shuffled, and what fills no batch is dropped
    assert torch.cat(list(data.val_dataloader())).tolist() == windows[30:]


def said(out: Path, folders: dict[str, str], **selection: Any) -> tuple[int, str]:
    root = HERE.parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    settings = json.dumps({"out": str(out), "data": folders, "selection": selection})
    out.mkdir()
    done = warm.run(
        [sys.executable, "-c", PROGRAM, settings],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def by_hand(adapter: Any, folders: dict[str, str], first: dict[str, Tensor]) -> tuple[Any, list]:
    """The model after three steps of SGD over four windows each, and the steps' losses.

    The two micro-batches of a step are ranked apart, and divided by their common number.
    """
    model, lr = tiny(adapter)
    model.load_state_dict(first)
    data = adapter.SelectiveData(**folders)
    data.connect(None, batch_size=2, max_seq_length=L)
    batches, losses = iter(data.train_dataloader()), []
    for _ in range(3):
        model.zero_grad()
        total = torch.tensor(0.0)
        for batch in (next(batches), next(batches)):
            logits = model(batch["tokens"][:, :-1].contiguous())
            loss = F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(),
                                   reduction="none")  # fmt: skip
            excess = loss.detach() + batch["reference_logprob"].flatten()
            total = total + loss[excess.argsort(descending=True, stable=True)[:13]].sum() / 26
        total.backward()
        losses.append(total.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    return model, losses


@needs_data
@pytest.mark.slow
def test_stock_pretraining_trains_on_the_selection(adapter, folders, tmp_path):
    """Weights, logged losses and validation of `pretrain.setup` are those of the definition."""
    out = tmp_path / "out"
    code, text = said(out, folders, select_ratio=0.4)
    assert code == 0, text
    model, losses = by_hand(adapter, folders, torch.load(out / "first.pth"))
    trained = torch.load(out / "final" / "lit_model.pth")["model"]
    torch.testing.assert_close(trained, dict(model.state_dict()), rtol=1e-4, atol=1e-6)
    logged = [float(value) for value in re.findall(r"step \d \| *loss train: ([\d.]+)", text)]
    assert logged == pytest.approx(losses, abs=6e-4), text
    assert losses[-1] < losses[0]
    data = adapter.SelectiveData(**folders)
    data.connect(None, batch_size=2, max_seq_length=L)
    validated = []
    for number, tokens in enumerate(data.val_dataloader()):
        hidden = model(tokens[:, :-1].contiguous())
        if number < 2:
            validated.append(F.cross_entropy(hidden.flatten(0, 1), tokens[:, 1:].flatten()).item())
    final = re.search(r"Final evaluation \| val loss: ([\d.]+)", text)
    assert final and float(final[1]) == pytest.approx(np.mean(validated), abs=6e-4)


@needs_data
def test_recipe_for_a_loop_of_your_own(adapter, folders):
    """The two losses that the docstring names have the same gradients."""
    model, _ = tiny(adapter)
    data = adapter.SelectiveData(**folders)
    data.connect(None, batch_size=4, max_seq_length=L)
    batch = next(iter(data.train_dataloader()))
    inputs, targets = batch["tokens"][:, :-1].contiguous(), batch["tokens"][:, 1:].contiguous()
    out = selective_cross_entropy_from_logits(
        model(inputs), targets, -batch["reference_logprob"], select_ratio=0.6
    )
    kept: dict[str, Tensor] = {}
    model.lm_head.register_forward_pre_hook(lambda head, args: kept.update(hidden=args[0]))
    model(inputs)
    loss = token_cross_entropy(kept["hidden"], model.lm_head.weight, targets).loss
    assert torch.allclose(loss, out.token_loss, atol=1e-6)


class Replaced:
    """`litgpt.pretrain` while a selection lasts, with one batch of made-up scores."""

    def __init__(self, adapter: Any, select_ratio: float = 0.5, scope: str = "batch"):
        self.adapter = adapter
        self.context = adapter.selective_pretraining(select_ratio=select_ratio, scope=scope)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(30, (2, 9), generator=generator)
        self.logprob = -torch.rand(2, 8, generator=generator)
        self.logits = torch.randn(2, 8, 30, generator=generator).requires_grad_()

    def loss(self, **changes: Tensor) -> Tensor:
        batch = {"tokens": self.tokens, "reference_logprob": self.logprob} | changes
        with self.context:
            read = next(self.adapter.pretrain.CycleIterator([batch]))
            targets = read[:, 1:].contiguous()
            return self.adapter.pretrain.chunked_cross_entropy(self.logits, targets)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_loss_of_the_batch_that_was_read(adapter, scope):
    one = Replaced(adapter, scope=scope)
    wanted = selective_cross_entropy_from_logits(
        one.logits, one.tokens[:, 1:], -one.logprob, select_ratio=0.5, scope=scope
    )
    gradients = [torch.autograd.grad(loss, one.logits)[0] for loss in (one.loss(), wanted.loss)]
    assert torch.equal(*gradients)


def test_weights_multiply_what_is_selected(adapter):
    """Divided by as much as without, so that none may be 0, which would be no candidate."""
    one = Replaced(adapter)
    targets, weight = one.tokens[:, 1:], torch.rand(2, 8) + 0.1
    out = selective_cross_entropy_from_logits(
        one.logits, targets, -one.logprob, select_ratio=0.5, scope="batch"
    )
    losses = F.cross_entropy(one.logits.flatten(0, 1), targets.flatten(), reduction="none")
    wanted = (losses.view(2, 8) * weight)[out.selected].sum() / 8
    gradients = [
        torch.autograd.grad(loss, one.logits)[0] for loss in (one.loss(token_weight=weight), wanted)
    ]
    torch.testing.assert_close(*gradients)
    weight[0, :4] = 0
    with pytest.raises(ValueError, match="give every token its scores, and no weight of 0"):
        Replaced(adapter).loss(token_weight=weight)


def test_validation_and_the_count_of_flops_are_not_touched(adapter):
    one = Replaced(adapter)
    targets = one.tokens[:, 1:].contiguous()
    wanted = F.cross_entropy(one.logits.flatten(0, 1), targets.flatten())
    stock = (adapter.pretrain.CycleIterator, adapter.pretrain.chunked_cross_entropy)
    with one.context:
        with torch.no_grad():
            got = adapter.pretrain.chunked_cross_entropy(one.logits, targets)
        meta = adapter.pretrain.chunked_cross_entropy(
            one.logits.to("meta"), targets.to("meta"), chunk_size=0
        )
    torch.testing.assert_close(got, wanted.detach())
    assert meta.is_meta
    assert stock == (adapter.pretrain.CycleIterator, adapter.pretrain.chunked_cross_entropy)


def test_a_batch_that_is_not_what_it_must_be_is_refused(adapter):
    one = Replaced(adapter)
    some = one.logprob.clone()
    some[1, :2] = torch.nan
    for changes, message in (
        (
            {"reference_logprob": -one.logprob},
            "reference_logprob: a finite number <= 0 is needed, .* got 16 others",
        ),
        ({"reference_logprob": some}, "must select 8 of its 16 tokens, .*, got .* the first 7"),
        (
            {"reference_logprob": one.logprob[:, 1:]},
            r"reference_logprob is \(2, 7\), the targets of the batch are \(2, 8\)",
        ),
        ({"other": some}, "dicts of tokens and reference_logprob, got tokens, .*, other"),
    ):
        with pytest.raises(ValueError, match=message):
            Replaced(adapter).loss(**changes)
    with adapter.selective_pretraining(select_ratio=0.5):
        with pytest.raises(ValueError, match="dicts of tokens .*, got Tensor"):
            next(adapter.pretrain.CycleIterator([one.tokens]))
        with pytest.raises(ValueError, match="before it read a batch"):
            adapter.pretrain.chunked_cross_entropy(one.logits, one.tokens[:, 1:])
        next(adapter.pretrain.CycleIterator([{"tokens": one.tokens, "reference_logprob": some}]))
        with pytest.raises(ValueError, match="targets must be those of the batch"):
            adapter.pretrain.chunked_cross_entropy(one.logits, one.tokens[:, :-1])


def test_settings_are_checked(adapter):
    for settings, message in (
        ({"select_ratio": 0.0}, "select_ratio is 0.0, it must be"),
        (
            {"select_ratio": 0.5, "scope": "global"},
            "scope is 'global', .* must be 'batch' or 'sequence'",
        ),
    ):
        with pytest.raises(ValueError, match=message), adapter.selective_pretraining(**settings):
            pass


@needs_data
def test_what_litgpt_cannot_train_on_is_refused(adapter, folders, tmp_path, make_corpus):
    data = adapter.SelectiveData(**folders)
    with pytest.raises(ValueError, match="train.max_seq_length must be 16, .*, got 32"):
        data.connect(None, batch_size=4, max_seq_length=32)
    ids = [np.arange(L + 1)]
    make_corpus(tmp_path / "documents", ids, L, packing="documents")
    with pytest.raises(ValueError, match="packing is 'documents', masks are False"):
        adapter.SelectiveData(**(folders | {"heldout": str(tmp_path / "documents")}))
    make_corpus(tmp_path / "other", ids, L)
    with pytest.raises(UserError, match="other"):
        adapter.SelectiveData(**(folders | {"corpus": str(tmp_path / "other")}))
