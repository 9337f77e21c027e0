"""Commands that train the success classifier."""
