"""The tabletop's tasks: two instructions, which differ in the colour of the target."""

COLORS = ("red", "blue")
INSTRUCTIONS = tuple(f"pick up the {color} block and place it on the plate" for color in COLORS)
