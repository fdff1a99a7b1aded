"""Weight files: what is read, what is refused, and that nothing in them is ever run."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genscale.errors import CheckpointError
from genscale.io.weights import (
    assign_strictly,
    below,
    check_choice,
    complete_from,
    load_strictly,
    read_checkpoint,
)

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


class TestReading:
    def test_safetensors(self, tmp_path: Path) -> None:
        save_file(WEIGHTS, tmp_path / "w.safetensors")
        assert same(read_checkpoint(tmp_path / "w.safetensors"), WEIGHTS)

    @pytest.mark.parametrize("zipped", [True, False], ids=["today's format", "before torch 1.6"])
    def test_torch_files(self, tmp_path: Path, zipped: bool) -> None:
        torch.save(WEIGHTS, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert same(read_checkpoint(str(tmp_path / "w.pt")), WEIGHTS)

    def test_plain_containers_beside_tensors(self, tmp_path: Path) -> None:
        content = {"state_dict": OrderedDict(WEIGHTS), "step": 3, "betas": (0.9, 0.99), "x": None}
        torch.save(content, tmp_path / "w.ckpt")
        read = read_checkpoint(tmp_path / "w.ckpt")
        assert same(read["state_dict"], WEIGHTS)
        assert (read["step"], read["betas"], read["x"]) == (3, (0.9, 0.99), None)


class TestRefusing:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"No weight file at .*gone\.pt"):
            read_checkpoint(tmp_path / "gone.pt")

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated(self, tmp_path: Path, name: str, share: float) -> None:
        path = tmp_path / name
        if name.endswith(".pt"):
            torch.save(WEIGHTS, path)
        else:
            save_file(WEIGHTS, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or no weight file"):
            read_checkpoint(path)

    @pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "old pickle"])
    def test_objects_that_would_run_code(self, tmp_path: Path, kind: str) -> None:
        path, sprung = tmp_path / "trap.ckpt", tmp_path / "sprung"
        content = {"state_dict": Trap(sprung)}
        if "torch" in kind:
            torch.save(content, path, _use_new_zipfile_serialization="old" not in kind)
        else:
            path.write_bytes(pickle.dumps(content, protocol=0 if "old" in kind else None))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one sentence, and nothing beside it
            with pytest.raises(CheckpointError, match="would run code when loaded") as caught:
                read_checkpoint(path)
        assert "best as .safetensors" in str(caught.value)
        assert not sprung.exists()
        pickle.loads(pickle.dumps(Trap(sprung))).close()
        assert sprung.exists()  # the trap does work

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", bytes(1000)])
    def test_other_files(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "w.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{len(content)} bytes were found"):
            read_checkpoint(tmp_path / "w.bin")

    def test_a_tensor_alone(self, tmp_path: Path) -> None:
        torch.save(torch.ones(3), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="holds a Tensor, but a dict of tensors"):
            read_checkpoint(tmp_path / "w.pt")


class TestLoading:
    def test_all_keys_and_shapes_fit(self) -> None:
        source, target = nn.Linear(2, 3), nn.Linear(2, 3)
        load_strictly(target, source.state_dict(), source="x")
        assert torch.equal(target.weight, source.weight)

    def test_missing_and_unexpected_keys_are_counted(self) -> None:
        model = nn.Linear(2, 3)
        before = model.weight.clone()
        state = {"weight": torch.zeros(3, 2), "scale": torch.ones(1)}
        sentence = (
            r"1 missing, 1 unexpected keys for Linear in x\.ckpt \(first: bias\)\. The file "
            r"belongs to a model of other settings\. Pass model=other\."
        )
        with pytest.raises(CheckpointError, match=sentence):
            load_strictly(model, state, source="x.ckpt", hint="Pass model=other.")
        assert torch.equal(model.weight, before)  # nothing is loaded in part

    def test_other_shapes_are_named(self) -> None:
        model = nn.Linear(2, 3)
        state = {"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}
        with pytest.raises(CheckpointError, match=r"weight is \(3, 5\), expected \(3, 2\)"):
            load_strictly(model, state, source="x.ckpt")

    def test_a_model_on_the_meta_device_gets_tensors_of_its_own(self) -> None:
        with torch.device("meta"):
            target = nn.Linear(2, 3)
        state = {"weight": torch.ones(3, 2, dtype=torch.bfloat16), "bias": torch.zeros(3)}
        assign_strictly(target, state, device=torch.device("cpu"), source="x")
        assert target.weight.dtype == torch.float32  # as built
        assert target.weight.requires_grad
        assert torch.equal(target(torch.ones(1, 2)), torch.full((1, 3), 2.0))
        state["bias"].fill_(9.0)  # as if the file changed
        assert torch.equal(target.bias, torch.zeros(3))
        with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected keys for Linear in y"):
            assign_strictly(target, {"bias": state["bias"]}, device=torch.device("cpu"), source="y")

    def test_what_no_file_holds_is_computed_anew(self) -> None:
        built = 0

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("table", torch.arange(3.0), persistent=False)
                self.plain = torch.tensor([5.0])

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                nonlocal built
                built += 1
                self.inner, self.layer = Inner(), nn.Linear(1, 1)

        state = Net().state_dict()
        assert list(state) == ["layer.weight", "layer.bias"]
        with torch.device("meta"):
            net = Net()
        assign_strictly(net, state, device=torch.device("cpu"), source="x")
        complete_from(net, Net)
        assert torch.equal(net.inner.table, torch.arange(3.0))  # type: ignore[arg-type]
        assert torch.equal(net.inner.plain, torch.tensor([5.0]))  # type: ignore[arg-type]
        assert "inner.table" not in net.state_dict()
        complete_from(net, Net)  # nothing is lacking: nothing is built
        assert built == 3

    def test_below_takes_one_part(self) -> None:
        state = {"ema.a": torch.ones(1), "model.a": torch.zeros(1), "em": torch.zeros(1)}
        assert list(below(state, "ema.")) == ["a"]

    def test_choices(self) -> None:
        check_choice("weights", "raw", ("ema", "raw"))
        with pytest.raises(CheckpointError, match=r"one of ema, raw, but 'emma'.*mean 'ema'"):
            check_choice("weights", "emma", ("ema", "raw"))
