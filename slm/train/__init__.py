"""Corpus (+ references) -> a trained model, its checkpoints and its curves."""

from slm.stage import callable_package

callable_package(__name__)
