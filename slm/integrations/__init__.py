"""Selective language modeling in other people's trainers: one file a framework, imported lazily."""
