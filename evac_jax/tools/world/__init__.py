"""Commands that make and check the folder of a world."""
