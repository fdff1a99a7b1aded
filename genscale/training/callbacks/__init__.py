"""What happens beside the optimizer steps."""
