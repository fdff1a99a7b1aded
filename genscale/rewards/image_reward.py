"""ImageReward v1.0 (arXiv:2304.05977): people's preferences, learned by a BLIP with a linear head.

The forward pass is our own, as the official package pins libraries of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError, require
from genscale.io.weights import assign_strictly, below, read_checkpoint
from genscale.layers.norm import no_autocast
from genscale.metrics.features import file_sha256
from genscale.rewards.aesthetic import LinearHead
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.blip import BLIP, BLIP_LARGE, BLIPSizes, from_blip
from genscale.rewards.learned import LearnedReward, Precision, captions_of, find_file, once_each
from genscale.rewards.preprocessing import Preprocessing

# mean and deviation of the raw score over the official validation set
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_NUM_TOKENS = 35  # the most of a caption, beginning and end included
_WHAT = "ImageReward.pt (THUDM/ImageReward, Apache-2.0)"
_WORDS = "vocab.txt or tokenizer.json of google-bert/bert-base-uncased (Apache-2.0)"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Captions as numbers.

    Shapes:
        ids: ``(G, N)`` int64.
        mask: ``(G, N)`` bool, false for padding.
    """

    ids: Tensor
    mask: Tensor


class ImageReward(LearnedReward):
    """The head's score of the caption's first token in sight of the picture, standardised.

    Captions of more than 35 tokens are cut.

    Args:
        weights: ImageReward.pt.
        vocabulary: vocab.txt or tokenizer.json of bert-base-uncased, or the folder of one.
        exact: preprocess as the official program does, without gradient.
        precision: of BLIP's arithmetic; the head computes in float32.
    """

    needs = frozenset({"caption"})
    licence = "Apache-2.0 (THUDM/ImageReward)"
    sizes: BLIPSizes = BLIP_LARGE

    def __init__(
        self,
        *,
        weights: str | None = None,
        vocabulary: str | None = None,
        exact: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(precision)
        self.weights = weights
        self.vocabulary = vocabulary
        self.preprocessing = Preprocessing(exact=exact)
        self.differentiable = not exact
        self._words: Any = None

    @property
    def settings(self) -> list[str]:
        """The route of preprocessing."""
        return [self.preprocessing.label]

    def digests(self) -> list[str]:
        """Return those of the checkpoint and the vocabulary."""
        files = (find_file(self.weights, _WHAT), self._vocabulary_file())
        return [file_sha256(str(file)) for file in files]

    def find(self) -> None:
        """Look for both files and the tokenizers package."""
        find_file(self.weights, _WHAT)
        self._vocabulary_file()
        require("tokenizers", what="reward ImageReward", extra="text")

    def load(self) -> nn.Module:
        """Read BLIP and the head."""
        path = find_file(self.weights, _WHAT)
        state = read_checkpoint(path)
        with torch.device("meta"):
            network = nn.ModuleDict(
                {"blip": BLIP(self.sizes), "head": LinearHead(self.sizes.text[0])}
            )
        named = {f"blip.{key}": value for key, value in from_blip(below(state, "blip.")).items()}
        named |= {f"head.{key}": value for key, value in below(state, "mlp.").items()}
        named |= {k: v for k, v in state.items() if not k.startswith(("blip.", "mlp."))}
        assign_strictly(
            network, named, device=torch.device("cpu"), source=path, hint=f"Give {_WHAT}."
        )
        return network

    def prepare(self, requests: Sequence[Request]) -> Tokens:
        """Return the captions' tokens."""
        texts, places = once_each(captions_of(requests))
        found = [each.ids for each in self._tokenizer().encode_batch(texts)]
        ids = torch.zeros(len(found), max(map(len, found)), dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, numbers in enumerate(found):
            ids[i, : len(numbers)] = torch.tensor(numbers)
            mask[i, : len(numbers)] = True
        return Tokens(ids[places].to(self.device), mask[places].to(self.device))

    def score(self, images: Tensor, handle: Tokens, index: Tensor) -> RewardOutput:
        """Judge pictures; the score before standardisation is told beside the value."""
        network = self.network
        preprocessing = replace(self.preprocessing, size=self.sizes.image_size)
        pixels = preprocessing(images.to(self.device))
        rows = index.to(handle.ids.device)
        with self.computing():
            states = network.blip(pixels, handle.ids[rows], handle.mask[rows])
        with no_autocast(self.device):
            raw: Tensor = network.head(states.float())
        return RewardOutput((raw - _MEAN) / _STD, {"raw": raw})

    def loss(self, images: Tensor, handle: Tokens, index: Tensor) -> Tensor:
        """Return 2 - score, as ReNO weighs it (arXiv:2406.04312).

        Raises:
            NotImplementedError: preprocessing is exact, and has no gradient.
        """
        return 2.0 + super().loss(images, handle, index)

    def _vocabulary_file(self) -> Path:
        if self.vocabulary is None:
            raise ConfigError(
                f"reward.vocabulary is not set, and {_WORDS} is needed. Download it once and give "
                "reward.vocabulary=<its path>."
            )
        place = Path(self.vocabulary).expanduser()
        for path in (place, place / "tokenizer.json", place / "vocab.txt"):
            if path.is_file():
                return path
        raise CheckpointError(
            f"reward.vocabulary={self.vocabulary} does not exist or holds no vocabulary, and "
            f"{_WORDS} was expected. Give its path."
        )

    def _tokenizer(self) -> Any:
        if self._words is None:
            require("tokenizers", what="reward ImageReward", extra="text")
            from tokenizers import BertWordPieceTokenizer, Tokenizer

            path = self._vocabulary_file()
            try:
                words = (
                    Tokenizer.from_file(str(path))
                    if path.suffix == ".json"
                    else BertWordPieceTokenizer(str(path), lowercase=True)
                )
            except Exception as error:  # the package raises nothing narrower
                raise CheckpointError(
                    f"reward.vocabulary={path} is damaged ({error}), and {_WORDS} was expected. "
                    "Copy it again."
                ) from error
            words.no_padding()
            words.enable_truncation(_NUM_TOKENS)
            self._words = words
        return self._words
