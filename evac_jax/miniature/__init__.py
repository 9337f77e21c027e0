"""A small simulated tabletop with ground truth."""
