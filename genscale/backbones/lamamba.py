"""LaMamba-Diff: a denoising U-Net of 2-D scans and window attention (arXiv:2408.02615).

Y. Fu, C. Chen, Y. Yu, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local
Attention and Mamba", 2024. Official program: yunxiangfu2001/LaMamba-Diff, MIT. It is matched
number for number (``scripts/parity/lamamba.py``).

Every block looks at the whole picture through a selective scan in four directions, mends detail
with attention inside windows, and ends with an MLP; the condition shifts, scales and gates each of
the three. Both kinds of mixing take time linear in the number of cells. Blocks are stacked in four
stages on grids of sides 1, 1/2, 1/4 and 1/4, joined to their mirror images by added skips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.lamamba_settings import StageSettings, resolve_layout
from genscale.backbones.shapes import check_inputs, class_rows
from genscale.conditioning.base import Conditioning
from genscale.layers.embed import LearnedPositions, TimeEmbedding, sincos_positions
from genscale.layers.mlp import MLP
from genscale.layers.norm import per_sample, upcast
from genscale.layers.skip_scale import SkipScale, SkipScaling
from genscale.layers.ss2d import SS2D
from genscale.layers.window_attention import WindowAttention


class LaMambaBlock(nn.Module):
    """x += g_r F_r(norm_r(x) (1 + k_r) + s_r) for F = scan, window attention, MLP, in this order.

    Shifts s, scales k and gates g are read off the condition. The norms have weights of their own.
    """

    def __init__(
        self, settings: StageSettings, condition_size: int, *, project: bool, shifted: bool
    ) -> None:
        super().__init__()
        size = settings.hidden_size
        mlp_size = int(settings.mlp_ratio * size)
        self.condition = nn.Linear(condition_size, size) if project else nn.Identity()
        rank = settings.modulation_rank
        self.modulation: nn.Module = nn.Linear(size, 9 * size)
        if rank is not None:
            self.modulation = nn.Sequential(nn.Linear(size, rank), nn.Linear(rank, 9 * size))
        self.scan_norm = nn.LayerNorm(size)
        self.scan = SS2D(
            size,
            state_size=settings.state_size,
            expansion=settings.expansion,
            step_rank=settings.step_rank,
            kernel_size=settings.kernel_size,
            conv_bias=settings.conv_bias,
            scan=settings.scan,
        )
        self.attention_norm = nn.LayerNorm(size)
        self.attention = WindowAttention(
            size, settings.num_heads, settings.window_size, shifted=shifted
        )
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = MLP(size, mlp_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Advance a grid ``(B, H, W, C)`` under the condition ``(B or 1, condition size)``."""
        modulation = self.modulation(F.silu(self.condition(c)))
        parts = [per_sample(part, x) for part in modulation.chunk(9, dim=-1)]
        steps = (
            (self.scan_norm, self.scan),
            (self.attention_norm, self.attention),
            (self.mlp_norm, self.mlp),
        )
        for i, (norm, mix) in enumerate(steps):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            x = torch.addcmul(x, gate, mix(torch.addcmul(shift, norm(x), 1 + scale)))
        return x


class Downsample(nn.Module):
    """Halve the grid ``(B, H, W, C)``, rounding up, and widen it.

    Args:
        in_size: width C.
        out_size: width of the result.
        kind: ``"merge"``: four neighbours side by side, layer norm, linear layer (Swin);
            ``"conv2"``, ``"conv3"``: convolution of that kernel and stride 2, layer norm.
    """

    def __init__(self, in_size: int, out_size: int, kind: str) -> None:
        super().__init__()
        self.merge = kind == "merge"
        if self.merge:
            self.norm = nn.LayerNorm(4 * in_size)
            self.reduce = nn.Linear(4 * in_size, out_size, bias=False)
        else:
            kernel = 2 if kind == "conv2" else 3
            self.conv = nn.Conv2d(in_size, out_size, kernel, stride=2, padding=kernel - 2)
            self.norm = nn.LayerNorm(out_size)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample a grid; odd sides are filled up with zeros."""
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        if not self.merge:
            y: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            return y
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, row, w, column, C)
        merged: Tensor = self.reduce(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))
        return merged


class Upsample(nn.Module):
    """Linear layer to ``ratio``^2 cells of ``out_size`` channels each, layer norm."""

    def __init__(self, in_size: int, out_size: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.expand = nn.Linear(in_size, out_size * ratio**2, bias=False)
        self.norm = nn.LayerNorm(out_size)

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``(B, H, W, C)`` into ``(B, ratio H, ratio W, out_size)``."""
        x = self.expand(x).unflatten(3, (self.ratio, self.ratio, -1))  # (B, h, w, row, column, C)
        y: Tensor = self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        return y


class Stage(nn.Module):
    """Blocks on one grid; every second one has shifted windows.

    Args:
        settings: what the blocks are made of.
        depth: how many there are.
        condition_size: width of the condition.
        project: project the condition in every block, even where its width fits already.
        checkpointed: recompute the blocks in the backward pass.
    """

    def __init__(
        self,
        settings: StageSettings,
        depth: int,
        condition_size: int,
        *,
        project: bool,
        checkpointed: bool,
    ) -> None:
        super().__init__()
        project = project or condition_size != settings.hidden_size
        self.gradient_checkpointing = checkpointed  # diffusers' name for the switch
        self.blocks = nn.ModuleList(
            LaMambaBlock(settings, condition_size, project=project, shifted=i % 2 == 1)
            for i in range(depth)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Advance a grid ``(B, H, W, C)`` under the condition ``(B or 1, condition size)``."""
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # nothing in a block is random, and reading the generator waits for the device
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
        return x


class LaMamba(Backbone):
    """Class-conditional U-Net whose blocks scan, attend inside windows, and apply an MLP.

    The network's time is the noise step 0..999: the objective's ``time_input: timestep``.

    Inputs of another size than ``input_size``, oblong ones included, need sides that are multiples
    of the patch. Odd grids are filled up where they are halved, grids that are no multiple of
    the window where windows are cut; positions are stretched over the new grid.

    Args:
        input_size: side of the trained input, or its height and width.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row, the last, for the null class, which
            labels of -1 and missing labels mean. 0 builds an unconditional model.
        patch_size: side of a cell of the finest grid.
        hidden_sizes: width of each of the four stages, finest first: d, 2 d, 4 d, 4 d.
        depths: blocks of each stage.
        bottleneck_depth: blocks between encoder and decoder, on the coarsest grid.
        decoder_depths: blocks of each decoder stage, coarsest first; default one more than the
            encoder stage on the same grid, or none where that has none.
        num_heads: attention heads, of each stage or of all.
        window_size: side of the windows; on smaller grids they are the whole grid.
        scan: orders of the scan: ``"continuous"`` turns at every edge, ``"cross"`` is VMamba's.
        state_size: numbers of state N a channel and direction of the scan.
        expansion: inner width of the scan over the stage's.
        step_rank: rank of the scan's step sizes; default a sixteenth of the stage's width.
        kernel_size: side of the depthwise kernel before the scan, odd.
        conv_bias: whether that convolution has a bias.
        mlp_ratio: inner width of the MLP over the stage's.
        downsample: ``"merge"``, ``"conv2"`` or ``"conv3"``, see :class:`Downsample`.
        patch_norm: layer norm after the patches.
        modulation_rank: rank of the layer that reads shifts, scales and gates off the condition,
            a third of all weights; default full.
        learn_sigma: also predict C channels of variance (arXiv:2102.09672), ``aux["variance"]``.
        zero_init_head: start with a prediction of zero. The official program does not, against
            its intention.
        skip_scale: factors on the four skips before they are added (ScaleLong,
            arXiv:2310.13545); see :class:`~genscale.layers.skip_scale.SkipScale`. Gates keep the
            model to the trained resolution; a shared one serves the skips of one grid.
        skip_kappa: base of ``skip_scale: geometric``.
        checkpoint_stages: stages (0 is the finest) whose blocks, in encoder and decoder, are
            recomputed in the backward pass instead of kept; 3 includes the middle.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("LaMambaBlock",)
    cached_modules = ("LaMambaBlock.scan", "LaMambaBlock.attention", "LaMambaBlock.mlp")
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch_size: int = 1,
        hidden_sizes: Sequence[int] = (320, 640, 1280, 1280),
        depths: Sequence[int] = (2, 2, 2, 2),
        bottleneck_depth: int = 2,
        decoder_depths: Sequence[int] | None = None,
        num_heads: int | Sequence[int] = 16,
        window_size: int = 8,
        scan: Literal["continuous", "cross"] = "continuous",
        state_size: int = 1,
        expansion: float = 2.0,
        step_rank: int | None = None,
        kernel_size: int = 3,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        downsample: Literal["merge", "conv2", "conv3"] = "merge",
        patch_norm: bool = True,
        modulation_rank: int | None = None,
        learn_sigma: bool = False,
        zero_init_head: bool = True,
        skip_scale: SkipScaling = "none",
        skip_kappa: float = 0.5,
        checkpoint_stages: Sequence[int] = (),
    ) -> None:
        super().__init__()
        # lists given as tuples or by a config library are kept as plain lists, as JSON has them
        plain = {
            name: list(value)
            for name, value in self.config.items()
            if isinstance(value, Sequence) and not isinstance(value, str)
        }
        self.register_to_config(**plain)
        layout = resolve_layout(self.config)
        widths = [stage.hidden_size for stage in layout.stages]
        finest, condition_size = widths[0], widths[-1]
        self.num_classes = num_classes
        self.learn_sigma, self.zero_init_head = learn_sigma, zero_init_head

        self.patch = nn.Conv2d(in_channels, finest, patch_size, stride=patch_size)
        self.embed_norm = nn.LayerNorm(finest) if patch_norm else nn.Identity()
        self._grid = layout.grid
        self.position = LearnedPositions(*layout.grid, finest)
        self.time = TimeEmbedding(condition_size)
        self.class_table = nn.Embedding(num_classes + 1, condition_size)

        def build(level: int, depth: int, *, project: bool) -> Stage:
            return Stage(
                layout.stages[level],
                depth,
                condition_size,
                project=project,
                checkpointed=level in checkpoint_stages,
            )

        self.encoder = nn.ModuleList(
            build(i, n, project=False) for i, n in enumerate(layout.depths)
        )
        self.downsamples = nn.ModuleList(
            Downsample(widths[i], widths[i + 1], downsample) for i in range(2)
        )
        self.middle = build(3, layout.bottleneck_depth, project=False)
        self.upsamples = nn.ModuleList(Upsample(widths[i + 1], widths[i], 2) for i in (1, 0))
        self.decoder = nn.ModuleList(
            build(3 - i, n, project=True) for i, n in enumerate(layout.decoder_depths)
        )
        self.skip_factors = SkipScale(
            skip_scale,
            len(widths),
            hidden_size=widths[::-1],
            num_tokens=layout.cells[::-1],
            kappa=skip_kappa,
        )
        self.head_up = Upsample(finest, finest, patch_size)
        self.head_condition = nn.Linear(condition_size, finest)
        self.head_modulation = nn.Linear(finest, 2 * finest)
        self.head = nn.Linear(finest, (1 + learn_sigma) * in_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them.

        Every block starts as the identity: its gates are zero.
        """
        for module in reversed(list(self.modules())[1:]):  # parts before the whole
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in self._grid)
        table = sincos_positions(rows, columns, self.patch.out_channels).flatten(0, 1)
        self.position.table.copy_(table.to(self.position.table.device))
        for layer in (self.class_table, self.time.linear_1, self.time.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        closed: list[nn.Module] = [self.head_modulation, *[self.head] * self.zero_init_head]
        for module in self.modules():
            if isinstance(module, LaMambaBlock):
                read = module.modulation
                closed.append(read[-1] if isinstance(read, nn.Sequential) else read)
        for module in closed:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Name biases, norms, embeddings, position tables and the scan's rates.

        The official recipe decays everything.
        """
        tables = ("position.table", "class_table.weight")
        ends = ("bias_table", "step_bias", "log_rate")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() == 1 or name in tables or name.endswith(ends)
        }

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, H, W)``, H and W multiples of the patch.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time; see the class.
            cond: ``labels`` ``(B,)`` or None are read.
            memory: not used; the model has none.

        Returns:
            ``sample`` ``(B, C, H, W)``; with ``learn_sigma`` also ``aux["variance"]``, alike.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_inputs(self, x, t, cond.labels)
        c = self._embed_condition(t, cond.labels)
        # channels-last from the start, so that the grid below is a view and stays one
        y = self.patch(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        y = self.embed_norm(y)
        y = y + self.position(*y.shape[1:3])
        skips = []
        for i, stage in enumerate(self.encoder):
            y = stage(y, c)
            skips.append(y)
            if i < len(self.downsamples):
                y = self.downsamples[i](y)
        y = y + self.middle(y, c)
        for i, stage in enumerate(self.decoder):
            if i >= 2:
                y = self.upsamples[i - 2](y)
            skip = self.skip_factors(skips.pop(), i)
            y = y[:, : skip.shape[1], : skip.shape[2]] + skip  # odd grids were filled up
            y = stage(y, c)
        return self._predict(y, c)

    def _embed_condition(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the condition ``(B, D)``, or ``(1, D)`` when all samples share it."""
        # without labels all samples share the null row
        rows = class_rows(labels if self.num_classes else None, self.num_classes, 1, t.device)
        features: Tensor = self.time(t)
        return features + self.class_table(rows)

    def _predict(self, y: Tensor, c: Tensor) -> BackboneOutput:
        """Turn the finest grid into predictions."""
        y = self.head_up(y)
        parts = self.head_modulation(F.silu(self.head_condition(c))).chunk(2, dim=-1)
        shift, scale = (per_sample(part, y) for part in parts)
        wide = upcast(y)
        y = F.layer_norm(wide, y.shape[-1:], eps=1e-6).to(y.dtype)
        y = self.head(y * (1 + scale) + shift).permute(0, 3, 1, 2).contiguous()
        if not self.learn_sigma:
            return BackboneOutput(sample=y)
        sample, variance = y.chunk(2, dim=1)
        return BackboneOutput(sample=sample, aux={"variance": variance})
