"""What a search may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genscale.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most a search may spend; None sets no limit.

    Args:
        nfe: network evaluations a returned sample, guidance branches counted; a backward pass
            through one counts as two.
        reward_calls: pictures judged a returned sample, held-out rewards not counted.
        seconds: wall-clock seconds a batch of prompts; exceeded by one micro-batch at most.

    Raises:
        ConfigError: a number that is not positive.
    """

    nfe: float | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("nfe", "reward_calls", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"budget.{name} must be positive, but is {value}. null sets no limit."
                )


class BudgetSpent(Exception):
    """The next call would exceed the budget; the search returns its best so far."""
