"""Metrics of clips ``(B, C, T, H, W)``: what one sees that single frames do not show."""
