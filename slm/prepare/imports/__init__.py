"""Corpora that are tokenized already: a reader a format, one path to the shards."""
