"""How much memory a run needs on each of its devices, and the mesh that this chooses."""
