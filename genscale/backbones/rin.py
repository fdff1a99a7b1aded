"""RIN: a few latents read from a long tape of patches, compute, and write back (arXiv:2212.11972).

A. Jabri, D. Fleet and T. Chen, "Scalable Adaptive Computation for Iterative Generation", ICML 2023.
Its authors' program is in TensorFlow; what is matched number for number here
(``scripts/parity/rin.py``) is a third party's, lucidrains/recurrent-interface-network-pytorch, MIT,
which adds to the paper what ``tape_conv``, ``tape_attention``, ``latent_norm`` and
``condition="adaln"`` turn on.

It is FIT (:mod:`genscale.backbones.fit`) of a single group: every latent reads all patches, every
patch reads all latents. Patches never attend to each other, so that a block costs what its latents
cost. The last latents go to the next call, as in FIT; a call that knows none starts from the
learned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.fit_groups import GroupedPositions, Groups
from genscale.backbones.fit_layers import (
    Attention,
    ComputeLayer,
    FeedForward,
    NumberEmbedding,
    SelfConditioning,
    gain_norm,
    modulated,
    start_numbers,
)
from genscale.backbones.fit_settings import check_clip, frames_and_sides, with_memory
from genscale.backbones.shapes import check_choice, check_positive, check_text, class_rows
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError

_FREQUENCIES = 8  # of the time's learned waves


class TapeAttention(nn.Module):
    """Attention among patches at a cost linear in their number: softmax(q) (softmax(k)^T v).

    Args:
        size: width D.
        num_heads: heads.
        head_size: channels of a head.
        condition_size: see :class:`~genscale.backbones.fit_layers.Attention`.
    """

    def __init__(self, size: int, num_heads: int, head_size: int, condition_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_size
        self.norm = gain_norm(size)
        self.modulation = nn.Linear(condition_size, 2 * size) if condition_size else None
        self.qkv = nn.Linear(size, 3 * inner, bias=False)
        self.out = nn.Linear(inner, size, bias=False)
        self.out_norm = gain_norm(size)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Return what is to be added to ``x`` ``(B, N, D)``."""
        y = modulated(self.norm(x), self.modulation, c)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, k)
            for part in self.qkv(y).chunk(3, dim=-1)
        )
        q = q.softmax(dim=-1) * q.shape[-1] ** -0.5
        read = k.softmax(dim=-2).transpose(-2, -1) @ v  # (B, h, k, k)
        y = self.out_norm(self.out((q @ read).transpose(1, 2).flatten(2)))
        return y


class PlaceEmbedding(nn.Module):
    """Learned function of a place along one axis, from 0 to 1, to a vector.

    Args:
        size: width D.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(1, size // 2)
        self.linear_2 = nn.Linear(size // 2, size // 2)
        self.linear_3 = nn.Linear(size // 2, size)

    def forward(self, count: int) -> Tensor:
        """Return ``(count, D)``."""
        weight = self.linear_1.weight
        places = torch.linspace(0.0, 1.0, count, device=weight.device).to(weight.dtype)
        y = F.silu(self.linear_2(F.silu(self.linear_1(places[:, None]))))
        out: Tensor = self.linear_3(y)
        return out


class RINBlock(nn.Module):
    """Read, compute, write between a tape of patches and latents; every line is a residual.

    Args:
        tape_width: width Dt of the tape.
        latent_width: width Dl of the latents.
        compute_depth: layers among latents.
        num_heads: heads of every attention.
        head_size: channels of a head.
        condition_size: width of the vector that modulates; 0 without one.
        tape_conv: begin with a 3 x 3 depthwise convolution of every frame of the tape.
        tape_attention: let patches attend to each other, linearly, before they read the latents.
        latent_norm: end with a norm of the latents.
        qk_norm: normalise queries and keys of a head.
    """

    def __init__(
        self,
        tape_width: int,
        latent_width: int,
        compute_depth: int,
        num_heads: int,
        head_size: int,
        *,
        condition_size: int,
        tape_conv: bool,
        tape_attention: bool,
        latent_norm: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        heads = (num_heads, head_size)
        self.tape_conv = (
            nn.Conv2d(tape_width, tape_width, 3, padding=1, groups=tape_width)
            if tape_conv
            else None
        )
        self.read = Attention(
            latent_width, tape_width, *heads, condition_size=condition_size, qk_norm=qk_norm
        )
        self.read_mlp = FeedForward(latent_width)
        self.compute = nn.ModuleList(
            ComputeLayer(latent_width, *heads, condition_size=condition_size, qk_norm=qk_norm)
            for _ in range(compute_depth)
        )
        self.tape_attention = (
            TapeAttention(tape_width, *heads, condition_size) if tape_attention else None
        )
        self.tape_mlp = FeedForward(tape_width) if tape_attention else None
        self.write = Attention(
            tape_width, latent_width, *heads, condition_size=condition_size, qk_norm=qk_norm
        )
        self.write_mlp = FeedForward(tape_width)
        self.latent_norm = gain_norm(latent_width) if latent_norm else None

    def forward(
        self, tape: Tensor, latents: Tensor, c: Tensor | None, sides: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """Advance both.

        Args:
            tape: ``(B, N, Dt)``.
            latents: ``(B, L, Dl)``.
            c: ``(B, condition_size)`` or ``(1, condition_size)``, where there is a condition.
            sides: patches along frames, height and width; their product is N.
        """
        if self.tape_conv is not None:
            frames, height, width = sides
            maps = rearrange(tape, "b (t h w) d -> (b t) d h w", t=frames, h=height, w=width)
            maps = rearrange(self.tape_conv(maps), "(b t) d h w -> b (t h w) d", t=frames)
            tape = tape + maps
        latents = latents + self.read(latents, tape, c)
        latents = latents + self.read_mlp(latents)
        for layer in self.compute:
            latents = layer(latents, c)
        if self.tape_attention is not None and self.tape_mlp is not None:
            tape = tape + self.tape_attention(tape, c)
            tape = tape + self.tape_mlp(tape)
        tape = tape + self.write(tape, latents, c)
        tape = tape + self.write_mlp(tape)
        return tape, latents if self.latent_norm is None else self.latent_norm(latents)


class RIN(Backbone):
    """Recurrent interface network, on pictures or clips.

    The time is any number of about unit size: it is embedded by learned waves.

    Args:
        input_size: side of the trained picture, height and width, or frames, height and width.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row for the null class. 0 without classes.
        patch_size: side of the patches, or their sides along time, height and width.
        tape_width: width Dt of the tape.
        latent_width: width Dl of the latents.
        num_latents: L; more of them cost more and can hold more.
        depth: blocks.
        compute_depth: layers among latents in a block.
        num_heads: heads of every attention.
        head_size: channels of a head.
        condition: ``"token"``: time and class are tokens beside the latents, as in the paper;
            ``"adaln"``: their sum scales and shifts the queries of every attention.
        text_size: width of the text tokens, which stand beside the latents; 0 without text.
        num_text_tokens: their number, where none are given.
        reference_channels: channels of ``cond.reference`` (an earlier estimate, or a smaller
            picture), stretched to the input and joined before its channels; 0 without one.
        positions: ``"learned"``: a vector a patch, stretched for other sizes; ``"mlp"``: the sum
            of learned functions of the places along the axes.
        patch_norm: norm the patches' pixels and tokens (``"both"``), the tokens alone
            (``"after"``), or none (``"none"``).
        tape_conv: see :class:`RINBlock`.
        tape_attention: see there.
        latent_norm: see there.
        qk_norm: see there.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("RINBlock",)
    cached_modules = ("ComputeLayer.attention", "ComputeLayer.mlp")
    self_conditioning = True
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | Sequence[int] = 64,
        in_channels: int = 3,
        num_classes: int = 0,
        patch_size: int | Sequence[int] = 8,
        tape_width: int = 256,
        latent_width: int = 768,
        num_latents: int = 128,
        depth: int = 4,
        compute_depth: int = 4,
        num_heads: int = 16,
        head_size: int = 48,
        condition: Literal["token", "adaln"] = "token",
        text_size: int = 0,
        num_text_tokens: int = 32,
        reference_channels: int = 0,
        positions: Literal["learned", "mlp"] = "learned",
        patch_norm: Literal["none", "after", "both"] = "after",
        tape_conv: bool = False,
        tape_attention: bool = False,
        latent_norm: bool = False,
        qk_norm: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, grid = _check_settings(self)
        self.num_frames, self.reference_channels = (
            frames_and_sides(input_size)[0],
            reference_channels,
        )
        self.num_classes, self.text_shape = num_classes, (num_text_tokens, text_size)
        self.condition = condition
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        pixels = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        seen = (in_channels + reference_channels) * pixels
        vector = latent_width if condition == "token" else 4 * tape_width

        self.pixel_norm = nn.LayerNorm(seen) if patch_norm == "both" else None
        self.patch = nn.Linear(seen, tape_width)
        self.tape_norm = nn.LayerNorm(tape_width) if patch_norm != "none" else None
        learned = positions == "learned"
        self.table = GroupedPositions(grid, tape_width) if learned else None
        self.places = None if learned else nn.ModuleList(
            PlaceEmbedding(tape_width) for _ in range(3 if grid.group[0] > 1 else 2)
        )  # fmt: skip
        self.latents = nn.Parameter(torch.empty(num_latents, latent_width))
        self.past = SelfConditioning(latent_width)
        self.time = NumberEmbedding(1, 4 * tape_width, vector, frequencies=_FREQUENCIES)
        self.classes = nn.Embedding(num_classes + 1, vector) if num_classes else None
        self.text = nn.Linear(text_size, latent_width, bias=False) if text_size else None
        self.blocks = nn.ModuleList(
            RINBlock(
                tape_width,
                latent_width,
                compute_depth,
                num_heads,
                head_size,
                condition_size=vector if condition == "adaln" else 0,
                tape_conv=tape_conv,
                tape_attention=tape_attention,
                latent_norm=latent_norm,
                qk_norm=qk_norm,
            )
            for _ in range(depth)
        )
        self.head_norm = gain_norm(tape_width)
        self.head = nn.Linear(tape_width, in_channels * pixels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator."""
        start_numbers(self, 1.0)
        nn.init.normal_(self.latents, std=0.02)
        if self.table is not None:
            nn.init.normal_(self.table.table, std=0.02)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, H, W)`` or ``(B, C, T, H, W)``; a picture given to a network of clips is
                repeated over the frames, and the predicted frames are averaged.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time.
            cond: ``labels``, ``text`` with its mask and ``reference`` are read where the settings
                name them; what is None counts as absent.
            memory: what the previous call returned, or None. Samples whose ``known`` is false
                are computed as without memory.

        Returns:
            ``sample`` shaped as ``x``, and the memory for the next call.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_clip(self, x, t, cond)
        clip = x if x.dim() == 5 else x[:, :, None].expand(-1, -1, self.num_frames, -1, -1)
        grid = _whole(clip.shape[2:], self.patch_size)
        tape = grid.cut(self._with_reference(clip, cond))
        tape = self.patch(tape if self.pixel_norm is None else self.pixel_norm(tape))
        tape = tape if self.tape_norm is None else self.tape_norm(tape)
        tape = tape + self._places(grid)
        c, tokens = self._condition(t, cond, len(x))
        latents = with_memory(self.latents, self.past, memory, batch=len(x))
        latents = torch.cat([latents, *tokens], dim=1)
        for block in self.blocks:
            tape, latents = self._run(block, tape, latents, c, grid.group)
        sample = grid.join(self.head(self.head_norm(tape)))
        known = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return BackboneOutput(
            sample=sample if x.dim() == 5 else sample.mean(dim=2),
            memory={"latents": latents[:, : len(self.latents)], "known": known},
        )

    def _with_reference(self, clip: Tensor, cond: Conditioning) -> Tensor:
        if not self.reference_channels:
            return clip
        reference = cond.reference
        if reference is None:
            reference = clip.new_zeros(len(clip), self.reference_channels, 1, 1, 1)
        elif reference.dim() == 4:
            reference = reference[:, :, None]
        sides = clip.shape[2:]
        if reference.shape[2:] != sides:
            reference = F.interpolate(reference, size=sides, mode="trilinear")
        return torch.cat((reference.to(clip.dtype), clip), dim=1)

    def _places(self, grid: Groups) -> Tensor:
        """Return the positions ``(N, Dt)`` of a tape."""
        if self.table is not None:
            return self.table(grid)[0]
        assert self.places is not None
        axes = grid.group[-len(self.places) :]
        embedded = [embed(count) for embed, count in zip(self.places, axes, strict=True)]
        total = embedded[0]
        for vectors in embedded[1:]:
            total = total[..., None, :] + vectors
        total = total.flatten(0, -2)
        # one frame, or all frames alike
        return total.repeat(grid.length // len(total), 1)

    def _condition(
        self, t: Tensor, cond: Conditioning, batch: int
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the vector that modulates, and the tokens ``(B, n, Dl)`` beside the latents."""
        vector, tokens = self.time(t), []
        labels = None
        if self.classes is not None:
            labels = self.classes(class_rows(cond.labels, self.num_classes, batch, t.device))
        if self.condition == "token":
            tokens.append(vector[:, None].expand(batch, 1, vector.shape[-1]))
            tokens += [] if labels is None else [labels[:, None]]
        elif labels is not None:
            vector = vector + labels
        if self.text is not None:
            count, width = self.text_shape
            text, mask = cond.text, cond.text_mask
            if text is None:
                text = torch.zeros(batch, count, width, device=t.device)
            elif text.shape[::2] != (batch, width):
                raise ValueError(
                    f"cond.text must have shape ({batch}, N, {width}), but has "
                    f"{tuple(text.shape)}. Give tokens of width model.text_size."
                )
            words = self.text(text.to(self.text.weight.dtype))
            tokens.append(words if mask is None else words.masked_fill(~mask[:, :, None], 0.0))
        return (vector if self.condition == "adaln" else None), tokens

    def _run(
        self,
        block: nn.Module,
        tape: Tensor,
        latents: Tensor,
        c: Tensor | None,
        sides: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            result: tuple[Tensor, Tensor] = checkpoint(
                block, tape, latents, c, sides, use_reentrant=False, preserve_rng_state=False
            )
            return result
        tape, latents = block(tape, latents, c, sides)
        return tape, latents

    def example(self, shape: tuple[int, ...], device: torch.device | str) -> tuple[Any, ...]:
        """Return arguments of :meth:`forward` for one sample, in the middle of a trajectory."""
        latents = torch.zeros(1, *self.latents.shape, device=device)
        known = torch.ones(1, dtype=torch.bool, device=device)
        return (*super().example(shape, device), {"latents": latents, "known": known})

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a condition of one sample, with all that the network reads."""
        count, width = self.text_shape
        return Conditioning(
            labels=torch.zeros(1, dtype=torch.int64, device=device),
            text=torch.zeros(1, count, width, device=device) if width else None,
        )


def _whole(size: Sequence[int], patch: tuple[int, int, int]) -> Groups:
    """Cut a clip into patches that are all one group.

    Raises:
        ValueError: a side is no multiple of the patch.
    """
    sides = tuple(int(side) for side in size)
    if min(sides) < 1 or any(side % pixels for side, pixels in zip(sides, patch, strict=True)):
        raise ValueError(
            f"Frames, height and width must be multiples of the patch {patch}, but are {sides}. "
            "Pad, crop or resize the input, or change model.patch_size."
        )
    return Groups((1, 1, 1), Groups.of(sides, patch, (1, 1, 1)).counts, patch)


def _check_settings(model: Backbone) -> tuple[tuple[int, int, int], Groups]:
    """Check RIN's settings, and return the patch and the grid of the trained input."""
    config = model.config
    check_positive(
        config, *("in_channels", "tape_width", "latent_width", "num_latents", "depth"),
        *("compute_depth", "num_heads", "head_size"),
    )  # fmt: skip
    check_choice("condition", config["condition"], ("token", "adaln"))
    check_choice("positions", config["positions"], ("learned", "mlp"))
    check_choice("patch_norm", config["patch_norm"], ("none", "after", "both"))
    check_text(config["text_size"], config["num_text_tokens"], 0)
    if config["reference_channels"] < 0:
        raise ConfigError(
            f"model.reference_channels must be 0 or more, but is {config['reference_channels']}. "
            "Give the channels of the reference, or 0 without one."
        )
    patch = config["patch_size"]
    sides = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(sides) != 3 or min(sides) < 1:
        raise ConfigError(
            "model.patch_size must be a positive number, or three along time, height and width, "
            f"but is {patch}. Give e.g. 4."
        )
    for name in ("input_size", "patch_size"):
        if not isinstance(config[name], int):
            model.register_to_config(**{name: list(config[name])})
    try:
        grid = _whole(frames_and_sides(config["input_size"]), sides)
    except ValueError as error:
        raise ConfigError(f"model.input_size does not fit. {error}") from None
    return sides, grid
