"""Commands that make episodes, world models, classifiers and start policies."""
