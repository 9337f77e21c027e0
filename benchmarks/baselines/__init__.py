"""Plain PyTorch baselines of the benchmarks, with the same weights as our code."""
