"""What the Triton kernels share: one tile of logits, and the tiles' sizes for each chip."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from slm_kernels.contracts import Head

LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    rows: int
    vocab: int
    width: int
    warps: int
    stages: int
    group: int  # row blocks that walk over the vocabulary together

    def options(self) -> dict[str, Any]:
        # Without a limit of its own ptxas may spill a little to fit more programs on a core.
        limits = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": 255}
        return limits | {"enable_fp_fusion": True}


# By chip and whether the kernel is plain: an odd width, a bias, whatever else it does needs
# registers, and a spill costs more than a narrow tile. With these nothing spills:
# benchmarks/compiled.py shows it.
TILES = {
    ("hopper", True): Tile(128, 256, 64, 8, 3, 12),
    ("hopper", False): Tile(128, 128, 64, 8, 3, 12),
    ("ampere", True): Tile(128, 128, 32, 8, 4, 12),
    ("ampere", False): Tile(128, 128, 32, 8, 4, 12),
}
FLOAT32 = Tile(32, 64, 32, 4, 2, 12)  # true float32 products: no tensor cores
INTERPRETED = Tile(16, 32, 16, 1, 1, 2)  # small, so that small tests cross several of them


def interpreted() -> bool:
    return knobs.runtime.interpret


def pick_tile(hidden: Tensor, plain: bool) -> Tile:
    if interpreted():
        return INTERPRETED
    if hidden.dtype == torch.float32:
        return FLOAT32
    chip = "hopper" if torch.cuda.get_device_capability(hidden.device)[0] >= 9 else "ampere"
    return TILES[chip, plain]


def is_plain(hidden: Tensor, head: Head) -> bool:
    return head.bias is None and head.softcap is None and hidden.shape[1] % 64 == 0


def readable(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The kernels step through D, and through the bias, one element at a time."""
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, head.weight))
    bias = None if head.bias is None else head.bias.contiguous()
    return hidden, head._replace(weight=weight, bias=bias)


@triton.jit
def _tanh(x):
    """Accurate for small x as well, where 1 - 2 / (exp(2 x) + 1) cancels."""
    square = x * x
    series = 1.0 + square * (
        -0.3333333333333333
        + square * (0.13333333333333333 + square * (-0.05396825396825397 + square * 0.02186948854))
    )
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(x), 15.0)) + 1.0)  # 1 from 10 on
    return tl.where(square < 0.0625, x * series, tl.where(x < 0, -large, large))


@triton.jit
def place_of(program, row_blocks, column_blocks, GROUP_N: tl.constexpr):
    """Row and column block of a program: those that run together share rows and weights in L2."""
    in_group = GROUP_N * column_blocks
    first = program // in_group * GROUP_N
    rows = tl.minimum(row_blocks - first, GROUP_N)
    return first + program % in_group % rows, program % in_group // rows


@triton.jit
def logits_tile(
    hidden,
    weight,
    bias,
    first_row,
    first_column,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    logit_scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_N, BLOCK_V) logits in float32. Past N and V the last row and column are repeated.

    Only the first of a tile needs 64 bits: offsets within it fit in 32, which saves registers.
    """
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_row)
    columns = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_column)
    inner = tl.arange(0, BLOCK_D)
    h_first = hidden + tl.full((), first_row, tl.int64) * hidden_stride
    w_first = weight + tl.full((), first_column, tl.int64) * weight_stride
    h_place = h_first + (rows[:, None] * hidden_stride + inner[None, :])
    w_place = w_first + (columns[None, :] * weight_stride + inner[:, None])
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if WHOLE_D:
            h = tl.load(h_place)
            w = tl.load(w_place)
        else:
            h = tl.load(h_place, mask=inner[None, :] < D - start, other=0.0)
            w = tl.load(w_place, mask=inner[:, None] < D - start, other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
        h_place += BLOCK_D
        w_place += BLOCK_D
    if HAS_BIAS:
        z += tl.load(bias + first_column + columns)[None, :].to(tl.float32)
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z
