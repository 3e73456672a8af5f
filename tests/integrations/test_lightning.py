"""A step of a LightningModule with the mixin is the step that float64 defines."""

import copy
import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from door_helpers import (
    Row,
    assert_gradients,
    cut_gradients,
    expected_gradients,
    gradients_of,
    make_model,
    make_rows,
    run_on_ranks,
)
from slm.integrations import lightning as door
from slm.integrations.lightning import SelectiveMixin
from slm.integrations.loss import BESIDE, SelectiveLoss, shifted
from slm.model.head import head_arguments
from slm.model.selected import selected_backward

LENGTHS = [9, 5, 12, 7, 8, 11, 6, 10]
NAN = float("nan")


class Mine(SelectiveMixin, LightningModule):
    def __init__(self, scope: str, cuts: bool = False):
        super().__init__()
        self.model, self.cuts = make_model(), cuts
        self.selective = SelectiveLoss(0.4, scope)
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with selected_backward(self.model) if self.cuts else nullcontext() as rows:
            hidden = self.model.model(batch["input_ids"]).last_hidden_state
        head, scores = head_arguments(self.model), batch["reference_logprob"]
        more = {name: batch[name] for name in ("token_weight",) if name in batch}
        return self.selective_loss(hidden, head, batch["targets"], scores, rows, **more)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients.append(gradients_of(self.model))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batch_of(rows: list[Row]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: float) -> Tensor:
        return torch.tensor([r[name] + [value] * (longest - len(r["input_ids"])) for r in rows])

    names = [name for name in BESIDE if name in rows[0]]
    scores = {name: padded(name, NAN) for name in names}
    targets, columns = shifted(padded("labels", -100), scores)
    return {"input_ids": padded("input_ids", 0), "targets": targets, **columns}


def fit(module: LightningModule, batches: Any, held: Any = None, **fields: Any) -> Any:
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**(fixed | fields))
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(
        module, loader, torch.utils.data.DataLoader(held, batch_size=None) if held else None
    )
    return trainer


def test_gradients_along_selected_tokens_are_those_of_the_definition():
    rows = make_rows(LENGTHS[:4], prompt=3, unscored=1)
    module = Mine("batch", cuts=True)
    fit(module, [batch_of(rows)])
    assert_gradients(module.gradients[0], cut_gradients(make_model(), rows, 0.4))


def test_weights_multiply_what_is_selected():
    rows = make_rows(LENGTHS, prompt=3, weighted=True)
    module = Mine("batch")
    fit(module, [batch_of(two) for two in pairs(rows)], accumulate_grad_batches=4)
    expected, loss, _ = expected_gradients(make_model(), pairs(rows), 0.4)
    assert_gradients(module.gradients[0], expected)
    assert module.logged[-1]["train/loss"] == pytest.approx(loss, rel=1e-4)


def pairs(rows: list[Row]) -> list[list[Row]]:
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
def test_accumulated_micro_batches_are_divided_once(scope):
    """Three to a step, so that the epoch ends with a step of one."""
    rows = make_rows(LENGTHS, prompt=3, unscored=1)
    module = Mine(scope)
    fit(module, [batch_of(pair) for pair in pairs(rows)], accumulate_grad_batches=3)
    assert len(module.gradients) == 2
    for i, part in enumerate((rows[:6], rows[6:])):
        groups = [[row] for row in part] if scope == "sequence" else pairs(part)
        expected, loss, count = expected_gradients(make_model(), groups, 0.4)
        assert_gradients(module.gradients[i], expected)
        logged = module.logged[(2, 3)[i]]
        assert logged["train/loss"] == pytest.approx(loss, rel=1e-4)
        num_valid = sum(len(row["input_ids"]) - 3 for row in part)
        assert logged["slm/kept_frac"] == pytest.approx(count / num_valid)


def test_gradients_are_clipped_after_they_are_divided():
    rows = make_rows(LENGTHS[:4])
    expected, _, _ = expected_gradients(make_model(), pairs(rows), 0.4)
    norm = torch.nn.utils.get_total_norm(expected.values()).item()

    class Clipped(Mine):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.gradients.append(gradients_of(self.model))

    module = Clipped("batch")
    batches = [batch_of(pair) for pair in pairs(rows)]
    fit(module, batches, accumulate_grad_batches=2, gradient_clip_val=norm / 2)
    clipped = {name: gradient / 2 for name, gradient in expected.items()}
    assert_gradients(module.gradients[-1], clipped)


def test_the_value_is_the_mean_of_the_micro_batch():
    """Whatever the accumulation; so what a user logs of it can be compared."""

    class Logging(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss)
            return loss

    rows = make_rows(LENGTHS, prompt=3, unscored=1)
    module = Logging("batch")
    fit(module, [batch_of(pair) for pair in pairs(rows)], accumulate_grad_batches=3)
    losses = [expected_gradients(make_model(), [pair], 0.4)[1] for pair in pairs(rows)]
    assert [logged["mine"] for logged in module.logged] == pytest.approx(losses, rel=1e-4)


def test_an_optimizer_that_reads_the_value_and_evaluates_again():
    class Searching(Mine):
        def __init__(self) -> None:
            super().__init__("batch")
            self.seen: list[tuple[float, Any]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = copy.deepcopy(self.model)
            loss = super().training_step(batch, batch_idx)
            self.seen.append((loss.item(), weights))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=3, line_search_fn="strong_wolfe")

    rows = make_rows(LENGTHS[:4])
    module = Searching()
    fit(module, [batch_of(rows)])
    assert len(module.seen) == len(module.gradients) > 1
    for (value, weights), gradients in zip(module.seen, module.gradients, strict=True):
        expected, loss, _ = expected_gradients(weights, [rows], 0.4)
        assert value == pytest.approx(loss, rel=1e-4)
        assert_gradients(gradients, expected)
    assert module.seen[-1][0] < module.seen[0][0]


@pytest.mark.parametrize("before_the_loss", [True, False])
def test_a_micro_batch_that_returns_none_does_not_count(before_the_loss):
    """The first three of four are skipped: a whole step, and half of one."""

    class Skipping(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx in (0, 1, 2) and before_the_loss:
                return None
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 1, 2) else loss

    rows = make_rows(LENGTHS)
    module = Skipping("batch")
    fit(module, [batch_of(pair) for pair in pairs(rows)], accumulate_grad_batches=2)
    expected, loss, _ = expected_gradients(make_model(), pairs(rows)[3:], 0.4)
    skipped, taken = module.gradients
    assert not skipped and not module.logged[1]
    assert_gradients(taken, expected)
    assert module.logged[-1]["train/loss"] == pytest.approx(loss, rel=1e-4)


def test_a_step_without_a_target_logs_nothing():
    batch = batch_of(make_rows(LENGTHS[:2]))
    batch["targets"].fill_(-100)
    module = Mine("batch")
    fit(module, [batch])
    assert module.logged == [{}]
    assert all(not gradient.any() for gradient in module.gradients[0].values())


def test_another_loss_is_refused():
    class Other(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch["input_ids"]).logits.square().mean()

    with pytest.raises(ValueError, match="did not return what selective_loss gave it"):
        fit(Other("batch"), [batch_of(make_rows(LENGTHS[:2]))])


def test_a_module_that_forgets_super_is_stopped():
    class Forgetful(Mine):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    batches = [batch_of(pair) for pair in pairs(make_rows(LENGTHS[:4]))]
    with pytest.raises(RuntimeError, match="step 0 were not divided: does Forgetful"):
        fit(Forgetful("batch"), batches)


def test_validation_does_not_count_into_the_step():
    class Validating(Mine):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    batches = [batch_of(make_rows(LENGTHS[:2]))]
    with pytest.raises(ValueError, match="selective_loss is for training_step"):
        fit(Validating("batch"), batches, held=batches)


def test_another_term_in_the_loss_is_refused():
    """It would be multiplied by what the gradients are divided by."""

    class WithTerm(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weight: Any = self.model.lm_head.weight
            return super().training_step(batch, batch_idx) + 0.01 * weight.square().sum()

    with pytest.raises(ValueError, match="did not return what selective_loss gave it"):
        fit(WithTerm("batch"), [batch_of(make_rows(LENGTHS[:2]))])


def test_a_fit_that_stopped_within_a_step_leaves_nothing_for_the_next():
    class Stopping(Mine):
        stop = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trainer.should_stop = self.stop
            return super().training_step(batch, batch_idx)

    rows = make_rows(LENGTHS[:4])
    module, batches = Stopping("batch"), [batch_of(pair) for pair in pairs(rows)]
    fit(module, batches, accumulate_grad_batches=2, min_steps=0)
    module.stop = False
    fit(module, batches, accumulate_grad_batches=2)
    expected, _, _ = expected_gradients(make_model(), pairs(rows), 0.4)
    assert_gradients(module.gradients[-1], expected)


def test_all_nan_scores_and_manual_optimization_are_refused():
    with pytest.raises(ValueError, match="all of the step's 12 targets have NaN"):
        fit(Mine("batch"), [batch_of(make_rows(LENGTHS[:2], unscored=100))])
    module = Mine("batch")
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization is False"):
        fit(module, [batch_of(make_rows(LENGTHS[:2]))])


def test_another_signature_is_refused_at_import(monkeypatch):
    monkeypatch.setattr(LightningModule, "on_before_optimizer_step", lambda self, optim: None)
    with pytest.raises(ImportError, match="no parameter optimizer .*made for lightning 2.6"):
        importlib.reload(door)


def train_on_ranks(folder: str) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    module = Mine("sequence")
    batches = [batch_of(pair) for pair in pairs(make_rows(LENGTHS, prompt=2))[rank::2]]
    fields: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    fit(module, batches, accumulate_grad_batches=2, **fields)
    torch.save(module.gradients[0], Path(folder) / f"rank-{rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    run_on_ranks(__file__, tmp_path)
    rows = make_rows(LENGTHS, prompt=2)
    expected, _, _ = expected_gradients(make_model(), [[row] for row in rows], 0.4)
    for rank in (0, 1):
        assert_gradients(torch.load(tmp_path / f"rank-{rank}.pt"), expected)


if __name__ == "__main__":
    train_on_ranks(sys.argv[1])
