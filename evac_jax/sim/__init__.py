"""The RL environment on a world model, and the process that hosts it."""
