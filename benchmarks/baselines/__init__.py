"""Plain PyTorch paths that the benchmarks measure ours against, with the same weights."""
