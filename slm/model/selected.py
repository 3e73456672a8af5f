"""A backward pass along selected rows alone (after Centrifuge, arXiv 2502.00340).

    with selected_backward(model) as rows:
        hidden = model.base_model(input_ids).last_hidden_state
    out = selective_cross_entropy(hidden, ...)
    rows.select(out.selected)
    out.loss.backward()

In every layer the keys and values of the other positions are constants, so each row of each
gradient that belongs to them is exactly zero. The forward pass is what it was, but that it keeps no
graph: of a layer it keeps the input, what its linear layers gave, and keys and values. The backward
pass runs the layer's own code on the selected rows, with these in place of products, and
differentiates that: norms, activations and products of any architecture see K rows, and their
queries all keys. A layer with activation checkpointing keeps no products: they are computed again,
for K rows.

Tokens must mix in transformers' attention functions and nowhere else: `check_rows` compares.

Letters: B windows, T positions, N = B * T, D width, H heads, K selected rows, W most of a window.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer as Layer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slm.errors import UserError
from slm.model.head import hidden_states

ATTENTIONS = ("sdpa", "eager")
TOLERANCE = 1e-4  # of a layer's largest value: products of fewer rows round otherwise
INSTEAD = "which backward=selected does not compute; backward=exact does"
# Where inputs, weight and bias stand; GPT-2's Conv1D is the other.
PRODUCTS = {F.linear: (0, 1, 2), torch.addmm: (1, 2, 0)}


# ---- the rows -----------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The K rows with a weight in ascending order; padding, up to a capacity, is row N."""

    shape: tuple[int, int]  # B, T
    index: Tensor  # (K,)
    slots: Tensor  # (K,), where a row stands among the windows' queries, B * W
    queries: Tensor  # (B, W), which of the K rows is there; padding: any
    positions: Tensor  # (B, W), of the queries, in 0 .. T - 1

    @property
    def num_rows(self) -> int:  # N
        return self.shape[0] * self.shape[1]

    def take(
        self,
        values: Tensor,  # (N, ...)
    ) -> Tensor:  # (K, ...), any row for padding
        return values.index_select(0, self.index.clamp(max=self.num_rows - 1))

    def gather(self, values: Any) -> Any:
        """(B, T, ...), or (1, T, ...) for all windows, to (1, K, ...); all else as it is."""
        windows, length = self.shape
        shapes = (windows, length), (1, length)
        if not isinstance(values, Tensor) or values.shape[:2] not in shapes:
            return values
        return self.take(values.expand(windows, *values.shape[1:]).flatten(0, 1))[None]

    def gather_gradient(
        self,
        values: Tensor,  # (B, T, ...)
    ) -> Tensor:  # (1, K, ...), zero for padding
        padding = (self.index == self.num_rows).view(1, -1, *[1] * (values.ndim - 2))
        return self.gather(values).masked_fill_(padding, 0)

    def scatter(
        self,
        values: Tensor,  # (1, K, D)
    ) -> Tensor:  # (B, T, D), exactly zero in the other rows
        out = values.new_zeros(self.num_rows + 1, values.shape[2])
        return out.index_copy_(0, self.index, values[0])[: self.num_rows].unflatten(0, self.shape)


def make_rows(
    selected: Tensor,  # (B, T), bool
    capacity: int | None = None,
) -> Rows:
    """Without a `capacity` their number is read back from the device."""
    (windows, length), flat, total = selected.shape, selected.flatten(), selected.numel()
    counted = capacity is None
    count = max(1, int(flat.sum()) if counted else min(capacity, total))  # type: ignore[type-var]
    longest = max(1, int(selected.sum(1).max())) if counted else min(count, length)
    numbers = torch.arange(total, device=flat.device)
    place = torch.where(flat, flat.cumsum(0) - 1, count).clamp(max=count)
    index = numbers.new_full((count + 1,), total).scatter_(0, place, numbers)[:count]
    rank = F.pad((selected.cumsum(1) - 1).flatten(), (0, 1))[index]
    slots = torch.where(index < total, index // length * longest + rank, windows * longest)
    queries = numbers.new_zeros(windows * longest + 1).scatter_(0, slots, numbers[:count])
    queries, slots = queries[:-1].view(windows, longest), slots.clamp(max=windows * longest - 1)
    positions = (index.clamp(max=total - 1) % length)[queries]
    return Rows((windows, length), index, slots, queries, positions)


class Selected:
    """The rows of one forward pass, which are known when it has ended."""

    rows: Rows | None = None

    def select(
        self,
        selected: Tensor,  # (B, T), bool, or weights
        capacity: int | None = None,
    ) -> None:
        """`capacity`: most rows there can be, so that nothing is read back from the device."""
        self.rows = make_rows(selected != 0, capacity)


@contextmanager
def selected_backward(model: PreTrainedModel) -> Iterator[Selected]:
    """Around a forward pass with gradients; say `select` before its backward pass."""
    selected = Selected()

    def run(layer: Layer, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tape = _Tape(layer, args, kwargs, keeps=not layer.gradient_checkpointing)
        return _Replayed.apply(tape, selected, hidden, *tape.weights)

    with through(model, run):
        yield selected


@contextmanager
def through(model: PreTrainedModel, run: Callable[..., Tensor]) -> Iterator[None]:
    """`run(layer, hidden, ...)` in place of each layer's forward."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        if "forward" in vars(layer):
            raise UserError(f"the forward of {type(layer).__name__} is replaced, {INSTEAD}")
        layer.forward = partial(run, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# ---- a layer ------------------------------------------------------------------------------------


class _Replayed(Function):
    @staticmethod
    def forward(ctx: Any, tape: "_Tape", selected: Selected, hidden: Tensor, *weights: Tensor):
        out = tape.record(hidden)
        ctx.tape, ctx.selected = tape, selected
        ctx.save_for_backward(hidden, *tape.saved)
        tape.saved = []
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # (B, T, D)
        rows, (hidden, *saved) = ctx.selected.rows, ctx.saved_tensors
        if rows is None:
            raise UserError("no rows: say select(...) between the forward and the backward pass")
        mine = rows.gather(hidden).requires_grad_()
        with torch.enable_grad():
            out = ctx.tape.replay(mine.view_as(mine), rows, saved)  # no leaf: hooks refuse one
        wanted, gradient = [mine, *ctx.tape.weights], rows.gather_gradient(gradients[0])
        found = torch.autograd.grad(out, wanted, gradient, allow_unused=True)
        return None, None, rows.scatter(found[0]), *found[1:]


class _Tape(TorchFunctionMode):
    """One run of a layer on all rows, and what of it is kept for the same on K of them."""

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], keeps: bool):
        super().__init__()
        # A cache would grow in the second run; none is read in training.
        self.inputs = (
            tuple(None if isinstance(value, Cache) else value for value in args),
            {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()},
        )
        self.layer, self.keeps = layer, keeps
        self.weights = [weight for weight in layer.parameters() if weight.requires_grad]
        self.name = type(layer).__name__
        self.saved: list[Tensor] = []
        self.products: dict[int, list[int]] = {}  # by the weight's id: places in `saved`
        self.attentions: list[tuple[int, Tensor | None]] = []  # place of the keys, mask
        self.rows: Rows | None = None  # in the second run

    def record(
        self,
        hidden: Tensor,  # (B, T, D)
    ) -> Tensor:  # (B, T, D)
        leaves = tree_leaves(self.inputs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise UserError(f"{self.name} has one more input with a gradient, {INSTEAD}")
        self.count, device = hidden[..., 0].numel(), hidden.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
        out = self._run(hidden, self.inputs)
        if not isinstance(out, Tensor):
            raise UserError(f"{self.name} gives more than hidden states, {INSTEAD}")
        return out

    def replay(
        self,
        hidden: Tensor,  # (1, K, D)
        rows: Rows,
        saved: list[Tensor],
    ) -> Tensor:  # (1, K, D)
        self.rows, self.saved = rows, saved
        self.waiting = {key: iter(places) for key, places in self.products.items()}
        self.waiting_attentions = iter(self.attentions)
        try:
            with self.autocast():
                return self._run(hidden, tree_map(rows.gather, self.inputs))
        finally:
            self.rows, self.saved = None, []

    def _run(self, hidden: Tensor, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = inputs
        layer: Any = self.layer
        checkpoints, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        try:
            with attention_through(self._attention), self:
                return type(layer).forward(layer, hidden, *args, **kwargs)
        finally:
            layer.gradient_checkpointing = checkpoints

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            check_dropout(self.name, given["p"], given["training"])
        if func not in PRODUCTS or kwargs:
            return func(*args, **kwargs)
        operands: Any = ((*args, None)[place] for place in PRODUCTS[func])
        inputs, weight, bias = operands
        if self.rows is None:
            out = func(*args)
            # Else of some rows, as an expert of a mixture: computed again.
            if self.keeps and isinstance(weight, nn.Parameter) and rows_of(inputs) == self.count:
                self.products.setdefault(id(weight), []).append(len(self.saved))
                self.saved.append(out)
            return out
        if id(weight) not in self.waiting:
            return func(*args)
        kept = self.saved[next(self.waiting[id(weight)])]
        known = self.rows.take(kept.flatten(0, -2)).view(*inputs.shape[:-1], -1)
        return _Product.apply(inputs, weight if func is F.linear else weight.T, bias, known)

    def _attention(
        self,
        own: Callable[..., Any],
        module: nn.Module,
        query: Tensor,  # (B, H, T, D / H), then (1, H, K, D / H)
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # (B, T, H, D / H), then (1, K, H, D / H)
        check_dropout(self.name, dropout, module.training)
        if self.rows is None:
            self.attentions.append((len(self.saved), mask))
            self.saved += [key, value]
            return own(module, query, key, value, mask, **kwargs)
        (place, mask), rows = next(self.waiting_attentions), self.rows
        keys = _Context.apply(key, self.saved[place], rows)
        values = _Context.apply(value, self.saved[place + 1], rows)
        asked = query[0][:, rows.queries].transpose(0, 1)  # (B, H, W, D / H)
        out, _ = own(module, asked, keys, values, seen(mask, rows), **kwargs)
        return out.flatten(0, 1).index_select(0, rows.slots)[None], None


def rows_of(values: Tensor) -> int:
    return values.numel() // values.shape[-1]


def seen(
    mask: Tensor | None,  # (1 or B, 1 or H, T, T); None: causal
    rows: Rows,
) -> Tensor:  # (B, 1 or H, W, T)
    positions, (windows, length) = rows.positions, rows.shape
    if mask is None:
        return torch.arange(length, device=positions.device) <= positions[:, None, :, None]
    index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, length)
    return mask.expand(windows, -1, -1, -1).gather(2, index)


@contextmanager
def attention_through(function: Callable[..., Any]) -> Iterator[None]:
    """`function(own, ...)` in place of each attention function `own` of transformers."""
    registry: Any = ALL_ATTENTION_FUNCTIONS
    found = registry.get_interface

    def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, found(name, default))

    registry.get_interface = get_interface
    try:
        yield
    finally:
        registry.get_interface = found


class _Product(Function):
    """inputs @ weight.T + bias, which is known."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor):
        ctx.save_for_backward(inputs, weight)
        return known

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inputs, weight = (operand.to(gradient.dtype) for operand in ctx.saved_tensors)
        wants_inputs, wants_weight, wants_bias, _ = ctx.needs_input_grad
        by_row = gradient.flatten(0, -2)
        return (
            gradient @ weight if wants_inputs else None,
            by_row.T @ inputs.flatten(0, -2) if wants_weight else None,
            by_row.sum(0) if wants_bias else None,
            None,
        )


class _Context(Function):
    """Keys or values of all positions, of which those of the selected rows get a gradient."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, every: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return every.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # (B, H, T, D / H)
        return ctx.rows.gather_gradient(gradients[0].transpose(1, 2)).transpose(1, 2), None, None


# ---- what is refused ----------------------------------------------------------------------------


def check_dropout(name: str, probability: float, training: bool) -> None:
    if training and probability:
        raise UserError(f"{name} has a dropout of {probability}, {INSTEAD}")


@torch.no_grad()
def check_rows(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model in training mode whose layers give other values for every other row alone."""
    attention = model.config._attn_implementation
    if attention not in ATTENTIONS:
        raise UserError(f"{type(model).__name__} has attn_implementation={attention}, {INSTEAD}")
    compared = []

    def compare(layer: Layer, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ids = torch.arange(rows_of(hidden), device=hidden.device).view(hidden.shape[:2])
        rows = make_rows(ids % 2 == 0)
        for keeps in (True, False):
            tape = _Tape(layer, args, kwargs, keeps)
            out = tape.record(hidden)
            again = tape.replay(rows.gather(hidden), rows, tape.saved)
            if not (again - rows.gather(out)).abs().max() <= TOLERANCE * out.abs().max():
                raise UserError(f"tokens of {tape.name} mix outside of attention, {INSTEAD}")
        compared.append(layer)
        return out

    with through(model, compare):
        hidden_states(model, batch)
    if not compared:
        raise UserError(f"{type(model).__name__} has no layers that are known, {INSTEAD}")
