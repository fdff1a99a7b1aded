"""Parity of VAR's training recipe: learning rates, weight decay, and losses."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import ScaleBackbone, ScaleOutput
from genscale.conditioning.base import Conditioning
from genscale.layers.scales import scale_spans
from genscale.objectives.base import Batch
from genscale.objectives.next_scale import NextScale
from genscale.objectives.progressive import ProgressiveScales
from genscale.rng import for_step
from genscale.training.lr_schedule import Annealed
from genscale.training.optim import AdamW
from scripts.parity import Case, Comparison

# the official words; any other number behind "lin" is where a broken line has its knee
_WORDS: dict[str, dict[str, Any]] = {
    "lin0": {"flat_fraction": 0.05},
    "lin": {"flat_fraction": 0.15},
    "lin00": {"flat_fraction": 0.0},
    "cos": {"shape": "cosine", "flat_fraction": 0.0},
    "exp": {"shape": "exponential", "flat_fraction": 0.15},
}


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    results = [c for word in case.config["schedules"] for c in _schedule(case, word)]
    return results + _losses(case)


def _schedule(case: Case, word: str) -> list[Comparison]:
    """Compare rates and decays at the given steps of a run."""
    config, steps = case.config, case.tensors["input/iterations"].tolist()
    settings = _WORDS.get(word) or {
        "shape": "broken_linear",
        "flat_fraction": float(word.removeprefix("lin")),
    }
    schedule = Annealed(
        warmup_steps=config["warmup_iters"],
        initial_scale=config["wp0"],
        final_scale=config["wpe"],
        **settings,
    )
    law = AdamW(
        lr=config["peak_lr"], weight_decay=config["wd"], final_weight_decay=config["wd_end"]
    )
    optimizer = law.build(torch.nn.Linear(2, 2))
    scheduler = schedule.build(optimizer, config["max_iters"])
    found: dict[int, tuple[float, float]] = {}
    for step in range(max(steps) + 1):
        group = optimizer.param_groups[0]
        found[step] = (group["lr"], group["weight_decay"])
        optimizer.step()
        scheduler.step()
    rates, decays = zip(*(found[step] for step in steps), strict=True)
    rtol = _number(case, "lr")
    return [
        Comparison(f"{name}_{word}", torch.tensor(values).double(), expected.double(), 0.0, rtol)
        for name, values in (("lr", rates), ("wd", decays))
        if (expected := case.tensors.get(f"output/{name}_{word}")) is not None
    ]


class _Given(ScaleBackbone):
    """A network whose logits are given."""

    def __init__(self, logits: Tensor, scales: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_to_config(  # type: ignore[no-untyped-call]
            scales=scales, vocab_size=logits.shape[-1], latent_channels=1
        )
        self.logits = logits

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        cond: Conditioning,
        scales: range | None = None,
        memory: Any = None,
    ) -> ScaleOutput:
        """Return the logits of as many tokens as there are features."""
        return ScaleOutput(self.logits[:, : features.shape[1]])


def _losses(case: Case) -> list[Comparison]:
    """Compare the loss of all scales, and that of the first few with a young last one."""
    config, scales = case.config, case.config["patch_nums"]
    logits, tokens = case.tensors["input/logits"], case.tensors["input/gt"]
    network = _Given(logits, scales)
    # one stage after the other; a scale joins in the middle between two places, and here its
    # weight rises until the middle between the next two
    first = config["prog_si"] - 1
    length = 1 / (len(scales) - 1 - first)
    law = ProgressiveScales(
        total_samples=10**9, until=1.0, first_scale=first, start=0.0, newest_warmup=length
    )
    age = (0.5 + config["prog_warmup"]) * length
    cases = {
        "loss_full": (NextScale(label_smoothing=config["label_smoothing"]), 0),
        "loss_progressive": (
            NextScale(label_smoothing=config["label_smoothing"], progressive=law),
            round(age * 10**9),
        ),
    }
    results = []
    for name, (objective, seen) in cases.items():
        batch = Batch(
            clean=tokens,
            cond=Conditioning(),
            position=torch.arange(len(tokens)),
            features=torch.zeros(len(tokens), scale_spans(network.scales)[-1][1], 1),
            samples_seen=seen,
        )
        loss = objective.loss(network, batch, for_step(0, batch.position)).loss
        expected = case.tensors[f"output/{name}"]
        results.append(Comparison(name, loss.view_as(expected), expected, _number(case, "loss"), 0))
    return results


def _number(case: Case, kind: str) -> float:
    """Read a tolerance, which the cases say in words."""
    match = re.match(r"\S+", case.info["tolerance"][kind])
    if match is None:
        raise KeyError(f"The case does not state a tolerance of its {kind}.")
    return float(match[0])
