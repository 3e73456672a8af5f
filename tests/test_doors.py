"""The examples under experiments/doors run as they stand, and their losses fall."""

import sys

import pytest
import torch

import warm
from door_helpers import ROOT, assert_loss_falls, losses_of, run_python
from slm_kernels import selective_cross_entropy

DOORS = ROOT / "experiments" / "doors"
EXAMPLES = sorted(path.stem for path in DOORS.glob("*.py") if path.stem != "stand_in")
PRINTS_SCORES = {"score_own_dataset"}
RUNS_WITH_ITS_IMPORTS = {"axolotl_run"}  # in tests/integrations/test_axolotl.py
OWN_TRAINER = {"litgpt_loop", "torchtitan_loss"}  # installed beside us
FALLS_FAST = {"transformers_trainer", "trl_dpo", "trl_sft"}  # within half of its steps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in RUNS_WITH_ITS_IMPORTS])
def test_example_runs_and_its_loss_falls(name):
    words = ["-W", "ignore", str(DOORS / f"{name}.py"), *(["10"] if name in FALLS_FAST else [])]
    output = run_python(*words, doors=name in OWN_TRAINER)
    if name not in PRINTS_SCORES:
        assert_loss_falls(output)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short(name):
    assert len((DOORS / f"{name}.py").read_text().splitlines()) < 60


def expected_losses(steps: int, per_step: int) -> list[float]:
    """Of a loop that sees all processes' micro-batches of a step, by the definition."""
    sys.path.insert(0, str(DOORS))
    import stand_in

    model, losses = stand_in.model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    micro_batches = stand_in.batches(per_step * steps, rows=4, length=64)
    kept = int(0.6 * 4 * 64 + 0.5)
    for step in range(steps):
        total = 0.0
        for batch in micro_batches[per_step * step : per_step * (step + 1)]:
            out = selective_cross_entropy(
                model.model(batch["input_ids"]).last_hidden_state,
                model.lm_head.weight,
                batch["targets"],
                -batch["reference_logprob"],
                select_ratio=0.6,
                denominator=per_step * kept,
                implementation="reference",
            )
            out.loss.backward()
            total += out.loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_takes_the_steps_of_one_process(processes):
    """Losses after an update say that the gradients were right; SGD shows their scale as well."""
    example = [sys.executable, "-W", "ignore", DOORS / "accelerate_loop.py", "5"]
    codes, output = warm.run_ranks(processes, example)
    assert codes == [0] * processes, output
    found = losses_of(output)
    assert found == pytest.approx(expected_losses(5, 2 * processes), abs=2e-3)


def test_plain_torch_takes_the_steps_of_the_definition():
    found = losses_of(run_python("-W", "ignore", str(DOORS / "plain_torch.py"), "5"))
    assert found == pytest.approx(expected_losses(5, 2), abs=2e-3)
