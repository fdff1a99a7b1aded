"""Files: checkpoints of other programs, images, npz."""
