"""Hosts, devices, and how arrays lie on them."""
