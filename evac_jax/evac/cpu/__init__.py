"""Faster forms of a float32 world model's layers on a CPU; no other device or type comes here.

`packed` serves every such model. `winograd` and the map matrices of `packed` serve large ones only,
from the sizes that their docstrings give: the miniature reaches neither.
"""
