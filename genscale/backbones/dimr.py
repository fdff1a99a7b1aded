"""DiMR: multi-resolution diffusion with time-dependent layer normalisation (arXiv:2406.09416).

Q. Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models
and Time-Dependent Layer Normalization", NeurIPS 2024. Official program: qihao067/DiMR,
Apache-2.0. It is matched number for number (``scripts/parity/dimr.py``), its checkpoints load
through ``genscale/io/converters/dimr.py``.

Several branches look at the same noisy picture, from coarse to fine. The coarsest is a U-shaped
transformer on large patches, which sees everything at once; the finer ones are convolutional and
mend detail. Each branch hands *all* of its intermediate features to the next one and predicts the
target at its own resolution. Time enters only through the normalisation layers, whose scales are
learned blends of two vectors (:mod:`genscale.layers.time_dependent`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.dimr_blocks import ConvNeXtBlock, FeatureUpsampler, TransformerBlock
from genscale.backbones.dimr_settings import (
    BranchSettings,
    default_pyramid_weights,
    resolve_branches,
    trained_size,
)
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.layers.embed import LearnedPositions
from genscale.layers.norm import (
    TimeDependentLayerNorm,
    VectorNorm,
)
from genscale.layers.rope import axial_positions
from genscale.layers.skip_scale import SkipScale, SkipScaling
from genscale.layers.time_dependent import TimeDependentVectors


class Branch(nn.Module):
    """One resolution: patches in, blocks with U-shaped skips, a prediction and features out.

    Args:
        settings: what this branch is made of.
        in_channels: channels C of the picture.
        grid: rows and columns of its grid at the trained resolution.
        coarser: the next coarser branch, whose features this one takes, or None.
        cell_size: pixels along one side that one cell predicts.
        hand_on: whether a finer branch follows, which takes the features.
        num_labels: rows of the class table; 0 for none. Transformers only.
        norm: name of the blocks' norm.
        axial_rope: rotary positions instead of a table, in transformers.
        position_resize: see :class:`~genscale.layers.embed.LearnedPositions`.
        fused_upsample: see :class:`FeatureUpsampler`.
        checkpointed: recompute the blocks in the backward pass.
    """

    def __init__(
        self,
        settings: BranchSettings,
        *,
        in_channels: int,
        grid: tuple[int, int],
        coarser: BranchSettings | None,
        cell_size: int,
        hand_on: bool,
        num_labels: int,
        norm: str,
        axial_rope: bool,
        position_resize: Literal["interpolate", "crop"],
        fused_upsample: bool,
        checkpointed: bool,
    ) -> None:
        super().__init__()
        size, patch, half = settings.hidden_size, settings.patch_size, settings.depth // 2
        transformer = settings.block_type == "transformer"
        axial_rope = axial_rope and transformer
        self.image_ratio, self.cell_size, self.hand_on = settings.image_ratio, cell_size, hand_on
        self.transformer, self.axial_rope = transformer, axial_rope
        self.gradient_checkpointing = checkpointed  # diffusers' name for the switch
        self.dropout = settings.dropout
        self.patch = nn.Conv2d(in_channels, size, patch, stride=patch)
        self.position: LearnedPositions | None = None
        if not axial_rope:
            self.position = LearnedPositions(*grid, size, position_resize)
        self.upsample: FeatureUpsampler | None = None
        if coarser is not None:
            self.upsample = FeatureUpsampler(
                coarser.depth + 1,  # the blocks' outputs and what the first block reads
                coarser.hidden_size,
                size,
                coarser.downsample // settings.downsample,
                fused=fused_upsample,
            )
        self.class_table = nn.Embedding(num_labels, size) if transformer and num_labels else None
        blocks = [
            TransformerBlock(settings, norm, axial_rope=axial_rope)
            if transformer
            else ConvNeXtBlock(settings, norm)
            for _ in range(settings.depth)
        ]
        self.num_vectors = blocks[0].num_vectors  # a block
        self.blocks = nn.ModuleList(blocks)
        self.skips = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(half))
        self.skip_factors = SkipScale(
            settings.skip_scale,
            half,
            hidden_size=size,
            num_tokens=grid[0] * grid[1] + (self.class_table is not None),
            kappa=settings.skip_kappa,
        )
        self.head_norm = TimeDependentLayerNorm(size)
        kernel = settings.head_kernel_size
        self.head = nn.Conv2d(size, in_channels * cell_size**2, kernel, padding=kernel // 2)

    def forward(
        self, x: Tensor, features: list[Tensor], labels: Tensor | None, vectors: Iterator[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Predict the target at this resolution.

        Args:
            x: ``(B, C, H, W)``, the noisy picture at full resolution.
            features: what the coarser branch handed over, ``(B, N, D_low)`` each.
            labels: ``(B,)`` rows of the class table, or None.
            vectors: the time-dependent vectors from this branch on, in the order of modules.

        Returns:
            The prediction ``(B, C, H_r, W_r)`` and this branch's features ``(B, N_r, D)``: the
            input of the blocks and the output of each. The finest branch hands over none.
        """
        x = self._embed(x)
        _, height, width, _ = x.shape
        if self.upsample is not None:
            ratio = self.upsample.ratio
            x = x + self.upsample(features, height // ratio, width // ratio, vectors)
        if self.transformer:
            x = x.flatten(1, 2)
        if self.class_table is not None and labels is not None:
            x = torch.cat((self.class_table(labels)[:, None].to(x.dtype), x), dim=1)
        positions = axial_positions(height, width, x.device) if self.axial_rope else None

        visited, half = [x], len(self.skips)
        stack: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i > half:
                skip = self.skip_factors(stack.pop(), i - half - 1)
                x = self.skips[i - half - 1](torch.cat((x, skip), dim=-1))
            x = self._run(block, x, tuple(islice(vectors, self.num_vectors)), positions)
            if i < half:
                stack.append(x)
            if self.hand_on:
                visited.append(x)

        if self.transformer:
            x = x[:, -height * width :].unflatten(1, (height, width))
        y = self.head(self.head_norm(x, tuple(islice(vectors, 2))).permute(0, 3, 1, 2))
        s = self.cell_size
        prediction = rearrange(y, "b (i j c) h w -> b c (h i) (w j)", i=s, j=s).contiguous()
        if not self.hand_on:
            return prediction, []
        return prediction, visited if self.transformer else [f.flatten(1, 2) for f in visited]

    def _embed(self, x: Tensor) -> Tensor:
        """Turn the picture into this branch's grid ``(B, h, w, D)`` of positioned patches."""
        if self.image_ratio > 1:
            x = F.avg_pool2d(x, self.image_ratio)
        # channels-last from the start, so that the grid below is a view and stays one
        x = self.patch(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        if self.position is not None:
            x = x + self.position(*x.shape[1:3])
        return x

    def _run(
        self, block: nn.Module, x: Tensor, vectors: tuple[Tensor, ...], positions: Tensor | None
    ) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            y: Tensor = checkpoint(
                block,
                x,
                vectors,
                positions,
                use_reentrant=False,
                # reading the generator's state waits for the device: only where it is needed
                preserve_rng_state=self.dropout > 0,
            )
            return y
        return block(x, vectors, positions)


class DiMR(Backbone):
    """Multi-resolution denoiser; per-branch settings are lists, coarsest branch first.

    The network's time is the code 8 n / 1000 - 4 of the noise step n = 1..1000, or 8 t - 4 of a
    unit time t (1 is noise): the objective's ``time_input: dimr_linear``. Any other code that
    stays within about [-4, 4] works, as time only meets a sigmoid.

    Where the finest branch has patches of more than one pixel, each of its cells predicts all of
    its pixels, and the coarser branches as many; in the paper it has patches of one.

    Inputs of another size than ``input_size`` are accepted when all grids divide them; learned
    position tables are then stretched over the new grid (see ``position_resize``).

    Args:
        input_size: side of the trained input, or its height and width.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row, the last, for the null class, which
            labels of -1 and missing labels mean. 0 builds an unconditional model.
        hidden_sizes: width of each branch.
        depths: blocks of each branch, odd: pairs joined by skips around a middle one.
        patch_sizes: side of each branch's patches, after ``image_ratios``.
        image_ratios: by how much each branch first averages the picture down.
        block_types: ``"transformer"`` or ``"convnext"`` each; default: the coarsest branch is a
            transformer, the others are convolutional. Only transformers see the class.
        num_heads: attention heads (transformer branches).
        kernel_sizes: side of the depthwise kernels, odd (convnext branches).
        mlp_sizes: width inside the feed-forward layers; default twice the branch's width.
        head_kernel_sizes: side of the prediction heads' kernels, odd.
        dropout: drop-out on every residual of the blocks.
        skip_scale: factors on the skips of each branch before they are joined (ScaleLong,
            arXiv:2310.13545); see :class:`~genscale.layers.skip_scale.SkipScale`. Gates keep the
            model to the trained resolution.
        skip_kappa: base of ``skip_scale: geometric``; choose it by a branch's number of skips.
        norm: the blocks' norm. ``"td_rms"`` is that of the released models, ``"td_ln"`` the
            paper's text; ``"rms"`` and ``"ada_rms"`` leave time to the heads and upsamplers.
        position: ``"learned"`` tables, or ``"axial_rope"`` in the transformer branches.
        position_resize: ``"interpolate"`` tables to other grids, or ``"crop"`` them as the
            official program does.
        detach_lowres: keep the gradient of a branch out of the coarser ones.
        fused_upsample: never build the concatenation of the handed features; the plain way is
            kept as a reference.
        checkpoint_stages: branches (0 is the coarsest) whose blocks are recomputed in the
            backward pass instead of kept.
        pyramid_weights: weight of each branch's loss; default 4^-(R - 1 - r)/(R - 1) for branch
            r of R, which is the published 1/4, 1 and 1/4, 1/2, 1.

    A single value stands for the same value in every branch.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("TransformerBlock", "ConvNeXtBlock")
    cached_modules = (
        *("TransformerBlock.attention", "TransformerBlock.mlp"),
        *("ConvNeXtBlock.conv", "ConvNeXtBlock.mlp"),
    )
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        hidden_sizes: Sequence[int] = (960, 480),
        depths: Sequence[int] = (39, 21),
        patch_sizes: Sequence[int] = (2, 1),
        image_ratios: int | Sequence[int] = 1,
        block_types: Sequence[str] | None = None,
        num_heads: int | Sequence[int] = 16,
        kernel_sizes: int | Sequence[int] = 7,
        mlp_sizes: Sequence[int] | None = None,
        head_kernel_sizes: int | Sequence[int] = 3,
        dropout: float | Sequence[float] = 0.0,
        skip_scale: SkipScaling | Sequence[SkipScaling] = "none",
        skip_kappa: float | Sequence[float] = 0.5,
        norm: Literal["td_rms", "td_ln", "rms", "ada_rms"] = "td_rms",
        position: Literal["learned", "axial_rope"] = "learned",
        position_resize: Literal["interpolate", "crop"] = "interpolate",
        detach_lowres: bool = False,
        fused_upsample: bool = True,
        checkpoint_stages: Sequence[int] = (),
        pyramid_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        # lists given as tuples or by a config library are kept as plain lists, as JSON has them
        plain = {
            name: list(value)
            for name, value in self.config.items()
            if isinstance(value, Sequence) and not isinstance(value, str)
        }
        self.register_to_config(**plain)
        branches = resolve_branches(self.config)
        height, width = trained_size(input_size, branches[0].downsample)
        weights = (
            default_pyramid_weights(len(branches)) if pyramid_weights is None else pyramid_weights
        )
        self._pyramid_weights = [float(weight) for weight in weights]
        self.num_classes, self.detach_lowres = num_classes, detach_lowres
        self.downsample = branches[0].downsample
        self.stages = nn.ModuleList(
            Branch(
                settings,
                in_channels=in_channels,
                grid=(height // settings.downsample, width // settings.downsample),
                coarser=branches[r - 1] if r else None,
                cell_size=branches[-1].downsample,
                hand_on=r + 1 < len(branches),
                num_labels=num_classes + 1 if num_classes else 0,
                norm=norm,
                axial_rope=position == "axial_rope",
                position_resize=position_resize,
                fused_upsample=fused_upsample,
                checkpointed=r in checkpoint_stages,
            )
            for r, settings in enumerate(branches)
        )
        self.time = TimeDependentVectors(self._vector_layout())
        self.reset_parameters()

    def _vector_layout(self) -> dict[str, tuple[int, float]]:
        """Return size and start of every vector the norms ask for, in the order of modules."""
        return {
            f"{name}.{vector}": (module.hidden_size, init)
            for name, module in self.named_modules()
            if isinstance(module, VectorNorm)
            for vector, init in module.vector_inits.items()
        }

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        for module in reversed(list(self.modules())[1:]):  # parts before the whole
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def no_weight_decay(self) -> set[str]:
        """Name the gates of the time-dependent vectors, as in the published recipe."""
        return {f"time.{gate}" for gate in TimeDependentVectors.GATES}

    @property
    def size_step(self) -> tuple[int, int]:
        """The coarsest branch's cells."""
        return self.downsample, self.downsample

    @property
    def pyramid_weights(self) -> list[float]:
        """Loss weight of each prediction in ``aux["pyramid"]``, coarse first."""
        return list(self._pyramid_weights)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target at every resolution.

        Args:
            x: ``(B, C, H, W)``, H and W multiples of the coarsest branch's cells.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time; see the class.
            cond: ``labels`` ``(B,)`` or None are read.
            memory: not used; the model has none.

        Returns:
            ``sample`` ``(B, C, H, W)``, and ``aux["pyramid"]``: one prediction a branch,
            ``(B, C, H_r, W_r)``, coarse first, the last being ``sample``.

        Raises:
            ValueError: shapes do not fit together.
        """
        self._check_shapes(x, t, cond.labels)
        labels = None
        if self.num_classes:
            labels = cond.labels
            if labels is None:
                labels = torch.full((len(x),), NULL_LABEL, device=x.device)
            labels = torch.where(labels < 0, self.num_classes, labels)
        vectors = iter(self.time(t / 4))
        pyramid: list[Tensor] = []
        features: list[Tensor] = []
        for branch in self.stages:
            if self.detach_lowres:
                features = [feature.detach() for feature in features]
            prediction, features = branch(x, features, labels, vectors)
            pyramid.append(prediction)
        return BackboneOutput(sample=pyramid[-1], aux={"pyramid": pyramid})

    def _check_shapes(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        channels = self.config["in_channels"]
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"DiMR takes x of shape (B, {channels}, H, W), but {tuple(x.shape)} was given. "
                "Give pictures with as many channels as model.in_channels."
            )
        if x.shape[2] % self.downsample or x.shape[3] % self.downsample:
            raise ValueError(
                f"Height and width must be multiples of {self.downsample}, the coarsest cell, but "
                f"x is {x.shape[2]} x {x.shape[3]}. Pad, crop or resize it."
            )
        if t.shape not in ((len(x),), (1,)):
            raise ValueError(
                f"t must have shape ({len(x)},), or (1,) when shared, but has {tuple(t.shape)}. "
                "Give one time a sample."
            )
        if labels is not None and labels.shape != (len(x),):
            raise ValueError(
                f"cond.labels must have shape ({len(x)},), but has {tuple(labels.shape)}. "
                "Give one label a sample."
            )
