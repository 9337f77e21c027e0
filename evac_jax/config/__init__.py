"""What a run is told: its settings, their checks, presets and flags."""
