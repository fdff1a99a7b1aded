"""The aesthetic predictor on a small CLIP, held to matrix products written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import CheckpointError
from genscale.rewards.aesthetic import Aesthetic, LinearHead, load_head
from genscale.rewards.base import Request
from genscale.rewards.preprocessing import Preprocessing
from tests.rewards.small_clip import IMAGE_SIZE, pictures, write_clip

LAYERS = (("0", 1024), ("2", 128), ("4", 64), ("6", 16), ("7", 1))


def head_state(width: int, prefix: str = "") -> dict[str, Tensor]:
    """Return tensors of the names and shapes of the published file."""
    generator = torch.Generator().manual_seed(2)
    state, before = {}, width
    for name, after in LAYERS:
        weight = torch.randn(after, before, generator=generator) / before**0.5
        state[f"{prefix}layers.{name}.weight"] = weight
        state[f"{prefix}layers.{name}.bias"] = torch.randn(after, generator=generator)
        before = after
    return state


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clip")
    model = write_clip(folder)
    torch.save(head_state(6), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder, model


def aesthetic(folder: Path, **changes: Any) -> Aesthetic:
    weights = str(folder / "sac+logos+ava1-l14-linearMSE.pth")
    return Aesthetic(**{"folder": str(folder), "weights": weights, **changes})


def by_hand(embeddings: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = embeddings.double()
    for name, _ in LAYERS:
        x = x @ state[f"layers.{name}.weight"].double().T + state[f"layers.{name}.bias"].double()
    return x[:, 0]


@pytest.mark.parametrize("exact", [False, True])
def test_linear_layers_of_the_unit_embedding(clip: tuple[Path, Any], exact: bool) -> None:
    folder, model = clip
    reward = aesthetic(folder, exact=exact)
    assert reward.check() == []
    images, index = pictures(4), torch.zeros(4, dtype=torch.int64)
    found = reward.score(images, reward.prepare([Request()]), index).value
    with torch.no_grad():
        pooled = model.vision_model(Preprocessing(IMAGE_SIZE, exact=exact)(images)).pooler_output
        embeddings = model.visual_projection(pooled)
    expected = by_hand(embeddings / embeddings.norm(dim=1, keepdim=True), head_state(6))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert reward.problems([Request()]) == []  # it reads no caption


def test_batch_mates_do_not_matter_and_the_gradient_is_right(clip: tuple[Path, Any]) -> None:
    reward, images = aesthetic(clip[0]), pictures(3)
    index = torch.zeros(3, dtype=torch.int64)
    together = reward.score(images, None, index).value
    for i in range(3):
        alone = reward.score(images[i : i + 1], None, index[:1]).value
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
    wanted = images[:1].clone().requires_grad_()
    loss = reward.loss(wanted, None, index[:1])
    assert float(loss.detach()) == pytest.approx(10 - float(together[0]), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), wanted)
    direction, step = gradient / gradient.norm(), 1e-2
    ends = [
        float(reward.loss(images[:1] + sign * step * direction, None, index[:1]))
        for sign in (1, -1)
    ]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_the_exact_route_comes_close_and_has_no_gradient(clip: tuple[Path, Any]) -> None:
    images, index = pictures(4), torch.zeros(4, dtype=torch.int64)
    exact = aesthetic(clip[0], exact=True)
    values = [each.score(images, None, index).value for each in (aesthetic(clip[0]), exact)]
    assert 0 < (values[0] - values[1]).abs().max() < 2e-2
    assert exact.label == f"Aesthetic(pil, float32, weights {exact.fingerprint})"
    with pytest.raises(NotImplementedError, match="has no gradient"):
        exact.loss(images, None, index)


def test_the_published_sizes_load(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(head_state(768), path)
    head = load_head(path, 768)
    assert isinstance(head, LinearHead)
    assert sum(p.numel() for p in head.parameters()) == 787_456 + 131_200 + 8_256 + 1_040 + 17


def test_weights_that_do_not_fit_are_told_of(clip: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    for content, message in (
        (head_state(5), r"layers\.0\.weight is \(1024, 5\), expected \(1024, 6\)"),
        ({"layers.0.weight": torch.ones(1024, 6)}, "9 missing, 0 unexpected keys for LinearHead"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            aesthetic(clip[0], weights=str(path)).score(
                pictures(1), None, torch.zeros(1, dtype=torch.int64)
            )
    path.write_bytes(b"PK" + bytes(50))
    with pytest.raises(CheckpointError, match="is damaged or no weight file"):
        load_head(path, 6)


def test_what_to_download_is_told(clip: tuple[Path, Any], tmp_path: Path) -> None:
    (problem,) = Aesthetic().check()
    assert "openai/clip-vit-large-patch14, MIT" in problem
    (problem,) = Aesthetic(folder=str(clip[0])).check()
    assert "reward.weights is not set, and sac+logos+ava1-l14-linearMSE.pth" in problem
    assert "Apache-2.0" in problem
    (problem,) = aesthetic(clip[0], weights=str(tmp_path / "none.pth")).check()
    assert "none.pth does not exist" in problem
