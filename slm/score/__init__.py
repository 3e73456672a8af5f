"""Corpus + reference model -> the reference's log-probs, aligned with the corpus."""
