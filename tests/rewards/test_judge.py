"""A judge of two answers: its probabilities, its cache, and whom candidates meet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genscale.errors import CheckpointError, ConfigError
from genscale.rewards import duels
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.judge import Candidate, Judge, Sitting
from genscale.rewards.preprocessing import to_pictures
from genscale.rewards.vision_language import Verdicts, VisionLanguage
from genscale.search.scorer import Scorer, Scores, best_first
from tests.rewards.small_clip import pictures

REQUESTS = [Request("two red circle"), Request("blue")]
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} answer"
)
VOCABULARY = """
<pad> <unk> <s> </s> <image> yes Yes no No red blue circle two a A picture pictures was
were made for this description : This is the second first better than good Is it ? Judge
by how well shows what described , its composition and quality . Answer with or answer
Think step about you see Then Final ( ) Two
"""
WORDS = VOCABULARY.split()


# ------------------------------------------------------------------ duels, without any model


class Strengths:
    """Candidates of known strength; counts what it is asked."""

    def __init__(self, *strengths: float) -> None:
        self.strengths = strengths
        self.rounds: list[list[tuple[int, int]]] = []

    def __call__(self, pairs: list[tuple[int, int]]) -> list[float]:
        self.rounds.append(pairs)
        return [1 / (1 + math.exp(self.strengths[j] - self.strengths[i])) for i, j in pairs]

    @property
    def count(self) -> int:
        return sum(map(len, self.rounds))


def best(order: list[float]) -> int:
    return max(range(len(order)), key=order.__getitem__)


class TestDuels:
    def test_a_ladder_takes_one_duel_a_challenger(self) -> None:
        beats = Strengths(1.0, 0.5, 2.0, 1.5, 3.0)
        order = duels.champion_ladder([0.1, 0.9, 0.2, 0.3, 0.4], beats)
        assert beats.rounds == [[(1, 0)], [(2, 0)], [(3, 2)], [(4, 2)]]
        assert order[:1] + order[2:3] + order[4:] == [0.0, 1.0, 2.0]  # later champions are better
        assert -1 < order[3] < order[1] < 0  # others by their values

    @pytest.mark.parametrize(("count", "rounds"), [(1, 0), (2, 1), (5, 3), (8, 3), (9, 4)])
    def test_a_tournament_takes_one_duel_a_loser(self, count: int, rounds: int) -> None:
        strengths = [math.sin(7.0 * i) for i in range(count)]
        beats = Strengths(*strengths)
        order = duels.tournament([0.0] * count, beats)
        assert (beats.count, len(beats.rounds)) == (count - 1, rounds)
        assert best(order) == best(strengths)

    def test_all_pairs_meet_once(self) -> None:
        beats = Strengths(0.3, 2.0, -1.0, 1.0)
        order = duels.all_pairs([0.0] * 4, beats)
        assert beats.count == 6
        assert sorted(range(4), key=order.__getitem__) == [2, 0, 3, 1]
        assert sum(order) == pytest.approx(2.0)  # half of all duels are won

    def test_references_are_the_same_for_all_and_drawn_by_key(self) -> None:
        beats = Strengths(0.3, 2.0, -1.0, 1.0, 0.0)
        settings: dict[str, Any] = {"count": 2, "seed": 3, "request": 0}
        order = duels.against_references([0.0] * 5, beats, **settings)
        drawn = {j for _, j in beats.rounds[0]}
        assert len(drawn) == 2
        assert beats.count == 2 * 4  # nobody meets itself
        assert sorted(range(5), key=order.__getitem__) == [2, 4, 0, 3, 1]
        assert order == duels.against_references([0.0] * 5, beats, **settings)
        draws = set()
        for request in range(20):
            own = Strengths(0.3, 2.0, -1.0, 1.0, 0.0)
            duels.against_references([0.0] * 5, own, count=2, seed=3, request=request)
            draws.add(tuple(sorted({j for _, j in own.rounds[0]})))
        assert len(draws) > 3

    def test_even_duels_go_to_the_first(self) -> None:
        even = Strengths(0.0, 0.0, 0.0)
        for order in (
            duels.champion_ladder([0.5] * 3, even),
            duels.tournament([0.5] * 3, even),
            duels.all_pairs([0.5] * 3, even),
        ):
            assert best(order) == 0


# ------------------------------------------------------------------ a small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two small towers with random weights, as ``save_pretrained`` writes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("judge")
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 8, "width": 8}
    try:  # the one that needs no torchvision
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # before transformers 5
        CLIPImageProcessorPil = transformers.CLIPImageProcessor

    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size),
        tokenizer=words,
        patch_size=4,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(
            **tower, vocab_size=len(WORDS), max_position_embeddings=256, pad_token_id=0,
            bos_token_id=2, eos_token_id=3,
        ),
        image_token_id=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def judge(folder: Path, **changes: Any) -> Judge:
    return Judge(**{"folder": str(folder), "precision": "float32", "batch_size": 3, **changes})


def by_hand(folder: Path, text: str, shown: list[np.ndarray]) -> Tensor:
    """Return the logits (V,) after a whole message, by transformers alone."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[text], images=shown, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def probability(logits: Tensor) -> float:
    yes, no = (
        logits[[WORDS.index(w) for w in words]].exp().sum()
        for words in (("yes", "Yes"), ("no", "No"))
    )
    return float(yes / (yes + no))


ALONE = (
    "A picture was made for this description: {caption}\nThis is the picture:<image>Is it a good "
    "picture? Judge by how well it shows what was described, its composition and its quality. "
    "Answer with yes or no. answer"
)
BESIDE = (
    "Two pictures were made for this description: {caption}\nThis is the first picture:<image>This "
    "is the second picture:<image>Is the second picture better than the first? Judge by how well "
    "it shows what was described, its composition and its quality. Answer with yes or no. answer"
)


class TestPointwise:
    def test_the_probability_of_yes_over_all_its_spellings(self, folder: Path) -> None:
        reward = judge(folder)
        assert reward.check() == []
        images, index = pictures(4, side=8), torch.tensor([0, 1, 0, 0])
        found = reward.score(images, reward.prepare(REQUESTS), index)
        for i, request in enumerate(index.tolist()):
            text = ALONE.format(caption=REQUESTS[request].caption)
            expected = probability(by_hand(folder, text, [to_pictures(images)[i]]))
            assert float(found.value[i]) == pytest.approx(expected, abs=1e-5)
        assert found.value.std() > 1e-3
        logit = judge(folder, logit_reward=True)
        odds = logit.score(images, logit.prepare(REQUESTS), index).value
        torch.testing.assert_close(odds.sigmoid(), found.value, rtol=0, atol=1e-6)
        assert logit.label == f"Judge(pointwise, logit, float32, weights {reward.fingerprint})"

    def test_a_cached_prefix_changes_nothing(self, folder: Path) -> None:
        images, index = pictures(5, side=8), torch.tensor([0, 1, 0, 0, 0])
        cached, plain = (judge(folder, cache_prefix=each) for each in (True, False))
        values = [
            each.score(images, each.prepare(REQUESTS), index).value for each in (cached, plain)
        ]
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)

    def test_the_prefix_is_read_once(self, folder: Path) -> None:
        lengths: dict[bool, list[int]] = {}
        for cached in (True, False):
            reward = judge(folder, cache_prefix=cached)
            handle = reward.prepare(REQUESTS[:1])
            one = torch.zeros(1, dtype=torch.int64)
            reward.score(pictures(1, side=8), handle, one)  # with the check against no cache
            seen: list[int] = []
            hook = reward.network.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(
                    kwargs["input_ids"].shape[1] * len(kwargs["input_ids"])
                ),
                with_kwargs=True,
            )
            reward.score(pictures(4, side=8), handle, one.expand(4))
            hook.remove()
            lengths[cached] = seen
        assert len(lengths[True]) == len(lengths[False]) == 2  # batches of 3 and 1
        text = "<s> A picture was made for this description : two red circle This is the picture :"
        head = len(text.split(" "))
        assert sum(lengths[False]) - sum(lengths[True]) == 4 * head

    def test_batch_mates_do_not_matter(self, folder: Path) -> None:
        reward, images = judge(folder), pictures(4, side=8)
        index = torch.tensor([0, 1, 1, 0])
        together = reward.score(images, reward.prepare(REQUESTS), index).value
        for i in range(4):
            handle = reward.prepare(REQUESTS)
            alone = reward.score(images[i : i + 1], handle, index[i : i + 1]).value
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)

    def test_parts_watch_the_judge(self, folder: Path) -> None:
        reward = judge(folder)
        handle = reward.prepare(REQUESTS)
        assert isinstance(handle, Sitting)
        index = torch.tensor([0, 0, 1])
        first = reward.score(pictures(3, side=8), handle, index)
        p = first.value.double()
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        torch.testing.assert_close(first.parts["entropy"].double(), entropy, rtol=0, atol=1e-5)
        spread = float(first.value[:2].std(correction=0))
        assert first.parts["std_within_group"].tolist() == pytest.approx([spread, spread, 0.0])
        second = reward.score(pictures(1, side=8, seed=5), handle, torch.tensor([0]))
        group = torch.cat((first.value[:2], second.value))
        assert float(second.parts["std_within_group"]) == pytest.approx(
            float(group.std(correction=0)), abs=1e-6
        )
        assert first.parts["thoughts"].tolist() == [0, 0, 0]
        assert reward.compare(first, index) is first.value
        assert reward.potential
        assert not reward.differentiable

    def test_a_rationale_is_written_greedily_before_the_answer(self, folder: Path) -> None:
        most = 5
        found = {}
        for cached in (True, False):
            reward = judge(
                folder, chain_of_thought=True, max_thought_tokens=most, cache_prefix=cached
            )
            found[cached] = reward.score(
                pictures(2, side=8), reward.prepare(REQUESTS), torch.tensor([0, 1])
            )
        torch.testing.assert_close(found[True].value, found[False].value, rtol=0, atol=1e-5)
        assert reward.settings == ["pointwise", "thoughts 5"]
        # by hand: the likeliest word again and again, then the cue
        text = ALONE.replace(
            "Answer with yes or no.",
            "Think step by step about what you see. Then answer with yes or no.",
        ).format(caption="two red circle")
        picture, written = to_pictures(pictures(2, side=8))[0], 0
        while written < most:
            token = int(by_hand(folder, text, [picture]).argmax())
            if token == WORDS.index("</s>"):
                break
            text, written = f"{text} {WORDS[token]}", written + 1
        logits = by_hand(folder, f"{text} Final answer (yes or no):", [picture])
        assert float(found[True].parts["thoughts"][0]) == written
        assert float(found[True].value[0]) == pytest.approx(probability(logits), abs=1e-5)


class TestPairwise:
    def scored(self, folder: Path, count: int = 4, **changes: Any) -> tuple[Judge, RewardOutput]:
        reward = judge(folder, mode="pairwise", **changes)
        handle = reward.prepare(REQUESTS)
        index = torch.zeros(count, dtype=torch.int64)
        return reward, reward.score(pictures(count, side=8), handle, index)

    def test_chances_are_those_of_the_whole_message(self, folder: Path) -> None:
        reward, output = self.scored(folder, debias=False)
        one, two = output.parts["candidate"].long().tolist()[:2]
        shown = to_pictures(pictures(4, side=8))
        text = BESIDE.format(caption="two red circle")
        expected = probability(by_hand(folder, text, [shown[1], shown[0]]))
        assert reward.chances([(one, two)]) == pytest.approx([expected], abs=1e-5)
        assert not reward.potential

    def test_debiased_chances_sum_to_one(self, folder: Path) -> None:
        plain, output = self.scored(folder, debias=False)
        numbers = output.parts["candidate"].long().tolist()
        pairs = [(i, j) for i in numbers for j in numbers if i != j]
        raw = dict(zip(pairs, plain.chances(pairs), strict=True))
        assert any(abs(raw[i, j] + raw[j, i] - 1) > 0.01 for i, j in pairs)  # places matter to it
        fair, _ = self.scored(folder)
        even = dict(zip(pairs, fair.chances(pairs), strict=True))
        for i, j in pairs:
            assert even[i, j] + even[j, i] == pytest.approx(1.0, abs=1e-12)
            assert even[i, j] == pytest.approx(0.5 * (raw[i, j] + 1 - raw[j, i]), abs=1e-5)
        assert fair.comparisons == len(pairs)  # both orders of every pair, each once

    @pytest.mark.parametrize(
        ("references", "debias", "asked"),
        [
            ("best_so_far", True, 6),  # N - 1 duels in both orders
            ("tournament", True, 6),
            ("tournament", False, 3),
            ("all_pairs", True, 12),
            ("random_k", False, 6),  # 2 references, 3 opponents each
        ],
    )
    def test_the_questions_of_four_candidates(
        self, folder: Path, references: str, debias: bool, asked: int
    ) -> None:
        reward, output = self.scored(folder, references=references, debias=debias, num_references=2)
        group = torch.zeros(4, dtype=torch.int64)
        order = reward.compare(output, group)
        assert order.unique().numel() == 4
        assert reward.comparisons == asked
        again = reward.compare(output, group)
        assert torch.equal(order, again)
        assert reward.comparisons == asked  # what was asked once is remembered
        assert references in reward.label

    def test_requests_are_ordered_apart(self, folder: Path) -> None:
        reward = judge(folder, mode="pairwise", references="all_pairs")
        handle = reward.prepare(REQUESTS)
        index = torch.tensor([0, 1, 0, 1, 0])
        output = reward.score(pictures(5, side=8), handle, index)
        order = reward.compare(output, index)
        lone = judge(folder, mode="pairwise", references="all_pairs")
        own = lone.prepare(REQUESTS[1:])
        mine = lone.score(pictures(5, side=8)[index == 1], own, torch.tensor([0, 0]))
        expected = lone.compare(mine, torch.tensor([0, 0]))
        torch.testing.assert_close(order[index == 1], expected, rtol=0, atol=1e-5)
        assert reward.comparisons == 2 * (3 + 1)

    def test_values_that_are_no_numbers_come_last_unasked(self, folder: Path) -> None:
        reward, output = self.scored(folder)
        output.value[1] = -torch.inf
        order = reward.compare(output, torch.zeros(4, dtype=torch.int64))
        assert order[1] == -torch.inf
        assert order[[0, 2, 3]].isfinite().all()
        assert reward.comparisons == 2 * 2

    def test_a_new_search_forgets_candidates(self, folder: Path) -> None:
        reward, output = self.scored(folder)
        pair = tuple(output.parts["candidate"].long().tolist()[:2])
        reward.chances([pair])
        handle = reward.prepare(REQUESTS)
        again = reward.score(pictures(1, side=8), handle, torch.tensor([0]))
        assert float(again.parts["candidate"]) == 4  # numbers are never given twice
        with pytest.raises(KeyError):
            reward.chances([pair])
        assert Candidate("blue", to_pictures(pictures(1))[0]).caption == "blue"


class Bright(Judge):
    """Says yes to bright pictures, and to the brighter one of two."""

    def _asked(self) -> Any:
        return self

    def ask(self, before: list[Any], shown: list[np.ndarray], question: str) -> Verdicts:
        assert "two red circle" in before[0] or "blue" in before[0]
        assert question.startswith("Is ")
        reference = [part.mean() for part in before if not isinstance(part, str)]
        yes = torch.tensor([each.mean() - sum(reference) for each in shown]) / 50
        return Verdicts(yes.float(), torch.zeros(len(shown)), torch.zeros(len(shown)))


@pytest.mark.parametrize("references", ["best_so_far", "tournament", "random_k", "all_pairs"])
def test_a_search_finds_its_best_by_duels(references: str) -> None:
    reward = Bright(mode="pairwise", references=references)  # type: ignore[arg-type]
    scorer = Scorer(lambda latents: latents, reward)
    scorer.prepare(REQUESTS)
    group = torch.tensor([0, 1]).repeat(6)
    levels = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.4, 0.8, 0.0, 0.5, 0.6, 0.7, 0.2, 0.1])
    latents = (2 * levels - 1)[:, None, None, None].expand(-1, 3, 4, 4)
    # in micro-batches, as an engine scores; the best of the first ones stays in the race
    parts = [scorer.score(latents[i : i + 5], latents[i : i + 5], group[i : i + 5]) for i in (0, 5)]
    first = Scores.cat(parts)
    kept = first.select(best_first(scorer.compare(first), first.group, 1))
    both = Scores.cat((kept, scorer.score(latents[10:], latents[10:], group[10:])))
    best = both.select(best_first(scorer.compare(both), both.group, 1))
    assert best.latents[:, 0, 0, 0].tolist() == pytest.approx([0.8, 0.6])  # 0.9 and 0.8
    assert best.group.tolist() == [0, 1]


class TestModel:
    def parts(self, folder: Path) -> tuple[Any, Any]:
        transformers = pytest.importorskip("transformers")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
        return model, transformers.AutoProcessor.from_pretrained(folder)

    def test_a_model_that_a_cache_misleads_is_found_out(self, folder: Path) -> None:
        model, processor = self.parts(folder)
        reader = VisionLanguage(model, processor)
        shown = list(to_pictures(pictures(1, side=8)))
        whole = VisionLanguage(model, processor, cache_prefix=False).ask(["a"], shown, "yes")
        assert isinstance(whole, Verdicts)
        inner = model.forward

        def forgetful(**kwargs: Any) -> Any:  # takes a cached start for none
            name = reader._cache_name
            if kwargs.get(name) is not None:
                kwargs |= {name: None, "attention_mask": torch.ones_like(kwargs["input_ids"])}
            return inner(**kwargs)

        model.forward = forgetful
        with pytest.raises(ConfigError, match=r"Give reward\.cache_prefix=false"):
            reader.ask(["two red circle"], shown, "yes")

    def test_captions_must_not_hold_the_word_for_a_picture(self, folder: Path) -> None:
        reward = judge(folder)
        handle = reward.prepare([Request("red <image>")])
        with pytest.raises(ConfigError, match=r"1 pictures has 2 places for them \(<image>\)"):
            reward.score(pictures(1, side=8), handle, torch.tensor([0]))

    def test_models_that_cannot_answer_are_told_of(self, folder: Path) -> None:
        model, processor = self.parts(folder)
        processor.chat_template = None
        with pytest.raises(ConfigError, match="has no chat template"):
            VisionLanguage(model, processor)
        _, processor = self.parts(folder)
        processor.tokenizer.encode = lambda word, add_special_tokens: [5]
        with pytest.raises(ConfigError, match="no single tokens for yes and for no"):
            VisionLanguage(model, processor)


def test_settings_and_folders_are_checked(tmp_path: Path) -> None:
    (problem,) = Judge().check()
    assert "HuggingFaceTB/SmolVLM-Instruct (Apache-2.0) are needed" in problem
    (problem,) = Judge(folder=str(tmp_path)).check()
    assert "has no config.json and no model.safetensors and no tokenizer.json" in problem
    assert Judge().problems([Request(label=1)])
    assert Judge(criteria="its colours.").settings == ["pointwise", "criteria 'its colours'"]
    for settings, message in (
        ({"mode": "pair"}, r"reward\.mode must be one of .*Did you mean 'pairwise'"),
        ({"references": "all"}, r"reward\.references must be one of"),
        ({"precision": "float16"}, r"reward\.precision must be one of float32, bfloat16"),
        ({"batch_size": 0}, r"reward\.batch_size must be at least 1, but 0 was given"),
    ):
        with pytest.raises(ConfigError, match=message):
            Judge(**settings)  # type: ignore[arg-type]


def test_a_processor_that_is_missing_is_told_of(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    reward = judge(tmp_path)
    assert reward.check() == []
    with pytest.raises((CheckpointError, ConfigError), match=r"reward\.folder"):
        reward.score(pictures(1, side=8), reward.prepare(REQUESTS), torch.tensor([0]))
