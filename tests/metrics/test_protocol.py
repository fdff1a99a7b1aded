"""Protocols: one hash for one meaning, and no table of two meanings."""

import json
from dataclasses import fields

import pytest

from genscale.errors import ProtocolError
from genscale.metrics.protocol import (
    EvalProtocol,
    MetricValue,
    require_comparable,
    require_one_protocol,
)


def test_the_hash_of_a_protocol_never_changes() -> None:
    # computed when the fields were settled: another value orphans every number stored before
    assert EvalProtocol.adm50k().digest == "96ab2938"
    assert EvalProtocol().digest == "0e8d23a4"


def test_the_text_is_canonical() -> None:
    protocol = EvalProtocol(guidance_scale=2, guidance_interval=(0, 1), nfe=50)
    text = protocol.canonical_json()
    assert " " not in text.replace("generator(seed, i)", "")
    assert list(json.loads(text)) == sorted(json.loads(text))
    # 2 and 2.0 are one number, and settings have no order
    twin = EvalProtocol(guidance_scale=2.0, guidance_interval=(0.0, 1.0), nfe=50.0)
    assert protocol.digest == twin.digest
    one = EvalProtocol(settings=(("b", 1), ("a", 2)))
    assert one.digest == EvalProtocol(settings=(("a", 2), ("b", 1))).digest


def test_every_field_counts() -> None:
    base = EvalProtocol()
    changed = {
        "quantise": "truncate",
        "class_law": "empirical",
        "covariance": "biased",
        "guidance_scale": 1.5,
        "guidance_interval": (0.1, 0.9),
        "settings": (("seed", 1),),
        "nfe": 7.0,
    }
    for each in fields(EvalProtocol):
        default = getattr(base, each.name)
        value = changed.get(each.name, 1 if isinstance(default, int) else "other")
        other = base.replace(**{each.name: value})
        assert other.digest != base.digest, each.name
        assert base.differences(other) == (each.name,)


def test_a_protocol_survives_json() -> None:
    protocol = EvalProtocol(guidance_interval=(0.2, 0.8), settings=(("k", 3), ("strict", False)))
    again = EvalProtocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol
    with pytest.raises(ProtocolError, match="'sampling' is no field"):
        EvalProtocol.from_dict({"sampling": "euler"})


def test_presets() -> None:
    adm = EvalProtocol.adm50k()
    assert (adm.features, adm.resize, adm.num_samples) == ("inception_tf", "tf1_bilinear", 50_000)
    assert adm.differences(EvalProtocol.adm10k()) == ("num_samples",)
    clean = EvalProtocol.clean50k(reference="imagenet")
    assert clean.resize == "pil_bicubic_antialias"
    assert EvalProtocol.fd_dino50k(reference="imagenet").features == "dinov2_vitl14"


def test_numbers_of_two_protocols_are_not_compared() -> None:
    first = EvalProtocol(sampler="euler", steps=50, num_samples=50_000)
    second = first.replace(steps=250, num_samples=5_000)
    with pytest.raises(
        ProtocolError, match=r"num_samples \(50000 and 5000\), steps \(50 and 250\)"
    ):
        require_comparable(first, second)
    with pytest.raises(ProtocolError, match="differ in steps"):
        require_comparable(first, second, allow=["num_samples"])
    require_comparable(first, second, allow=["num_samples", "steps"])
    require_comparable(first, first.replace())


def test_a_table_holds_one_protocol() -> None:
    protocol = EvalProtocol(steps=10)
    other = protocol.replace(steps=20)
    first = MetricValue("fd", 1.0, protocol.digest, {}, protocol)
    second = MetricValue("fd", 2.0, other.digest, {}, other)
    require_one_protocol([first, first])
    require_one_protocol([first, second], allow=["steps"])
    with pytest.raises(ProtocolError, match=r"steps \(10 and 20\)"):
        require_one_protocol([first, second])
    with pytest.raises(ProtocolError, match="their fields are not at hand"):
        require_one_protocol([first, MetricValue("fd", 2.0, other.digest)])


def test_a_value_is_stored_beside_its_hash() -> None:
    value = MetricValue("fd_probe", 1.5, "0123abcd", {"n": 500})
    assert value.to_dict() == {
        "name": "fd_probe",
        "value": 1.5,
        "protocol": "0123abcd",
        "details": {"n": 500},
    }


def test_impossible_protocols_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"protocol\.quantise='floor' is unknown"):
        EvalProtocol(quantise="floor")
    with pytest.raises(ProtocolError, match="are no FID features"):
        EvalProtocol(features="inception_torchvision")
