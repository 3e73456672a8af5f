"""Runs -> a page, paper figures and tables."""

from slm.stage import callable_package

callable_package(__name__)
