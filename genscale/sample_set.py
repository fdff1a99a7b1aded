"""A set of samples in batches: which number, seed, class and prompt each of them has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from genscale import rng
from genscale.cascade import Wanted
from genscale.conditioning.labels import LabelLaw, labels_for
from genscale.errors import ConfigError


def batches_of_set(
    num_samples: int,
    batch_size: int,
    *,
    labels: LabelLaw,
    num_classes: int,
    prompts: Sequence[str] = (),
    negative_prompt: str | None = None,
    frame_rate: float | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Wanted]:
    """Yield what is wanted of the samples ``0 .. num_samples - 1`` of a set, in order.

    What is wanted of sample i is a function of (seed, i) alone.

    Args:
        num_samples: samples of the set.
        batch_size: samples at a time.
        labels: their classes; see :func:`~genscale.conditioning.labels.labels_for`.
        num_classes: classes the model knows; 0 for none.
        prompts: n texts, of which sample i has number i mod n; none for a model without text.
        negative_prompt: what guidance leads away from.
        frame_rate: frames a second of clips.
        seed: of the set.
        rank: number of this process, which makes a contiguous share.
        world_size: of so many.

    Raises:
        ConfigError: numbers or labels that cannot be used.
    """
    if num_samples < 1 or batch_size < 1:
        raise ConfigError(
            f"num_samples and batch_size must be positive, but {num_samples} and {batch_size} "
            "were given."
        )
    start, stop = (num_samples * r // world_size for r in (rank, rank + 1))
    for first in range(start, stop, batch_size):
        ids = torch.arange(first, min(first + batch_size, stop))
        captions = tuple(prompts[i % len(prompts)] for i in ids.tolist()) if prompts else None
        yield Wanted(
            ids,
            rng.sample_seeds(seed, first, len(ids)),
            labels_for(labels, ids, num_classes=num_classes, seed=seed),
            captions,
            negative_prompt,
            frame_rate,
        )
