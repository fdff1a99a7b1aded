"""From an error to the sentence a person reads."""

from __future__ import annotations

import sys

import pytest
from omegaconf import OmegaConf

from genscale.cli.failures import STATUS_MISTAKE, JobFailed, as_config_error, explain, report
from genscale.cli.values import check_values
from genscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GenscaleError,
    ParallelError,
    ProtocolError,
    did_you_mean,
    require,
)


def test_the_five_classes_can_be_caught_as_one_and_as_the_built_in() -> None:
    for kind in (CheckpointError, DataError, ParallelError, ProtocolError):
        assert issubclass(kind, GenscaleError)
        assert issubclass(kind, RuntimeError)
    assert issubclass(ConfigError, GenscaleError)
    assert issubclass(ConfigError, ValueError)


class TestSuggestions:
    def test_the_closest_word(self) -> None:
        assert did_you_mean("stpes", ["steps", "scale"]) == " Did you mean 'steps'?"

    def test_nothing_close_says_nothing(self) -> None:
        assert did_you_mean("zzz", ["steps", "scale"]) == ""


class TestOptionalPackages:
    def test_one_that_is_there_is_returned(self) -> None:
        assert require("json", what="x", extra="y") is sys.modules["json"]

    def test_one_that_is_missing_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "some_package", None)
        sentence = (
            "metric 'x' needs the package 'some-package'. "
            'Install it with: pip install "genscale[metrics]"'
        )
        with pytest.raises(ImportError) as caught:
            require("some_package", what="metric 'x'", extra="metrics")
        assert str(caught.value) == sentence
        assert explain(caught.value) == sentence  # a mistake the user can mend, not a bug


class TestExplain:
    def test_ours_are_sentences(self) -> None:
        assert explain(DataError("a.png is damaged.")) == "a.png is damaged."

    def test_system_errors_name_the_path(self, tmp_path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            (tmp_path / "gone.txt").open()
        assert explain(caught.value) == f"No such file or directory: {tmp_path}/gone.txt"

    def test_a_full_disk_is_no_bug(self) -> None:
        error = OSError(28, "No space left on device", "/runs/a.ckpt")
        assert explain(error) == "No space left on device: /runs/a.ckpt"

    def test_others_are_bugs(self) -> None:
        assert explain(KeyError("width")) is None
        assert explain(ModuleNotFoundError("No module named 'x'", name="x")) is None

    def test_memory_gets_advice(self) -> None:
        class OutOfMemoryError(RuntimeError):  # as torch calls it
            pass

        told = explain(OutOfMemoryError("CUDA out of memory."))
        assert told == (
            "CUDA out of memory. Give a smaller batch_size, or a larger "
            "trainer.accumulate_grad_batches where you train."
        )


class TestReport:
    def test_a_line_a_problem(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert report(ConfigError("One.\nTwo.")) == STATUS_MISTAKE
        assert capsys.readouterr().err == (
            "genscale: ConfigError: One.\ngenscale: ConfigError: Two.\n"
        )

    def test_other_processes_are_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "3")
        report(DataError("Gone."))
        assert capsys.readouterr().err == "genscale (process 3): DataError: Gone.\n"

    def test_a_job_that_has_told_is_not_told_again(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert report(JobFailed(70)) == 70
        assert capsys.readouterr().err == ""


class TestHydra:
    def test_its_advice_to_append_a_key_is_left_out(self) -> None:
        from hydra.errors import ConfigCompositionException

        error = ConfigCompositionException(
            "Could not override 'a.b'.\nTo append to your config use +a.b=1"
        )
        assert str(as_config_error(error)) == "Could not override 'a.b'."

    def test_bugs_stay_what_they_are(self) -> None:
        error = KeyError("width")
        assert as_config_error(error) is error


class TestValues:
    def test_all_that_is_missing_at_once(self) -> None:
        cfg = OmegaConf.create({"a": "???", "b": {"c": "???", "d": 1}, "e": "${b.d}"})
        with pytest.raises(ConfigError) as caught:
            check_values(cfg)
        assert str(caught.value).splitlines() == [
            "'a' has no default and was not given. Give a=...",
            "'b.c' has no default and was not given. Give b.c=...",
        ]

    def test_a_reference_to_nothing(self) -> None:
        cfg = OmegaConf.create({"data": {"size": 3}, "x": "${data.sise}"})
        with pytest.raises(ConfigError, match=r"no 'data\.sise'.*Did you mean 'data\.size'\?"):
            check_values(cfg)

    def test_a_complete_config_passes(self) -> None:
        check_values(OmegaConf.create({"a": [1, {"b": 2}], "c": "${a}"}))
