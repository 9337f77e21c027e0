"""How far imagination can be trusted, as a report."""
