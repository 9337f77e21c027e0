"""The settings of a run, their checks, presets and flags."""
