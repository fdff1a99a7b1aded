"""From captions to conditions in a training step: cached, dropped by position, labels beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.autoencoders.identity import Identity
from genscale.backbones.dit import DiT
from genscale.conditioning.base import NULL_LABEL
from genscale.conditioning.words import Words
from genscale.errors import DataError
from genscale.guidance.base import Unguided
from genscale.objectives.base import Batch
from genscale.objectives.flow import FlowMatching
from genscale.pipeline import GenerationPipeline
from genscale.rng import Purpose, for_step
from genscale.samplers.ode import Euler
from genscale.text_cache import TextCache
from genscale.training.ema import ConstantEMA
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule
from genscale.training.optim import AdamW

POSITION = torch.arange(40, 48)
CAPTIONS = [f"{word} circle" for word in ("red", "blue", "green", "white")] * 2


def module_of(num_classes: int = 0, dropout: float = 0.0, text: bool = True) -> GenerativeModule:
    encoder = Words(num_tokens=4, token_size=8, pooled_size=8)
    sizes = {"text_size": 8, "num_text_tokens": 4, "pooled_text_size": 8} if text else {}
    torch.manual_seed(0)
    model = DiT(
        input_size=8, in_channels=1, num_classes=num_classes, hidden_size=8, depth=1, num_heads=2,
        **sizes,
    )  # fmt: skip
    return GenerativeModule(
        model=model,
        autoencoder=Identity(latent_channels=1),
        objective=FlowMatching(),
        optimizer=AdamW(),
        lr_schedule=Constant(),
        ema=ConstantEMA(),
        batch_size=8,
        condition_dropout=dropout,
        seed=3,
        text=TextCache(encoder) if text else None,
    )


def raw(**changes: Any) -> dict[str, Any]:
    batch = {
        "image": torch.zeros(8, 1, 8, 8, dtype=torch.uint8),
        "label": torch.arange(8) % 3,
        "position": POSITION,
        "caption": CAPTIONS,
    }
    return {**batch, **changes}


def test_captions_become_text_and_requests() -> None:
    cond = module_of().prepare(raw()).cond
    expected = Words(num_tokens=4, token_size=8, pooled_size=8).encode(CAPTIONS)
    assert cond.text is not None
    assert torch.equal(cond.text, expected.tokens)
    assert cond.pooled_text is not None
    assert torch.equal(cond.pooled_text, expected.pooled)
    assert cond.requests == tuple(CAPTIONS)
    assert cond.labels is None  # the model knows no classes


def test_each_caption_is_encoded_once_for_all_steps() -> None:
    module = module_of()
    for _ in range(3):
        module.prepare(raw())
    assert module.text is not None
    assert module.text.encoded == 4 + 1  # four captions and the empty one


def test_dropped_samples_see_the_empty_prompt_by_position() -> None:
    module = module_of(num_classes=3, dropout=0.5)
    cond = module.prepare(raw()).cond
    dropped = for_step(3, POSITION).uniform(Purpose.DROP) < 0.5
    assert 0 < int(dropped.sum()) < 8
    empty = Words(num_tokens=4, token_size=8, pooled_size=8).encode([""], null=True)
    own = Words(num_tokens=4, token_size=8, pooled_size=8).encode(CAPTIONS)
    assert cond.text is not None
    assert cond.labels is not None
    for i in range(8):
        text, label = (empty.tokens[0], NULL_LABEL) if dropped[i] else (own.tokens[i], i % 3)
        assert torch.equal(cond.text[i], text)
        assert cond.labels[i] == label


def test_a_model_of_classes_ignores_captions() -> None:
    cond = module_of(num_classes=3, text=False).prepare(raw()).cond
    assert cond.text is None
    assert cond.requests is None
    assert cond.labels is not None
    assert cond.labels.tolist() == raw()["label"].tolist()


def test_text_without_captions_is_refused() -> None:
    batch = raw()
    del batch["caption"]
    with pytest.raises(DataError, match="batches carry no captions"):
        module_of().prepare(batch)


def test_the_encoder_is_no_part_of_checkpoints() -> None:
    module = module_of()
    module.prepare(raw())
    assert not [key for key in module.state_dict() if "text" in key or "place" in key]


def test_a_step_trains_the_text_layers() -> None:
    module = module_of()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    image = torch.randint(256, (8, 1, 8, 8)).to(torch.uint8)
    module.training_step(raw(image=image), 0).backward()
    gradients = {name: p.grad for name, p in module.model.named_parameters()}
    for name in ("blocks.0.cross_attention.kv.weight", "pooled_embed.linear_1.weight"):
        gradient = gradients[name]
        assert gradient is not None
        assert gradient.any(), name


def test_a_trained_model_does_what_captions_say() -> None:
    """Pictures are dark or bright as captions say; learnt in 150 steps, then prompted."""
    torch.manual_seed(0)
    text = TextCache(Words(num_tokens=4, token_size=8, pooled_size=8))
    model = DiT(
        input_size=4, in_channels=1, num_classes=0, hidden_size=32, depth=1, num_heads=2,
        text_size=8, num_text_tokens=4, pooled_text_size=8,
    )  # fmt: skip
    objective = FlowMatching()
    captions = ["a dark picture", "a bright picture"] * 16
    clean = torch.tensor([-0.8, 0.8] * 16).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cond = text.condition(captions)
    for step in range(150):
        position = torch.arange(32) + 32 * step
        batch = Batch(clean=clean, cond=cond, position=position)
        loss = objective.loss(model, batch, for_step(0, position)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipeline = GenerationPipeline(
        model=model.eval(),
        autoencoder=Identity(latent_channels=1),
        objective=objective,
        sampler=Euler(steps=8),
        guidance=Unguided(),
        text=text,
    )
    images = pipeline.generate(prompts=["a dark picture", "a bright picture"], num_samples=8)
    brightness = images.float().mean((1, 2, 3))
    assert float(brightness[0::2].max()) < 80 < 176 < float(brightness[1::2].min())
