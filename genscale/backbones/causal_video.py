"""CausalVideo: a video transformer that is bidirectional in a block of frames and causal across.

The architecture is Wan's (arXiv:2503.20314) with the block-causal attention of CausVid
(arXiv:2412.07772) and Self Forcing (arXiv:2506.08009, official program guandeh17/Self-Forcing,
Apache-2.0), matched number for number (``scripts/parity/causal_wan.py``); what is kept of a long
history follows BlockVid (arXiv:2511.22973). Checkpoints load through
``genscale/io/converters/causal_wan.py``.

Every frame has a time of its own, so that frames may be noisy to different degrees (Diffusion
Forcing, arXiv:2407.01392). A video is made block by block: finished blocks are remembered as keys
and values, and new ones attend to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.causal_video_block import (
    Attend,
    CausalVideoBlock,
    CausalVideoHead,
    Continued,
    FrameTime,
    KeysValues,
    Whole,
    doubled,
    project_text,
)
from genscale.backbones.causal_video_settings import check_clips, check_settings
from genscale.backbones.shapes import class_rows
from genscale.conditioning.base import Conditioning
from genscale.conditioning.text import masked_mean
from genscale.layers.block_mask import BlockCausalMask
from genscale.layers.embed import PositionResize, grid_places
from genscale.layers.norm import WeightedRMSNorm
from genscale.layers.rope3d import VideoRoPE
from genscale.layers.scale_cache import cache_dtype
from genscale.layers.semantic_bank import look_up
from genscale.layers.video_cache import (
    VIDEO_CACHE,
    Cache,
    CacheKind,
    CachePolicy,
    claim,
    empty_cache,
    frame_numbers,
    frames_committed,
)

Positions = Literal["auto", "absolute", "relative"]

Memory = dict[str, Any]


class CausalVideo(Backbone):
    """Block-causal video transformer.

    Args:
        input_size: frames, height and width of the trained input.
        in_channels: channels C of input and prediction.
        num_classes: K classes, added to the time; the table has one more row, the last, for the
            null class, which labels of -1 and missing labels mean. 0 builds a model without.
        patch_size: side of the patches of a frame.
        hidden_size: width D, a multiple of ``num_heads``.
        depth: blocks.
        num_heads: attention heads, of an even number of channels, 6 at least.
        mlp_size: width inside the feed-forward layers.
        frequency_size: width of the time's sinusoid, even.
        text_size: width of the text tokens that frames attend to; 0 builds a model without.
        num_text_tokens: their number; shorter texts are padded with zeros.
        attend_padding: attend to that padding as well, as the official program does, instead of
            to the tokens of the mask alone.
        qk_norm: normalise queries and keys.
        text_norm: normalise what goes into the attention to text.
        block_size: frames a block.
        independent_first_frame: the first block is one frame alone.
        window: frames a block attends to in training, its own included; 0 for all before it.
        sink: first frames of the video that stay in the window, in training and in the cache.
        cache: what is kept of finished frames: ``"full"``, ``"rolling"`` or ``"semantic"``
            (:class:`~genscale.layers.video_cache.CachePolicy`).
        cache_window: frames in sight of a block with a rolling cache, its own included; 0 for
            ``window``, or, without one, the trained number of frames.
        bank_share: share of attention that the tokens kept by a semantic cache receive.
        bank_top: chunks that it reads again.
        bank_local: last chunks that it keeps whole.
        positions: where frames lie in time: ``"absolute"`` at their number in the video,
            ``"relative"`` at their place among those in sight, ``"auto"`` at their number up to
            the trained length and at their place beyond it.
        position_resize: what rows and columns do on other grids than the trained one: they keep
            their numbers (``"extend"``), as in the official program, or a cell's place in the
            picture (``"interpolate"``).
        attention: ``"blocks"``, one plain attention a block, or ``"flex"``, one compiled
            FlexAttention, where all frames are seen at once; the latter needs CUDA.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("CausalVideoBlock",)
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: Sequence[int] = (21, 60, 104),
        in_channels: int = 16,
        num_classes: int = 0,
        patch_size: int = 2,
        hidden_size: int = 1536,
        depth: int = 30,
        num_heads: int = 12,
        mlp_size: int = 8960,
        frequency_size: int = 256,
        text_size: int = 0,
        num_text_tokens: int = 512,
        attend_padding: bool = False,
        qk_norm: bool = True,
        text_norm: bool = True,
        block_size: int = 3,
        independent_first_frame: bool = False,
        window: int = 0,
        sink: int = 0,
        cache: CacheKind = "full",
        cache_window: int = 0,
        bank_share: float = 0.97,
        bank_top: int = 2,
        bank_local: int = 1,
        positions: Positions = "auto",
        position_resize: PositionResize = "extend",
        attention: Literal["blocks", "flex"] = "blocks",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.register_to_config(input_size=list(input_size))
        check_settings(self.config)
        frames, height, width = input_size
        self.trained_frames, self.grid = frames, (height // patch_size, width // patch_size)
        self.num_classes, self.patch_size, self.num_heads = num_classes, patch_size, num_heads
        self.head_size, self.block_size = hidden_size // num_heads, block_size
        self.rope = VideoRoPE(self.head_size)
        self.text_shape, self.attend_padding = (num_text_tokens, text_size), attend_padding
        self.independent_first_frame = independent_first_frame
        self.window, self.sink, self.positions = window, sink, positions
        self.position_resize = position_resize
        self.attention, self.gradient_checkpointing = attention, checkpoint_blocks
        self.policy = CachePolicy(
            kind=cache,
            block_size=block_size,
            window=cache_window or window or frames,
            sink=sink,
            tau=bank_share,
            top=bank_top,
            local=bank_local,
            independent_first_frame=independent_first_frame,
        )
        self.patch = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_embed = FrameTime(hidden_size, frequency_size)
        self.class_table = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.text_1 = nn.Linear(text_size, hidden_size) if text_size else None
        self.text_2 = nn.Linear(hidden_size, hidden_size) if text_size else None
        self.blocks = nn.ModuleList(
            CausalVideoBlock(
                hidden_size,
                num_heads,
                mlp_size,
                text=text_size > 0,
                qk_norm=qk_norm,
                text_norm=text_norm,
            )
            for _ in range(depth)
        )
        self.head = CausalVideoHead(hidden_size, patch_size**2 * in_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | WeightedRMSNorm):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        small = [self.time_embed.linear_1, self.time_embed.linear_2, self.text_1, self.text_2]
        for layer in (*small, self.class_table):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".modulation"):  # learned vectors, not the layer of that name
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.zeros_(self.head.linear.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        memory: Memory | None = None,
        clean: Tensor | None = None,
        clean_t: Tensor | None = None,
    ) -> BackboneOutput:
        """Predict the objective's target.

        Without memory all frames are seen at once, block-causally. With memory ``x`` are the
        frames that follow those committed there: any number of whole blocks, block-causal among
        themselves, each attending to all of the history that its window holds. Their keys and
        values come back in ``output.memory`` provisionally: the next call writes over them, and
        :func:`~genscale.layers.video_cache.commit_frames` makes them history.

        Args:
            x: ``(B, C, F, H, W)``, F whole blocks, H and W multiples of ``patch_size``.
            t: float32 ``(B,)``, ``(1,)`` when all samples share one time, or ``(B, F)`` or
                ``(1, F)``, a time a frame; equal within a block, as a rule.
            cond: ``labels`` ``(B,)`` or None; by models of text also ``text`` ``(B, N,
                text_size)`` with ``text_mask`` ``(B, N)``. What is None is zero and masked out.
            memory: from :meth:`begin`, or of an earlier call.
            clean: ``(B, C, F, H, W)`` finished frames: noisy blocks attend to the finished blocks
                before them in place of the noisy ones (teacher forcing). Not with ``memory``.
            clean_t: their time, shaped as ``t``; default 0.

        Returns:
            ``sample`` ``(B, C, F, H, W)``, and ``memory`` where one was given.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_clips(self, x, t, cond, memory, clean)
        grid = (x.shape[3] // self.patch_size, x.shape[4] // self.patch_size)
        embedded = self._time(t, cond, len(x))
        modulation = self.time_embed.modulate(embedded)
        tokens, frames = self._tokens(x), x.shape[2]
        if clean is not None:
            clean_t = torch.zeros_like(t[:1]) if clean_t is None else clean_t
            before = self.time_embed.modulate(self._time(clean_t, cond, len(x)))
            tokens = torch.cat((self._tokens(clean), tokens), dim=1)
            modulation = _one_after_the_other(before, modulation, frames)
        text, text_mask, text_memory = self._text(x, cond, memory)
        attend: Attend
        if memory is None:
            attend, result = self._whole(frames, grid, tokens, clean is not None), None
        else:
            cache = claim(memory[VIDEO_CACHE], frames)
            attend = self._continued(cache, frames, grid, x, cond)
            result = {VIDEO_CACHE: cache, "text": text_memory}
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and memory is None
        for layer, block in enumerate(self.blocks):
            inputs = (tokens, modulation, layer, attend, text[layer], text_mask)
            if recompute:
                tokens = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(*inputs)
        y = self.head(tokens[:, -frames:], embedded)
        sample = rearrange(
            y,
            "b f (h w) (i j c) -> b c f (h i) (w j)",
            h=grid[0],
            i=self.patch_size,
            j=self.patch_size,
        )
        return BackboneOutput(sample=sample.contiguous(), memory=result)

    def begin(
        self,
        batch: int,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        shape: Sequence[int] | None = None,
    ) -> Memory:
        """Return the memory of ``batch`` videos that begin.

        Args:
            batch: number of samples B.
            device: where they live.
            dtype: of keys and values; default that of attention, autocast's or the weights'.
            shape: ``(C, F, H, W)`` of the videos to be made; default :attr:`sample_shape`. A
                longer one, or another number of frames, costs a copy where it is not told here.

        Returns:
            nested dicts and lists of tensors whose first axis is the sample, and frozen settings.
        """
        _, frames, height, width = shape or self.sample_shape
        if self.policy.kind != "full":
            frames = self.policy.sink + (self.policy.recent or 0) + self.block_size
        if dtype is None:
            dtype = cache_dtype(torch.device(device), self.patch.weight)
        topic_size = self.text_shape[1] or (self.config["hidden_size"] if self.num_classes else 1)
        cache = empty_cache(
            self.policy,
            num_layers=len(self.blocks),
            batch=batch,
            num_heads=self.num_heads,
            tokens_per_frame=(height // self.patch_size) * (width // self.patch_size),
            head_size=self.head_size,
            frames=frames,
            device=device,
            dtype=dtype,
            topic_size=topic_size,
        )
        return {VIDEO_CACHE: cache, "text": self._no_text(batch, device, dtype)}

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a condition of one sample; its text has as many tokens as the model expects."""
        cond = super().example_condition(device)
        if not self.text_shape[1]:
            return cond
        text = torch.zeros(1, *self.text_shape, device=device)
        return replace(cond, text=text, text_mask=text.new_ones(text.shape[:2], dtype=torch.bool))

    # what goes into the blocks

    def _tokens(self, x: Tensor) -> Tensor:
        """Return ``(B, F, N, D)``; stays in the weights' type under autocast."""
        y = self.patch(x.transpose(1, 2).flatten(0, 1)).to(self.patch.weight.dtype)
        return y.flatten(2).transpose(1, 2).unflatten(0, (len(x), -1))

    def _time(self, t: Tensor, cond: Conditioning, batch: int) -> Tensor:
        """Return time and class of every frame, ``(B or 1, F or 1, D)``."""
        embedded = self.time_embed.embed(t if t.dim() == 2 else t[:, None])
        if self.class_table is None:
            return embedded
        rows = class_rows(cond.labels, self.num_classes, batch, t.device)
        classes: Tensor = self.class_table(rows)
        return embedded + classes[:, None]

    def _whole(self, frames: int, grid: tuple[int, int], like: Tensor, teacher: bool) -> Whole:
        mask = BlockCausalMask(
            frames=frames,
            block_size=self.block_size,
            tokens_per_frame=grid[0] * grid[1],
            mode="teacher" if teacher else "causal",
            window=self.window,
            sink=self.sink if self.window else 0,
            independent_first_frame=self.independent_first_frame,
        )
        numbers = torch.arange(frames, device=like.device)
        rotation = self.rope.grid_rotation(numbers, *self._sides(grid, like.device))
        flex = self.attention == "flex" and like.is_cuda
        return Whole(mask, doubled(rotation) if teacher else rotation, flex)

    def _continued(
        self, cache: Cache, frames: int, grid: tuple[int, int], x: Tensor, cond: Conditioning
    ) -> Continued:
        numbers, total = frame_numbers(cache), frames_committed(cache)
        semantic = self.policy.kind == "semantic"
        # a semantic cache says itself what is in sight
        window = {"rolling": self.policy.window, "full": self.window}.get(self.policy.kind, 0)
        mask = BlockCausalMask(
            frames=frames,
            block_size=self.block_size,
            tokens_per_frame=grid[0] * grid[1],
            window=window,
            sink=self.sink if window else 0,
            independent_first_frame=self.independent_first_frame,
            context=tuple(numbers[: len(numbers) - frames]),
            first=total,
        )
        topic = self._topic(cond, x) if semantic else None
        chosen = places = None
        ahead = 0
        relative = self.positions == "relative" or (
            self.positions == "auto" and total + frames > self.trained_frames
        )
        if topic is not None and cache["bank"]["first"].shape[1]:
            chosen = look_up(cache["bank"], topic, self.policy.top)
            ahead = chosen.shape[1] * self.block_size
            places = cache["bank"]["first"].gather(1, chosen)
            if relative:
                places = torch.arange(0, ahead, self.block_size, device=x.device)[None]
        if relative:
            numbers = list(range(ahead, ahead + len(numbers)))
        when = torch.tensor(numbers, device="cpu").to(x.device, non_blocking=True)
        sides = self._sides(grid, x.device)
        rotation = self.rope.grid_rotation(when, *sides)
        return Continued(mask, cache, self.rope, sides, rotation, chosen, places, topic)

    def _sides(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the places of the rows and of the columns of a frame's tokens."""
        rows, columns = (
            grid_places(count, trained, self.position_resize, device)
            for count, trained in zip(grid, self.grid, strict=True)
        )
        return rows, columns

    def _topic(self, cond: Conditioning, x: Tensor) -> Tensor:
        """Return what chunks are looked up by ``(B, E)``: the mean of the text, or the class."""
        if self.text_shape[1]:
            if cond.text is None:
                return x.new_zeros(len(x), self.text_shape[1])
            mask = cond.text_mask
            if mask is None:
                mask = torch.ones(cond.text.shape[:2], dtype=torch.bool, device=x.device)
            return masked_mean(cond.text, mask)
        if self.class_table is not None:
            rows = class_rows(cond.labels, self.num_classes, len(x), x.device)
            classes: Tensor = self.class_table(rows)
            return classes
        return x.new_ones(len(x), 1)

    # text

    def _text(
        self, x: Tensor, cond: Conditioning, memory: Memory | None
    ) -> tuple[Sequence[KeysValues | None], Tensor | None, Memory | None]:
        """Return keys and values of every block, which text counts, and what to remember."""
        if not self.text_shape[1]:
            return [None] * len(self.blocks), None, None
        text, mask = self._padded_text(x, cond)
        known = None if memory is None else memory["text"]
        # what is remembered has no graph behind it
        learning = torch.is_grad_enabled() and self.patch.weight.requires_grad
        if known is not None and not learning and _is_same(known, cond.text, text, mask):
            pairs = list(zip(known["keys"], known["values"], strict=True))
            return pairs, None if self.attend_padding else mask, known
        embedded = self._embed_text(text)
        pairs = [project_text(block, embedded) for block in self.blocks]
        if memory is not None:
            keys, values = ([part.detach() for part in parts] for parts in zip(*pairs, strict=True))
            given = text if cond.text is None else cond.text
            known = {"given": given, "text": text, "mask": mask, "keys": keys, "values": values}
        return pairs, None if self.attend_padding else mask, known

    def _embed_text(self, text: Tensor) -> Tensor:
        assert self.text_1 is not None
        assert self.text_2 is not None
        y: Tensor = self.text_2(F.gelu(self.text_1(text), approximate="tanh"))
        return y

    def _padded_text(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        count, size = self.text_shape
        dtype = self.patch.weight.dtype
        if cond.text is None:
            text = torch.zeros(len(x), count, size, dtype=dtype, device=x.device)
            return text, torch.zeros(len(x), count, dtype=torch.bool, device=x.device)
        if cond.text.shape[::2] != (len(x), size) or cond.text.shape[1] > count:
            raise ValueError(
                f"cond.text must have shape ({len(x)}, N, {size}) with N up to {count}, but has "
                f"{tuple(cond.text.shape)}. Give tokens of width model.text_size, at most "
                "model.num_text_tokens of them."
            )
        missing = count - cond.text.shape[1]
        mask = cond.text_mask
        if mask is None:
            mask = torch.ones(cond.text.shape[:2], dtype=torch.bool, device=x.device)
        text = F.pad(cond.text.to(dtype), (0, 0, 0, missing))
        return text, F.pad(mask, (0, missing))

    def _no_text(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Memory | None:
        """Return the memory of a text that equals none: not a number."""
        count, size = self.text_shape
        if not size:
            return None
        text = torch.full((batch, count, size), float("nan"), device=device)
        shape = (batch, self.num_heads, count, self.head_size)

        def empty() -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks]

        mask = torch.zeros(batch, count, dtype=torch.bool, device=device)
        return {"given": text, "text": text, "mask": mask, "keys": empty(), "values": empty()}


def _is_same(known: Memory, given: Tensor | None, text: Tensor, mask: Tensor) -> bool:
    """Return whether a text is the remembered one; on an accelerator it is not looked into."""
    if given is not None and known["given"] is given:
        return True
    if text.device.type != "cpu":
        return False
    return torch.equal(known["text"], text) and torch.equal(known["mask"], mask)


def _one_after_the_other(first: Tensor, second: Tensor, frames: int) -> Tensor:
    """Join two ``(B or 1, F or 1, 6, D)`` along the frames."""
    batch = max(len(first), len(second))
    return torch.cat([part.expand(batch, frames, -1, -1) for part in (first, second)], dim=1)
