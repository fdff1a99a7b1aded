"""What is learned: the loss, and the generator view that samplers see."""
