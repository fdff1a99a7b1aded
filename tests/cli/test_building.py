"""Objects from config nodes: errors name the place in the config and what it takes."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from genscale.cli.app import instantiate
from genscale.errors import CheckpointError, ConfigError


class Net:
    """Takes what a backbone would."""

    def __init__(self, *, width: int, depths: tuple[int, ...] = (1,), extra: object = None):
        if width < 0:
            raise ValueError(f"model.width must be positive, but {width} was given")
        if width == 1:
            raise CheckpointError("no weights at a.")
        if width == 2:
            raise FileNotFoundError("no shards in b.")
        if width == 3:
            raise ImportError('needs c: pip install "c"')
        self.width = width + 0
        self.depths = depths
        self.extra = extra


def open_ended(**settings: object) -> dict[str, object]:
    return settings


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Test modules are imported by path; targets need a dotted one."""
    import sys

    module = SimpleNamespace(Net=Net, open_ended=open_ended, __name__="building_targets")
    monkeypatch.setitem(sys.modules, "building_targets", module)


def node(**settings: object) -> object:
    return OmegaConf.create({"_target_": "building_targets.Net", **settings})


def test_containers_arrive_plain_and_references_are_followed():
    config = OmegaConf.create(
        {
            "size": 4,
            "model": {"_target_": "building_targets.Net", "width": "${size}", "depths": [1, 2]},
        }
    )
    net = instantiate(config.model, "model")
    assert net.width == 4
    assert type(net.depths) is list


def test_objects_from_code_are_passed_on_uncopied():
    callbacks = [object()]
    net = instantiate(node(width=4), "model", extra=callbacks)
    assert net.extra is callbacks


def test_nested_nodes_are_built():
    inner = {"_target_": "building_targets.Net", "width": 5}
    assert instantiate(node(width=4, extra=inner), "model").extra.width == 5


def test_partial_nodes_wait_for_the_rest():
    partial = instantiate(node(_partial_=True, depths=[3]), "model", extra="x")
    assert isinstance(partial, functools.partial)
    net = partial(width=7)
    assert (net.width, net.depths, net.extra) == (7, [3], "x")


def test_functions_with_open_arguments_take_anything():
    config = OmegaConf.create({"_target_": "building_targets.open_ended", "a": 1})
    assert instantiate(config, "model", b=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"width": 4, "dephts": 3},
            r"'model.dephts' is not a parameter of building_targets.Net. "
            r"Did you mean 'model.depths'\?",
        ),
        (
            {"width": 4, "zzz": 3},
            r"'model.zzz' is not a parameter of building_targets.Net. It takes: width, depths",
        ),
        ({}, r"'model.width' is missing: building_targets.Net needs it. Give model.width=..."),
        ({"width": 4, "extra": 1, "given": 0}, r"'model.extra' is set by genscale itself"),
        (
            {"width": -4},
            r"model \(building_targets.Net\) could not be built: model.width must be "
            r"positive, but -4 was given\.$",
        ),
        (
            {"width": "wide"},
            r"model could not be built: '<' not supported .* Its constructor is "
            r"building_targets.Net\(width, depths=\(1,\), extra=None\)\.$",
        ),
        (
            {"width": "${nothing}"},
            r"'model' has a value that cannot be computed: Interpolation "
            r"key 'nothing' not found",
        ),
        (
            {"width": 4, "extra": {"_target_": "building_targets.Net", "wide": 1}},
            r"extra could not be built",
        ),
        ({"_target_": None}, r"'model' names no _target_ to build\."),
        (
            {"_target_": "building_targets.Nope"},
            r"model._target_ names building_targets.Nope, which does not exist",
        ),
        (
            {"_target_": "no_such_package.Net"},
            r"model._target_ names no_such_package.Net, which does not exist",
        ),
    ],
)
def test_mistakes_name_the_place(settings, sentence):
    extra = {"extra": 1} if settings.pop("given", 1) == 0 else {}
    with pytest.raises(ConfigError, match=sentence):
        instantiate(node(**settings), "model", **extra)


def test_an_optional_package_missing_inside_a_target_is_named(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\nclass Net: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs the package 'surely_not_installed'"):
        instantiate(OmegaConf.create({"_target_": "needs_more.Net"}), "model")


@pytest.mark.parametrize(
    ("width", "error", "sentence"),
    [
        (1, CheckpointError, "no weights at a."),
        (2, FileNotFoundError, "no shards in b."),
        (3, ImportError, 'needs c: pip install "c"'),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_errors_with_sentences_of_their_own_pass_untouched(width, error, sentence, nested):
    config = node(width=width)
    if nested:
        config = node(width=4, extra=config)
    with pytest.raises(error) as caught:
        instantiate(config, "model")
    assert str(caught.value) == sentence
