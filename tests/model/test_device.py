"""Where a model computes: a device that is not here is one sentence."""

import pytest
import torch

from slm.errors import UserError
from slm.model.device import devices_here, own_gpu, pick_device


def test_what_is_here_is_taken(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices_here() == ["cpu", "cuda", "cuda:0", "cuda:1", "mps"]


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({}, 8, "cuda"),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 8, "cuda:3"),  # torchrun inside of srun
        ({"SLURM_LOCALID": "5"}, 8, "cuda:5"),
        ({"SLURM_LOCALID": "5"}, 1, "cuda:0"),  # Slurm shows a process its own alone
        ({"LOCAL_RANK": ""}, 2, "cuda"),
    ],
)
def test_each_process_of_a_machine_has_its_gpu(environment, count, expected):
    assert own_gpu(environment, count) == expected


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
