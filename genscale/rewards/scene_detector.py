"""A detector of scenes without weights: masks of colours, and templates of shapes on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.data.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    parse_caption,
)
from genscale.data.scenes.renderer import render
from genscale.errors import DataError
from genscale.rewards.detector import Detections, Detector

SIDE = 32  # pixels a side at which pictures are read
TEMPERATURE = 0.1  # of colours, in squared distances of linear RGB: orange is 0.14 from red
SIZES = tuple(range(8, 17))  # pixels a side of the templates; objects have 8 to 16
SHIFTS = (0.0, 0.5)  # of a pixel, along each axis
STEEPNESS = 40.0  # nats a unit of misfit
NOTHING = 0.3  # misfit at which nothing is as likely as an object; objects stay below 0.21
NEIGHBOURS = 4  # pixels around, in which other shapes compete; objects lie 10 apart or more
_WINDOW = 20  # pixels a side of a template
_RANK = 40  # of the templates' common basis: convolutions in place of 180
_BORDER = 1.5  # pixels around a template that must be empty: objects keep a gap of two
_ANY_COLOUR, _ANY_SHAPE = len(COLOURS), len(SHAPES)


class SceneDetector(Detector):
    """An analytic, differentiable detector of coloured shapes.

    In linear RGB, a softmax of -d^2 / T over the eight colours of objects and the five of
    backgrounds gives soft masks m. A template t of shape s is what the mask of a drawn object is
    on average over colours and backgrounds; its misfit at a place is

        e = sum over the template's box and a border of (m - t)^2 / sum of t^2,

    0 where the mask is the template, 1 where it is empty. With e_s the smallest over sizes and
    shifts, a candidate at every pixel corner has the log-odds

        z_s = -g e_s - log(exp(-g e_nothing) + sum over other shapes s' of exp(-g min e_s')),

    where other shapes compete over a neighbourhood: a circle seen from beside looks like a square.
    The class of a shape in any colour works on the sum of the masks, and the odds of any object are
    the sum of those of the shapes. Pictures are averaged or interpolated to 32 pixels first; those
    smaller than that say less than shapes are told apart by.
    """

    threshold = 0.5
    anything = "object"

    def read(self, caption: str) -> dict[str, int]:
        """Return the groups that a caption of scenes names; see :meth:`Detector.read`."""
        asked: dict[str, int] = {}
        for colour, shape in parse_caption(caption).objects:
            name = shape if colour is None else f"{colour} {shape}"
            asked[name] = asked.get(name, 0) + 1
        return asked

    def number(self, name: str) -> int:
        """Return the number of ``"red circle"``, ``"circle"`` or ``"object"``."""
        if name == self.anything:
            return _class_number(_ANY_COLOUR, _ANY_SHAPE)
        *colour, shape = name.split()
        number = list(COLOURS).index(colour[0]) if colour else _ANY_COLOUR  # type: ignore[arg-type]
        return _class_number(number, SHAPES.index(shape))

    def detect(self, images: Tensor, classes: Tensor) -> Detections:
        """Return a candidate a class and corner of pixels, N = 33 x 33; see :class:`Detector`.

        Raises:
            DataError: pictures that are not RGB.
        """
        if images.shape[1] != 3:
            raise DataError(
                f"Scenes are found by colour, but the pictures have {images.shape[1]} channels. "
                "Give RGB pictures."
            )
        masks = colour_masks(_at_side(images))
        colour, shape = classes // (_ANY_SHAPE + 1), classes % (_ANY_SHAPE + 1)
        # classes of one colour in one picture share a mask: U of them differ
        row = torch.arange(len(images))[:, None] * (_ANY_COLOUR + 1)
        mask, which = torch.unique(row + colour, return_inverse=True)
        misfit, template = _misfits(masks.flatten(0, 1)[mask.to(images.device)])  # (U, 5, 33, 33)
        logits = _log_odds(misfit)  # (U, 6, 33, 33)
        # the box of any object is that of its best shape
        best = misfit.argmin(1, keepdim=True)
        template = torch.cat((template, template.gather(1, best)), 1)
        chosen = (which.flatten().to(images.device), shape.flatten().to(images.device))
        count = (SIDE + 1) ** 2
        return Detections(
            logits[chosen].reshape(*classes.shape, count),
            _boxes(template[chosen]).reshape(*classes.shape, count, 4),
        )


def _class_number(colour: int, shape: int) -> int:
    return colour * (_ANY_SHAPE + 1) + shape


def _at_side(images: Tensor) -> Tensor:
    if min(images.shape[2:]) >= SIDE:
        return F.adaptive_avg_pool2d(images, SIDE)
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)


def _linear(srgb: Tensor) -> Tensor:
    """Return linear intensities of sRGB values in [0, 1]."""
    # the clamp keeps the gradient of the branch not taken finite
    power = ((srgb.clamp(min=0.04) + 0.055) / 1.055) ** 2.4
    return torch.where(srgb <= 0.04045, srgb / 12.92, power)


@cache
def _palette(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the colours of objects, then of backgrounds, linear RGB ``(13, 3)``."""
    levels = [*COLOURS.values(), *BACKGROUNDS.values()]
    return _linear(torch.tensor(levels, dtype=torch.float64) / 255.0).to(device, dtype)


def colour_masks(images: Tensor) -> Tensor:
    """Return how far each pixel has each colour ``(B, 9, H, W)``, 0 to 1, the last for any.

    Args:
        images: ``(B, 3, H, W)`` sRGB in [0, 1].
    """
    pixels = _linear(images).flatten(2).transpose(1, 2)  # (B, H W, 3)
    distance = (pixels[:, :, None] - _palette(images.device, images.dtype)).square().sum(3)
    share = torch.softmax(-distance / TEMPERATURE, dim=2)[:, :, :_ANY_COLOUR]
    share = torch.cat((share, share.sum(2, keepdim=True)), 2)
    return share.transpose(1, 2).reshape(len(images), -1, *images.shape[2:])


@dataclass(frozen=True, slots=True)
class _Templates:
    """The templates of all shapes, sizes and shifts, on one device.

    Attributes:
        basis: ``(r, 1, w, w)`` what they are combinations of.
        weights: ``(5 s p p, r)`` the combinations, p shifts down and p across, times -2 over the
            template's sum of squares.
        inverse: ``(5, s, p, p, 1, 1)`` one over that sum.
        span: ``(s, p, 33, 32)`` which pixels of an axis a box of each size and shift covers, with
            its border, seen from every corner of pixels.
    """

    basis: Tensor
    weights: Tensor
    inverse: Tensor
    span: Tensor


@cache
def _templates(device: torch.device, dtype: torch.dtype) -> _Templates:
    begin = (SIDE - _WINDOW) // 2
    inner = slice(begin, begin + _WINDOW)
    covered = []
    for shape, size, down, across in itertools.product(SHAPES, SIZES, SHIFTS, SHIFTS):
        x, y = ((SIDE / 2 + shift) / SIDE for shift in (across, down))
        drawn = render(Scene("black", (SceneObject(shape, "white", x, y, size / SIDE),)), SIDE)
        covered.append(torch.from_numpy(drawn[0, inner, inner]).long())
    mean = _mean_mask()[torch.stack(covered)].flatten(1)
    basis = torch.linalg.svd(mean, full_matrices=False).Vh[:_RANK]
    weights = mean @ basis.T
    energy = (weights @ basis).square().sum(1)
    corner, pixel = torch.arange(SIDE + 1.0)[:, None], torch.arange(SIDE) + 0.5
    span = [
        [((corner + shift - pixel).abs() <= size / 2 + _BORDER).float() for shift in SHIFTS]
        for size in SIZES
    ]
    layout = (len(SHAPES), len(SIZES), len(SHIFTS), len(SHIFTS), 1, 1)
    return _Templates(
        basis.view(-1, 1, _WINDOW, _WINDOW).to(device, dtype),
        (-2.0 * weights / energy[:, None]).to(device, dtype),
        energy.reciprocal().view(layout).to(device, dtype),
        torch.stack([torch.stack(each) for each in span]).to(device, dtype),
    )


def _mean_mask() -> Tensor:
    """Return what a colour's mask is of a pixel covered by 0 to 255 parts, ``(256,)``, on average.

    The average is over the colours of the object and of the ground.
    """
    share = torch.arange(256, dtype=torch.float64) / 255.0
    masks = []
    for number, colour in enumerate(COLOURS.values()):
        for ground in BACKGROUNDS.values():
            ends = torch.tensor([ground, colour], dtype=torch.float64).T[..., None] / 255.0
            mixed = ends[:, 0] + share * (ends[:, 1] - ends[:, 0])  # (3, 256)
            masks.append(colour_masks(mixed[None, :, None])[0, number, 0])
    return torch.stack(masks).mean(0)


def _misfits(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest misfit of each shape at each corner, and which template has it.

    Args:
        masks: ``(n, 32, 32)``.

    Returns:
        ``(n, 5, 33, 33)`` misfits with gradients, and numbers of size and shifts, int64.
    """
    bank = _templates(masks.device, masks.dtype)
    parts = F.conv2d(masks[:, None], bank.basis, padding=_WINDOW // 2)
    match = torch.einsum("tr,nrij->ntij", bank.weights, parts)
    match = match.reshape(len(masks), *bank.inverse.shape[:4], *match.shape[2:])
    inside = torch.einsum("sdih,nhw->nsdiw", bank.span, masks.square())
    inside = torch.einsum("nsdiw,sajw->nsdaij", inside, bank.span)
    misfit = torch.addcmul(match, inside[:, None], bank.inverse)  # less one
    smallest, which = misfit.flatten(2, 4).min(2)
    return smallest + 1.0, which


def _log_odds(misfit: Tensor) -> Tensor:
    """Return the log-odds of each shape and of any ``(n, 6, 33, 33)``; see the class."""
    own = -STEEPNESS * misfit
    reach = 2 * NEIGHBOURS + 1
    near = F.max_pool2d(own, (reach, 1), stride=1, padding=(NEIGHBOURS, 0))
    near = F.max_pool2d(near, (1, reach), stride=1, padding=(0, NEIGHBOURS))
    nothing = torch.full_like(own[:, :1], -STEEPNESS * NOTHING)
    others = [
        torch.cat((near[:, :s], near[:, s + 1 :], nothing), 1).logsumexp(1)
        for s in range(len(SHAPES))
    ]
    odds = own - torch.stack(others, 1)
    return torch.cat((odds, odds.logsumexp(1, keepdim=True)), 1)


def _boxes(template: Tensor) -> Tensor:
    """Return the boxes ``(n, 33, 33, 4)`` of templates ``(n, 33, 33)``, in shares."""
    count = len(SHIFTS)
    device = template.device
    size = torch.tensor(SIZES, dtype=torch.float32, device=device)[template // count**2]
    shift = torch.tensor(SHIFTS, dtype=torch.float32, device=device)
    corner = torch.arange(SIDE + 1.0, device=device)
    y = corner[:, None] + shift[template // count % count]
    x = corner + shift[template % count]
    half = size / 2
    return torch.stack((x - half, y - half, x + half, y + half), -1) / SIDE
