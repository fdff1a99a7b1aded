"""Calls of a network of diffusers with other rows of a batch, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from genscale.errors import ConfigError


def rows_of(value: Any, batch: int, rows: Any) -> Any:
    """Return some rows of every tensor of ``batch`` rows within a call's arguments.

    Args:
        value: an argument, a container of arguments, or anything else, which stays as it is.
        batch: rows of the network's input.
        rows: what tensors are indexed with.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: rows_of(part, batch, rows) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(rows_of(part, batch, rows) for part in value)
    return value


def prediction_of(out: Any) -> Tensor:
    """Return the prediction of a network's output: its sample, or the first of a tuple."""
    found: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return found


def with_prediction(out: Any, prediction: Tensor) -> Any:
    """Return such an output with another prediction."""
    return (prediction, *out[1:]) if isinstance(out, tuple) else replace(out, sample=prediction)


def check_halves(x: Tensor, what: str, instead: str) -> None:
    """Refuse batches that are no unconditional and conditional halves.

    Args:
        x: the batch.
        what: needs them.
        instead: what else to do, as the end of a sentence.

    Raises:
        ConfigError: the number of samples is odd.
    """
    if len(x) % 2:
        raise ConfigError(
            f"{what} needs a batch of unconditional and conditional halves, but the network was "
            f"given {len(x)} samples. Guide (guidance_scale above 1), or {instead}."
        )
