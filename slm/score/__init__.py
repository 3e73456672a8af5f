"""Corpus + reference model -> the reference's log-probs, aligned with the corpus."""

from slm.stage import callable_package

callable_package(__name__)
