"""What the entry points call; the only room that knows Hydra."""
