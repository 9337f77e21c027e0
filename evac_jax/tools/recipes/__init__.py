"""Tables of commands that make weights from scratch."""
