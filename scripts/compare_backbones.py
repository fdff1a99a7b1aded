"""Train backbones for equally many operations on one data set and measure them alike.

python scripts/compare_backbones.py [--models dit sit uvit dimr lamamba var mvar] [--seeds 0]
    [--budget 6.0] [--samples 5000] [--folder outputs/compare] [overrides of train.py ...]

A row is one model and seed. It trains for the steps that spend ``--budget`` TFLOP (forward
operations times three, as counted for the papers: matrix products, convolutions and attention),
is sampled with one seed, and measured by one protocol. Diffusion models have one sampler in common;
scale-wise models have their own, and a tokenizer, which is trained first and whose training is not
counted. In everything else, numbers of different protocols are refused. The last columns say what
a picture costs: operations of all its network evaluations, and seconds on one thread, measured for
all rows in one go. Rows that are done are not done again, and a row that was killed continues
where it stopped, so the script can be started again at any time. The table, with the exact commands
of every row, goes to ``<folder>/table.md``, a picture of samples to ``<folder>/samples.png``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DATA = ("data=fashion_mnist", "data.resolution=16")
STEPS = 30
SAMPLER = ("sampler=sde", f"sampler.steps={STEPS}")
HOW_SAMPLED = ("sampler", "steps", "nfe", "solver", "autoencoder", "decoder_dtype")
METRICS = ("fd_lite0", "kid_lite0", "precision", "recall", "label_agreement", "judge_accuracy")
REFERENCE = 10_000  # training pictures, whose features take minutes on a CPU
SHOWN = 20  # samples of each model in the picture


@dataclass(frozen=True, slots=True)
class Row:
    """One model trained with one seed.

    Attributes:
        model: option of ``model=``.
        seed: of the training run; samples always have seed 0.
        steps: optimizer steps.
        tflop: what they cost.
        parameters: of the model.
        run: the run folder.
        train: words of train.py.
        evaluate: words of evaluate.py.
        gflops: of all network evaluations of one picture.
        tokenizer: words of train.py for the tokenizer it needs, if it does.
    """

    model: str
    seed: int
    steps: int
    tflop: float
    parameters: int
    run: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    gflops: float
    tokenizer: tuple[str, ...] = ()

    @property
    def numbers(self) -> Path:
        """Where evaluate.py leaves its numbers."""
        return self.run / "compare" / "metrics.json"


def plan(
    model: str, seed: int, *, budget: float, samples: int, folder: Path, overrides: Sequence[str]
) -> Row:
    """Work out the steps that spend ``budget`` TFLOP, and the two commands of a row."""
    import torch
    from hydra import compose, initialize_config_dir

    from genscale.backbones.base import parameter_count
    from genscale.cli.app import conf_directory
    from genscale.cli.building import instantiate
    from genscale.cli.resolvers import register_resolvers

    register_resolvers()
    words: tuple[str, ...] = (f"model={model}", *DATA, f"seed={seed}", *overrides)
    tokenizer: tuple[str, ...] = ()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
        scale_wise = str(cfg.objective._target_).endswith(".NextScale")
        if scale_wise:
            folder_of_tokens = folder / "tokenizer"
            tokenizer = ("model=msvq", *DATA, f"run_dir={folder_of_tokens}")
            ensure_tokenizer(folder_of_tokens, tokenizer)
            words += (f"autoencoder.run={folder_of_tokens}",)
            cfg = compose("train", overrides=list(words))
    with torch.device("meta"):
        network = instantiate(cfg.model, "model")
    step_tflop = 3 * network.flops() * cfg.batch_size / 1e12
    steps = max(1, round(budget / step_tflop))
    run = folder / f"{model}_seed{seed}"
    train = (*words, f"trainer.max_steps={steps}", f"run_dir={run}")
    evaluate = (
        *(f"run={run}", f"out_dir={run / 'compare'}", f"num_samples={samples}"),
        *(() if scale_wise else SAMPLER),
        *("metrics=fd_lite", f"metrics.metrics=[{','.join(METRICS)}]", "save_samples=true"),
        f"metrics.max_reference={REFERENCE}",
    )
    parameters = parameter_count(network)
    # the forward pass of a scale-wise model holds all scales
    gflops = network.flops() * (1 if scale_wise else STEPS) / 1e9
    spent = steps * step_tflop
    return Row(model, seed, steps, spent, parameters, run, train, evaluate, gflops, tokenizer)


def ensure_tokenizer(run: Path, words: Sequence[str]) -> None:
    """Train the tokenizer of scale-wise models unless that is done."""
    from genscale.runs import RunFolder

    if not (run / "summary.json").is_file():
        begun = run.is_dir() and RunFolder(run).checkpoints()
        call("train.py", (*words, *(("resume=latest",) if begun else ())))


def call(program: str, words: Sequence[str]) -> None:
    """Run one of our commands; its progress is shown.

    Raises:
        SystemExit: it failed.
    """
    print(f"$ python {program} {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / program), *words], check=False)
    if done.returncode:
        raise SystemExit(f"{program} ended with status {done.returncode}; start me again to resume")


def carry_out(row: Row) -> None:
    """Train and evaluate as far as that is not done."""
    from genscale.runs import RunFolder

    summary = row.run / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["steps"] < row.steps:
        begun = row.run.is_dir() and RunFolder(row.run).checkpoints()
        call("train.py", (*row.train, *(("resume=latest",) if begun else ())))
    if not row.numbers.is_file():
        call("evaluate.py", row.evaluate)


def read_numbers(row: Row) -> dict[str, Any]:
    """Return the metrics of a row by name, with their protocols."""
    from genscale.metrics.protocol import EvalProtocol, MetricValue

    record = json.loads(row.numbers.read_text())
    protocols = {k: EvalProtocol.from_dict(v) for k, v in record["protocols"].items()}
    return {
        item["name"]: MetricValue(
            item["name"],
            item["value"],
            item["protocol"],
            item["details"],
            protocols.get(item["protocol"]),
        )
        for item in record["metrics"]
    }


def table(rows: Sequence[Row]) -> str:
    """Return the table and the commands as markdown.

    Raises:
        ProtocolError: the rows were measured under different protocols.
    """
    from genscale.metrics.protocol import require_one_protocol

    numbers = [read_numbers(row) for row in rows]
    for name in METRICS:
        require_one_protocol([found[name] for found in numbers], allow=HOW_SAMPLED)
    seconds_a_picture = time_sampling(rows)
    floor = numbers[0]["fd_lite0"].details
    heads = ["model", "seed", "parameters", "steps", "TFLOP", "training s", "FD-lite0"]
    heads += ["KID-lite0 x 1000", "precision", "recall", "label agreement"]
    heads += ["NFE", "GFLOP a picture", "s a picture"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row, found in sorted(
        zip(rows, numbers, strict=True), key=lambda pair: pair[1]["fd_lite0"].value
    ):
        seconds = json.loads((row.run / "summary.json").read_text())["seconds"]
        cells = [f"`{row.model}`", str(row.seed), f"{row.parameters:,}", f"{row.steps:,}"]
        cells += [f"{row.tflop:.2f}", f"{seconds:.0f}", f"{found['fd_lite0'].value:.1f}"]
        kid = found["kid_lite0"]
        cells += [f"{1e3 * kid.value:.1f}"]
        cells += [f"{found[name].value:.3f}" for name in ("precision", "recall")]
        cells += [f"{100 * found['label_agreement'].value:.1f} %"]
        nfe = json.loads(row.numbers.read_text())["nfe_per_sample"]
        cells += [f"{nfe:g}", f"{row.gflops:.3f}", f"{seconds_a_picture[row]:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    hashes = ", ".join(f"{name} {numbers[0][name].protocol_hash}" for name in METRICS)
    lines += [
        "",
        f"Real/real floor of FD-lite0: {floor['floor']:.1f} ({floor['floor_n']} held-out "
        "pictures). The judge sees the right class in "
        f"{100 * numbers[0]['judge_accuracy'].value:.1f} % of real held-out pictures. Protocols of "
        f"{rows[0].model}: {hashes}; others differ from them in how pictures are sampled, at most.",
        "",
        "```",
    ]
    lines += [f"python train.py {shlex.join(row.tokenizer)}" for row in rows if row.tokenizer][:1]
    for row in rows:
        lines += [f"python train.py {shlex.join(row.train)}"]
        lines += [f"python evaluate.py {shlex.join(row.evaluate)}"]
    return "\n".join([*lines, "```", ""])


def time_sampling(rows: Sequence[Row], *, count: int = 64, turns: int = 3) -> dict[Row, float]:
    """Return seconds a picture on one thread, decoding included: the best of runs in turns."""
    import torch

    from genscale.pipeline import GenerationPipeline
    from genscale.samplers.sde import DDIM
    from scripts.bench_scan import best_in_turns

    torch.set_num_threads(1)
    works: dict[str, Callable[[], Any]] = {}
    for row in rows:
        pipeline = GenerationPipeline.from_run(row.run, device="cpu")
        if not row.tokenizer:
            pipeline.sampler = DDIM(STEPS, eta=0.5)
        works[row.run.name] = partial(pipeline.generate, num_samples=count, batch_size=count)
    seconds = best_in_turns(works, turns, time.process_time)
    return {row: seconds[row.run.name] / count for row in rows}


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the first samples of every model, a model a row; columns are classes in turn."""
    import torch

    from genscale.io.images import load_npz, save_grid

    shown = [load_npz(row.run / "compare" / "samples.npz")[0][:SHOWN] for row in rows]
    save_grid(torch.cat(shown).permute(0, 3, 1, 2).contiguous(), path, columns=SHOWN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = ["dit", "sit", "uvit", "dimr", "lamamba", "var", "mvar"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budget", type=float, default=6.0, help="training TFLOP of a row")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--no-table", action="store_true", help="only train and evaluate")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, for every row")
    arguments = parser.parse_intermixed_args()
    rows = [
        plan(
            model,
            seed,
            budget=arguments.budget,
            samples=arguments.samples,
            folder=arguments.folder,
            overrides=arguments.overrides,
        )
        for seed in arguments.seeds
        for model in arguments.models
    ]
    for row in rows:
        print(f"{row.model} seed {row.seed}: {row.steps} steps, {row.tflop:.2f} TFLOP", flush=True)
    for row in rows:
        carry_out(row)
    if arguments.no_table:
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (arguments.folder / "table.md").write_text(text)
    picture(rows, arguments.folder / "samples.png")
    print(text)
    print(f"table: {arguments.folder / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
