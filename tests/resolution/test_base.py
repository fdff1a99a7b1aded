"""apply_resolution puts operators on in order, always takes them off, and refuses wrong uses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution import EntropyAttention, ResolutionOp, RotaryScaling, apply_resolution
from genscale.resolution.base import Patches, linear_factor, network_of


class Note(ResolutionOp):
    """Writes down what happens to it."""

    def __init__(self, name: str, log: list[str], *, fails: bool = False) -> None:
        self.name, self.log, self.fails = name, log, fails

    def prepare(self, model, native, target, schedule=None) -> None:
        self.log.append(f"+{self.name}")
        if self.fails:
            raise RuntimeError("no")

    def pre_step(self, x, t, i):
        return [*x, self.name]

    def wrap_model(self, fn):
        return lambda x: [*fn(x), self.name]

    def post_x0(self, x0, x, t, i):
        return [*x0, self.name]

    def restore(self, model) -> None:
        self.log.append(f"-{self.name}")


def apply(ops: list[ResolutionOp], model: nn.Module | None = None) -> apply_resolution:
    return apply_resolution(model or nn.Identity(), ops, native=(2, 2), target=(4, 4))


def test_operators_act_in_order_and_come_off_in_reverse() -> None:
    log: list[str] = []
    with apply([Note("a", log), Note("b", log)]) as scaled:
        assert scaled.pre_step([], 1.0, 0) == ["a", "b"]
        assert scaled.post_x0([], None, 1.0, 0) == ["a", "b"]
        assert scaled.wrap_model(lambda x: [x])("x") == ["x", "a", "b"]
    assert log == ["+a", "+b", "-b", "-a"]


def test_all_come_off_after_an_error_within_and_one_on_the_way_in() -> None:
    log: list[str] = []
    with pytest.raises(ZeroDivisionError), apply([Note("a", log)]):
        _ = 1 / 0
    assert log == ["+a", "-a"]
    log.clear()
    model = nn.Identity()
    with (
        pytest.raises(RuntimeError, match="no"),
        apply([Note("a", log), Note("b", log, fails=True)], model),
    ):
        pass
    assert log == ["+a", "+b", "-b", "-a"]
    with apply([Note("a", log)], model):  # the model is free again
        pass


def test_a_base_operator_changes_nothing() -> None:
    op, x = ResolutionOp(), torch.ones(1)
    op.prepare(nn.Identity(), (1, 1), (2, 2))
    assert op.pre_step(x, 1.0, 0) is x
    assert op.post_x0(x, x, 1.0, 0) is x
    assert op.wrap_model(print) is print
    op.restore(nn.Identity())


def test_methods_and_hooks_are_put_back_as_they_were() -> None:
    layer, patches, x = nn.Linear(2, 2), Patches(), torch.ones(1, 2)
    before = layer(x)
    patches.method(layer, "forward", lambda y: y + 1)
    patches.method(layer, "forward", lambda y: y + 2)
    patches.hook(layer.register_forward_hook(lambda m, a, out: out * 10))
    assert torch.equal(layer(x), (x + 2) * 10)
    patches.undo()
    patches.undo()
    assert "forward" not in vars(layer)
    assert torch.equal(layer(x), before)


def test_the_network_of_a_pipeline_is_found() -> None:
    net = nn.Identity()
    for name in ("backbone", "transformer", "unet"):
        assert network_of(SimpleNamespace(**{name: net})) is net
    with pytest.raises(ConfigError, match="holds one as backbone"):
        network_of(SimpleNamespace(vae=net))


def test_presets_by_name_and_a_guess_for_a_wrong_one() -> None:
    layer = SelfAttention(8, 2, axial_rope=True)

    def named(preset: str, model: nn.Module = layer) -> list[type]:
        scaled = apply_resolution(model, preset, native=(2, 2), target=(4, 4))
        return [type(op) for op in scaled.ops]

    assert named("none") == []
    assert named("ntk") == [EntropyAttention, RotaryScaling]
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        named("entrpy")
    with pytest.raises(ConfigError, match=r"needs rotary positions.*Use resolution=entropy"):
        named("ntk", SelfAttention(8, 2))
    with pytest.raises(ConfigError, match="samples small first"):
        named("sdedit")


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match="no native size"):
        apply_resolution(nn.Identity(), "none", target=(4, 4))
    with pytest.raises(ConfigError, match="target must be a height and a width"):
        apply_resolution(nn.Identity(), "none", native=(4, 4), target=(4,))
    model = nn.Identity()
    with apply([], model), pytest.raises(ConfigError, match="already within"), apply([], model):
        pass
    with apply([], model):
        pass


def test_the_linear_factor_is_that_of_a_square_of_the_same_area() -> None:
    assert linear_factor((64, 64), (128, 128)) == 2.0
    assert linear_factor((64, 64), (64, 256)) == 2.0
