"""Measurements; each is one command, and most compare with a baseline."""
