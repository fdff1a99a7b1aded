"""Pictures made small and large again by any upscaler, and the scripts that do so through files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.io.images import save_npz
from genscale.upscaling.iarn import IARN
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.irn import IRN
from genscale.upscaling.rescaler import Rescaler, fitting_size, rescaler_of
from scripts.overfit_video import main as overfit_video
from scripts.rescale_pictures import main as rescale_pictures


def waves(count: int, side: int) -> Tensor:
    """Return uint8 pictures ``(count, side, side, 3)`` of waves with an edge."""
    place = torch.arange(side) / side
    turns = torch.arange(1, count + 1).view(-1, 1, 1)
    wave = torch.sin(9.0 * turns * place[:, None] + 5.0 * place) * 0.3 + 0.5
    wave[:, side // 2 :, side // 3 :] *= 0.4
    return (torch.stack((wave, 1.0 - wave, wave.flip(1)), dim=3) * 255).to(torch.uint8)


def test_a_bijection_makes_its_own_small_pictures_and_others_reduce() -> None:
    x = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    irn = IRN(scale=2, num_blocks=[1], growth=4)
    pair = rescaler_of(irn, (2.0, 2.0), (12, 8))
    assert isinstance(pair, Rescaler)
    assert pair.own
    torch.testing.assert_close(pair.down(x), F.avg_pool2d(x, 2))
    assert torch.equal(pair.up(pair.down(x)), irn(irn.downscale(x)[0], 2))

    bicubic = Interpolation(space="pixel", channels=3)
    pair = rescaler_of(bicubic, (4.0, 4.0), (12, 8))
    assert not pair.own
    expected = F.interpolate(x, (3, 2), mode="bicubic", antialias=True)
    assert torch.equal(pair.down(x), expected)
    assert torch.equal(pair.up(expected), bicubic(expected, 4))

    pair = rescaler_of(IARN(num_blocks=1, growth=4), (1.5, 2.5), (12, 8))
    assert pair.down(x).shape == (1, 3, 8, 3)
    assert pair.up(pair.down(x)).shape == x.shape


def test_pictures_are_cropped_to_what_divides() -> None:
    bicubic = Interpolation(space="pixel", channels=3)
    assert fitting_size(bicubic, (4.0, 4.0), (13, 8)) == (12, 8)
    assert fitting_size(IARN(num_blocks=1, growth=4), (1.5, 2.5), (13, 7)) == (13, 7)
    with pytest.raises(DataError, match="13x8 cannot be made 4 times smaller"):
        rescaler_of(bicubic, (4.0, 4.0), (13, 8))
    with pytest.raises(ConfigError, match=r"the same on both axes, but 1.5 x 2 was asked for"):
        rescaler_of(bicubic, (1.5, 2.0), (12, 8))
    with pytest.raises(ConfigError, match="enlarges latents"):
        rescaler_of(Interpolation(), (2.0, 2.0), (12, 8))


def test_the_script_finds_small_pictures_whose_files_are_rebuilt_better(tmp_path: Path) -> None:
    save_npz(tmp_path / "pictures.npz", waves(2, 18))
    words = [str(tmp_path / "pictures.npz"), str(tmp_path / "out"), "--search", "--steps", "4", "4"]
    assert rescale_pictures(words) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    psnr = {(each["picture"], each["way"]): each["psnr"] for each in found}
    for name in ("00000", "00001"):
        assert psnr[name, "plain"] == psnr[name, "bicubic"]
        assert psnr[name, "searched"] > psnr[name, "plain"]
        assert (tmp_path / "out" / "searched" / f"{name}.png").is_file()


def test_the_script_tells_mistakes_in_a_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert rescale_pictures([str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    assert "holds no pictures" in capsys.readouterr().err


def test_a_video_is_delivered_as_files(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", waves(2, 18).numpy())
    words = f"{tmp_path / 'clip.npy'} {tmp_path / 'out'} --grid 2 2 --hidden-size 4 --blocks 1"
    assert overfit_video([*words.split(), "--epochs", "30", "--lr", "1e-2"]) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["size"] == [16, 16]  # cropped to whole small patches
    assert sorted(index["chunk"]) == [0] * 4 + [1] * 4
    assert len(list((tmp_path / "out" / "small").iterdir())) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["psnr"] > summary["psnr_general"]
