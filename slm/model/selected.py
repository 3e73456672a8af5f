"""A backward pass along selected rows alone (after Centrifuge, arXiv 2502.00340).

    with selected_backward(model) as rows:
        hidden = model.base_model(input_ids).last_hidden_state
    out = selective_cross_entropy(hidden, ...)
    rows.select(out.selected)
    out.loss.backward()

In every layer the keys and values of the other positions are constants, so each row of each
gradient that belongs to them is exactly zero. The forward pass is what it was, but that it keeps no
graph: of a layer it keeps the input, what its linear layers and attention gave, and keys and
values. The backward pass runs the layer's own code on the selected rows, with these in place of
products, and differentiates that: norms, activations and products of any architecture see K rows,
and their queries all keys. A layer with activation checkpointing keeps its input alone: products
are computed again, for K rows, and keys and values, for all, unless these fit into
`keys_cache_bytes`. What dropout left out is drawn again.

Tokens must mix in transformers' attention functions and nowhere else: `check_rows` compares.

Letters: B windows, T positions, N = B * T, D width, H heads, K selected rows, W most of a window.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer as Layer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slm.errors import UserError
from slm.model.attention import Attended, attend, attention_through
from slm.model.head import hidden_states
from slm.model.rows import Rows, make_rows, seen

ATTENTIONS = ("sdpa", "eager")
TOLERANCE = 1e-4  # of a layer's largest value: products of fewer rows round otherwise
INSTEAD = "which backward=selected does not compute; backward=exact does"
# Where inputs, weight and bias stand; GPT-2's Conv1D is the other.
PRODUCTS = {F.linear: (0, 1, 2), torch.addmm: (1, 2, 0)}


# ---- a forward pass ------------------------------------------------------------------------------


class Selected:
    """The rows of one forward pass, which are known when it has ended."""

    def __init__(self, keys_cache_bytes: int = 0):
        self.rows: Rows | None = None
        self.room = keys_cache_bytes

    def take(self, keys: list[Tensor]) -> bool:
        """Whether there is room to keep them; views count as the whole that they are of."""
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in keys}
        size = sum(storage.nbytes() for storage in storages.values())
        if size > self.room:
            return False
        self.room -= size
        return True

    def select(
        self,
        selected: Tensor,  # (B, T), bool, or weights
        capacity: int | None = None,
    ) -> None:
        """`capacity`: most rows there can be, so that nothing is read back from the device."""
        self.rows = make_rows(selected != 0, capacity)


@contextmanager
def selected_backward(model: PreTrainedModel, keys_cache_bytes: int = 0) -> Iterator[Selected]:
    """Around a forward pass with gradients; say `select` before its backward pass.

    keys_cache_bytes: memory for keys and values of layers with activation checkpointing, which are
                      else computed again
    """
    selected = Selected(keys_cache_bytes)

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
        keys = tape.keys if tape.keeps or selected.take(tape.keys) else []
        ctx.save_for_backward(hidden, *tape.saved, *keys)
        tape.saved, tape.keys = [], []
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # (B, T, D)
        tape, rows, (hidden, *saved) = ctx.tape, ctx.selected.rows, ctx.saved_tensors
        if rows is None:
            raise UserError("no rows: say select(...) between the forward and the backward pass")
        products, keys = saved[: tape.num_products], saved[tape.num_products :]
        keys = keys or tape.keys_again(hidden)
        mine = rows.gather(hidden).requires_grad_()
        with torch.enable_grad():  # no leaf: hooks refuse one
            out = tape.replay(mine.view_as(mine), rows, products, keys)
        wanted, gradient = [mine, *tape.weights], rows.gather_gradient(gradients[0])
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
        self.num_products = 0
        self.keys: list[Tensor] = []  # and values, by turns
        self.masks: list[Tensor | None] = []  # of each attention
        self.attended: list[int | None] = []  # place of what was found, where it was kept
        self.dropouts: list[Noise] = []
        self.recorded = False
        self.rows: Rows | None = None  # in the run on these

    def record(
        self,
        hidden: Tensor,  # (B, T, D)
    ) -> Tensor:  # (B, T, D)
        leaves = tree_leaves(self.inputs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise UserError(f"{self.name} has one more input with a gradient, {INSTEAD}")
        self.shape, device = hidden.shape[:2], hidden.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
        out = self._run(hidden, self.inputs)
        if not isinstance(out, Tensor):
            raise UserError(f"{self.name} gives more than hidden states, {INSTEAD}")
        self.recorded, self.num_products = True, len(self.saved)
        return out

    @torch.no_grad()
    def keys_again(
        self,
        hidden: Tensor,  # (B, T, D)
    ) -> list[Tensor]:
        self.keys, self.waiting_dropouts = [], iter(self.dropouts)
        try:
            with self.autocast():
                self._run(hidden, self.inputs)
        except _AllKeys:
            pass
        keys, self.keys = self.keys, []
        return keys

    def replay(
        self,
        hidden: Tensor,  # (1, K, D)
        rows: Rows,
        products: list[Tensor],
        keys: list[Tensor],
    ) -> Tensor:  # (1, K, D)
        self.rows, self.saved = rows, products
        self.waiting = {key: iter(places) for key, places in self.products.items()}
        self.waiting_keys, self.waiting_masks = iter(keys), iter(self.masks)
        self.waiting_attended = iter(self.attended)
        self.waiting_dropouts = iter(self.dropouts)
        try:
            with self.autocast():
                return self._run(hidden, tree_map(rows.gather, self.inputs))
        finally:
            self.rows, self.saved, self.waiting_keys = None, [], iter([])

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
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func not in PRODUCTS or kwargs:
            return func(*args, **kwargs)
        operands: Any = ((*args, None)[place] for place in PRODUCTS[func])
        inputs, weight, bias = operands
        if self.rows is None:
            out = func(*args)
            # Else of some rows, as an expert of a mixture: computed again.
            every = rows_of(inputs) == self.shape.numel()
            if self.keeps and isinstance(weight, nn.Parameter) and every:
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
        if dropout and module.training and own is ALL_ATTENTION_FUNCTIONS["sdpa"]:
            advice = f"{INSTEAD}, and so does attn_implementation=eager"
            raise UserError(f"{self.name} has a dropout of {dropout} within sdpa, {advice}")
        if self.rows is None:
            self.keys += [key, value]
            if not self.recorded:
                self.masks.append(mask)
            elif len(self.keys) == 2 * len(self.masks):
                raise _AllKeys
            return own(module, query, key, value, mask, dropout=dropout, **kwargs)
        rows, mask = self.rows, next(self.waiting_masks)
        keys = _Context.apply(key, next(self.waiting_keys), rows)
        values = _Context.apply(value, next(self.waiting_keys), rows)
        asked = query[0][:, rows.queries].transpose(0, 1)  # (B, H, W, D / H)
        out, _ = own(module, asked, keys, values, seen(mask, rows), dropout=dropout, **kwargs)
        return out.flatten(0, 1).index_select(0, rows.slots)[None], None

    def _attend(
        self,
        query: Tensor,  # (B, H, T, D / H), then (B, H, W, D / H)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        operands = query, key, value, attn_mask
        if self.rows is None:
            found = attend(*operands, **options) if self.keeps else None
            self.attended.append(len(self.saved) if found else None)
            self.saved += found or ()
            return found[0] if found else F.scaled_dot_product_attention(*operands, **options)
        place = next(self.waiting_attended)
        if place is None or query.shape[1] != self.saved[place].shape[1]:
            return F.scaled_dot_product_attention(*operands, **options)
        return Attended.apply(*operands, options["scale"], self.rows, *self.saved[place:][:2])

    def _dropout(
        self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not (training and p):
            return F.dropout(values, p, training, inplace)
        if self.recorded:
            noise = next(self.waiting_dropouts).again(values.device)
            if self.rows is None:
                return values * noise
            if noise.ndim == 4:
                return values * seen(noise, self.rows)
            return values * self.rows.take(noise.flatten(0, -2)).view_as(values)
        attends = values.ndim == 4 and values.shape[::2] == self.shape  # (B, H, T, T)
        if not attends and (values.ndim > 3 or rows_of(values) != self.shape.numel()):
            raise UserError(f"{self.name} has a dropout of values {tuple(values.shape)}, {INSTEAD}")
        self.dropouts.append(Noise(values, p))
        return F.dropout(values, p, training, inplace)


class _AllKeys(Exception):
    """The rest of a layer has no use."""


class Noise:
    """What a dropout multiplies values with: drawn again, for all rows, and not kept."""

    def __init__(self, values: Tensor, probability: float):
        self.like = torch.empty_like(values, device="meta")  # which number goes where: its strides
        self.probability, self.state = probability, torch.get_rng_state()
        self.devices, self.states = get_device_states(values)

    def again(self, device: torch.device) -> Tensor:
        with torch.random.fork_rng(self.devices, device_type=device.type):
            torch.set_rng_state(self.state)
            set_device_states(self.devices, self.states, device_type=device.type)
            return F.dropout(torch.ones_like(self.like, device=device), self.probability)


def rows_of(values: Tensor) -> int:
    return values.numel() // values.shape[-1]


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
            keys = tape.keys if keeps else tape.keys_again(hidden)
            again = tape.replay(rows.gather(hidden), rows, tape.saved, keys)
            if not (again - rows.gather(out)).abs().max() <= TOLERANCE * out.abs().max():
                raise UserError(f"tokens of {tape.name} mix outside of attention, {INSTEAD}")
        compared.append(layer)
        return out

    devices, kind = ([model.device] if model.device.type != "cpu" else []), model.device.type
    with through(model, compare), torch.random.fork_rng(devices, device_type=kind):
        hidden_states(model, batch)
    if not compared:
        raise UserError(f"{type(model).__name__} has no layers that are known, {INSTEAD}")
