"""Corpus (+ references) -> a trained model, its checkpoints and its curves."""
