"""The loss of the adapters against float64; what a step divides by, against counting by hand."""

import ast
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from door_helpers import ROOT, expected_gradients, gradients_of, make_model, make_rows, top
from slm.errors import UserError
from slm.integrations.loss import SelectiveLoss, shifted
from slm.model.head import head_arguments
from slm.selection import (
    All,
    Entropy,
    Excess,
    Forget,
    Intersection,
    LongGain,
    Loss,
    Middle,
    Mixture,
    Overconfident,
    Probability,
    Random,
    ReferenceEntropy,
    ReferenceLoss,
    Relu,
    Selection,
    Sigmoid,
    Softmax,
    Union,
)
from slm.selection.registry import RULES, word_of

NAN = float("nan")
INTEGRATIONS = ROOT / "slm" / "integrations"


def batch_of(lengths: list[int], **fields: int):
    """One row for each length, padded at the right."""
    rows = make_rows(lengths, **fields)  # type: ignore
    longest = max(lengths)

    def padded(name: str, value: float) -> torch.Tensor:
        return torch.tensor([r[name] + [value] * (longest - len(r["input_ids"])) for r in rows])

    return rows, padded("input_ids", 0), padded("labels", -100), padded("reference_logprob", NAN)


def test_entries_move_to_the_position_that_predicts_them():
    labels, scores = torch.tensor([[5, 6, -100]]), torch.tensor([[NAN, -1.0, -2.0]])
    targets, columns = shifted(labels, {"reference_logprob": scores, "window": labels})
    assert targets.tolist() == [[6, -100, -100]] and list(columns) == ["reference_logprob"]
    expected = torch.tensor([[-1.0, -2.0, NAN]])
    torch.testing.assert_close(columns["reference_logprob"], expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), the labels have \(1, 3\)"):
        shifted(labels, {"reference_logprob": scores[:, :2]})


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_gradients_are_those_of_the_definition(scope):
    rows, ids, labels, scores = batch_of([9, 5, 12], prompt=2, unscored=1)
    model = make_model()
    groups = [[row] for row in rows] if scope == "sequence" else [rows]
    expected, loss, count = expected_gradients(model, groups, 0.4)
    one = SelectiveLoss(0.4, scope)
    targets, moved = shifted(labels, {"reference_logprob": scores})
    divisor = one.denominator([(targets, moved)], lambda counts: counts)
    out = one(model.model(ids).last_hidden_state, head_arguments(model), targets, moved, divisor)
    out.loss.backward()
    assert divisor == count == out.selected.sum()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-4, atol=1e-6)


def test_a_step_of_several_micro_batches_and_ranks_has_one_denominator():
    """Half of 3, 5 and 2, 2 candidates: 2 + 3 and 1 + 1, K rounding up at one half; two ranks."""
    t = torch.tensor
    scores = t([[-1.0, -1.0, -1.0, -1.0, NAN, NAN]]), t([[-1.0, -1.0, -1.0], [-1.0, -1.0, NAN]])
    first, second = ({"reference_logprob": values} for values in scores)
    step = [(t([[1, 2, 3, -100, 4, -100]]), first), (t([[1, 2, 3], [4, 5, -100]]), second)]

    def num(scope: str) -> int:
        return int(SelectiveLoss(0.5, scope).denominator(step, lambda n: 2 * n))

    assert num("batch") == 2 * (2 + 3)
    assert num("sequence") == 2 * (2 + 2 + 1)
    assert num("global") == 3 + 5  # of 6 and of 10


def test_random_draws_as_many_candidates_without_looking_at_losses():
    _, ids, labels, scores = batch_of([9, 5, 12], prompt=2, unscored=3)
    model, one = make_model(), SelectiveLoss(0.4, "sequence", "random")
    targets, moved = shifted(labels, {"reference_logprob": scores})
    hidden, drawn = model.model(ids).last_hidden_state.detach(), []
    candidates = (targets != -100) & ~moved["reference_logprob"].isnan()
    for seed in range(200):
        torch.manual_seed(seed)
        drawn.append(one(hidden, head_arguments(model), targets, moved, 1.0).selected)
    counts = torch.stack(drawn).sum(0)
    expected = [top(torch.zeros(int(row.sum())), 0.4).sum().item() for row in candidates]
    assert all(one.sum(-1).tolist() == expected for one in drawn)
    assert (counts[~candidates] == 0).all() and (counts[candidates] > 30).all()


def test_nothing_to_select_is_zero_with_zero_gradients():
    _, ids, labels, scores = batch_of([4, 4])
    model, one = make_model(), SelectiveLoss(0.4)
    targets, moved = shifted(labels, {"reference_logprob": torch.full_like(scores, NAN)})
    divisor = one.denominator([(targets, moved)], lambda counts: counts)
    hidden = model.model(ids).last_hidden_state
    one(hidden, head_arguments(model), targets, moved, divisor).loss.backward()
    assert divisor == 0 and all((g == 0).all() for g in gradients_of(model).values())


def test_probabilities_and_positive_numbers_are_no_scores():
    for wrong in (0.25, -float("inf")):
        scores = {"reference_logprob": torch.tensor([[-1.0, wrong]])}
        message = f"reference_logprob: a finite number <= 0 is needed, .* the first {wrong}"
        with pytest.raises(ValueError, match=message):
            SelectiveLoss(0.5).denominator([(torch.tensor([[1, 2]]), scores)], lambda n: n)


# ---- every rule ---------------------------------------------------------------------------------

TEMPERATURE = 0.7


def kept(scores: list[float], ratio: float) -> list[bool]:
    """The K highest; ties to the first."""
    return top(torch.tensor(scores, dtype=torch.float64), ratio).tolist() if scores else []


def middle(losses: list[float], ratio: float) -> list[bool]:
    low = kept([-loss for loss in losses], (1 + ratio) / 2)
    rest = [loss if is_low else NAN for loss, is_low in zip(losses, low, strict=True)]
    return kept(rest, 2 * ratio / (1 + ratio))


def overconfident(losses: list[float], reference: list[float], own: list[float]) -> list[bool]:
    sure = kept([-value for value in own], 0.6)
    excess = excesses(losses, reference)
    return kept([one if is_sure else NAN for one, is_sure in zip(excess, sure, strict=True)], 0.5)


def softmax(excess: list[float], cap: float) -> list[float]:
    exps = [math.exp(value / TEMPERATURE) for value in excess]
    return [min(cap, len(exps) * value / sum(exps)) for value in exps]


# Of the candidates of one ranking: losses, reference losses, entropies (the model's own where the
# rule wants those, or a domain's losses, else the reference's) -> weights.
Weights = Callable[[list[float], list[float], list[float]], Sequence[float]]


def excesses(losses: list[float], reference: list[float]) -> list[float]:
    return [one - other for one, other in zip(losses, reference, strict=True)]


def over(excess: list[float], weight: Callable[[float], float]) -> list[float]:
    return [weight(value / TEMPERATURE) for value in excess]


DEFINITIONS: dict[str, tuple[Selection, Weights]] = {
    "all": (All(), lambda loss, ref, ent: [1] * len(loss)),
    "excess": (Excess(0.4), lambda loss, ref, ent: kept(excesses(loss, ref), 0.4)),
    "rows": (Excess(0.4, "sequence"), lambda loss, ref, ent: kept(excesses(loss, ref), 0.4)),
    "loss": (Loss(0.4), lambda loss, ref, ent: kept(loss, 0.4)),
    "reference_loss": (ReferenceLoss(0.4), lambda loss, ref, ent: kept([-v for v in ref], 0.4)),
    "reference_entropy": (
        ReferenceEntropy(0.4),
        lambda loss, ref, ent: kept([-v for v in ent], 0.4),
    ),
    "middle": (Middle(0.4), lambda loss, ref, ent: middle(loss, 0.4)),
    "mixture": (
        Mixture(0.4, clm_weight=0.3),
        lambda loss, ref, ent: [0.12 + 0.7 * one for one in kept(excesses(loss, ref), 0.4)],
    ),
    "entropy": (Entropy(0.4), lambda loss, ref, ent: kept(ent, 0.4)),
    "overconfident": (Overconfident(0.3, low_entropy=0.6), overconfident),
    "long_gain": (LongGain(0.4), lambda loss, ref, ent: kept(excesses(ref, loss), 0.4)),
    "forget": (
        Forget(0.4, smooth=0),
        lambda loss, ref, domain: kept(excesses(domain, ref), 0.4),
    ),
    "probability": (Probability(0.7), lambda loss, ref, ent: [math.exp(-0.7 * v) for v in loss]),
    "sigmoid": (
        Sigmoid(TEMPERATURE),
        lambda loss, ref, ent: over(excesses(loss, ref), lambda x: 1 / (1 + math.exp(-x))),
    ),
    "relu": (
        Relu(TEMPERATURE, cap=2.0),
        lambda loss, ref, ent: over(excesses(loss, ref), lambda x: min(max(x, 0.0), 2.0)),
    ),
    "softmax": (
        Softmax(TEMPERATURE, cap=3.0),
        lambda loss, ref, ent: softmax(excesses(loss, ref), 3.0),
    ),
}


def micro_batch(seed: int, weighted: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of unequal length, a prompt, tokens without a score and an entropy of each."""
    _, ids, labels, scores = batch_of([9, 12], prompt=2, unscored=2, seed=seed)
    entropy = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    columns = {"reference_logprob": scores, "reference_entropy": entropy}
    columns["domain_logprob"] = scores - entropy
    if weighted:
        columns["token_weight"] = (4 * entropy).floor().masked_fill(scores.isnan(), NAN)
    targets, moved = shifted(labels, columns)
    return {"input_ids": ids, "targets": targets, **moved}


def fp64_loss(model: Any, step: list[Any], rule: Selection, weights: Weights) -> torch.Tensor:
    """Sum of weight * loss over rankings, micro-batches and tokens, divided once."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for batch in step:
        logits = model(batch["input_ids"]).logits
        losses = F.cross_entropy(logits.mT, batch["targets"], reduction="none")
        live = (batch["targets"] != -100) & ~batch["reference_logprob"].isnan()
        own = torch.special.entr(logits.softmax(-1)).sum(-1)
        entropies = own if rule.needs_entropy else batch["reference_entropy"]
        if "domain_logprob" in rule.needs:
            entropies = -batch["domain_logprob"]
        times = (
            batch["token_weight"].double() if "token_weight" in batch else torch.ones(live.shape)
        )
        live &= times != 0
        rows = [[row] for row in range(len(live))] if rule.scope == "sequence" else [[0, 1]]
        for ranking in rows:
            mine = live[ranking]
            given = losses[ranking][mine]
            reference = -batch["reference_logprob"][ranking][mine].double()
            entropy = entropies[ranking][mine].double()
            weight = weights(given.tolist(), reference.tolist(), entropy.tolist())
            weighted = torch.tensor(weight, dtype=torch.float64) * times[ranking][mine]
            total = total + (weighted * given).sum()
            is_soft = rule.divides_by == "valid"
            count += len(weight) if is_soft else sum(one > 0.12001 for one in weight)
    return total / count


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("from_logits", "weighted"), [(0, 0), (1, 0), (0, 1)])
def test_losses_after_updates_are_those_of_the_rule(name, from_logits, weighted):
    """Two steps of two micro-batches, SGD; the losses show that the gradients were right."""
    rule, weights = DEFINITIONS[name]
    loss = SelectiveLoss(selection=rule)
    model = make_model()
    exact = copy.deepcopy(model).double()
    for seeds in ((1, 2), (3, 4)) * 2:
        step = [micro_batch(seed, bool(weighted)) for seed in seeds]
        pairs = [(batch["targets"], batch) for batch in step]
        divisor, total = loss.denominator(pairs, lambda counts: counts), 0.0
        for batch in step:
            hidden = model.model(batch["input_ids"]).last_hidden_state
            if from_logits:
                logits = model.lm_head(hidden)
                out = loss.of_logits(logits, batch["targets"], batch, divisor)
            else:
                out = loss(hidden, head_arguments(model), batch["targets"], batch, divisor)
            out.loss.backward()
            total += out.loss.item()
        wanted = fp64_loss(exact, step, rule, weights)
        wanted.backward()
        assert total == pytest.approx(wanted.item(), rel=2e-5)
        for one in (model, exact):
            with torch.no_grad():
                for parameter in one.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.2 * parameter.grad
            one.zero_grad()


def test_random_draws_what_the_trainer_draws_where_windows_have_numbers():
    rule, batch = Random(0.4, seed=5), micro_batch(1)
    numbers = {"window": torch.tensor([7, 9]), "epoch": torch.tensor([1, 1])}
    live = batch["targets"].masked_fill(batch["reference_logprob"].isnan(), -100)
    expected = rule.choose({"targets": live, **numbers}, None, 0).selected
    model, loss = make_model(), SelectiveLoss(selection=rule)
    hidden = model.model(batch["input_ids"]).last_hidden_state
    head = head_arguments(model)
    out = loss(hidden, head, batch["targets"], {**batch, **numbers}, 1.0)
    assert torch.equal(out.selected, expected)
    drawn = loss(hidden, head, batch["targets"], batch, 1.0)
    assert not torch.equal(drawn.selected, expected)
    assert drawn.divisor == out.divisor == expected.sum()


def test_a_schedule_is_followed_by_tokens_seen():
    ratio = {"shape": "step", "points": [[0, 1.0], [100, 0.25]]}
    loss, batch = SelectiveLoss(ratio), micro_batch(1)
    pairs = [(batch["targets"], batch)]
    live = int(((batch["targets"] != -100) & ~batch["reference_logprob"].isnan()).sum())
    assert [int(loss.denominator(pairs, lambda n: n, seen)) for seen in (0, 99, 100)] == [
        live, live, int(live / 4 + 0.5),
    ]  # fmt: skip
    loss.check_step("anybody", knows_tokens=True)
    with pytest.raises(ValueError, match="follows the tokens seen, which nobody does not count"):
        loss.check_step("nobody")


@pytest.mark.parametrize("rule", [Intersection(0.5, 0.5), Union(0.5, 0.5)])
def test_rules_that_have_to_choose_first_say_so(rule):
    message = f"{type(rule).__name__} has to choose before .*, and it divides before: X cannot"
    with pytest.raises(ValueError, match=message):
        SelectiveLoss(selection=rule).check_step("X", divides="it divides before")
    SelectiveLoss(selection=rule).check_step("who divides after that")


def test_inputs_cannot_be_replaced_after_the_forward_pass():
    with pytest.raises(ValueError, match="replaces inputs before the forward pass, .*mode='mask'"):
        SelectiveLoss(selection=Forget(0.5, mode="replace"))


def test_a_rule_is_given_one_way():
    assert SelectiveLoss(0.6).rule == Excess(0.6)
    assert SelectiveLoss(0.6, "sequence", "random").rule == Random(0.6, "sequence", seed=0)
    assert SelectiveLoss(0.6, selection="middle").rule == Middle(0.6)
    as_written = {"rule": "sigmoid", "temperature": 2.0}
    assert SelectiveLoss(selection=as_written).rule == Sigmoid(2.0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"select_ratio": 0.6, "selection": Sigmoid(1.0)}, "select_ratio is 0.6, but Sigmoid"),
        ({"scope": "batch", "selection": Excess(0.6)}, "scope is 'batch', but Excess"),
        ({}, "select_ratio is null"),
        ({"select_ratio": 0.6, "selection": ReferenceLoss(max_loss=1.0)}, "but ReferenceLoss"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            SelectiveLoss(**fields)


def test_a_rule_without_its_column_is_refused():
    batch = micro_batch(1)
    one = {"reference_logprob": batch["reference_logprob"]}
    with pytest.raises(ValueError, match="ReferenceEntropy needs reference_entropy, the batch has"):
        SelectiveLoss(selection=ReferenceEntropy(0.4)).candidates(batch["targets"], one)
    found = SelectiveLoss(selection=Loss(0.4)).candidates(batch["targets"], {})
    assert torch.equal(found["targets"], batch["targets"])


# ---- the table of the README --------------------------------------------------------------------


def calls_of_check_step(door: str) -> list[ast.expr]:
    """The arguments of a door's own call; trl and axolotl have the one of transformers."""
    code = (INTEGRATIONS / f"{door}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "check_step":
                return node.args
    assert "SelectiveTrainerMixin" in code, door
    return calls_of_check_step("transformers")


def test_the_readme_says_which_rule_reaches_which_door():
    lines = (INTEGRATIONS / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = next(i for i, row in enumerate(cells) if row[0] == "rule")
    doors, known, last, bound, schedule = cells[head][1:], *cells[head + 2 : head + 6]
    assert {*known[0].split(", "), *last[0].split(", ")} == set(RULES) and schedule[0][0] == "s"
    bounded = ReferenceLoss(max_loss=0.916)
    examples = {word_of(type(rule).__name__): rule for rule, _ in DEFINITIONS.values()}
    examples |= {"random": Random(0.4, seed=0), "union": Union(0.5, 0.5)}
    examples["intersection"] = Intersection(0.5, 0.5)
    for door, moves in zip(doors, schedule[1:], strict=True):
        given = calls_of_check_step(door)
        assert moves == ("yes" if len(given) > 1 else "no"), door
        says = refuses(bounded, divides=len(given) > 2)
        assert bound[1 + doors.index(door)] == ("no" if says else "yes"), door
        for row in (known, last):
            for word in row[0].split(", "):
                says = refuses(examples[word], divides=len(given) > 2)
                assert row[1 + doors.index(door)] == ("no" if says else "yes"), (door, word)


def refuses(rule: Selection, divides: bool) -> bool:
    try:
        SelectiveLoss(selection=rule).check_step("x", divides="y" if divides else "")
    except ValueError:
        return True
    return False


def test_a_word_gets_what_its_rule_takes_and_no_more():
    assert SelectiveLoss(None, None, "all").rule == All()
    assert SelectiveLoss(0.6, None, "random").rule == Random(select_ratio=0.6, seed=0)
    with pytest.raises(ValueError, match=r"select_ratio is 0.6, but all has none: leave it out"):
        SelectiveLoss(0.6, None, "all")
    with pytest.raises(UserError, match="rule sigmoid .* 'temperature'"):
        SelectiveLoss(None, None, "sigmoid")
