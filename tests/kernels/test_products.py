"""A product is the same on either library, and runs on the faster one."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slm_kernels import products


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch.mm"], autouse=True)
def has_onednn(request, monkeypatch) -> bool:
    monkeypatch.setattr(products, "_has_onednn", lambda: request.param)
    return request.param


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:  # rows, weight, bias
    rows, width, columns = shape
    random = torch.Generator().manual_seed(rows + width + columns)
    made = [torch.randn(shape, generator=random) for shape in ((rows, width), (columns, width))]
    return made[0].to(dtype), made[1].to(dtype), torch.randn(columns, generator=random).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (0, 4, 6), (64, 257, 130), (5, 64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_and_bias_are_those_in_float64(shape, dtype):
    rows, weight, bias = operands(shape, dtype)
    error = 1e-4 if dtype == torch.float32 else 1e-12
    exact = rows.double() @ weight.double().T
    for given, expected in ((None, exact), (bias, exact + bias.double())):
        out = products.linear(rows, weight, given)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=error)


@pytest.mark.parametrize("shape", [(7, 5, 3), (64, 257, 130)])
def test_operands_may_be_transposed_or_cut_out(shape):
    rows, weight, _ = operands(shape)
    expected = rows.double() @ weight.double().T
    wide = torch.full((shape[0], shape[1] + 9), torch.nan)
    wide[:, 4:-5] = rows
    for left in (rows.T.contiguous().T, wide[:, 4:-5]):
        for right in (weight, weight.T.contiguous().T):
            out = products.linear(left, right)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_autocast_leaves_products_in_float32():
    rows, weight, bias = operands((16, 64, 24))
    for given in (None, bias):
        expected = products.linear(rows, weight, given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(products.linear(rows, weight, given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_runs_on_onednn_where_there_is_one(has_onednn, dtype):
    if has_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.fail("torch has no oneDNN here any more: look for its operator's new name")
    with Operators() as ran:
        products.linear(*operands((4, 4, 4), dtype))
    on_onednn = any("mkldnn" in name for name in ran.names)
    assert on_onednn == (has_onednn and dtype == torch.float32)
