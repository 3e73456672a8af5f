"""Checkpoints + frozen tokens -> classes H->H, L->H, H->L, L->L."""

from slm.stage import callable_package

callable_package(__name__)
