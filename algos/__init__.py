"""Algorithms as pure functions on arrays, and the table of them."""

# Name -> module with `Config`, `problems`, `advantages`, `loss` and `make_update`. The values are
# strings, so that this table imports nothing. A new algorithm needs a file and one line here.
ALGORITHMS = {"grpo": "algos.grpo", "ppo": "algos.ppo"}
