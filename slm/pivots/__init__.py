"""A model, problems and an oracle -> the tokens that decide, and preference pairs of them."""

from slm.stage import callable_package

callable_package(__name__)
