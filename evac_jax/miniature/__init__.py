"""A small tabletop with ground truth."""
