"""Conditions follow their particles, and have a null twin."""

from __future__ import annotations

import pytest
import torch

from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.conditioning.labels import labels_for
from genscale.errors import ConfigError


def make() -> Conditioning:
    return Conditioning(
        labels=torch.tensor([4, 5, 6]),
        text=torch.ones(3, 2, 8),
        text_mask=torch.ones(3, 2, dtype=torch.bool),
        size=torch.full((3, 2), 32),
        requests=("a", "b", "c"),
    )


def test_select_takes_every_field_together() -> None:
    picked = make().select(torch.tensor([2, 0, 2]))
    assert picked.labels is not None
    assert picked.labels.tolist() == [6, 4, 6]
    assert picked.requests == ("c", "a", "c")
    assert len(picked) == 3


def test_null_forgets_the_wish_and_keeps_the_size() -> None:
    null = make().null()
    assert null.labels is not None
    assert null.text is not None
    assert null.text_mask is not None
    assert null.size is not None
    assert null.labels.tolist() == [NULL_LABEL] * 3
    assert not null.text.any()
    assert not null.text_mask.any()
    assert (null.size == 32).all()


def test_drop_touches_masked_rows_only() -> None:
    dropped = make().drop(torch.tensor([False, True, False]))
    assert dropped.labels is not None
    assert dropped.labels.tolist() == [4, NULL_LABEL, 6]


def test_cat_inverts_select_and_refuses_unequal_fields() -> None:
    whole = make()
    parts = [whole.select(torch.tensor([0])), whole.select(torch.tensor([1, 2]))]
    joined = Conditioning.cat(parts)
    assert joined.labels is not None
    assert joined.labels.tolist() == [4, 5, 6]
    assert joined.requests == ("a", "b", "c")
    with pytest.raises(ValueError, match="'text' is given in some and missing in others"):
        Conditioning.cat([whole, Conditioning(labels=torch.tensor([1]))])


def test_repeat_keeps_copies_together() -> None:
    repeated = make().repeat(2)
    assert repeated.labels is not None
    assert repeated.labels.tolist() == [4, 4, 5, 5, 6, 6]


class TestLabelLaws:
    def test_balanced_holds_every_class_once_in_any_run_of_k(self) -> None:
        labels = labels_for("balanced", torch.arange(3, 13), num_classes=10, seed=0)
        assert labels is not None
        assert sorted(labels.tolist()) == list(range(10))

    def test_random_depends_on_seed_and_number_alone(self) -> None:
        whole = labels_for("random", torch.arange(100), num_classes=10, seed=1)
        part = labels_for("random", torch.arange(40, 60), num_classes=10, seed=1)
        other = labels_for("random", torch.arange(100), num_classes=10, seed=2)
        assert whole is not None
        assert part is not None
        assert other is not None
        assert torch.equal(whole[40:60], part)
        assert not torch.equal(whole, other)

    def test_a_list_is_cycled_through(self) -> None:
        labels = labels_for([3, 7], torch.arange(5), num_classes=10, seed=0)
        assert labels is not None
        assert labels.tolist() == [3, 7, 3, 7, 3]

    def test_unconditional_models_have_no_labels(self) -> None:
        assert labels_for("balanced", torch.arange(3), num_classes=0, seed=0) is None
        with pytest.raises(ConfigError, match="the model is unconditional"):
            labels_for([1], torch.arange(3), num_classes=0, seed=0)

    def test_unknown_laws_and_classes_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="must be balanced, random or a list"):
            labels_for("evenly", torch.arange(3), num_classes=10, seed=0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="class 10, but the model knows classes 0 to 9"):
            labels_for([10], torch.arange(3), num_classes=10, seed=0)


def with_negative() -> Conditioning:
    return Conditioning(
        labels=torch.tensor([4, 5, 6]),
        text=torch.arange(48.0).view(3, 2, 8),
        text_mask=torch.ones(3, 2, dtype=torch.bool),
        pooled_text=torch.ones(3, 4),
        requests=("a", "b", "c"),
        negative=Conditioning(
            text=-torch.ones(1, 2, 8).expand(3, -1, -1) * torch.arange(1, 4)[:, None, None],
            text_mask=torch.tensor([[True, False]]).expand(3, -1),
            pooled_text=torch.full((3, 4), 7.0),
        ),
    )


class TestNegative:
    """Text that is dropped becomes the negative text, where there is one."""

    def test_null_is_the_negative_text_and_the_null_class(self) -> None:
        cond = with_negative()
        null = cond.null()
        assert cond.negative is not None
        for name in ("text", "text_mask", "pooled_text"):
            assert torch.equal(getattr(null, name), getattr(cond.negative, name))
        assert null.labels is not None
        assert null.labels.tolist() == [NULL_LABEL] * 3

    def test_drop_replaces_masked_rows_only(self) -> None:
        cond = with_negative()
        dropped = cond.drop(torch.tensor([False, True, False]))
        assert dropped.text is not None
        assert cond.text is not None
        assert cond.negative is not None
        assert cond.negative.text is not None
        assert torch.equal(dropped.text[[0, 2]], cond.text[[0, 2]])
        assert torch.equal(dropped.text[1], cond.negative.text[1])
        assert dropped.text_mask is not None
        assert dropped.text_mask.tolist() == [[True, True], [True, False], [True, True]]

    def test_it_follows_its_samples(self) -> None:
        cond = with_negative()
        picked = Conditioning.cat([cond.select(torch.tensor([2])), cond.select(torch.tensor([0]))])
        assert picked.negative is not None
        assert picked.negative.text is not None
        assert picked.negative.text[:, 0, 0].tolist() == [-3.0, -1.0]
        assert picked.repeat(2).negative is not None
        assert len(picked.repeat(2).negative or ()) == 4
        moved = cond.to("meta").negative
        assert moved is not None
        assert moved.text is not None
        assert moved.text.device.type == "meta"

    def test_a_field_that_the_negative_lacks_is_zeroed(self) -> None:
        cond = Conditioning(text=torch.ones(1, 2, 3), negative=Conditioning())
        null = cond.null()
        assert null.text is not None
        assert not null.text.any()
