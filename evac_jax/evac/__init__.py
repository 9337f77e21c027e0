"""The EVAC world model in PyTorch."""
