"""Parity of the D2D count loss with numbers of its formula, computed independently."""

from __future__ import annotations

from dataclasses import replace

import torch

from genscale.rewards.counting import CountLoss
from scripts.parity import Case, Comparison, compare_in_words


def run(case: Case) -> list[Comparison]:
    """Compare counts, both losses, and their gradients."""
    config = case.config
    critic = CountLoss(
        threshold=config["tau"],
        beta=config["beta"],
        beta_low=config["beta_low"],
        margin=config["margin"],
        equal_weight=config["equal_weight"],
    )
    given = case.group("input")
    logits, targets = given["logits"].requires_grad_(), given["targets"]
    loss = critic.loss(logits, targets)
    plain = replace(critic, mode="plain").loss(logits, targets)
    got = {
        "output/count": critic.count(logits),
        "output/soft_count": critic.soft_count(logits),
        "output/loss": loss,
        "output/plain_loss": plain,
        "grad/logits": torch.autograd.grad(loss.sum(), logits)[0],
        "grad/logits_plain": torch.autograd.grad(plain.sum(), logits)[0],
    }
    atol = float(case.info["tolerance"]["abs"])
    words = f"{atol} abs"
    return [compare_in_words(words, name, value, case.tensors[name]) for name, value in got.items()]
