"""Which tokens are trained on: the rules, their schedules, their words."""

from slm.selection.rule import Choice, Ranked, Selection
from slm.selection.rules import (
    All,
    Excess,
    Intersection,
    Loss,
    Middle,
    Mixture,
    Random,
    ReferenceEntropy,
    ReferenceLoss,
    Union,
)
from slm.selection.soft import Relu, Sigmoid, Soft, Softmax

__all__ = [
    "All",
    "Choice",
    "Excess",
    "Intersection",
    "Loss",
    "Middle",
    "Mixture",
    "Random",
    "Ranked",
    "ReferenceEntropy",
    "ReferenceLoss",
    "Relu",
    "Selection",
    "Sigmoid",
    "Soft",
    "Softmax",
    "Union",
]
