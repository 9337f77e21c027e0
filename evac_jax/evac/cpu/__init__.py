"""Faster layers for a world model on a CPU; other devices do not use them.

All float32 models use `packed`. Only large models use `winograd` and the map matrices of `packed`;
their docstrings give the sizes. The miniature uses neither. Models of half precision use `widened`
where the CPU has no instructions for their type.
"""
