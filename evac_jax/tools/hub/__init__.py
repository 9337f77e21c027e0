"""Published files and configurations of others: fetch, import, translate."""
