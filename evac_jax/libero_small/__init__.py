"""A small LIBERO: sizes of networks that learn it on two CPU cores, and where their weights lie."""
