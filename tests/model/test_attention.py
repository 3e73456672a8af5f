"""Attention of some queries whose output is known has the gradients of attention."""

import pytest
import torch
import torch.nn.functional as F

from slm.model.attention import Attended, attend
from slm.model.rows import make_rows, seen

SHAPE = (2, 4, 12, 8)


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_attention(masked, capacity):
    torch.manual_seed(0)
    query, key, value = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 12, 12) < 0.5 if masked else None
    mask = None if mask is None else (mask | torch.eye(12, dtype=torch.bool)).tril()
    plain = {"attn_mask": mask, "is_causal": mask is None, "scale": 0.3}
    found = attend(query, key, value, **plain)
    assert found is not None
    assert torch.equal(found[0], F.scaled_dot_product_attention(query, key, value, **plain))

    index = torch.arange(12)
    rows = make_rows(torch.stack([index % 3 == 1, index % 4 != 1]), capacity)
    places = rows.positions[:, None, :, None].expand(-1, 4, -1, 8)
    some = query.gather(2, places)
    some[~rows.asked[:, None].expand(-1, 4, -1)] *= 1e6  # of padding any query may stand there
    leaves = [one.requires_grad_() for one in (some, key, value)]
    upstream = torch.randn(some.shape, dtype=torch.float64) * rows.asked[:, None, :, None]
    known = Attended.apply(*leaves, seen(mask, rows), 0.3, rows, *found)
    again = F.scaled_dot_product_attention(*leaves, attn_mask=seen(mask, rows), scale=0.3)
    ours, theirs = (torch.autograd.grad(out, leaves, upstream) for out in (known, again))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_what_is_no_kernel_of_the_cpu_is_not_kept():
    query, key, value = (torch.randn(SHAPE) for _ in range(3))
    assert attend(query, key, value, dropout_p=0.1) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query, key, value) is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attend(query, key, value) is None
