"""Commands that train and export policies."""
