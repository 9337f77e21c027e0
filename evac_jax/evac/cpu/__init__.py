"""Faster layers for a float32 world model on a CPU; other devices and types do not use them.

All such models use `packed`. Only large models use `winograd` and the map matrices of `packed`;
their docstrings give the sizes. The miniature uses neither.
"""
