"""Step caching on the command line: what is recorded, printed, and named by protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genscale.backbones.reuse import remaining_share
from genscale.evaluation import describe
from genscale.pipeline import GenerationPipeline
from genscale.samplers.step_cache import FORA, NoStepCache, Taylor


def test_samples_are_counted_in_fractions_and_recorded(
    command: Any, trained_run: Path, tmp_path: Path
) -> None:
    words = [f"run={trained_run}", "num_samples=2", "device=cpu", "sampler.steps=6"]
    answer = command("sample", *words, f"out_dir={tmp_path}", "step_cache=fora")
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "samples.json").read_text())
    model = GenerationPipeline.from_run(trained_run, device="cpu").model
    share = remaining_share(model, model.sample_shape)
    # steps 0, 3 and the last, 5, are whole
    assert record["nfe_per_sample"] == pytest.approx(3 + 3 * share)
    assert record["solver_evaluations"] == 6
    assert record["step_cache"] == "fora(interval=3)"
    assert "network evaluations each (of 6 a branch that the solver makes)" in answer.out

    plain = command("sample", *words, f"out_dir={tmp_path}")
    assert json.loads((tmp_path / "samples.json").read_text())["step_cache"] == "none"
    assert "2 samples, 6 network evaluations each: " in plain.out


def test_a_mistake_is_told_in_a_sentence(command: Any, trained_run: Path) -> None:
    words = [f"run={trained_run}", "num_samples=2", "device=cpu"]
    answer = command("sample", *words, "step_cache=taylor", "step_cache.interval=0")
    assert answer.status == 1
    assert "step_cache.interval must be a whole number of at least 1, but is 0" in answer.err


def test_protocols_name_it(trained_run: Path) -> None:
    pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
    assert isinstance(pipeline.step_cache, NoStepCache)

    def protocol() -> Any:
        return describe(pipeline, labels="balanced", num_samples=2, nfe=3.0, weights="ema")

    plain = protocol()
    assert "with" not in plain.sampler
    pipeline.step_cache = Taylor(4, order=2)
    assert protocol().sampler == f"{plain.sampler} with taylor(interval=4, order=2, warm_up=3)"
    assert protocol().digest != plain.digest


def test_a_pipeline_takes_one(trained_run: Path) -> None:
    whole = GenerationPipeline.from_run(trained_run, device="cpu")
    cached = GenerationPipeline(
        model=whole.model,
        autoencoder=whole.autoencoder,
        objective=whole.objective,
        sampler=whole.sampler,
        guidance=whole.guidance,
        num_classes=whole.num_classes,
        step_cache=FORA(2),
    )
    (own,), (other,) = (list(p.stream(num_samples=2)) for p in (whole, cached))
    assert bool((other.nfe < own.nfe).all())
