"""Tables of commands that make weights from nothing."""
