"""A causal language model as the trainer sees it: built, loaded, checked, saved."""
