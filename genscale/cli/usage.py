"""The page that ``--help`` prints, written from the config tree itself.

Settings, their defaults and comments are read from the primary YAML and options from the group
folders, so the page cannot fall behind. Nothing but the standard library and PyYAML is imported.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from genscale.errors import ConfigError

_SETTING = re.compile(r"^(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$")
_WIDTH = 100

_GROUPS = {
    "model": "architecture and size; brings the objective, autoencoder and sampler that fit",
    "data": "what to learn from",
    "objective": "what is learned: loss and parameterisation",
    "autoencoder": "pixels to latents and back",
    "sampler": "how samples are drawn",
    "guidance": "how conditional and unconditional predictions are combined",
    "step_cache": "features of the network reused between steps: faster, not the same samples",
    "search": "test-time search over samples",
    "reward": "what the search looks for",
    "held_out": "what its samples are judged by, and the search does not see",
    "resolution": "training-free resolution scaling",
    "upscaling": "trained upscalers behind the decoder",
    "metrics": "what is measured",
    "optim": "optimizer",
    "lr_schedule": "learning rate over the steps",
    "ema": "average of the weights",
    "callbacks": "intervals of logs, checkpoints and sample grids",
    "trainer": "device, processes, precision, number of steps",
    "logger": "where numbers go besides the run folder",
    "experiment": "complete published recipes",
    "debug": "short runs that look for mistakes",
}

_PLACED = {"held_out": "reward"}  # groups whose options are another one's

_WORDS = {
    "trainer": [
        ("trainer.max_steps", "optimizer steps to train for"),
        ("trainer.devices", "processes on this machine"),
    ],
    "sampler": [("sampler.steps", "solver steps of a sample")],
    "guidance": [("guidance.scale", "guidance strength; 1 is none")],
    "experiment": [
        ("evaluation.num_samples", "samples that evaluate.py makes of the run when not told"),
        ("evaluation.labels", "law of their classes: balanced, random, or a list"),
    ],
}

_EXAMPLES = {
    "train": [
        ("", "train with the defaults"),
        ("debug=smoke", "everything once, in seconds"),
        ("model=dimr data=digits trainer.max_steps=1000", "choose and change"),
        ("model=dimr data=digits resume=latest", "continue the newest run of that name"),
        ("model=dimr trainer=ddp trainer.devices=8", "eight GPUs"),
        (
            "experiment=dit_xl_2_imagenet256 data.root=CACHE autoencoder.source=FOLDER",
            "a published recipe, complete",
        ),
        ("-m optim.lr=1e-3,2e-3", "a sweep: one run for each value"),
    ],
    "sample": [
        ("run=outputs/latest num_samples=64", "a grid of samples"),
        ("run=outputs/latest labels=[3,7] guidance.scale=2", "of two classes"),
        ("run=outputs/latest format=npz num_samples=10000", "a file for other evaluators"),
        (
            "run=outputs/latest search=fk search.particles=8 reward=scenes_soft "
            "held_out=scenes_exact",
            "the best of eight particles, steered on the way",
        ),
    ],
    "evaluate": [
        ("run=outputs/latest num_samples=500", "the metrics of a run"),
        ("run=outputs/latest weights=raw guidance.scale=2", "of the raw weights, with guidance"),
        ("run=outputs/latest metrics=quick", "choose the metrics"),
    ],
    "scaling": [
        (
            "run=outputs/latest methods=[best_of_n,fk] budgets=[1,2,4,8] reward=scenes_soft "
            "held_out=scenes_exact",
            "what more computation buys",
        ),
    ],
    "export": [
        ("run=outputs/latest out=exported/mine", "the averaged weights, for sample.py and Python"),
        (
            "run=outputs/latest layout=official",
            "a state dict with the official program's keys",
        ),
        ("run=outputs/latest layout=diffusers", "a DiT as diffusers loads it"),
    ],
    "import_checkpoint": [
        ("family=dit file=DiT-XL-2-256x256.pt out=exported/dit_xl_2", "a published DiT"),
        ("family=sit file=0100000.pt weights=model out=exported/mine", "out of a training file"),
        ("family=uvit file=nnet_ema.pth num_heads=8 out=exported/uvit", "what no shape tells"),
    ],
    "cache": [
        (
            "data=image_folder data.root=pictures autoencoder.source=vae out_dir=latents",
            "one pass over a folder; run again after an interruption, it goes on",
        ),
        (
            "data=imagenet256 data.root=imagenet autoencoder.source=vae out_dir=latents",
            "for python train.py data=imagenet256_latents data.root=latents",
        ),
    ],
}

_FLAGS = [
    ("--cfg job", "print the composed config and exit; add --resolve for values"),
    ("--info defaults-tree", "print where the config comes from"),
    ("-m, --multirun", "sweep over comma-separated values, one process a job"),
    ("-sc install=bash", "shell completion: eval the line it prints"),
    ("--version", "print the version"),
]


def help_page(config_name: str, conf_dir: Path, program: str) -> str:
    """Write the help page of one command.

    Args:
        config_name: primary config, without ``.yaml``.
        conf_dir: the config tree.
        program: how the user started it, for example ``python train.py``.

    Raises:
        ConfigError: the config tree lacks the primary config.
    """
    file = conf_dir / f"{config_name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{file} is missing; the config tree is incomplete. Reinstall genscale.")
    text = file.read_text(encoding="utf-8")
    lines = [f"usage: {program} [group=option ...] [key=value ...] [flags]", ""]
    lines += [_first_comment(text), ""]
    groups = _groups(text, conf_dir)
    lines += ["Groups (group=option; * is the default):"] if groups else []
    for group, chosen in groups.items():
        folder = conf_dir / (group if (conf_dir / group).is_dir() else _PLACED[group])
        options = [f"{n}*" if n == chosen else n for n in _options(folder)]
        if options:
            lines += _row(group, f"{_GROUPS.get(group, '')}".strip(), " ".join(options))
    lines += [*([""] if groups else []), "Settings (key=value):"]
    for key, default, comment in _settings(text):
        lines += _row(f"{key}={default}", comment)
    for group in groups:
        for word, meaning in _WORDS.get(group, []):
            lines += _row(word, meaning)
    lines += ["", "Every key of --cfg job can be set, and every parameter of a chosen class:"]
    lines += ["  lists are labels=[3,7]; a setting no class knows is refused.", "", "Flags:"]
    for flag, meaning in _FLAGS:
        lines += _row(flag, meaning)
    lines += ["", "Examples:"]
    for arguments, meaning in _EXAMPLES.get(config_name, []):
        lines += [f"  {program} {arguments}".rstrip(), f"      {meaning}"]
    lines += ["", "GENSCALE_DEBUG=1 shows the traceback behind an error sentence."]
    return "\n".join(lines) + "\n"


def _row(name: str, *texts: str) -> list[str]:
    """Set a name and its texts in two columns."""
    indent = " " * 26
    lines: list[str] = []
    for text in texts:
        lines += textwrap.wrap(text, _WIDTH - len(indent), break_long_words=False)
    head = f"  {name}"
    if len(head) >= len(indent):
        return [head, *(indent + line for line in lines)]
    first, *rest = lines or [""]
    return [f"{head:<{len(indent)}}{first}".rstrip(), *(indent + line for line in rest)]


def _first_comment(text: str) -> str:
    """Return the comment lines that a YAML file starts with, as one paragraph."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# ").rstrip())
    return "\n".join(found)


def _groups(text: str, conf_dir: Path) -> dict[str, str | None]:
    """Return the groups of a primary config's defaults list with their default options."""
    import yaml

    groups: dict[str, str | None] = {}
    content: Any = yaml.safe_load(text) or {}
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            for key, option in entry.items():
                group = str(key).removeprefix("optional ").removeprefix("override ").strip("/")
                group, _, placed = group.partition("@")
                if (conf_dir / group).is_dir():
                    groups[placed or group] = option
    order = list(_GROUPS)
    return dict(
        sorted(groups.items(), key=lambda g: order.index(g[0]) if g[0] in order else len(order))
    )


def _options(folder: Path) -> list[str]:
    """List a group's options; options in sub-folders are written ``folder/option``."""
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def _settings(text: str) -> list[tuple[str, str, str]]:
    """Return key, default and comment of every setting at the top level of a YAML file."""
    matches = (_SETTING.match(line) for line in text.splitlines())
    found = [(m.group(1), m.group(2), m.group(3) or "") for m in matches if m]
    return [(key, default, comment) for key, default, comment in found if default]
