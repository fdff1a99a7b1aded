"""``evaluate.py`` takes what it is not told from the run: metrics, number of samples, labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from genscale.cli.app import conf_directory
from genscale.cli.run_protocol import metrics_node, settle
from genscale.errors import ConfigError

TARGET = "genscale.metrics.suite.EvaluationSuite"
PIXELS = {"_target_": "genscale.metrics.pixels.Pixels"}
OWN = {"_target_": TARGET, "metrics": ["fd_pixels"], "features": [PIXELS], "num_samples": 50}


def settings(*words: str) -> DictConfig:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("evaluate", overrides=list(words))
    settle(cfg)
    return cfg


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose protocol is 50 samples of random classes, measured on pixels."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"metrics": OWN, "evaluation": {"num_samples": 50, "labels": "random"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


class TestSettings:
    def test_a_run_is_evaluated_by_its_own_protocol(self, run: Path) -> None:
        cfg = settings(f"run={run}")
        assert (cfg.num_samples, cfg.labels) == (50, "random")
        assert cfg.metrics == OWN

    def test_what_is_given_wins(self, run: Path) -> None:
        cfg = settings(f"run={run}", "num_samples=7", "labels=[3]", "metrics.metrics=[kid_pixels]")
        assert (cfg.num_samples, cfg.labels) == (7, [3])
        assert cfg.metrics.metrics == ["kid_pixels"]
        assert cfg.metrics.features == [PIXELS]
        # another number than the run's protocol demands, asked for on purpose
        assert "num_samples" not in cfg.metrics

    def test_a_group_that_is_given_replaces_the_runs_metrics(self, run: Path) -> None:
        cfg = settings(f"run={run}", "metrics=adm50k", "num_samples=7")
        assert cfg.metrics.metrics[0] == "fid"
        assert cfg.metrics.num_samples == 50_000  # still demanded: the suite refuses 7

    def test_a_reference_that_is_given_replaces_the_runs(self, run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["metrics"]["reference"] = "own.npz"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert settings(f"run={run}").metrics.reference == "own.npz"
        assert "reference" not in settings(f"run={run}", "reference=other.npz").metrics

    @pytest.mark.parametrize("config", [{"seed": 0}, {"evaluation": None, "metrics": None}])
    def test_runs_that_say_nothing_have_the_defaults_of_training(
        self, run: Path, config: dict[str, Any]
    ) -> None:
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        cfg = settings(f"run={run}")
        assert (cfg.num_samples, cfg.labels) == (500, "balanced")
        assert "fd_probe" in cfg.metrics.metrics

    def test_files_have_the_defaults_too(self) -> None:
        cfg = settings("samples=a.npz", "reference=b.npz", "run=/nowhere")
        assert "fd_probe" in cfg.metrics.metrics

    def test_no_run_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="is no run folder"):
            settings("run=/nowhere")

    def test_foreign_code_is_not_built(self, run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["metrics"]["features"].append({"_target_": "os.system", "command": "true"})
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ConfigError, match=r"The run's metrics name os\.system"):
            settings(f"run={run}")

    def test_the_demand_stays_where_no_number_was_asked_for(self) -> None:
        asked = {"_target_": TARGET, "metrics": None, "features": None}
        assert metrics_node(asked, OWN, any_count=False) == OWN
        assert "num_samples" not in metrics_node(asked, OWN, any_count=True)


class TestThroughTheCommand:
    def test_the_protocol_of_training_is_that_of_evaluation(
        self, command: Any, trained_run: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "copy"
        shutil.copytree(trained_run, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["evaluation"] == {"num_samples": 500, "labels": "balanced"}
        config["evaluation"] = {"num_samples": 12, "labels": "random"}
        config["metrics"] = {**OWN, "num_samples": 12}
        (run / "config.yaml").write_text(yaml.safe_dump(config))

        answer = command("evaluate", f"run={run}", f"out_dir={tmp_path / 'own'}")
        assert answer.status == 0, answer.err
        record = json.loads((tmp_path / "own" / "metrics.json").read_text())
        assert [metric["name"] for metric in record["metrics"]] == ["fd_pixels"]
        (protocol,) = record["protocols"].values()
        assert (protocol["num_samples"], protocol["class_law"]) == (12, "uniform_random")

        answer = command(
            "evaluate", f"run={run}", "num_samples=20", "labels=balanced", f"out_dir={tmp_path}"
        )
        assert answer.status == 0, answer.err
        (protocol,) = json.loads((tmp_path / "metrics.json").read_text())["protocols"].values()
        assert (protocol["num_samples"], protocol["class_law"]) == (20, "balanced")
