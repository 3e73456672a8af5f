"""Which tokens are trained on: the rules, their schedules, their words."""

from slm.selection.purposes import Forget, LongGain
from slm.selection.rule import Choice, Ranked, Selection
from slm.selection.rules import (
    All,
    Entropy,
    Excess,
    Intersection,
    Loss,
    Middle,
    Mixture,
    Overconfident,
    Random,
    ReferenceEntropy,
    ReferenceLoss,
    Union,
)
from slm.selection.soft import Probability, Relu, Sigmoid, Soft, Softmax

__all__ = [
    "All",
    "Choice",
    "Entropy",
    "Excess",
    "Forget",
    "Intersection",
    "LongGain",
    "Loss",
    "Middle",
    "Mixture",
    "Overconfident",
    "Probability",
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
