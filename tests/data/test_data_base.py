"""A data set in memory, and the configs that build data modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from genscale.data.base import ImageDataset, TensorImages
from genscale.errors import ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf/data"
PIXELS = torch.arange(5 * 3 * 4).view(5, 3, 2, 2).to(torch.uint8)


def test_a_tensor_is_a_data_set() -> None:
    images = TensorImages(
        PIXELS, torch.tensor([0, 1, 0, 1, 1]), class_names=("x", "y"), captions=list("abcde")
    )
    assert isinstance(images, ImageDataset)
    assert (len(images), images.channels, images.resolution, images.num_classes) == (5, 3, 2, 2)
    assert torch.equal(images.images([4, 0, 4]), PIXELS[[4, 0, 4]])
    assert torch.equal(images.images(torch.tensor([2])), PIXELS[2:3])
    assert torch.equal(images.image(3), PIXELS[3])
    assert images.images([]).shape == (0, 3, 2, 2)
    assert images.captions == ["a", "b", "c", "d", "e"]
    assert repr(images) == "TensorImages(tensor, 5 pictures, 3x2x2, 2 classes)"


def test_what_a_batch_holds_is_a_copy() -> None:
    images = TensorImages(PIXELS.clone())
    images.images([0]).zero_()
    assert torch.equal(images.image(0), PIXELS[0])


@pytest.mark.parametrize("row", [5, -1])
def test_rows_outside_are_refused(row: int) -> None:
    with pytest.raises(IndexError, match=f"Row {row} does not exist.* rows 0 to 4"):
        TensorImages(PIXELS).images([0, row])


def test_the_fingerprint_knows_every_part() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1])
    changed = PIXELS.clone()
    changed[4, 2, 1, 1] += 1
    sets = [
        TensorImages(PIXELS),
        TensorImages(changed),
        TensorImages(PIXELS, captions=list("abcde")),
        TensorImages(PIXELS, labels, class_names=("x", "y")),
        TensorImages(PIXELS, 1 - labels, class_names=("x", "y")),
        TensorImages(PIXELS, labels, class_names=("x", "z")),
        TensorImages(PIXELS.view(15, 1, 2, 2)),
    ]
    assert len({images.fingerprint() for images in sets}) == len(sets)
    assert TensorImages(PIXELS.clone(), name="other").fingerprint() == sets[0].fingerprint()


def test_parts_that_do_not_fit_together_are_refused() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(DataError, match=r"uint8 .* but are torch.float32 of shape \(5, 3, 2, 2\)"):
        TensorImages(PIXELS.float())
    with pytest.raises(DataError, match=r"must be one uint8 tensor of shape"):
        TensorImages(PIXELS[:, :, :1])
    with pytest.raises(DataError, match=r"holds no pictures"):
        TensorImages(PIXELS[:0])
    with pytest.raises(ConfigError, match=r"channels=2"):
        TensorImages(PIXELS[:, :2])
    with pytest.raises(DataError, match=r"5 pictures but labels of shape \(4,\)"):
        TensorImages(PIXELS, labels[:4], class_names=("x",))
    with pytest.raises(DataError, match=r"labels of 'tensor' run from 0 to 1, but it has 1 class"):
        TensorImages(PIXELS, labels + torch.tensor([0, 0, 0, 0, 1]), class_names=("x",))
    with pytest.raises(DataError, match=r"run from -1 to -1"):
        TensorImages(PIXELS, labels - 1, class_names=("x",))
    with pytest.raises(DataError, match=r"2 class names but no labels"):
        TensorImages(PIXELS, class_names=("x", "y"))
    with pytest.raises(DataError, match=r"5 pictures but 1 captions"):
        TensorImages(PIXELS, captions=["one"])


def config(name: str, **changes: object) -> DictConfig:
    """Read a data config as the root config would hold it."""
    node = OmegaConf.load(CONF / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    for parent in node.pop("defaults", ()):
        if parent != "_self_":
            node = OmegaConf.merge(config(parent), node)
    root = OmegaConf.create({"batch_size": 6, "seed": 11, "data": node})
    data = root.data
    assert isinstance(data, DictConfig)
    OmegaConf.set_struct(root, True)
    data.update(changes)
    return data


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_states_what_a_model_asks_for(path: Path) -> None:
    node = config(path.stem)
    for word in ("name", "resolution", "channels", "num_classes", "flip", "num_workers"):
        assert word in node, word
    assert node.name == path.stem
    assert (node.batch_size, node.seed) == (6, 11)


def test_the_digits_config_builds_its_module() -> None:
    module = instantiate(config("digits", resolution=8))
    assert (module.batch_size, module.seed, module.resolution) == (6, 11, 8)
    assert (module.num_classes, module.name, len(module.heldout)) == (10, "digits", 360)


def test_the_folder_configs_build_their_module(tmp_path: Path) -> None:
    for word in ("a/1.png", "b/2.png"):
        (tmp_path / word).parent.mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / word)
    module = instantiate(config("image_folder", root=str(tmp_path), resolution=8))
    assert (module.num_classes, module.flip) == (2, True)
    imagenet = config("imagenet256", root=str(tmp_path))
    assert (imagenet.resolution, imagenet.verify) == (256, "none")
    with pytest.raises(
        InstantiationException, match=r"data.num_classes=1000, but 'imagenet256' has 2 classes"
    ):
        instantiate(imagenet)
    with pytest.raises(
        InstantiationException, match=r"data.root is not set, and data=imagenet256 needs"
    ):
        instantiate(config("imagenet256"))
