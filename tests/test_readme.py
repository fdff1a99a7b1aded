"""The commands of the README are run in small, and those of the docs are looked over.

Every command is first composed word by word as it stands there, so that a setting that does not
exist fails; then it runs on a tiny model with fewer samples.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ENTRIES = ("train", "sample", "evaluate", "scaling")

# what makes a command small, put behind its own words
SMALL = {
    "sample": ("num_samples=4", "sampler.steps=2"),
    "evaluate": ("num_samples=20", "sampler.steps=2", "metrics.metrics=[fd_pixels]"),
    "scaling": ("num_prompts=2", "sampler.steps=2"),
}
# the feature network of metrics=fid needs a weight file: the rest of the command is run
PIXELS = "metrics.features=[{_target_:genscale.metrics.pixels.Pixels}]"
# set-up of an environment, and what needs several GPUs or minutes
NOT_RUN = ("python -m venv", "pip install", "git clone")


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks in one of ``languages`` ('' where none is named)."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands(path: Path) -> list[str]:
    """Return the command lines of a page's fenced blocks, those joined by && taken apart."""
    found = []
    for body in blocks(path.read_text(), "", "bash", "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if re.match(r"(python|torchrun|make)\s", part.strip()):
                    found.append(part.strip())
    return found


def entry_of(command: str) -> tuple[str, list[str]] | None:
    """Return which entry point a command starts, and with which words; None for others."""
    words = shlex.split(command, comments=True)
    for i, word in enumerate(words):
        if word.removesuffix(".py") in ENTRIES and word.endswith(".py"):
            return word.removesuffix(".py"), words[i + 1 :]
        module = word.removeprefix("genscale.cli.")
        if module != word and (ROOT / "conf" / f"{module}.yaml").is_file():
            return module, words[i + 1 :]
    return None


def compose(name: str, words: list[str]) -> None:
    """Look over the words of a command as the front door does."""
    from genscale.cli.app import conf_directory
    from genscale.cli.overrides import prepare_overrides
    from genscale.cli.resolvers import register_resolvers

    register_resolvers()
    overrides = [word for word in words if not word.startswith("-")]
    prepare_overrides(
        overrides, conf_dir=conf_directory(), config_name=name, multirun="-m" in words
    )


RUN = [c for c in commands(README) if (entry_of(c) or ("",))[0] in ENTRIES]


@pytest.fixture
def workplace(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> Path:
    """A folder with a trained run, and samples under the names the README uses."""
    run = tmp_path / "outputs" / "dimr_digits" / trained_run.name
    shutil.copytree(trained_run, run)
    (tmp_path / "outputs" / "latest").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", RUN)
def test_commands_of_the_readme(
    line: str, workplace: Path, command: Any, tiny: tuple[str, ...]
) -> None:
    name, words = entry_of(line) or ("", [])
    compose(name, words)
    small = list(tiny) if name == "train" else list(SMALL[name])
    # one process here; several are tests/integration/test_exactness.py and test_sharding.py
    if {"trainer=ddp", "trainer=fsdp"} & set(words):
        small += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto"]
    if any(word.startswith("samples=") for word in words):
        answer = command(
            "sample", "run=outputs/latest", "format=npz", "out_dir=.", *SMALL["sample"]
        )
        assert answer.status == 0, answer.err
        for word in words:
            key, _, value = word.partition("=")
            if key == "reference":
                shutil.copy("samples.npz", value)
        small = ["metrics.metrics=[fd_pixels]", PIXELS]
    answer = command(name, *words, *small)
    assert answer.status == 0, answer.err
    # what a command says it wrote, it wrote
    for path in re.findall(r"^(?:report|numbers): (.*)$", answer.out, re.MULTILINE):
        assert Path(path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_setting_a_page_names_exists(page: Path) -> None:
    for line in commands(page):
        entry = entry_of(line)
        if entry is not None:
            compose(*entry)
            continue
        if line.startswith(NOT_RUN):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, f"{page.name}: {line}"
            continue
        check_script(words, f"{page.name}: {line}")


def check_script(words: list[str], where: str) -> None:
    """Check that a script or module is there and knows the flags it is given."""
    assert words[0] == "python", where
    name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    assert (ROOT / name).is_file(), where
    source = (ROOT / name).read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{where}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_scripts_named_in_the_text_exist(page: Path) -> None:
    for line in re.findall(r"`(python (?:scripts/|-m )[^`\n]+)`", page.read_text()):
        check_script(shlex.split(line), f"{page.name}: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_wrong_command_is_noticed() -> None:
    from genscale.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        compose(*(entry_of("python train.py model=dimr sede=1") or ("", [])))
    with pytest.raises(ConfigError, match="not an option of sampler"):
        compose(*(entry_of("torchrun --nproc-per-node 8 sample.py sampler=huen") or ("", [])))
    with pytest.raises(AssertionError, match="--kill"):
        check_script(["python", "scripts/check_exactness.py", "--kill=3"], "here")
    with pytest.raises(AssertionError, match="here"):
        check_script(["python", "scripts/check_everything.py"], "here")


def test_the_readme_has_its_commands() -> None:
    # an empty list of commands would pass every test above
    assert [line for line in commands(README) if line.startswith("make")] == [
        "make demo",
        "make test",
    ]
    assert {(entry_of(line) or ("",))[0] for line in RUN} == set(ENTRIES)
    assert len(RUN) >= 8


def test_the_python_snippet_runs(workplace: Path) -> None:
    snippets = [body for body in blocks(README.read_text(), "python") if "pipeline" in body]
    assert len(snippets) == 1
    names: dict[str, Any] = {}
    exec(snippets[0], names)
    assert names["images"].shape == (20, 1, 8, 8)
    assert names["images"].dtype == torch.uint8


def test_the_new_model_of_the_readme_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    import genscale
    from genscale.backbones.base import register_to_config
    from genscale.cli.app import conf_directory
    from genscale.cli.resolvers import register_resolvers

    (snippet,) = [body for body in blocks(README.read_text(), "python") if "MyNet" in body]
    names = {name: getattr(genscale, name) for name in ("Backbone", "BackboneOutput")}
    names |= {"Conditioning": genscale.Conditioning, "Tensor": torch.Tensor}
    exec(snippet, names | {"register_to_config": register_to_config} | {"__name__": "mynet"}, names)
    (text,) = blocks(README.read_text(), "yaml")
    target = yaml.safe_load(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mynet.yaml").write_text(text)
    register_resolvers()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        search = f"hydra.searchpath=['file://{tmp_path}']"
        cfg = hydra_compose("train", overrides=[search, "model=mynet"])
    sizes = {key: cfg.model[key] for key in target if key not in ("defaults", "_target_")}
    model = names["MyNet"](**sizes)
    assert (
        dict(model.config).items()
        >= {"input_size": 16, "in_channels": 1, "num_classes": 10}.items()
    )
    assert model.config["depth"] == 12  # its own default, stated nowhere else
