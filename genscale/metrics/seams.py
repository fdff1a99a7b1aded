"""Whether borders of tiles or patches show: gradients across them against gradients elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.features import check_images
from genscale.metrics.picture_measures import PictureMeasure
from genscale.metrics.protocol import Setting
from genscale.metrics.single import Combined

_ROUNDING = 1 / 6  # mean squared difference of two equal levels that were rounded to 8 bits


class Seams(PictureMeasure):
    """Squared steps between neighbouring pixels across given borders, over those elsewhere.

    1: a border looks like any other place; 2: steps across it are twice as strong. The value is
    the ratio of means over all pictures, so that even pictures, which tell little, weigh little.
    Sharp pictures score no worse than soft ones; what repeats with the period of the borders
    (a chequerboard) does, and real pictures of the same size are the yardstick beside it.

    Args:
        every: pixels from border to border in rows and columns, e.g. a patch of a transformer
            times the autoencoder's factor; 0 leaves out regular borders.
        at: further borders: where a tile begins or ends, in pixels, in rows and columns alike.
        name: of the metric.

    Raises:
        ConfigError: there is no border.
    """

    columns = ("border", "elsewhere")
    unfit = "no border lies inside a picture"

    def __init__(self, *, every: int = 0, at: Sequence[int] = (), name: str = "seams") -> None:
        at = tuple(sorted(set(at)))
        if every < 0 or every == 1 or any(place < 1 for place in at) or not (every or at):
            raise ConfigError(
                "Seams are sought at every so many pixels (2 or more) or at given places (1 or "
                f"more), but every={every} and at={list(at)} were given. Give e.g. every=8."
            )
        self.every = every
        self.at = at
        self.name = name

    @property
    def description(self) -> str:
        """What is computed."""
        return "squared steps at borders over elsewhere"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The borders."""
        return (("every", self.every), ("at", " ".join(map(str, self.at))))

    def borders(self, side: int) -> list[int]:
        """Return the pixels below ``side``, ascending, that a border lies before."""
        regular = range(self.every, side, self.every) if self.every else ()
        return sorted({*regular, *(place for place in self.at if place < side)})

    def of_pictures(self, images: Tensor) -> Tensor:
        """Return mean squared steps at borders and elsewhere: ``(B, 2)``; see the base class."""
        values = check_images(images).double()
        border = elsewhere = values.new_zeros(len(values))
        counts = [0, 0]
        for axis in (2, 3):
            steps = values.diff(dim=axis).square().mean(dim=(1, 5 - axis))  # (B, side - 1)
            chosen = torch.zeros(steps.shape[1], dtype=torch.bool, device=values.device)
            chosen[[place - 1 for place in self.borders(values.shape[axis])]] = True
            border = border + steps[:, chosen].sum(1)
            elsewhere = elsewhere + steps[:, ~chosen].sum(1)
            counts[0] += int(chosen.sum())
            counts[1] += int((~chosen).sum())
        if not min(counts):
            return values.new_full((len(values), 2), torch.nan)
        return torch.stack((border / counts[0], elsewhere / counts[1]), dim=1)

    def combine(self, rows: Tensor) -> Combined:
        """Return the ratio of means, and both means as root mean squares in grey levels."""
        border, elsewhere = rows.mean(0).tolist()
        ratio = (border + _ROUNDING) / (elsewhere + _ROUNDING)
        return ratio, {"step_at_borders": border**0.5, "step_elsewhere": elsewhere**0.5}
