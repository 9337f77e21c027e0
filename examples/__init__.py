"""Worked examples of code that a user brings: docs/plug_in.md."""
