"""The version, for what imports no more than that."""

__version__ = "0.1.0"
