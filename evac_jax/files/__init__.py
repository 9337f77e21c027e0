"""What the project writes and reads: recordings, cards, whole files."""
