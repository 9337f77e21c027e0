"""The trust report: how well imagination agrees with the ground truth."""
