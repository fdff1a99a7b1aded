"""Small classifiers trained by a fixed recipe: the same data and settings give the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.rng import Purpose, key, normal, permutation

Weights = dict[str, Tensor]


def keyed_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, *, dtype: torch.dtype = torch.float64
) -> Weights:
    """Draw keyed normal weights of variance 2 / fan-in (arXiv:1502.01852), and zero biases.

    Args:
        shapes: of each layer's weights, outputs first.
        seed: key of the draw.
        dtype: of the weights.

    Returns:
        ``<layer>`` and ``<layer>_bias``, that require gradients.
    """
    weights = {}
    for number, (name, each) in enumerate(shapes.items()):
        drawn = normal(key(seed, number, Purpose.NETWORK), each, dtype=torch.float64)
        weights[name] = (drawn * math.sqrt(2.0 / math.prod(each[1:]))).to(dtype)
        weights[f"{name}_bias"] = torch.zeros(each[0], dtype=dtype)
    return {name: value.requires_grad_() for name, value in weights.items()}


def train_classifier(
    weights: Weights,
    logits: Callable[[Weights, Tensor, int], Tensor],
    targets: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Weights:
    """Minimise the cross-entropy with AdamW, its rate decayed to zero along a cosine.

    Args:
        weights: where to start; trained in place.
        logits: of weights, rows ``(b,)`` and the number of the step, ``(b, K)``.
        targets: ``(n,)`` int64.
        num_steps: batches.
        batch_size: rows of one; every row comes once an epoch, in a keyed order.
        learning_rate: the first.
        seed: key of the order.

    Returns:
        the weights, detached.
    """
    optimizer = torch.optim.AdamW(
        weights.values(), lr=learning_rate, weight_decay=0.01, foreach=False
    )
    count, size = len(targets), min(batch_size, len(targets))
    batches_an_epoch = count // size
    order = torch.arange(count)
    for step in range(num_steps):
        epoch, batch = divmod(step, batches_an_epoch)
        if batch == 0:
            order = permutation(key(seed, epoch, Purpose.SHUFFLE), count)
        rows = order[batch * size : (batch + 1) * size]
        rate = 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        loss = F.cross_entropy(logits(weights, rows, step), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}
