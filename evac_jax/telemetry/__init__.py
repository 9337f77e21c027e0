"""Output of a run for people: metrics, progress, videos."""
