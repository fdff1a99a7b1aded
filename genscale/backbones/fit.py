"""FIT, the network of Snap Video: latents that read from groups of patches, compute, write back.

W. Menapace et al., "Snap Video: Scaled Spatiotemporal Transformers for Text-to-Video Synthesis",
CVPR 2024, arXiv:2402.14797, on the network of T. Chen and L. Li, "FIT: Far-reaching Interleaved
Transformers", arXiv:2305.12689. No program or weights of Snap Video are published; the network is
matched number for number (``scripts/parity/snap_video.py``) with that of the same authors' audio
model, which has the published numbers of parameters. Its state dicts load through
``genscale/io/converters/fit.py``.

A clip of T frames is cut into patches, patches into groups that span all frames. Each group has its
own few latents. In every block

    read:     the latents attend to the condition's tokens, then each to the patches of its group;
    compute:  all latents attend to each other, several times;
    write:    each patch attends to the latents of its group.

Patches hold the pixels, latents do the work, so that a clip of 10^5 tokens costs two thin
cross-attentions a block. The last latents are handed to the next call (the next noise level), where
they are added to the learned ones: the memory ``{"latents": (B, L, D), "known": (B,) bool}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.fit_context import ContextTokens
from genscale.backbones.fit_groups import GroupedPositions, Groups
from genscale.backbones.fit_layers import (
    Attention,
    ComputeLayer,
    FeedForward,
    LocalConvolution,
    LocalLayer,
    SelfConditioning,
    gain_norm,
    start_numbers,
)
from genscale.backbones.fit_settings import (
    ExtraInput,
    Sizes,
    check_clip,
    check_settings,
    frames_and_sides,
    read_extra_inputs,
    with_memory,
)
from genscale.conditioning.base import Conditioning

Arch = Literal["snap", "fit_original"]
LocalKind = Literal["attention", "convolution"]


class FITBlock(nn.Module):
    """Read, compute, write (arXiv:2402.14797, section 3.3); every line is a residual.

    Args:
        sizes: widths and heads.
        num_local: layers among the patches of a group, before all else.
        num_global: layers among all latents; 0 builds a block of local layers alone.
        local_grid: patches of a group along time, height and width, where local layers are
            convolutions; None where they are attention.
        context_first: read the context before the patches, else after.
        cross_mlp: follow every cross-attention by a feed-forward layer.
        dropout: inside the feed-forward layers of local and global layers.
        double_residual: double the stream where a feed-forward layer is left out.
    """

    def __init__(
        self,
        sizes: Sizes,
        num_local: int,
        num_global: int,
        *,
        local_grid: tuple[int, int, int] | None,
        context_first: bool,
        cross_mlp: bool,
        dropout: float,
        double_residual: bool,
    ) -> None:
        super().__init__()
        self.context_first, self.double_residual = context_first, double_residual
        eps, patch, latent = sizes.eps, sizes.patch, sizes.latent

        def cross(name: str, size: int, context: int) -> tuple[Attention, FeedForward | None]:
            attention = Attention(size, context, *sizes.heads[name], eps=eps)
            return attention, FeedForward(size, eps=eps) if cross_mlp else None

        self.convolves = local_grid is not None
        self.local_layers = nn.ModuleList(
            LocalLayer(patch, *sizes.heads["local"], dropout=dropout, eps=eps)
            if local_grid is None
            else LocalConvolution(patch, local_grid, sizes.context, eps=eps)
            for _ in range(num_local)
        )
        self.computes = num_global > 0
        if not self.computes:
            return
        self.context, self.context_mlp = cross("context", latent, sizes.context)
        self.read, self.read_mlp = cross("read", latent, patch)
        self.global_layers = nn.ModuleList(
            ComputeLayer(latent, *sizes.heads["global"], dropout=dropout, eps=eps)
            for _ in range(num_global)
        )
        self.write, self.write_mlp = cross("write", patch, latent)

    def forward(self, patches: Tensor, latents: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Advance both.

        Args:
            patches: ``(B G, p, Dp)``.
            latents: ``(B, L, Dl)``, a group's rows beside each other.
            context: ``(B, N, Dc)``.
        """
        whole = None
        if self.convolves:  # the condition's tokens, noise level among them, as one vector a group
            whole = context.sum(1).repeat_interleave(len(patches) // len(context), 0)
        for layer in self.local_layers:
            patches = layer(patches, whole)
        if not self.computes:
            return patches, latents
        if self.context_first:
            latents = self._attend(latents, context, self.context, self.context_mlp)
        # a group stands in the place of a sample
        shape, groups = latents.shape, (len(patches), -1, latents.shape[-1])  # (B G, L / G, Dl)
        latents = latents.reshape(groups)
        latents = self._attend(latents, patches, self.read, self.read_mlp).view(shape)
        if not self.context_first:
            latents = self._attend(latents, context, self.context, self.context_mlp)
        for layer in self.global_layers:
            latents = layer(latents)
        patches = self._attend(patches, latents.reshape(groups), self.write, self.write_mlp)
        return patches, latents

    def _attend(
        self, x: Tensor, context: Tensor, attention: Attention, mlp: FeedForward | None
    ) -> Tensor:
        x = x + attention(x, context)
        if mlp is not None:
            return x + mlp(x)
        # parity: the program keeps an identity inside the residual where it leaves out the layer
        return 2 * x if self.double_residual else x


class FIT(Backbone):
    """Far-reaching interleaved transformer on clips, or on pictures.

    A picture ``(B, C, H, W)`` given to a network of clips is repeated over the trained number of
    frames, and the predicted frames are averaged. Clips of another size than ``input_size`` are
    accepted when patches and groups divide them and latents can be shared out among the groups.

    The network's time is EDM's ln(sigma) / 4 (``time_input: quarter_log_sigma``).

    Args:
        input_size: frames, height and width of the trained clip; a side, or height and width, for
            a network of pictures.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row for the null class. 0 without classes.
        patch_size: pixels of a patch along time, height and width.
        group_size: patches of a group along the same axes; along time, all frames as a rule.
        patch_width: width Dp of the patches' tokens.
        latent_width: width Dl of the latents.
        context_width: width Dc of the condition's tokens.
        num_latents: L, shared out among the groups. More of them cost more and follow larger
            motion; too few leave blocky artefacts where much moves.
        depth: blocks.
        global_depth: layers among latents in a block.
        local_depth: layers among the patches of a group in a block; with them, a last block of
            local layers alone is added. Snap Video has none.
        local_kind: ``attention``, as in the first FIT, or ``convolution``: two 3 x 3 convolutions
            of each frame's patches, told of the condition (ours).
        patch_head_size: channels of a head that reads, writes or is local.
        latent_head_size: of a head that reads the context or is global.
        heads: number and size of heads by layer (``read``, ``write``, ``context``, ``global``,
            ``local``) where they do not fill the narrower of the two widths.
        cross_mlp: follow every cross-attention by a feed-forward layer.
        dropout: inside the feed-forward layers of local and global layers.
        text_size: width of the text tokens; 0 builds a model without text.
        num_text_tokens: their number, where none are given.
        text_null_token: learn what stands in the place of no text, else zeros do.
        reads_size: read ``cond.size``, the picture's height and width.
        size_unit: pixels that count as 1 there.
        reads_frame_rate: read ``cond.frame_rate``.
        reference_channels: channels of ``cond.reference``, a clip or picture of any size that is
            stretched to the input's and joined to its channels; ``cond.reference_level`` then
            is one more token. 0 without reference.
        extra_inputs: further views of the input, joined to its channels: averages over windows
            ``kernel`` (frames, height, width), stretched back by ``mode`` (``nearest`` or
            ``trilinear``).
        output_conv: smooth the predicted frames by a 7 x 7 convolution that starts as the identity.
        arch: ``"snap"``, or ``"fit_original"`` for what the first FIT does otherwise: groups share
            their patches' positions, the time is a fixed sinusoid, latents read the context after
            the patches, and norms have an eps of 1e-6.
        init_scale: factor of torch's law for linear layers.
        double_residual_quirk: without ``cross_mlp``, double latents and patches after every
            cross-attention, as the program of the audio model does.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("FITBlock",)
    cached_modules = ("ComputeLayer.attention", "ComputeLayer.mlp")
    self_conditioning = True
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | Sequence[int] = (16, 40, 64),
        in_channels: int = 3,
        num_classes: int = 0,
        patch_size: Sequence[int] = (1, 4, 4),
        group_size: Sequence[int] = (16, 5, 4),
        patch_width: int = 768,
        latent_width: int = 1024,
        context_width: int = 768,
        num_latents: int = 512,
        depth: int = 6,
        global_depth: int = 4,
        local_depth: int = 0,
        local_kind: LocalKind = "attention",
        patch_head_size: int = 48,
        latent_head_size: int = 64,
        heads: Mapping[str, Sequence[int]] | None = None,
        cross_mlp: bool = True,
        dropout: float = 0.1,
        text_size: int = 0,
        num_text_tokens: int = 125,
        text_null_token: bool = False,
        reads_size: bool = False,
        size_unit: float = 1.0,
        reads_frame_rate: bool = False,
        reference_channels: int = 0,
        extra_inputs: Sequence[Mapping[str, Any]] = (),
        output_conv: bool = False,
        arch: Arch = "snap",
        init_scale: float = 3**-0.5,
        double_residual_quirk: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.groups = check_settings(self)
        sizes = self.sizes
        original = arch == "fit_original"
        self.num_frames, self.reference_channels = (
            frames_and_sides(input_size)[0],
            reference_channels,
        )
        self.group_size, self.patch_size = self.groups.group, self.groups.patch
        self.dropout, self.init_scale = dropout, init_scale
        self.extra_inputs: list[ExtraInput] = read_extra_inputs(extra_inputs)
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        pixels = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        seen = in_channels * (1 + len(self.extra_inputs)) + reference_channels

        self.patch = nn.Linear(seen * pixels, patch_width)
        self.patch_norm = nn.LayerNorm(patch_width, eps=sizes.eps)
        self.positions = GroupedPositions(self.groups, patch_width, shared=original)
        self.latents = nn.Parameter(torch.empty(num_latents, latent_width))
        self.past = SelfConditioning(latent_width, eps=sizes.eps)
        self.context = ContextTokens(
            context_width,
            4 * patch_width,
            text_size=text_size,
            num_text_tokens=num_text_tokens,
            text_null_token=text_null_token,
            reads_size=reads_size,
            size_unit=size_unit,
            reads_frame_rate=reads_frame_rate,
            reads_level=reference_channels > 0,
            num_classes=num_classes,
            time_size=latent_width // 4 if original else 0,
        )
        layers = [(local_depth, global_depth)] * depth + [(local_depth, 0)] * (local_depth > 0)
        self.blocks = nn.ModuleList(
            FITBlock(
                sizes,
                *counts,
                local_grid=self.groups.group if local_kind == "convolution" else None,
                context_first=not original,
                cross_mlp=cross_mlp,
                dropout=dropout,
                double_residual=double_residual_quirk,
            )
            for counts in layers
        )
        self.head_norm = gain_norm(patch_width, sizes.eps)
        self.head = nn.Linear(patch_width, in_channels * pixels)
        self.smooth = nn.Conv3d(in_channels, in_channels, (1, 7, 7)) if output_conv else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator."""
        start_numbers(self, self.init_scale)
        nn.init.normal_(self.latents, std=0.02)
        nn.init.normal_(self.positions.table, std=0.02)
        if self.context.text_null is not None:
            nn.init.normal_(self.context.text_null, std=0.02)
        if self.smooth is not None:
            nn.init.dirac_(self.smooth.weight)
            if self.smooth.bias is not None:
                nn.init.zeros_(self.smooth.bias)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, T, H, W)``, or a picture ``(B, C, H, W)``; see the class.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time.
            cond: of its fields, those are read that the settings name; what is None counts as
                absent.
            memory: what the previous call returned, or None. Samples whose ``known`` is false
                are computed as without memory.

        Returns:
            ``sample`` shaped as ``x``, and the memory for the next call.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_clip(self, x, t, cond)
        clip = x if x.dim() == 5 else x[:, :, None].expand(-1, -1, self.num_frames, -1, -1)
        groups = Groups.of(clip.shape[2:], self.patch_size, self.group_size)
        patches = self.patch_norm(self.patch(groups.cut(self._views(clip, cond))))
        places = self.positions(groups)  # (G or 1, p, Dp)
        patches = (patches.unflatten(0, (len(x), groups.number)) + places).flatten(0, 1)
        context = self.context(t, cond, len(x))
        latents = with_memory(self.latents, self.past, memory, batch=len(x), groups=groups.number)
        for block in self.blocks:
            patches, latents = self._run(block, patches, latents, context)
        sample = groups.join(self.head(self.head_norm(patches)))
        if self.smooth is not None:
            sample = self.smooth(F.pad(sample, (3, 3, 3, 3, 0, 0), mode="reflect"))
        known = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return BackboneOutput(
            sample=sample if x.dim() == 5 else sample.mean(dim=2),
            memory={"latents": latents, "known": known},
        )

    def _views(self, clip: Tensor, cond: Conditioning) -> Tensor:
        """Join to the channels of a clip its averages, then the reference."""
        sides = clip.shape[2:]
        views = [clip] + [extra.view_of(clip) for extra in self.extra_inputs]
        if self.reference_channels:
            reference = cond.reference
            if reference is None:
                reference = clip.new_zeros(len(clip), self.reference_channels, 1, 1, 1)
            elif reference.dim() == 4:
                reference = reference[:, :, None]  # one picture for all frames
            views.append(F.interpolate(reference.to(clip.dtype), size=sides, mode="trilinear"))
        return torch.cat(views, dim=1) if len(views) > 1 else clip

    def _run(
        self, block: nn.Module, patches: Tensor, latents: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            random = self.training and self.dropout > 0
            result: tuple[Tensor, Tensor] = checkpoint(
                block, patches, latents, context, use_reentrant=False, preserve_rng_state=random
            )
            return result
        patches, latents = block(patches, latents, context)
        return patches, latents

    @property
    def size_step(self) -> tuple[int, int]:
        """Patch times group, and the windows of the extra inputs."""
        steps = [a * b for a, b in zip(self.patch_size, self.group_size, strict=True)]
        for extra in self.extra_inputs:
            steps = [math.lcm(a, b) for a, b in zip(steps, extra.kernel, strict=True)]
        return steps[1], steps[2]

    def size_problem(self, height: int, width: int) -> str | None:
        """Return why inputs of other sides cannot be read; see :class:`Backbone`."""
        size = (self.num_frames, height, width)
        groups = Groups.of(size, self.patch_size, self.group_size).number
        if len(self.latents) % groups:
            return (
                f"it would have {groups} groups of patches, which cannot share out its "
                f"{len(self.latents)} latents. Give a size of another number of groups, of which "
                f"the trained one has {self.groups.number}."
            )
        return super().size_problem(height, width)

    def example(self, shape: tuple[int, ...], device: torch.device | str) -> tuple[Any, ...]:
        """Return arguments of :meth:`forward` for one sample, in the middle of a trajectory."""
        latents = torch.zeros(1, *self.latents.shape, device=device)
        known = torch.ones(1, dtype=torch.bool, device=device)
        return (*super().example(shape, device), {"latents": latents, "known": known})

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a condition of one sample, with all that the network reads."""
        count, width = self.context.text_shape
        config = self.config
        return Conditioning(
            labels=torch.zeros(1, dtype=torch.int64, device=device),
            text=torch.zeros(1, count, width, device=device) if width else None,
            size=torch.zeros(1, 2, device=device) if config["reads_size"] else None,
            frame_rate=torch.ones(1, device=device) if config["reads_frame_rate"] else None,
            reference_level=torch.zeros(1, device=device) if self.reference_channels else None,
        )
