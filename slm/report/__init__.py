"""Runs -> a page, paper figures and tables."""
