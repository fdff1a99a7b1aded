"""Make pictures small and large again, and say what is left of them.

python scripts/rescale_pictures.py SOURCE OUT [--upscaler RUN|FOLDER|FILE|bicubic] \
    [--scale 2 | --scale 1.5 2.5] [--search] [--steps 15 15] [--count 8] [--device cuda]

SOURCE is a folder of pictures, or an npz with arr_0. Small pictures are written to OUT as PNG and
read from there again before they are enlarged, so that nothing survives that a file does not keep.
--search looks for small pictures that are rebuilt better (collaborative downscaling,
arXiv:2211.10643), with the upscaler as it is. Scores are those of papers: PSNR and SSIM of luma,
without a border as wide as the scale.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.cli.failures import report
from genscale.data.image_folder import SUFFIXES
from genscale.data.transforms import to_rgb, to_tensor
from genscale.errors import DataError
from genscale.io.files import write_json
from genscale.io.images import load_npz, save_png
from genscale.metrics.restoration import restoration_psnr, restoration_ssim
from genscale.upscaling.base import Upscaler
from genscale.upscaling.collaborative import collaborative_downscale
from genscale.upscaling.iarn import resized
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.loading import load_upscaler
from genscale.upscaling.rescaler import Rescaler, fitting_size, rescaler_of


@dataclass(frozen=True)
class Score:
    """What is left of one picture by one way.

    Args:
        picture: its name.
        way: ``bicubic`` both ways, ``plain``: the upscaler's own, or ``searched``.
        psnr: of luma, dB.
        ssim: of luma.
        seconds: for the small picture.
    """

    picture: str
    way: str
    psnr: float
    ssim: float
    seconds: float


def read_pictures(source: Path, count: int | None) -> Iterator[tuple[str, Tensor]]:
    """Yield names and uint8 pictures ``(3, H, W)``."""
    from PIL import Image

    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{source} holds no pictures ({', '.join(SUFFIXES)}). Give a folder.")
        for path in paths[:count]:
            with Image.open(path) as image:
                yield path.stem, to_tensor(to_rgb(image), 3)
    else:
        pixels, _ = load_npz(source)
        for number, picture in enumerate(pixels[:count]):
            yield f"{number:05d}", picture.permute(2, 0, 1).contiguous()


def written(small: Tensor, path: Path) -> Tensor:
    """Write a small picture in [0, 1] as PNG; return what is read from there, float in [0, 1]."""
    from PIL import Image

    levels = torch.round(small.clamp(0.0, 1.0) * 255.0).to(torch.uint8)
    save_png(path, levels[0].cpu())
    with Image.open(path) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].to(small.device).float() / 255.0


def score(
    picture: Tensor, small: Tensor, pair: Rescaler, scale: tuple[float, float]
) -> tuple[float, float]:
    """Return PSNR and SSIM of luma of what is made of a small picture."""
    with torch.no_grad():
        large = torch.round(pair.up(small).clamp(0.0, 1.0) * 255.0).to(torch.uint8).cpu()
    border = math.ceil(max(scale))
    values = [
        measure(picture[None], large, border=border)
        for measure in (restoration_psnr, restoration_ssim)
    ]
    return float(values[0]), float(values[1])


def rescale(
    name: str, picture: Tensor, network: Upscaler, arguments: argparse.Namespace
) -> list[Score]:
    """Rescale one picture in every way that was asked for."""
    scale = (arguments.scale[0], arguments.scale[-1])
    height, width = fitting_size(network, scale, (picture.shape[1], picture.shape[2]))
    picture = picture[:, :height, :width]
    x = picture[None].to(arguments.device).float() / 255.0
    pair = rescaler_of(network, scale, (height, width))
    if scale[0] == scale[1] and scale[0].is_integer():
        plain: Upscaler = Interpolation(space="pixel", channels=3, scales=[int(scale[0])])
        bicubic = rescaler_of(plain, scale, (height, width))
    else:
        small_size = (round(height / scale[0]), round(width / scale[1]))
        bicubic = Rescaler(
            lambda large: resized(large, small_size),
            lambda small: resized(small, (height, width)),
            own=False,
        )
    pairs = {"bicubic": bicubic, "plain": pair}
    scores = []
    for way, each in pairs.items():
        begin = time.perf_counter()
        with torch.no_grad():
            small = each.down(x)
        seconds = time.perf_counter() - begin
        kept = written(small, arguments.out / way / f"{name}.png")
        scores.append(Score(name, way, *score(picture, kept, each, scale), seconds))
    if arguments.search:
        begin = time.perf_counter()
        found = collaborative_downscale(
            pair.down,
            pair.up,
            x,
            steps_hr=arguments.steps[0],
            steps_lr=arguments.steps[1],
            norm=arguments.norm,
            eps=arguments.eps,
            alpha=arguments.alpha,
            lr_target=arguments.target,
            straight_through=not arguments.published,
        )
        seconds = time.perf_counter() - begin
        kept = written(found.small, arguments.out / "searched" / f"{name}.png")
        scores.append(Score(name, "searched", *score(picture, kept, pair, scale), seconds))
    return scores


def make(arguments: argparse.Namespace) -> list[Score]:
    if arguments.upscaler == "bicubic":
        whole = max(1, int(arguments.scale[0]))
        network: Upscaler = Interpolation(space="pixel", channels=3, scales=[whole])
    else:
        network, _ = load_upscaler(arguments.upscaler)
    torch.nn.Module.to(network.requires_grad_(False).eval(), arguments.device)
    scores = []
    print(f"{'picture':<24}{'way':<12}{'PSNR-Y':>8}{'SSIM-Y':>9}{'seconds':>10}")
    for name, picture in read_pictures(arguments.source, arguments.count):
        for each in rescale(name, picture, network, arguments):
            scores.append(each)
            print(
                f"{each.picture:<24}{each.way:<12}{each.psnr:>8.2f}{each.ssim:>9.4f}"
                f"{each.seconds:>10.2f}"
            )
    for way in dict.fromkeys(each.way for each in scores):
        own = [each for each in scores if each.way == way]
        psnr = sum(each.psnr for each in own) / len(own)
        ssim = sum(each.ssim for each in own) / len(own)
        print(f"{f'mean of {len(own)}':<24}{way:<12}{psnr:>8.2f}{ssim:>9.4f}")
    write_json(
        arguments.out / "scores.json",
        {
            "upscaler": str(arguments.upscaler),
            "scale": list(arguments.scale),
            "scores": [{**asdict(s), "psnr": round(min(s.psnr, 999.0), 4)} for s in scores],
        },
    )
    return scores


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a folder of pictures, or an npz with arr_0")
    parser.add_argument("out", type=Path, help="folder for small pictures and scores.json")
    parser.add_argument("--upscaler", default="bicubic", help="run, folder or file; bicubic")
    parser.add_argument(
        "--scale", type=float, nargs="+", default=[2.0], help="one number, or rows and columns"
    )
    parser.add_argument("--search", action="store_true", help="search for better small pictures")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[15, 15], help="of the search in large and small"
    )
    parser.add_argument("--norm", choices=["l2", "linf"], default="l2", help="of the search")
    parser.add_argument("--eps", type=float, help="radius of the search; published by default")
    parser.add_argument("--alpha", type=float, help="step of the search; published by default")
    parser.add_argument("--target", choices=["adjusted", "original"], default="adjusted")
    parser.add_argument(
        "--published", action="store_true", help="search without rounding inside, as published"
    )
    parser.add_argument("--count", type=int, help="only so many pictures")
    parser.add_argument("--device", default="cpu")
    try:
        arguments = parser.parse_args(words)
        if len(arguments.scale) > 2 or min(arguments.scale) < 1:
            parser.error("--scale takes one or two numbers of 1 or more")
        make(arguments)
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
