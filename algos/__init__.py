"""Algorithms as pure functions on arrays, and the table of them."""

# Name -> module with `Config`, `problems`, `advantages`, `loss` and `make_update`. Strings, so that
# naming an algorithm imports nothing; a new one is a file and a line.
ALGORITHMS = {"grpo": "algos.grpo", "ppo": "algos.ppo"}
