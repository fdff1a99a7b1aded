"""How a trajectory advances, one step at a time."""
