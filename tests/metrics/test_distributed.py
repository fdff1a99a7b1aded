"""Two processes compute what one computes, also when one of them has no samples."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from genscale.metrics.suite import EvaluationSuite

METRICS = ["fd_pixels", "kid_pixels", "label_agreement", "copy_rate"]


def _pictures(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    from genscale.rng import integers, key

    labels = torch.arange(n) % 3
    pixels = integers(key(seed, torch.arange(n * 36)), 60).view(n, 1, 6, 6)
    return (pixels + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def _build(metrics: list[str] = METRICS) -> EvaluationSuite:
    from genscale.metrics.pixels import Pixels

    suite = EvaluationSuite(metrics, [Pixels(3)], kid_subsets=5)
    suite.fit_reference(*_pictures(1, 60), *_pictures(2, 30), "made")
    return suite


def _results(suite: EvaluationSuite, rows: torch.Tensor) -> dict[str, float]:
    images, labels = _pictures(3, 40)
    if len(rows):
        suite.update(images[rows], labels[rows], rows)
    return {value.name: value.value for value in suite.compute()}


def _child() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    suite = _build()
    # 41 ids over 2 processes, the last one twice, as a padding sampler would deal them
    split = _results(suite, torch.arange(41).remainder(40)[rank::2])
    suite.reset()
    lonely = _results(suite, torch.arange(40) if rank == 0 else torch.arange(0))
    if rank == 1:
        print(json.dumps([split, lonely]))
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_equal_one(subprocess_environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(2):
        environment = {
            **subprocess_environment,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    split, lonely = json.loads(outputs[1][0])
    expected = _results(_build(), torch.arange(40))
    assert split == expected  # to the last bit
    assert lonely == expected


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _child()
