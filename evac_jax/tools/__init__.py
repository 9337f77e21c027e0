"""Commands that make and check episodes, world models, classifiers and policies."""
