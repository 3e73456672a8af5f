"""The losses beside the definition, then torchtitan's own Trainer with them (titan_helpers.py)."""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import warm
from door_folder import DOORS, door
from slm.selection import All, Middle, Mixture, Random, Sigmoid
from slm_kernels import selective_cross_entropy
from text_helpers import DATA, needs_data

HERE = Path(__file__).resolve()
TEXT = DATA / "curated" / "gsm8k_train.jsonl"
IGNORED = -100
SCOPES = ("batch", "sequence")
WITH_TITAN = f"""
import sys
sys.path += [{str(DOORS)!r}, {str(HERE.parent)!r}]
import torch._utils
torch._utils._get_available_device_type = lambda: "cpu"
import titan_helpers
"""


@pytest.fixture(scope="module")
def titan() -> Iterator[Any]:
    with door("torchtitan") as module:
        yield module


class Case:
    """B = 3, L = 16, D = 8, V = 40, with ignored labels and tokens without a score."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(8, 40, bias=False, dtype=dtype)
        with torch.no_grad():
            self.head.weight.normal_(generator=generator)
        self.hidden = torch.randn(3, 16, 8, dtype=dtype, generator=generator).requires_grad_()
        self.labels = torch.randint(40, (3, 16), generator=generator)
        self.labels[0, :5] = IGNORED
        self.logprob = -3 * torch.rand(3, 16, generator=generator)
        self.logprob[1, 3:6] = torch.nan

    def gradients(self, make: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, its gradient by hidden, by the head: a chunked loss makes the last when called."""
        self.hidden.grad = self.head.weight.grad = None
        loss = make()
        loss.backward()
        assert self.hidden.grad is not None and self.head.weight.grad is not None
        return loss.detach(), self.hidden.grad, self.head.weight.grad

    def definition(
        self, denominator: Tensor | None, scope: str, select_ratio: float = 0.4
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (self.hidden, self.head.weight, self.labels, -self.logprob)
        settings = {"select_ratio": select_ratio, "scope": scope, "denominator": denominator}
        return self.gradients(
            lambda: selective_cross_entropy(*operands, **settings, implementation="reference").loss
        )


def chunked_loss(titan: Any, case: Case, num_chunks: int = 4, scope: str = "batch") -> Any:
    config = titan.SelectiveChunkedLoss.Config(select_ratio=0.4, scope=scope, num_chunks=num_chunks)
    loss = config.build(compile_config=None)
    loss.set_lm_head(case.head)
    return loss


def logits_loss(titan: Any, scope: str = "batch") -> Any:
    return titan.SelectiveLoss.Config(select_ratio=0.4, scope=scope).build(compile_config=None)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("denominator", [None, torch.tensor(57)])
def test_loss_of_logits_is_the_definition(titan, scope, denominator):
    case = Case(torch.float64)
    loss = logits_loss(titan, scope)
    loss.bind(case.logprob)
    got = case.gradients(lambda: loss(case.head(case.hidden), case.labels, denominator)[0])
    torch.testing.assert_close(got, case.definition(denominator, scope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("denominator", [None, torch.tensor(57)])
@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_chunked_loss_is_the_definition(titan, scope, denominator, num_chunks):
    """The chunks are of selected rows: how many there are changes no selection."""
    case = Case()
    loss = chunked_loss(titan, case, num_chunks, scope)
    loss.bind(case.logprob)
    got = case.gradients(lambda: loss(case.hidden, case.labels, denominator)[0])
    wanted = case.definition(denominator, scope)
    assert torch.equal(got[1] != 0, wanted[1] != 0)  # exactly the selected rows
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num_chunks", [3, 5, 8])
def test_rows_that_fill_the_last_chunk_count_nothing(titan, num_chunks):
    """The first row, whose excess is made the largest, is selected: it must count once."""
    case = Case()
    case.labels[0, 0] = case.head(case.hidden[0, 0]).argmin()
    case.logprob[0, 0] = 0.0
    loss = titan.SelectiveChunkedLoss.Config(select_ratio=0.15, num_chunks=num_chunks).build(
        compile_config=None
    )
    loss.set_lm_head(case.head)
    loss.bind(case.logprob)
    got = case.gradients(lambda: loss(case.hidden, case.labels, torch.tensor(1))[0])
    wanted = case.definition(torch.tensor(1), "batch", select_ratio=0.15)
    assert wanted[1][0, 0].any()
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-5)


def test_every_token_can_be_selected_or_none(titan):
    """45 rows are no multiple of 8 chunks; without a candidate loss and gradients are zero."""
    case = Case()
    case.hidden = case.hidden[:, :15].detach().requires_grad_()
    case.labels, case.logprob = case.labels[:, :15].contiguous(), case.logprob[:, :15]
    loss = titan.SelectiveChunkedLoss.Config(select_ratio=1.0).build(compile_config=None)
    loss.set_lm_head(case.head)
    loss.bind(case.logprob)
    got = case.gradients(lambda: loss(case.hidden, case.labels)[0])
    live = ((case.labels != IGNORED) & ~case.logprob.isnan()).flatten()
    labels = case.labels.flatten()[live]
    wanted = case.gradients(
        lambda: F.cross_entropy(case.head(case.hidden).flatten(0, 1)[live], labels)
    )
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
    loss.bind(torch.full_like(case.logprob, torch.nan))
    nothing = case.gradients(lambda: loss(case.hidden, case.labels)[0])
    assert not any(value.any() for value in nothing)


def test_a_broken_model_is_not_passed_over(titan):
    case = Case()
    with torch.no_grad():
        case.hidden[2, 7] = torch.nan
    loss = chunked_loss(titan, case)
    loss.bind(case.logprob)
    assert loss(case.hidden, case.labels)[0].isnan()


def test_validation_is_the_sum_over_every_valid_token(titan):
    """As torchtitan's validator calls it: without gradient, denominator and scores."""
    case = Case()
    with torch.no_grad():
        logits = case.head(case.hidden)
        wanted = F.cross_entropy(logits.flatten(0, 1), case.labels.flatten(), reduction="sum")
        torch.testing.assert_close(logits_loss(titan)(logits, case.labels)[0], wanted)
        chunked = chunked_loss(titan, case)
        torch.testing.assert_close(chunked(case.hidden.detach(), case.labels)[0], wanted)


@pytest.mark.parametrize("bound", ["to the inner loss", "nowhere", "as an argument"])
def test_a_wrapper_that_splits_the_batch_is_refused(titan, bound):
    case = Case()
    wrapper = titan.ChunkedLossWrapper.Config(num_chunks=2, loss_fn=titan.SelectiveLoss.Config())
    loss = wrapper.build(compile_config=None)
    loss.set_lm_head(case.head)
    scores = {}
    if bound == "to the inner loss":
        loss.loss_fn.bind(case.logprob)
    elif bound == "as an argument":
        scores = {"reference_logprob": case.logprob}
    with pytest.raises(ValueError, match="ChunkedLossWrapper|call its bind"):
        loss(case.hidden, case.labels, torch.tensor(57), **scores)


def test_scores_are_of_one_call_only(titan):
    case = Case()
    loss = chunked_loss(titan, case)
    loss.bind(case.logprob)
    loss(case.hidden, case.labels)
    with pytest.raises(ValueError, match=r"labels \(3, 16\) to train on and scores of None"):
        loss(case.hidden, case.labels)


def test_what_is_no_log_probability_is_refused(titan):
    case = Case()
    for loss in (chunked_loss(titan, case), logits_loss(titan)):
        loss.bind(-case.logprob)
        with pytest.raises(
            ValueError, match="reference_logprob: a finite number <= 0 is needed, .* got 40 others"
        ):
            loss(case.hidden, case.labels)


def test_what_the_losses_cannot_hold_is_refused(titan):
    inner = titan.SelectiveLoss.Config()
    with pytest.raises(ValueError, match=r"loss.loss_fn must be .*, got SelectiveLoss.Config"):
        titan.SelectiveChunkedLoss.Config(loss_fn=inner).build(compile_config=None)
    with pytest.raises(ValueError, match="select_ratio is 1.5, it must be"):
        titan.SelectiveLoss.Config(select_ratio=1.5).build(compile_config=None)
    with pytest.raises(ValueError, match="scope is 'chunk', it must be one of"):
        titan.SelectiveChunkedLoss.Config(scope="chunk").build(compile_config=None)
    with pytest.raises(ValueError, match="plain linear layer, got Bilinear"):
        chunked_loss(titan, Case()).set_lm_head(nn.Bilinear(2, 2, 2))


def stock_config() -> Any:
    registry = importlib.import_module("torchtitan.models.llama3.config_registry")
    return registry.llama3_debugmodel()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallelism.pipeline_parallel_degree", 2),
        ("parallelism.context_parallel_degree", 2),
        ("parallelism.tensor_parallel_degree", 2),
        ("parallelism.spmd_backend", "full_dtensor"),
        ("debug.spmd_typechecking", True),
    ],
)
def test_what_cannot_be_selected_from_is_refused_by_name(titan, field, value):
    config = titan.selective(stock_config(), titan.SelectiveChunkedLoss.Config())
    titan.check_config(config)
    part, name = field.split(".")
    setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=f"^{field} must be "):
        titan.check_config(config)


def test_torchtitans_command_line_takes_it(titan, tmp_path, monkeypatch):
    """As `python -m torchtitan.train` reads it: a registry of one's own, fields on the way."""
    (tmp_path / "registry_of_mine.py").write_text(
        "from torchtitan.models.llama3.config_registry import llama3_debugmodel\n"
        "from slm.integrations.torchtitan import SelectiveChunkedLoss, selective\n"
        "def mine():\n"
        "    return selective(llama3_debugmodel(), SelectiveChunkedLoss.Config(num_chunks=4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--module", "registry_of_mine", "--config", "mine", "--loss.select_ratio", "0.4"]
    words += ["--loss.selection", "random"]
    config = importlib.import_module("torchtitan.config").ConfigManager().parse_args(words)
    assert type(config) is titan.SelectiveTrainer.Config
    assert config.loss == titan.SelectiveChunkedLoss.Config(
        num_chunks=4, select_ratio=0.4, selection="random"
    )


def test_other_losses_and_cuda_graphs_are_refused(titan):
    stock = stock_config()
    with pytest.raises(ValueError, match="got ChunkedLossWrapper.Config"):
        titan.selective(stock, stock.loss).build()
    for loss in (titan.SelectiveLoss.Config(), titan.SelectiveChunkedLoss.Config(scope="global")):
        with pytest.raises(ValueError, match="^training.disable_cuda_graphs"):
            titan.selective(stock, loss).build()


@pytest.mark.parametrize("kind", ["chunked", "logits"])
@pytest.mark.parametrize(
    "rule", [Sigmoid(0.7), Mixture(0.4, "sequence", 0.3), Random(0.4, seed=3), Middle(0.4), All()]
)
def test_any_rule_trains_as_its_definition_says(titan, kind, rule):
    """By torch's own cross-entropy and the rule's own weights, times those of the tokens."""
    case, window = Case(), torch.tensor([3, 1, 2])
    config = {"chunked": titan.SelectiveChunkedLoss, "logits": titan.SelectiveLoss}[kind].Config
    loss = config(selection=rule).build(compile_config=None)
    numbers = {"window": window, "epoch": torch.zeros_like(window)}
    weight = torch.tensor([0.0, 0.5, 3.0, 1.0]).repeat(3, 4)
    loss.bind(reference_logprob=case.logprob, token_weight=weight, **numbers)
    if kind == "chunked":
        loss.set_lm_head(case.head)
        got = case.gradients(lambda: loss(case.hidden, case.labels)[0])
    else:
        got = case.gradients(lambda: loss(case.head(case.hidden), case.labels)[0])
    labels = case.labels.masked_fill(case.logprob.isnan() | (weight == 0), IGNORED)

    def wanted() -> Tensor:
        logits = case.head(case.hidden).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view(3, 16)
        batch = {"targets": labels, "reference_logprob": case.logprob, **numbers}
        choice = rule.choose(batch, losses.detach(), 0)
        valid = labels != IGNORED
        count = {"selected": choice.selected, "valid": valid}[rule.divides_by].sum()
        return (losses * choice.token_weight * weight)[valid].sum() / count

    torch.testing.assert_close(got, case.gradients(wanted), rtol=2e-5, atol=1e-6)


# ---- torchtitan's own Trainer ---------------------------------------------------------------


def said(ranks: int = 1, **settings: Any) -> tuple[int, str]:
    """The worst exit status of the ranks, and what they printed."""
    command = [sys.executable, "-c", "import titan_helpers as here; here.main()"]
    codes, text = warm.run_ranks(ranks, [*command, json.dumps(settings)], after=WITH_TITAN)
    return max(map(abs, codes)), text


def train(folder: Path, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    if ranks > 1:  # FSDP of torch 2.13 knows no parameters with SPMD types, a nightly torch does
        settings["spmd_backend"] = "partial_dtensor"
    out = folder / f"{len(list(folder.glob('*.pt')))}.pt"
    if (folder / "0.pt").exists():
        settings["start"] = str(folder / "0.pt")
    code, text = said(ranks, text=str(TEXT), out=str(out), **settings)
    assert code == 0, text
    return torch.load(out)


def model_with(weights: list[Tensor]) -> Any:
    spec = stock_config().model_spec
    attention = importlib.import_module("torchtitan.models.common.attention")
    del spec.model.layers[2:]
    for layer in spec.model.layers:
        layer.attention.inner_attention = attention.ScaledDotProductAttention.Config()
    model = spec.model.build()
    model.init_weights(buffer_device=None)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    return model


def by_hand(weights: list[Tensor], select_ratio: float) -> tuple[float, float, float]:
    """Loss, gradient norm and loss over all of the first step, by the definition."""
    model = model_with(weights)
    model._skip_lm_head = True
    ids = torch.tensor(list(TEXT.read_bytes()[: 100 * 33]))
    shares = torch.tensor([(ids == byte).double().mean() for byte in range(256)])
    logprob = shares.log().float()[ids].view(100, 33)[:4, 1:]
    ids = ids.view(100, 33)[:4]
    out = selective_cross_entropy(
        model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:].contiguous(),
        -logprob.masked_fill(ids[:, 1:] == ord("\n"), torch.nan),
        select_ratio=select_ratio, implementation="reference",
    )  # fmt: skip
    out.loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    return out.loss.item(), math.hypot(*norms), out.token_loss.mean().item()


@torch.no_grad()
def validated_by_hand(weights: list[Tensor]) -> float:
    """Mean over every byte of the validator's two batches of four windows."""
    ids = torch.tensor(list(TEXT.read_bytes()[: 8 * 33])).view(8, 33)
    logits = model_with(weights)(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["chunked", "logits"])
def test_the_trainer_trains_the_debug_model(titan, tmp_path, loss):
    """The first step is the definition's, then the loss falls; validation is over all tokens."""
    run = train(tmp_path, loss=loss, select_ratio=0.4, steps=24, validate=True)
    (first, largest, norm), last = run["logged"][0], run["logged"][-1]
    wanted, wanted_norm, over_all = by_hand(run["before"], 0.4)
    assert first == largest == pytest.approx(wanted, rel=1e-5)
    assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert run["over_all"][0]["slm/loss_all"] == pytest.approx(over_all, rel=1e-5)
    assert last[0] < first - 2
    assert run["validated"][-1] == pytest.approx(validated_by_hand(run["after"]), rel=1e-5)


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The norms agree less well: torch's sum of half a million squares on a CPU is that rough."""
    losses, norms = ([[step[i] for step in run["logged"]] for run in (one, other)] for i in (0, 2))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [step["slm/num_selected"] for step in one["over_all"]] == [
        step["slm/num_selected"] for step in other["over_all"]
    ]
    means = [[step["slm/loss_all"] for step in run["over_all"]] for run in (one, other)]
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=3e-4)
    for mine, theirs in zip(one["gradients"], other["gradients"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@needs_data
@pytest.mark.slow
def test_split_the_step_as_you_like(tmp_path):
    """4 rows at once, 2 micro-batches of 2, 2 ranks with 2: one division by one number."""
    whole = train(tmp_path, scope="sequence", steps=2)
    assert_same_run(train(tmp_path, scope="sequence", steps=2, rows=2), whole)
    assert_same_run(train(tmp_path, ranks=2, scope="sequence", steps=2, rows=2), whole)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["chunked", "logits"])
def test_the_scope_may_be_all_ranks(tmp_path, loss):
    """Two FSDP ranks that rank their tokens together select what one process selects."""
    whole = train(tmp_path, loss=loss, steps=2)
    assert_same_run(train(tmp_path, ranks=2, loss=loss, scope="global", steps=2, rows=2), whole)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scored": False}, "step 1: Excess needs reference_logprob, the batch has input"),
        ({"sign": -1.0}, "step 1: reference_logprob: a finite number <= 0 is needed"),
        ({"sign": math.nan}, "step 1: no token has a label and a score"),
        ({"scope": "global"}, "loss.scope 'global' needs several data-parallel ranks, got 1"),
    ],
)
def test_the_trainer_does_not_train_without_scores(tmp_path, settings, message):
    out = tmp_path / "none.pt"
    code, text = said(text=str(TEXT), out=str(out), **settings)
    assert code == 1 and f"ValueError: {message}" in text, text
    assert not out.exists()
