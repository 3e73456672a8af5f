"""Selective language modeling: prepare, train, score, evaluate."""

__version__ = "0.1.0"
