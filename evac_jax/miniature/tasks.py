"""What the tabletop asks for: three instructions, told apart by the colour of the target."""

COLORS = ("red", "blue", "yellow")
INSTRUCTIONS = tuple(f"pick up the {color} block and place it on the plate" for color in COLORS)
