"""Self-contained HTML pages: what a run did, and what both reports of the project share."""
