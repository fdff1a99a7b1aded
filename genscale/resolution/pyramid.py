"""Larger pictures of scale-wise models: coarse scales of a small picture, fine ones drawn anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale import rng
from genscale.errors import ConfigError
from genscale.layers.scales import Scales, scale_spans
from genscale.resolution.base import ResolutionOp, Sides
from genscale.resolution.entropy import EntropyAttention
from genscale.resolution.presets import Preset, check_count, fitting
from genscale.resolution.sampling import Stage, bicubic
from genscale.samplers.base import Sampler, State
from genscale.samplers.next_scale import NextScale


class Pyramid(Preset):
    """Keep the coarse scales of an enlarged small picture and draw the fine ones.

    The picture that was sampled small is enlarged and encoded to the tokens of the larger run's
    scales. Its fine scales hold only what interpolation left; the network draws others in their
    place, from the running latent of the coarse ones. Tokens cannot be noised half way: this
    stands where :class:`~genscale.resolution.cascades.SDEdit` stands for diffusion models.

    Args:
        kept: coarse scales that are kept; null: those no larger than the last scale of the run
            before, which are all that a small picture can tell.
        entropy: keep the entropy of attention where the network has any.
    """

    name = "pyramid"
    needs = ("scales",)
    uses = ("entropy",)
    family = "scale_wise"
    cascade = True
    doubling = True

    def __init__(self, *, kept: int | None = None, entropy: bool = True) -> None:
        check_count("kept", kept)
        self.kept, self.entropy = kept, entropy

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return entropy-keeping attention, or nothing."""
        return fitting(model, [EntropyAttention()] if self.entropy else [])

    def opened(self, solver: Sampler, view: Any, state: State, stage: Stage) -> State:
        """Return a state that knows the tokens of the coarse scales.

        Raises:
            ConfigError: nothing decodes the small picture, or the tokenizer cannot encode.
        """
        assert isinstance(solver, NextScale)
        if stage.images is None:
            raise ConfigError(
                f"resolution={self.name} looks at the small picture, but nothing decodes it. Give "
                "sample_scaled images=<the decoder>."
            )
        tokens = view.tokenizer.tokens(_enlarged(stage.images(stage.small), stage))
        count = self.kept or scales_within(view.scales, stage.before)
        count = min(count, len(view.scales))
        # other draws than those of the small run
        lineage = rng.key(state.lineage, stage.index + 1, rng.Purpose.RENOISE)
        state = state.replace(lineage=lineage)
        known = scale_spans(view.scales)[:count]
        keep = torch.arange(tokens.shape[1], device=tokens.device) < known[-1][1]
        if view.needs_prefix:  # keys and values of the kept scales have to be computed
            return solver.edit(state, tokens, keep.expand_as(tokens))
        running = state.x
        for scale, (start, end) in enumerate(known):
            codes = view.tokenizer.codes(tokens[:, start:end])
            running = view.tokenizer.add_scale(running, codes, scale)[0]
        return state.replace(
            x=running,
            step=torch.full_like(state.step, count),
            history={**state.history, "tokens": torch.where(keep, tokens, 0)},
        )


def scales_within(scales: Scales, sides: Sides) -> int:
    """Return how many scales, coarse ones first, are no larger than a grid; at least 1."""
    within = [rows <= sides[0] and columns <= sides[1] for rows, columns in scales]
    return max(sum(within), 1)


def _enlarged(pictures: Tensor, stage: Stage) -> Tensor:
    """Return pictures of the run before at the size of this one, in [-1, 1]."""
    factor = pictures.shape[-2] // stage.before[0]
    height, width = (side * factor for side in stage.sides)
    return bicubic(pictures.float(), (height, width)).clamp(-1.0, 1.0)
