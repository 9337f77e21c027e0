"""Commands on whole training runs."""
