"""Measurements, one command each; most compare with a baseline."""
