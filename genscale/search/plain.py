"""No search: one sample a prompt, judged, so that searches have something to be held against."""

from __future__ import annotations

from genscale.search.base import Search
from genscale.search.engine import Engine


class PlainSampling(Search):
    """The plain sample of every prompt and its reward."""

    def explore(self, engine: Engine) -> None:
        """Sample once."""
        state = engine.start(1)
        scores = engine.finish(state)
        engine.record("start", state, value=scores.value)
