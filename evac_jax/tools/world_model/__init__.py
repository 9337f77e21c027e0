"""Commands that train, import and show world models."""
