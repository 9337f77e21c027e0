"""What makes large world models faster on a CPU."""
