"""Detectors of transformers: small networks of random weights in local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.errors import CheckpointError, ConfigError
from genscale.rewards.base import Request
from genscale.rewards.count_words import NUMBER_WORDS, class_in, forms, read_counts
from genscale.rewards.counting import D2D
from genscale.rewards.detectors import (
    SIGMOID_HEADS,
    SOFTMAX_HEADS,
    DETRDetector,
    FolderDetector,
    OWLv2Detector,
    Resizing,
    log_odds,
)

LABELS = {0: "person", 1: "dog", 2: "hot dog", 3: "bus"}
SIZES = {
    "yolos": {"size": {"shortest_edge": 32, "longest_edge": 48}, "do_normalize": True},
    "rt_detr": {"size": {"height": 64, "width": 64}, "do_normalize": False},
    "detr": {"size": {"shortest_edge": 64, "longest_edge": 96}, "do_normalize": True},
}


class TestCaptions:
    @pytest.mark.parametrize(
        ("caption", "expected"),
        [
            ("Three dogs and a cat.", {"dogs": 3, "cat": 1}),
            ("a photo of four zebras on the grass", {"zebras": 4}),
            (
                "two red apples, 12 pears, and an orange",
                {"red apples": 2, "pears": 12, "orange": 1},
            ),
            ("one dog and one dog", {"dog": 2}),
        ],
    )
    def test_counts(self, caption: str, expected: dict[str, int]) -> None:
        assert read_counts(caption) == expected

    def test_no_number(self) -> None:
        with pytest.raises(
            ConfigError, match="'dogs and a cat' asks for no number of things: 'dogs'"
        ):
            read_counts("dogs and a cat")
        assert NUMBER_WORDS["twenty"] == 20

    def test_plurals(self) -> None:
        assert forms("bus") == ("bus", "buses")
        assert forms("person") == ("person", "persons", "people")
        assert forms("knife") == ("knife", "knives")
        assert forms("sheep") == ("sheep",)
        assert forms("teddy bear")[1] == "teddy bears"

    def test_the_longest_class_that_a_phrase_ends_with(self) -> None:
        names = tuple(LABELS.values())
        assert class_in("big hot dogs", names) == "hot dog"
        assert class_in("brown dogs", names) == "dog"
        assert class_in("people", names) == "person"
        assert class_in("hotdog", names) is None


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    probability = logits.softmax(-1)[..., :-1]
    torch.testing.assert_close(torch.sigmoid(log_odds(logits)), probability)


class TestResizing:
    def test_proportions_are_kept_within_the_longest_side(self) -> None:
        resizing = Resizing.read({"size": {"shortest_edge": 32, "longest_edge": 48}})
        assert resizing(torch.rand(1, 3, 20, 20)).shape == (1, 3, 32, 32)
        assert resizing(torch.rand(1, 3, 20, 40)).shape == (1, 3, 24, 48)

    def test_one_size(self) -> None:
        resizing = Resizing.read({"size": {"height": 64, "width": 48}, "do_normalize": False})
        assert resizing(torch.full((1, 3, 20, 20), 0.25)).mean() == 0.25
        assert resizing(torch.rand(1, 3, 20, 20)).shape == (1, 3, 64, 48)


class TestFolders:
    def test_no_folder(self) -> None:
        pytest.importorskip("transformers")
        (told,) = DETRDetector().check()
        assert "reward.detector.folder is not set" in told
        (told,) = D2D(OWLv2Detector()).check()
        assert "OWLv2" in told

    def test_another_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(CheckpointError, match="holds a model of type 'bert', but one of detr"):
            DETRDetector(str(tmp_path)).settings()

    def test_without_transformers_it_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "transformers", None)
        (told,) = DETRDetector().check()
        assert 'pip install "genscale[transformers]"' in told
        assert issubclass(DETRDetector, FolderDetector)

    def test_a_template_without_a_place(self) -> None:
        with pytest.raises(ConfigError, match="template='a dog' has no"):
            OWLv2Detector(template="a dog")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of small random detectors by their type."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("detectors")
    words: dict[str, Any] = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    yolos = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        use_mid_position_embeddings=False,
        **words,
    )
    rt_detr = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=8,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        **words,
    )
    detr = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        num_queries=5,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        d_model=32,
        **words,
    )
    found = {}
    for config in (yolos, rt_detr, detr):
        kind = config.model_type
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForObjectDetection.from_config(config)
        model.save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(SIZES[kind]))
        found[kind] = str(root / kind)
    return found


@pytest.mark.parametrize("kind", sorted(SIZES))
class TestFamily:
    def test_scores_are_those_of_the_network(self, folders: dict[str, str], kind: str) -> None:
        detector = DETRDetector(folders[kind])
        assert detector.check() == []
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        found = detector.detect(images, torch.tensor([[0, 1, 2, 3, 4]] * 2))
        with torch.no_grad():
            network = detector.network("AutoModelForObjectDetection")
            output = network(pixel_values=detector.resizing(images))
        if kind in SOFTMAX_HEADS:
            scores = output.logits.softmax(-1)[..., :-1]
            some = 1 - output.logits.softmax(-1)[..., -1]
        else:
            assert kind in SIGMOID_HEADS
            scores = output.logits.sigmoid()
            some = scores.amax(-1)
        torch.testing.assert_close(found.logits[:, :4].sigmoid(), scores.transpose(1, 2))
        torch.testing.assert_close(found.logits[:, 4].sigmoid(), some)
        centre = (found.boxes[..., :2] + found.boxes[..., 2:]) / 2
        torch.testing.assert_close(centre[:, 0], output.pred_boxes[..., :2])

    def test_a_picture_does_not_depend_on_its_batch_mates(
        self, folders: dict[str, str], kind: str
    ) -> None:
        detector = DETRDetector(folders[kind])
        images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        classes = torch.tensor([[0, 1], [2, 3], [1, 4]])
        whole = detector.detect(images, classes)
        alone = detector.detect(images[1:2], classes[1:2])
        torch.testing.assert_close(alone.logits[0], whole.logits[1], atol=1e-4, rtol=1e-4)

    def test_gradients_reach_the_picture(self, folders: dict[str, str], kind: str) -> None:
        reward = D2D(DETRDetector(folders[kind]), exclude=True)
        handle = reward.prepare([Request(caption="three dogs and two people")])
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        image.requires_grad_()
        loss = reward.loss(image, handle, torch.tensor([0]))
        loss.sum().backward()
        assert image.grad is not None
        assert float(image.grad.abs().max()) > 0.0
        step = image.detach() - 0.1 * image.grad / image.grad.norm()
        after = reward.loss(step, handle, torch.tensor([0]))
        assert float(after.detach()) < float(loss.detach())


def test_captions_of_a_closed_set(folders: dict[str, str]) -> None:
    detector = DETRDetector(folders["yolos"])
    assert detector.read("two hot dogs and three people") == {"hot dog": 2, "person": 3}
    assert [detector.number(name) for name in ("bus", "object")] == [3, 4]
    (told,) = D2D(detector).problems([Request(caption="two giraffes")])
    assert "'two giraffes' asks for 'giraffes', which is no class of the detector" in told


def test_a_folder_without_preprocessing(folders: dict[str, str], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders["yolos"], tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    (told,) = DETRDetector(str(tmp_path / "copy")).check()
    assert "preprocessor_config.json is missing or damaged" in told


def test_owlv2_looks_for_what_captions_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[BOS]", "[EOS]", "a", "photo", "of", "dogs", "cat", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 32}})
    )
    detector = OWLv2Detector(str(tmp_path))
    reward = D2D(detector)
    assert reward.check() == []
    handle = reward.prepare([Request(caption="two dogs and a cat"), Request(caption="a cat")])
    assert handle.classes.tolist() == [[0, 1], [1, -1]]
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    whole = detector.detect(images, torch.tensor([[0, 1], [1, 0]]))
    assert whole.logits.shape == (2, 2, 16)
    alone = detector.detect(images[1:], torch.tensor([[0]]))
    torch.testing.assert_close(alone.logits[0, 0], whole.logits[1, 1], atol=1e-4, rtol=1e-4)
    image = images[:1].clone().requires_grad_()
    reward.loss(image, handle, torch.tensor([0])).sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 0.0
    # a box that ends where the square's filling does reaches beyond the picture
    assert float(whole.boxes[..., 3].max()) > float(whole.boxes[..., 2].max())
