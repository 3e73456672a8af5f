"""Where a model computes: a device that is not here is one sentence."""

import pytest
import torch

from slm.errors import UserError
from slm.model.device import devices_here, pick_device


def test_what_is_here_is_taken(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices_here() == ["cpu", "cuda", "cuda:0", "cuda:1", "mps"]


@pytest.mark.parametrize("name", ["cuda", "cudaa", "mps", "cpu:x", ""])
def test_what_is_not_here_is_one_sentence(monkeypatch, name):
    if name and name in devices_here():
        pytest.skip(f"{name} is here")
    with pytest.raises(UserError) as refused:
        pick_device(name)
    here = ", ".join(devices_here())
    assert str(refused.value) == (
        f"device is {name!r}, and PyTorch finds none of that name here: {here}"
    )
