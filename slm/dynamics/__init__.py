"""Checkpoints + frozen tokens -> classes H->H, L->H, H->L, L->L."""
