"""Another version of a framework is refused with what it lacks."""

import pytest

from slm.integrations.signatures import check_attributes, check_parameters


class Trainer:
    limit = 1

    def step(self, batch: int, *, scale: float = 1.0) -> None: ...


def test_what_is_there_passes():
    check_parameters(Trainer.step, ("batch", "scale"), "frame 1.0")
    check_attributes(Trainer, ("step", "limit"), "frame 1.0")


def test_what_is_not_there_is_named_with_what_is():
    with pytest.raises(ImportError, match=r"step has no parameter inputs \(it has self, batch"):
        check_parameters(Trainer.step, ("batch", "inputs"), "frame 1.0")
    with pytest.raises(ImportError, match="Trainer has no run; .* made for frame 1.0"):
        check_attributes(Trainer, ("run",), "frame 1.0")
