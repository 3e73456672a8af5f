"""Figures for a paper, each with its rows as CSV."""
