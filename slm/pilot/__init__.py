"""A corpus, a reference and a base -> will selection pay, with an interval."""

from slm.stage import callable_package

callable_package(__name__)
