"""Measurements, one command each; every one times a baseline beside ours."""
