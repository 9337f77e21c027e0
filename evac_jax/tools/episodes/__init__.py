"""Commands that record or import episodes and start states."""
