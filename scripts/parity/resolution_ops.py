"""Parity of operators on samples and convolutions: blurs, windows, filters, dilations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genscale.resolution.dilated import redilated_conv
from genscale.resolution.fourier import fourier_conv, fourier_mask
from genscale.resolution.frequency import butterworth, gaussian_blur, low_pass, match_statistics
from genscale.resolution.windows import window_boxes
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare every output the case holds."""
    x, config, state = case.group("input")["x"], case.config, case.group("state")

    def conv(name: str, stride: int = 1) -> nn.Conv2d:
        weight = state[f"{name}.weight"]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding=1)
        layer.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
        return layer

    def blur() -> Tensor:
        return gaussian_blur(x, config["gaussian"]["kernel_size"], config["gaussian"]["sigma"])

    def boxes() -> Tensor:
        views = config["views"]
        return torch.tensor(
            window_boxes(
                views["latent_height"], views["latent_width"], views["window"], views["stride"]
            )
        )

    def filter_mask() -> Tensor:
        settings = config["butterworth"]
        height, width = x.shape[-2:]
        return butterworth(height, width, settings["ratio"], order=settings["order"])

    def fourier(weak: bool) -> Tensor:
        settings = config["fouri"]
        height, width = settings["target"]
        mask = fourier_mask(height, width, settings["dilation"], settings["value"], weak=weak)
        return mask[None, None]

    known: dict[str, Callable[[], Tensor]] = {
        "demofusion_gaussian": blur,
        "demofusion_gaussian_matched": lambda: match_statistics(blur(), x, per_sample=False),
        "demofusion_views": boxes,
        "butterworth": lambda: filter_mask()[None, None],
        "butterworth_low": lambda: low_pass(x, filter_mask()),
        "redilated_conv": lambda: redilated_conv(x, conv("conv"), config["dilation"]),
        "redilated_conv_stride2": lambda: redilated_conv(
            x, conv("conv_stride2", 2), config["dilation"]
        ),
        "fouri_conv": lambda: fourier_conv(
            x,
            conv("conv"),
            config["fouri"]["dilation"],
            tuple(config["fouri"]["base"]),
            config["fouri"]["value"],
        ),
        "fouri_mask": lambda: fourier(weak=False),
        "fouri_weak_mask": lambda: fourier(weak=True),
    }
    outputs = case.group("output")
    if missing := [name for name in outputs if name not in known]:
        raise KeyError(f"The case holds {missing}, which this adapter does not know.")
    return [case.compare(name, known[name](), expected) for name, expected in outputs.items()]
