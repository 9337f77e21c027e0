"""Presets, one file per algorithm."""
