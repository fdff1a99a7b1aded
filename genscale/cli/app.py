"""The front door: from ``sys.argv`` to a composed config, and from an error to one sentence.

Nothing heavy is imported before a job really starts, so ``--help``, ``--cfg job`` and shell
completion answer at once. Hydra keeps its own powers (sweeps, ``--info``, ``hydra.*`` settings);
what it writes into the working directory by itself (``outputs``, ``.hydra``, log files) is off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from genscale.cli.building import instantiate
from genscale.cli.failures import JobFailed, as_config_error, report
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["conf_directory", "instantiate", "main"]

# The run folder is genscale's own affair; hydra.sweep.dir holds multirun.yaml, what a sweep was.
_HYDRA_DEFAULTS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.job.chdir": "false",
    "hydra/job_logging": "none",
    "hydra.sweep.dir": "outputs/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir": ".",
}
_VALUED_FLAGS = ("cfg", "package", "config_dir", "experimental_rerun", "info")
_PLAIN_FLAGS = ("hydra_help", "resolve", "run", "multirun", "shell_completion")


def main(
    config_name: str,
    run: str,
    conf_dir: str | Path | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Compose the config and call a command with it.

    Args:
        config_name: primary config, without ``.yaml``.
        run: ``module:function`` of the command; imported only when a job starts.
        conf_dir: the config tree; the shipped one when None.
        argv: arguments without the program's name; those of the process when None.

    Returns:
        exit status: 0, 1 for a mistake the user can mend, 70 for a bug, 130 for an interrupt, or
        what the command asked for with ``SystemExit``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        tree = conf_directory() if conf_dir is None else Path(conf_dir).absolute()
        return _dispatch(config_name, run, tree, arguments)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return report(error)


def conf_directory() -> Path:
    """Return the config tree: inside the package once installed, beside it in the repository.

    Raises:
        ConfigError: there is neither.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(
        f"The config tree was expected at {package / 'conf'} or {package.parent / 'conf'}, but "
        "there is none. Reinstall genscale."
    )


def _dispatch(config_name: str, run: str, conf_dir: Path, arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        from genscale.cli.usage import help_page

        print(help_page(config_name, conf_dir, _program()), end="")
        return 0
    if "--version" in arguments:
        from genscale import __version__

        print(f"genscale {__version__}")
        return 0
    line = _parse_arguments(arguments)
    from genscale.cli.resolvers import register_resolvers

    register_resolvers()
    if line.flags.get("config_path"):
        conf_dir = Path(line.flags["config_path"]).expanduser().absolute()
    config_name = line.flags.get("config_name") or config_name
    overrides = line.overrides
    if not line.asks_hydra:
        from genscale.cli.overrides import prepare_overrides

        extra = line.flags.get("config_dir")
        try:
            overrides = prepare_overrides(
                overrides,
                conf_dir=conf_dir,
                config_name=config_name,
                multirun=line.multirun,
                search_path=[f"file://{Path(extra).absolute()}"] if extra else [],
            )
        except Exception as error:
            raise as_config_error(error) from error
        overrides = [*_hydra_defaults(config_name, overrides), *overrides]
    words = [*line.flag_words(), *overrides]
    _hand_over(config_name, run, conf_dir, words=words, typed=arguments)
    return 0


@dataclass(frozen=True, slots=True)
class _CommandLine:
    """A command line taken apart: flags by name, and overrides in their order."""

    flags: dict[str, Any]
    overrides: list[str]

    @property
    def multirun(self) -> bool:
        return bool(self.flags["multirun"]) or "hydra.mode=MULTIRUN" in self.overrides

    @property
    def asks_hydra(self) -> bool:
        """Whether the question is about Hydra itself, with overrides that may be unfinished."""
        names = ("shell_completion", "hydra_help", "experimental_rerun")
        return any(self.flags[name] for name in names)

    def flag_words(self) -> list[str]:
        """Write the flags out again, ahead of the overrides, where Hydra's parser wants them."""
        words = [f"--{n.replace('_', '-')}" for n in _PLAIN_FLAGS if self.flags[n]]
        for name in _VALUED_FLAGS:
            if self.flags[name] is not None:
                words.append(f"--{name.replace('_', '-')}={self.flags[name]}")
        return words


def _parse_arguments(arguments: list[str]) -> _CommandLine:
    """Tell flags from overrides; unlike in Hydra, they may be mixed.

    Raises:
        ConfigError: a flag that does not exist.
    """
    from hydra._internal.utils import get_args_parser  # the parser that hydra.main uses

    def refuse(message: str) -> NoReturn:
        unknown = [w for w in message.partition(":")[2].split() if w.startswith("-")]
        if not message.startswith("unrecognized") or not unknown:
            raise ConfigError(f"The command line cannot be read: {message}. See --help.")
        key, _, value = unknown[0].lstrip("-").partition("=")
        raise ConfigError(
            f"'{unknown[0]}' is no flag. Settings have no dashes: {key}={value or '...'}; "
            "see --help."
        )

    parser = get_args_parser()
    vars(parser)["error"] = refuse
    parsed = vars(parser.parse_intermixed_args(arguments))
    return _CommandLine(parsed, parsed.pop("overrides"))


def _hydra_defaults(config_name: str, overrides: list[str]) -> list[str]:
    """Return our settings of Hydra, less those that the user gives."""
    given = {text.lstrip("+~").partition("=")[0] for text in overrides}
    settings = {**_HYDRA_DEFAULTS, "hydra.job.name": config_name}
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def _hand_over(
    config_name: str, run: str, conf_dir: Path, *, words: list[str], typed: list[str]
) -> None:
    """Let Hydra compose ``words`` and launch; the job itself sees what was ``typed``."""
    import hydra

    def job(cfg: DictConfig) -> None:
        with _arguments([program, *typed]):
            _run_job(run, cfg)

    program = sys.argv[0]
    decorated: Callable[[], None] = hydra.main(
        version_base="1.3", config_path=str(conf_dir), config_name=config_name
    )(job)
    # HYDRA_FULL_ERROR makes Hydra raise what it would otherwise print in its own manner
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _arguments([program, *words]):
            decorated()
    except Exception as error:
        raise as_config_error(error) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """Set ``sys.argv``: Hydra reads it, and so does Lightning when it starts further processes."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


def _run_job(run: str, cfg: DictConfig) -> None:
    """Check the values and call the command; errors are told here, without Hydra's frames."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from genscale.cli.values import check_values

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check_values(cfg)
        if multirun:
            _check_sweep(cfg, str(HydraConfig.get().launcher.get("_target_", "")))
        module, _, function = run.partition(":")
        getattr(import_module(module), function)(cfg)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            return
        status = report(error)
        if multirun and not isinstance(error, KeyboardInterrupt):
            raise JobFailed(status) from None  # told already; the other jobs go on
        raise SystemExit(status) from None


def _check_sweep(cfg: DictConfig, launcher: str) -> None:
    """Refuse jobs of several processes inside a sweep that runs in this process."""
    devices = cfg.trainer.get("devices", 1) if "trainer" in cfg else 1
    in_process = any(name in launcher for name in ("BasicLauncher", "JoblibLauncher"))
    if in_process and str(devices) != "1":
        raise ConfigError(
            f"A sweep (-m) runs one process a job, but trainer.devices={devices} was given. "
            "Give trainer.devices=1, or a launcher that starts its own processes."
        )


def _program() -> str:
    """Return how the user started us."""
    script = Path(sys.argv[0])
    if script.resolve().parent == Path(__file__).resolve().parent:
        return f"python -m genscale.cli.{script.stem}"
    return f"python {script.name}" if script.suffix == ".py" else script.name
