"""Parity of EAGLE with its authors' program, whose weight is no high-pass."""

from __future__ import annotations

import torch

from genscale.upscaling.losses import eagle_loss, eagle_weight, edge_gradients
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare the loss, its parts and its gradient."""
    inputs, expected = case.group("input"), case.group("output")
    patch_size, cutoff = int(case.config["patch_size"]), float(case.config["cutoff"])
    made = inputs["output"].requires_grad_()
    loss = eagle_loss(made, inputs["target"], patch_size, cutoff, highpass="eagle_code")
    gradient_x, gradient_y = edge_gradients(made)
    rows, columns = (side // patch_size for side in made.shape[2:])
    got = {
        "loss": loss.reshape(1),
        "highpass_weights": eagle_weight(rows, columns, cutoff, "eagle_code"),
        "gradient_x": gradient_x,
        "gradient_y": gradient_y,
        "dloss_doutput": torch.autograd.grad(loss, made)[0],
    }
    return [case.compare(name, got[name], value) for name, value in expected.items()]
