"""Parity of Switti with its official program: logits, gradients, crops and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.switti import Switti, crop_numbers
from genscale.conditioning.base import Conditioning
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.io.converters import msvq
from genscale.io.converters.switti import config_from_official, from_official, to_official
from genscale.objectives.base import ScaleDecoder
from genscale.objectives.next_scale import NextScale as Objective
from genscale.samplers.next_scale import NextScale
from genscale.samplers.token_filters import filter_logits, smooth_weights
from scripts.parity import Case, Comparison, compare_in_words

_OF_TOKENIZER = {"vq_quant_resi": "quant_resi", "vq_share_quant_resi": "share_quant_resi"}
_SIZES = "batch_height/batch_width"


def run(case: Case) -> list[Comparison]:
    """Run one case: whatever outputs and gradients it holds, and all of its sampling runs."""
    model: Switti = Switti(**config_from_official(case.config, parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    tokenizer = _tokenizer(case)
    inputs, outputs = case.group("input"), dict(case.group("output"))
    size = _sizes(case)
    cond = _condition(inputs, "prompt", size)
    tokens = torch.cat([inputs[f"gt_indices_{k}"] for k in range(len(model.scales))], dim=1)
    start = model.embed.spans[0][1]
    features = tokenizer.features(tokens)
    results = [
        _compare(case, "fhat teacher input", features[:, start:], inputs["x_BLCv_wo_first_l"])
    ]
    if "crop_condition" in outputs:
        assert size is not None
        numbers = crop_numbers(size, single=model.config["float32_crop"]).to(torch.int32)
        results.append(_compare(case, "ids crop_condition", numbers, outputs.pop("crop_condition")))
    logits = model(features, cond).logits
    results.append(_compare(case, "logits", logits, outputs.pop("logits")))
    results += _gradients(case, model, logits)
    view = Objective().view(model, tokenizer)
    for name, settings in case.info.get("runs", {}).items():
        got = _sample(view, _condition(inputs, "prompt", None), inputs, settings["kw"])
        for kind, value in got.items():
            expected = outputs.pop(f"{name}_{kind}")
            smooth = kind == "fhat" and settings["kw"].get("more_smooth", False)
            results.append(_compare(case, f"{name} {kind}", value, expected, smooth=smooth))
    if outputs:
        raise KeyError(f"The case holds output/{next(iter(outputs))}, which nothing here computes.")
    return results


def _gradients(case: Case, model: Switti, logits: Tensor) -> list[Comparison]:
    """Compare gradients of the mean square of the logits."""
    wanted = case.group("grad")
    if not wanted:
        return []
    torch.autograd.backward(logits.square().mean())
    own = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.state_dict(keep_vars=True).items()
    }
    official = to_official(own, model.config)
    return [_compare(case, f"grad {name}", official[name], grad) for name, grad in wanted.items()]


@torch.no_grad()
def _sample(
    view: ScaleDecoder, cond: Conditioning, inputs: Mapping[str, Tensor], kw: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Sample as the official program: its generator, its order of draws."""
    batch, last = len(inputs["prompt_embeds"]), len(view.scales) - 1
    null = {
        name: value.expand(batch, *value.shape[1:])
        for name, value in inputs.items()
        if name.startswith("null_")
    }
    negative = _condition(null, "null", None)
    cond = Conditioning(
        text=cond.text, text_mask=cond.text_mask, pooled_text=cond.pooled_text, negative=negative
    )
    stop = kw.get("turn_off_cfg_start_si", 10)
    # (1 + t) c - t u is weight 1 + t
    guidance = ScaleGuidance(1 + kw["cfg"], start=kw.get("turn_on_cfg_start_si", 0), stop=stop)
    guided = guidance.wrap(view)
    # the official draws are made here, and handed to the sampler
    sampler = NextScale(len(view.scales), top_k=1)
    generator = torch.Generator().manual_seed(kw["seed"])
    state = sampler.start(guided, cond, torch.arange(batch))
    all_ids, all_logits = [], []
    for k, (height, width) in enumerate(view.scales):
        state = sampler.evaluate(guided, state)
        logits = state.history["logits"][:, : height * width]
        off, progress = k >= stop, k / last
        if off and kw.get("last_scale_temp") is not None:
            logits = logits / kw["last_scale_temp"]
        if kw.get("more_smooth", False) and k >= kw.get("smooth_start_si", 0) and not off:
            # Gumbel numbers from exponential ones, drawn in place of tokens
            gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
            codebook = view.tokenizer.codes(torch.arange(view.vocab_size)[None])[0]
            codes = smooth_weights(logits, gumbel, progress) @ codebook
            state = sampler.commit(guided, state, logits.argmax(-1), codes)
            logits = logits * (1 + progress)
        else:
            ids = _draw(filter_logits(logits, kw["top_k"], kw["top_p"]), generator)
            all_ids.append(ids)
            state = sampler.commit(guided, state, ids)
        all_logits.append(logits)
    return {
        "ids": torch.cat(all_ids, dim=1),
        "logits": torch.cat(all_logits, dim=1),
        "fhat": sampler.finish(state),
    }


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw tokens ``(B, n)`` by torch's multinomial, whose stream of numbers the cases are of."""
    rows = logits.softmax(dim=-1).flatten(0, 1)
    drawn = torch.multinomial(rows, 1, replacement=True, generator=generator)
    return drawn.view(logits.shape[:2])


def _condition(inputs: Mapping[str, Tensor], name: str, size: Tensor | None) -> Conditioning:
    pooled = "pooled_prompt_embeds" if name == "prompt" else "null_pooled"
    return Conditioning(
        text=inputs[f"{name}_embeds"],
        text_mask=inputs[f"{name}_attn_bias"] == 0,
        pooled_text=inputs[pooled],
        size=size,
    )


def _sizes(case: Case) -> Tensor | None:
    """Return heights and widths of the pictures ``(B, 2)``, where the case conditions on them."""
    given = case.info["inputs"].get(_SIZES)
    return None if given is None else torch.tensor(given).t().contiguous()


def _tokenizer(case: Case) -> MSVQ:
    """Return a tokenizer with the case's quantiser; its encoder and decoder are never run."""
    official = {theirs: case.config[ours] for ours, theirs in _OF_TOKENIZER.items()}
    levels = {"ch": 32, "ch_mult": (1,), "num_res_blocks": 1}
    official |= {"v_patch_nums": case.config["patch_nums"], "vocab_size": case.config["V"]}
    official |= {"z_channels": case.config["Cvae"], "ddconfig": levels}
    tokenizer: MSVQ = MSVQ(**msvq.config_from_official(official, parity=True))
    whole = msvq.to_official(tokenizer.state_dict(), tokenizer.config)
    tokenizer.load_state_dict(msvq.from_official({**whole, **case.group("vae_state")}, tokenizer))
    tokenizer.eval()
    return tokenizer


def _compare(
    case: Case, name: str, got: Tensor, expected: Tensor, *, smooth: bool = False
) -> Comparison:
    """Compare within what the case says in words of this kind of number."""
    kind = next((kind for kind in ("grad", "fhat") if kind in name), "logits")
    words = case.info["tolerance"][kind]
    if kind == "fhat" and ";" in words:  # <plain runs>; smooth runs <...>
        words = words.split(";")[1 if smooth else 0]
    return compare_in_words(words, name, got, expected)
