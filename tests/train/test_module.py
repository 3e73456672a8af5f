"""The training step against an independent float64 one: one denominator, exact sums, the stop."""

import copy
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import warm
from slm.errors import NonFiniteError, UserError
from slm.model.architecture import new_model
from slm.model.build import SelectiveLM
from slm.model.head import head_arguments
from slm.selection import (
    All,
    Entropy,
    Excess,
    Forget,
    Mixture,
    Probability,
    Random,
    Relu,
    Selection,
    Sigmoid,
    Softmax,
)
from slm.selection.books import SUMS, StepResult
from slm.store.windows import IGNORE_INDEX, Batch
from slm.train.module import SelectiveModule

VOCAB, LENGTH, STEP_ROWS = 41, 8, 8
STEP_TOKENS = STEP_ROWS * LENGTH
STEP_RTOL = 1e-9


def make_lm(seed: int = 0) -> SelectiveLM:
    torch.manual_seed(seed)
    fields = {
        "model_type": "gpt2",  # its norms keep float64, which Llama's do not
        "n_embd": 8,
        "n_inner": 12,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "initializer_range": 0.3,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    return SelectiveLM(new_model(fields, VOCAB, None)).train()


def make_rows(num_rows: int = STEP_ROWS, seed: int = 0, weighted: bool = False) -> Batch:
    """Windows of very different numbers of targets, 8 in the first, then fewer, as documents do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (num_rows, LENGTH + 1), generator=generator)
    targets = ids[:, 1:].clone()
    starts = torch.zeros(num_rows, LENGTH, dtype=torch.bool)
    for row in range(num_rows):
        starts[row, 1 : 1 + row % LENGTH] = True  # that many documents of one token
    index = torch.arange(LENGTH)
    latest = torch.where(starts, index, 0).cummax(1).values
    targets[:, :-1] = targets[:, :-1].masked_fill(starts[:, 1:], IGNORE_INDEX)
    reference = -4 * torch.rand(targets.shape, generator=generator)
    weights = {"token_weight": 4 * torch.rand(targets.shape, generator=generator)}
    return (weights if weighted else {}) | {
        "input_ids": ids[:, :-1],
        "targets": targets,
        "position_ids": index - latest,
        "reference_logprob": reference.masked_fill(targets == IGNORE_INDEX, torch.nan),
        "window": torch.arange(num_rows) + 100,
        "epoch": torch.zeros(num_rows, dtype=torch.int64),
    }


def micro_batches(rows: Batch, accumulate: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """The micro-batches of one optimizer step on one rank, as the data module makes them."""
    size = len(rows["window"]) // (accumulate * world_size)
    parts = {key: value.split(size)[rank::world_size] for key, value in rows.items()}
    return [{key: part[index] for key, part in parts.items()} for index in range(accumulate)]


class Stream:
    """An endless run over the steps' micro-batches."""

    def __init__(self, steps: list[list[Batch]]):
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for step in self.steps:
                yield from step


class Record(Callback):
    """The result of every optimizer step."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.selected: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.results.append(pl_module.step_result())
            self.selected.append(pl_module.tokens_selected)


def sgd(lm: SelectiveLM) -> Optimizer:
    """Rate 1: the weights move by the gradient itself."""
    return SGD(lm.parameters(), lr=1.0)


def constant(optimizer: Optimizer, num_steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def fit(
    lm: SelectiveLM,
    selection: Selection,
    steps: list[list[Batch]],
    gradient_clip: float | None = None,
    optimizer: Callable[[SelectiveLM], Optimizer] = sgd,
    selection_start: int = 0,
    online_reference: SelectiveLM | None = None,
    added_id: int = IGNORE_INDEX,
    **trainer: Any,
) -> tuple[SelectiveModule, Record]:
    module = SelectiveModule(
        lm,
        selection,
        optimizer,
        constant,
        gradient_clip,
        STEP_TOKENS,
        selection_start,
        online_reference,
        added_id=added_id,
    )
    record = Record()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "max_steps": len(steps),
        "accumulate_grad_batches": len(steps[0]),
    } | trainer
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= dict.fromkeys(quiet, False)
    Trainer(callbacks=[record], max_epochs=-1, **options).fit(module, Stream(steps))
    return module, record


# ---- the independent computation ------------------------------------------------------------


def own_losses(model: Any, batch: Batch) -> Tensor:  # (B, T)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    flat = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return flat.view(batch["targets"].shape)


def top(scores: list[tuple[float, int, int]], ratio: float) -> list[tuple[int, int]]:
    keep = max(1, math.floor(ratio * len(scores) + 0.5)) if scores else 0
    return [(row, column) for _, row, column in sorted(scores, key=lambda s: -s[0])[:keep]]


def by_hand(excess: Tensor, live: Tensor, ratio: float, scope: str) -> Tensor:  # (B, T) bool
    scores = [(excess[r, c].item(), r, c) for r, c in live.nonzero().tolist()]
    rows = range(len(live)) if scope == "sequence" else [None]
    groups = [[s for s in scores if row is None or s[1] == row] for row in rows]
    selected = torch.zeros_like(live)
    for place in (place for group in groups for place in top(group, ratio)):
        selected[place] = True
    return selected


def expected_step(
    lm: SelectiveLM, step: list[Batch], ratio: float, scope: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and sums: all selected losses of the step in one float64 graph, divided once."""
    model = copy.deepcopy(lm.model).double()
    sums: dict[str, Any] = dict.fromkeys(SUMS, 0.0)
    for batch in step:
        losses, live = own_losses(model, batch), batch["targets"] != IGNORE_INDEX
        reference = -batch["reference_logprob"].double()
        selected = by_hand(losses.detach() - reference, live, ratio, scope)
        sums["loss_selected"] += losses[selected].sum()
        sums["loss_valid"] += losses[live].sum().item()
        sums["num_selected"] += selected.sum().item()
        sums["num_valid"] += live.sum().item()
        sums["num_below_reference"] += (losses < reference)[live].sum().item()
        sums["reference_loss"] += reference[live].sum().item()
        sums["reference_loss_selected"] += reference[selected].sum().item()
        sums["num_scored"] += live.sum().item()
        sums["loss_scored"] += losses[live].sum().item()
    (sums["loss_selected"] / sums["num_selected"]).backward()
    sums["loss_weighted"] = sums["loss_selected"] = sums["loss_selected"].item()
    for name in ("num_trained", "weight", "weight_squared"):
        sums[name] = sums["num_selected"]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sums


def moved(before: SelectiveLM, after: SelectiveLM) -> dict[str, Tensor]:
    """The gradient that a step of rate 1 followed."""
    old, new = weights_of(before.model), weights_of(after.model)
    return {name: old[name].double() - new[name] for name in new}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol)


# ---- the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("ratio", "scope"), [(0.4, "sequence"), (0.4, "batch"), (1.0, "batch")])
def test_step_is_one_division_by_the_number_of_selected_tokens(accumulate, ratio, scope):
    lm, step = make_lm(), micro_batches(make_rows(), accumulate)
    expected, sums = expected_step(lm, step, ratio, scope)
    module, record = fit(copy.deepcopy(lm), Excess(ratio, scope), [step])
    assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
    assert record.results[0].sums == pytest.approx(sums, rel=1e-12)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert record.results[0].grad_norm == pytest.approx(norm, rel=STEP_RTOL)
    assert record.selected == [sums["num_selected"]]


def test_step_by_sequences_does_not_depend_on_the_split():
    weights = []
    for accumulate in (1, 2, 4, 8):
        module, _ = fit(
            make_lm(), Excess(0.4, "sequence"), [micro_batches(make_rows(), accumulate)]
        )
        weights.append(torch.nn.utils.parameters_to_vector(module.lm.parameters()))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-12, atol=1e-12)


def test_all_and_random_take_the_same_step_as_their_masks_by_hand():
    lm, step = make_lm(), micro_batches(make_rows(), 2)
    expected, sums = expected_step(lm, step, 1.0, "batch")
    module, record = fit(copy.deepcopy(lm), All(), [step])
    assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
    assert record.results[0].sums == pytest.approx(sums, rel=1e-12)
    rule = Random(0.5, seed=3)
    module, record = fit(copy.deepcopy(lm), rule, [step])
    model = copy.deepcopy(lm.model).double()
    losses = torch.cat([own_losses(model, b)[rule.choose(b, None, 0).selected] for b in step])
    losses.mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
    assert record.selected == [len(losses)]


@pytest.mark.parametrize("rule", [Sigmoid(0.7), Softmax(0.7), Relu(0.7, cap=1.5)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_soft_step_is_one_division_by_the_number_of_targets(rule, accumulate):
    lm, step = make_lm(), micro_batches(make_rows(), accumulate)
    model, total, count = copy.deepcopy(lm.model).double(), torch.zeros(()).double(), 0
    for batch in step:
        losses = own_losses(model, batch)
        token_weight = rule.choose(batch, losses.detach(), 0).token_weight
        total = total + (token_weight * losses).sum()
        count += int((batch["targets"] != IGNORE_INDEX).sum())
    (total / count).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    module, record = fit(copy.deepcopy(lm), rule, [step])
    assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
    assert record.results[0].divided_by == count
    weighted = record.results[0].sums["loss_weighted"]
    assert weighted / count == pytest.approx((total / count).item(), rel=1e-9)


@pytest.mark.parametrize("rule", [All(), Excess(0.4, "sequence"), Sigmoid(0.7)])
def test_weights_multiply_the_choice_and_not_the_denominator(rule):
    """However the step is split; what is chosen, counted and logged over all is as without."""
    lm, rows = make_lm(), make_rows(weighted=True)
    model = copy.deepcopy(lm.model).double()
    losses, live = own_losses(model, rows), rows["targets"] != IGNORE_INDEX
    choice = rule.choose(rows, losses.detach(), 0)
    count = int((live if rule.divides_by == "valid" else choice.selected).sum())
    total = (choice.token_weight * rows["token_weight"].double() * losses).sum()
    (total / count).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for accumulate in (1, 2, 8):
        module, record = fit(copy.deepcopy(lm), rule, [micro_batches(rows, accumulate)])
        assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
        result = record.results[0]
        assert result.divided_by == count
        assert result.sums["num_selected"] == choice.selected.sum()
        assert result.sums["loss_valid"] == pytest.approx(losses[live].sum().item(), rel=1e-9)
        assert result.sums["loss_weighted"] == pytest.approx(total.item(), rel=1e-9)


def test_mixture_step_is_the_mixture_of_both_steps():
    lm, step = make_lm(), micro_batches(make_rows(), 2)
    steps = {}
    for name, rule in (("all", All()), ("slm", Excess(0.5)), ("mix", Mixture(0.5, clm_weight=0.3))):
        module, record = fit(copy.deepcopy(lm), rule, [step])
        steps[name] = (moved(lm, module.lm), record.results[0].sums)
    valid, selected = (steps["mix"][1][name] for name in ("num_valid", "num_selected"))
    clm = 0.3 * 0.5 * valid / selected  # 0.3 but for the rounding of K
    assert clm == pytest.approx(0.3, abs=0.02)
    expected = {
        name: clm * gradient + 0.7 * steps["slm"][0][name]
        for name, gradient in steps["all"][0].items()
    }
    assert_gradients(steps["mix"][0], expected, 1e-7)  # the weights are float32


@pytest.mark.parametrize("mode", ["mask", "replace"])
def test_what_is_forgotten_is_no_target_and_with_replace_no_input(mode):
    rows, added = make_rows(), VOCAB - 1
    gain = torch.linspace(-1, 1, STEP_TOKENS)[torch.randperm(STEP_TOKENS)].view(STEP_ROWS, LENGTH)
    rows["domain_logprob"] = rows["reference_logprob"] + gain - 1
    lm, steps = make_lm(), [micro_batches(rows, 2)]
    rule = Forget(max_gain=-1.0, smooth=0, mode=mode)
    module, record = fit(copy.deepcopy(lm), rule, steps, added_id=added)
    model, total, count = copy.deepcopy(lm.model).double(), torch.zeros(()), 0
    for batch in steps[0]:
        forgotten = batch["domain_logprob"] - batch["reference_logprob"] > -1
        read = batch["input_ids"].clone()
        for row, place in (forgotten & (batch["targets"] != IGNORE_INDEX)).nonzero().tolist():
            # A window's first input goes with its first target, the last target is no input.
            for where in ([0] if place == 0 else []) + ([place + 1] if place + 1 < LENGTH else []):
                read[row, where] = added if mode == "replace" else read[row, where]
        live = (batch["targets"] != IGNORE_INDEX) & ~forgotten
        total = total + own_losses(model, batch | {"input_ids": read})[live].sum()
        count += int(live.sum())
    (total / count).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients(moved(lm, module.lm), expected, STEP_RTOL)
    assert record.selected == [count] and 0 < count < STEP_TOKENS


def test_every_token_is_trained_until_the_rule_starts():
    lm, steps = make_lm(), [micro_batches(make_rows(seed=seed), 2) for seed in range(3)]
    _, record = fit(lm, Excess(0.5), steps, selection_start=STEP_TOKENS + 1)
    kept = [result.sums["num_selected"] / result.sums["num_valid"] for result in record.results]
    assert kept[:2] == [1.0, 1.0]  # the rule takes over between two steps: at the next one
    assert kept[2] == pytest.approx(0.5, abs=0.05)


def test_online_reference_gives_the_step_that_stored_scores_give():
    lm, reference = make_lm(), make_lm(seed=1).double()
    steps = [micro_batches(make_rows(seed=seed), 2) for seed in range(2)]
    for batch in (batch for step in steps for batch in step):
        dead = batch["targets"] == IGNORE_INDEX
        batch["reference_logprob"] = (-reference(batch).loss).masked_fill(dead, torch.nan)
    stored, _ = fit(copy.deepcopy(lm), Excess(0.4), steps)
    without = [[{k: v for k, v in b.items() if "ref" not in k} for b in step] for step in steps]
    frozen = weights_of(reference)
    online, record = fit(copy.deepcopy(lm), Excess(0.4), without, online_reference=reference)
    for one, other in zip(stored.lm.parameters(), online.lm.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(p, frozen[n]) for n, p in reference.named_parameters())
    assert not any("online" in name for name in online.state_dict())
    assert record.results[0].sums["num_scored"] > 0


def test_the_reference_is_scored_without_dropout_and_without_a_graph():
    reference = make_lm(seed=1).train()
    grads: list[bool] = []
    # The loss per token has no graph in any case; the backbone's hidden states must have none.
    reference.model.base_model.register_forward_hook(
        lambda module, inputs, output: grads.append(
            module.training or torch.is_grad_enabled() or output.last_hidden_state.requires_grad
        )
    )
    rows = make_rows()
    del rows["reference_logprob"]
    fit(make_lm(), Excess(0.4), [micro_batches(rows, 2)], online_reference=reference)
    assert grads == [False, False]


def test_without_references_nothing_is_counted_as_scored():
    rows = make_rows()
    del rows["reference_logprob"]
    _, record = fit(make_lm(), All(), [micro_batches(rows, 2)])
    sums = record.results[0].sums
    assert sums["num_scored"] == sums["reference_loss"] == sums["reference_loss_selected"] == 0
    assert sums["loss_selected"] == sums["loss_valid"] > 0


def test_selection_follows_the_model_and_counts_add_up():
    lm, steps = make_lm(), [micro_batches(make_rows(seed=seed), 2) for seed in range(3)]
    follower = copy.deepcopy(lm).double()
    total, expected = 0.0, []
    for step in steps:  # selects by the weights of the moment
        gradients, sums = expected_step(follower, step, 0.4, "batch")
        with torch.no_grad():
            for name, parameter in follower.model.named_parameters():
                parameter -= gradients[name]
        total += sums["num_selected"]
        expected.append((sums, total))
    module, record = fit(lm, Excess(0.4), steps)
    for result, selected, (sums, so_far) in zip(
        record.results, record.selected, expected, strict=True
    ):
        assert result.sums == pytest.approx(sums, rel=STEP_RTOL)
        assert selected == so_far
    for name, parameter in module.lm.named_parameters():
        theirs = follower.get_parameter(name)
        torch.testing.assert_close(parameter, theirs, rtol=STEP_RTOL, atol=STEP_RTOL)


def test_model_that_is_its_own_reference_selects_k_of_the_ties():
    lm, rows = make_lm().double(), make_rows()
    rows["reference_logprob"] = -lm(rows).loss.masked_fill(
        rows["targets"] == IGNORE_INDEX, torch.nan
    )
    module, record = fit(lm, Excess(0.4), [micro_batches(rows, 1)])
    num_valid = int((rows["targets"] != IGNORE_INDEX).sum())
    assert record.results[0].sums["num_selected"] == math.floor(0.4 * num_valid + 0.5)
    assert record.results[0].threshold == pytest.approx(0, abs=1e-12)


def test_backbone_runs_once_for_each_micro_batch():
    lm, calls = make_lm(), []
    lm.model.base_model.register_forward_hook(lambda *_: calls.append(0))
    fit(lm, Excess(0.4), [micro_batches(make_rows(), 4)])
    assert len(calls) == 4


def test_step_without_any_target_leaves_the_weights():
    rows = make_rows()
    rows["targets"] = torch.full_like(rows["targets"], IGNORE_INDEX)
    lm = make_lm()
    for rule in (All(), Excess(0.4), Excess(0.4, "sequence"), Random(0.4, seed=0)):
        module, record = fit(copy.deepcopy(lm), rule, [micro_batches(rows, 2)])
        assert all((gradient == 0).all() for gradient in moved(lm, module.lm).values())
        assert record.results[0].sums["num_selected"] == 0
        assert record.results[0].threshold is None


# ---- thresholds -----------------------------------------------------------------------------


def test_threshold_is_the_lowest_selected_excess_of_the_last_micro_batch():
    lm, step = make_lm(), micro_batches(make_rows(), 2)
    losses = own_losses(copy.deepcopy(lm.model).double(), step[-1]).detach()
    excess = losses + step[-1]["reference_logprob"]
    live = step[-1]["targets"] != IGNORE_INDEX
    _, record = fit(copy.deepcopy(lm), Excess(0.4), [step])
    lowest = excess[by_hand(excess, live, 0.4, "batch")].min().item()
    assert record.results[0].threshold == pytest.approx(lowest, rel=1e-9)
    _, record = fit(copy.deepcopy(lm), Excess(0.4, "sequence"), [step])
    selected = by_hand(excess, live, 0.4, "sequence")
    rows = [row[mask].min().item() for row, mask in zip(excess, selected, strict=True)]
    assert record.results[0].threshold == pytest.approx(np.mean(rows), rel=1e-9)


def test_windows_without_targets_have_no_part_in_the_mean_threshold():
    rows = make_rows()
    whole = fit(make_lm(), Excess(0.4, "sequence"), [micro_batches(rows, 1)])[1].results[0]
    empty = {key: value[:1].clone() for key, value in rows.items()}
    empty["targets"][:] = IGNORE_INDEX
    more = {key: torch.cat([value, empty[key]]) for key, value in rows.items()}
    result = fit(make_lm(), Excess(0.4, "sequence"), [micro_batches(more, 1)])[1].results[0]
    assert result.threshold == pytest.approx(whole.threshold, rel=1e-12)


@pytest.mark.parametrize("rule", [All(), Sigmoid(1.0), Softmax(1.0)])
def test_rules_without_a_ranking_have_no_threshold(rule):
    _, record = fit(make_lm(), rule, [micro_batches(make_rows(), 2)])
    assert record.results[0].threshold is None


# ---- the stop -------------------------------------------------------------------------------


def break_a_loss(lm: SelectiveLM, place: tuple[int, ...]) -> None:
    """The loss of one token becomes NaN; the gradient knows nothing of it."""

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        losses = output.token_loss.clone()
        losses[place] = math.nan
        return output._replace(token_loss=losses)

    lm.register_forward_hook(replace)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [All(), Excess(0.1), Random(0.1, seed=0)])
def test_broken_weights_stop_before_the_update(value, rule):
    lm = make_lm()
    with torch.no_grad():
        # One token of the vocabulary that is never an input: its logit alone is broken.
        head_arguments(lm.model)["weight"][VOCAB - 1, 0] = value
    rows = make_rows()
    rows["input_ids"] = rows["input_ids"].clamp(max=VOCAB - 2)
    before = weights_of(lm)
    with pytest.raises(NonFiniteError, match=r"step 0: .*\(windows of this rank: \[100, .*107"):
        fit(lm, rule, [micro_batches(rows, 2)], precision="32-true")
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_an_unselected_broken_loss_stops_too():
    """Random never looks at the loss, so a broken token is mostly not among the selected."""
    lm, rows = make_lm(), make_rows()
    rule = Random(0.1, seed=0)
    step = micro_batches(rows, 1)
    left = ~rule.choose(step[0], None, 0).selected & (rows["targets"] != IGNORE_INDEX)
    break_a_loss(lm, tuple(left.nonzero()[0].tolist()))
    before = weights_of(lm)
    with pytest.raises(NonFiniteError, match="loss sum nan, gradient norm [0-9]"):
        fit(lm, rule, [step], precision="32-true")
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


# ---- clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clipping_is_torchs(factor):
    lm, step = make_lm(), micro_batches(make_rows(), 2)
    expected, _ = expected_step(lm, step, 0.4, "batch")
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in expected.values()]
    for parameter, gradient in zip(parameters, expected.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.get_total_norm(expected.values()).item()
    torch.nn.utils.clip_grad_norm_(parameters, factor * norm)
    clipped: Any = {n: p.grad for n, p in zip(expected, parameters, strict=True)}
    module, record = fit(copy.deepcopy(lm), Excess(0.4), [step], gradient_clip=factor * norm)
    assert_gradients(moved(lm, module.lm), clipped, STEP_RTOL)
    assert record.results[0].grad_norm == pytest.approx(norm, rel=STEP_RTOL)


def test_lightnings_own_clipping_is_refused():
    with pytest.raises(UserError, match="trainer.gradient_clip_val is 0.5, .*gradient_clip is 2.0"):
        step = micro_batches(make_rows(), 1)
        fit(make_lm(), All(), [step], gradient_clip=2.0, gradient_clip_val=0.5)


# ---- precision ------------------------------------------------------------------------------


def test_float32_step_agrees_with_float64():
    lm, step = make_lm(), micro_batches(make_rows(), 2)
    expected, _ = expected_step(lm, step, 0.4, "sequence")
    module, _ = fit(copy.deepcopy(lm), Excess(0.4, "sequence"), [step], precision="32-true")
    assert_gradients(moved(lm, module.lm), expected, 1e-5)


def test_bf16_mixed_step_keeps_float32_weights_and_scores():
    lm, step = make_lm(), micro_batches(make_rows(), 1)
    outputs: list[Any] = []
    lm.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    module, record = fit(copy.deepcopy(lm), Excess(0.4), [step], precision="bf16-mixed")
    output, reference = outputs[0], -step[0]["reference_logprob"]
    selected = record.results[0].tokens[0].selected
    assert output.token_loss.dtype == torch.float32
    live = step[0]["targets"] != IGNORE_INDEX
    assert (output.token_loss.bfloat16().float() != output.token_loss)[live].float().mean() > 0.9
    assert torch.equal(selected, by_hand(output.token_loss - reference, live, 0.4, "batch"))
    assert {p.dtype for p in module.lm.parameters()} == {torch.float32}
    expected, _ = expected_step(lm, step, 0.4, "batch")
    norm = torch.nn.utils.get_total_norm(expected.values()).item()
    assert record.results[0].grad_norm == pytest.approx(norm, rel=0.1)


# ---- checkpoints ----------------------------------------------------------------------------


def test_count_of_selected_tokens_goes_through_a_checkpoint(monkeypatch):
    monkeypatch.setattr(SelectiveModule, "_about", dict)  # asks the corpus, there is none here
    module, record = fit(make_lm(), Excess(0.4), [micro_batches(make_rows(), 2)])
    batches = {"total": {"ready": 2}, "current": {"ready": 2}}
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 1}
    checkpoint["loops"] = {"fit_loop": {"epoch_loop.batch_progress": batches}}
    module.on_save_checkpoint(checkpoint)
    other = SelectiveModule(make_lm(), Excess(0.4), sgd, constant, None, STEP_TOKENS)
    other._trainer = SimpleNamespace(global_rank=0, accumulate_grad_batches=2)  # type: ignore
    other.on_load_checkpoint(checkpoint)
    assert other.tokens_selected == record.selected[0] > 0
    del checkpoint["state_dict"]["lm.model.lm_head.weight"]
    with pytest.raises(UserError, match="of another model: the shape of lm.model.lm_head"):
        other.on_load_checkpoint(checkpoint)


# ---- two processes --------------------------------------------------------------------------


RULES: dict[str, Selection] = {
    "excess": Excess(0.4, "sequence"),
    "random": Random(0.4, "sequence", seed=0),
    "sigmoid": Sigmoid(0.7),
    "softmax": Softmax(0.7, scope="sequence"),
    "mixture": Mixture(0.4, "sequence"),
    "entropy": Entropy(0.4, "sequence"),
    "probability": Probability(1.0),
    "bound": Excess(min_excess=0.1),
    "all": All(),
}


def steps_of_rank(rank: int, ranks: int) -> list[list[Batch]]:
    rows = [make_rows(seed=seed, weighted=True) for seed in range(3)]
    return [micro_batches(step, 4 // ranks, rank, ranks) for step in rows]


def train_on_ranks(folder: str, ranks: str) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    steps = steps_of_rank(rank, int(ranks))
    state = {}
    for name, rule in RULES.items():
        module, record = fit(make_lm(), rule, steps, 0.5, devices=int(ranks), strategy="ddp")
        results = [(result.sums, result.grad_norm) for result in record.results]
        state[name] = {"weights": module.lm.state_dict(), "results": results}
    torch.save(state, f"{folder}/rank-{rank}.pt")


def global_scope_on_two_ranks(folder: str, _: str) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    steps, state = steps_of_rank(rank, 2), {}
    for name, rule in (("hard", Excess(0.4, "global")), ("soft", Softmax(0.7, scope="global"))):
        module, record = fit(make_lm(), rule, steps, devices=2, strategy="ddp")
        state[name] = (module.lm.state_dict(), [result.sums for result in record.results])
    torch.save(state, f"{folder}/rank-{rank}.pt")


def break_one_of_two_ranks(folder: str, _: str) -> None:
    rank, lm = int(os.environ.get("LOCAL_RANK", "0")), make_lm()
    if rank == 1:
        break_a_loss(lm, (0, LENGTH - 1))
    before = weights_of(lm)
    with pytest.raises(NonFiniteError):
        fit(lm, All(), steps_of_rank(rank, 2), devices=2, strategy="ddp")
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    Path(folder, f"rank-{rank}.stopped").touch()


def run_script(function: str, folder: Path, ranks: int) -> None:
    command = [sys.executable, "-W", "ignore", __file__, function, str(folder), str(ranks)]
    codes, said = warm.run_ranks(ranks, command)
    assert codes == [0] * ranks, said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_times_micro_batches_get_the_weights_of_one_process(ranks, tmp_path):
    """2 x 2 and 4 x 1 against 1 x 4, windows of very different numbers of targets."""
    run_script("train_on_ranks", tmp_path, ranks)
    for name, rule in RULES.items():
        module, record = fit(make_lm(), rule, steps_of_rank(0, 1), 0.5)
        for rank in range(ranks):
            found = torch.load(tmp_path / f"rank-{rank}.pt")[name]
            for key, value in module.lm.state_dict().items():
                torch.testing.assert_close(found["weights"][key], value, rtol=1e-9, atol=1e-9)
            for (sums, norm), ours in zip(found["results"], record.results, strict=True):
                assert sums == pytest.approx(ours.sums, rel=1e-9)
                assert norm == pytest.approx(ours.grad_norm, rel=1e-9)


@pytest.mark.slow
def test_global_scope_is_batch_scope_on_the_ranks_rows_together(tmp_path):
    run_script("global_scope_on_two_ranks", tmp_path, 2)
    together = [micro_batches(make_rows(seed=seed, weighted=True), 2) for seed in range(3)]
    for name, rule in (("hard", Excess(0.4)), ("soft", Softmax(0.7))):
        module, record = fit(make_lm(), rule, together)
        for rank in (0, 1):
            weights, results = torch.load(tmp_path / f"rank-{rank}.pt")[name]
            for key, value in module.lm.state_dict().items():
                torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-9)
            for theirs, ours in zip(results, record.results, strict=True):
                assert theirs == pytest.approx(ours.sums, rel=1e-9)


@pytest.mark.slow
def test_a_broken_loss_on_one_rank_stops_both(tmp_path):
    run_script("break_one_of_two_ranks", tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"rank-0.stopped", "rank-1.stopped"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        globals()[sys.argv[1]](*sys.argv[2:])
    finally:
        torch.distributed.destroy_process_group()  # one alive at exit may abort the process
