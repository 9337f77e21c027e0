"""Reinforcement learning of vision-language-action policies inside the EVAC world model."""
