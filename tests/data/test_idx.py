"""IDX files against bytes written by hand, and Fashion-MNIST's place to be found."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from genscale.data import fashion_mnist
from genscale.data.fashion_mnist import CLASS_NAMES, FashionMNIST, fashion_mnist_module
from genscale.data.idx import IDXFolder, read_idx
from genscale.errors import ConfigError, DataError

SCRIPT = Path(__file__).parents[2] / "scripts/prepare_fashion_mnist.sh"


def idx(shape: tuple[int, ...], payload: bytes) -> bytes:
    """Write the header by the format's definition: 0 0 type axes, then big-endian sizes."""
    header = bytes([0, 0, 8, len(shape)])
    return header + b"".join(size.to_bytes(4, "big") for size in shape) + payload


def write_set(
    root: Path,
    *,
    side: int = 28,
    train: tuple[int, ...] = (3, 5, 3),
    heldout: tuple[int, ...] = (5,),
    prefix: str = "",
    packed: bool = True,
) -> Path:
    """Write the four files; picture i is flat grey i + 1 with a white first pixel."""
    root.mkdir(exist_ok=True)
    for split, labels in (("train", train), ("t10k", heldout)):
        pictures = b"".join(
            b"\xff" + bytes([i + 1]) * (side * side - 1) for i in range(len(labels))
        )
        files = {
            f"{prefix}{split}-images-idx3-ubyte": idx((len(labels), side, side), pictures),
            f"{prefix}{split}-labels-idx1-ubyte": idx((len(labels),), bytes(labels)),
        }
        for name, content in files.items():
            if packed:
                (root / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_bytes_written_by_hand_are_read_as_they_are(tmp_path: Path, packed: bool) -> None:
    content = bytes.fromhex("0000080300000002000000020000000300010203040500ff0aff14ff")
    path = tmp_path / "any-name"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_idx(path).tolist() == [[[0, 1, 2], [3, 4, 5]], [[0, 255, 10], [255, 20, 255]]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "begins with nothing"),
        (b"\x01\x00\x08\x01", "begins with 01 00 08 01"),
        (b"\x00\x00\x0d\x01" + bytes(8), r"IDX type 0x0d, and unsigned bytes \(0x08\)"),
        (b"\x00\x00\x08\x03" + bytes(7), r"ends inside its header of 3 axes \(11 bytes\)"),
        (b"\x00\x00\x08\x00", "ends inside its header of 0 axes"),
        (idx((2, 3), bytes(5)), "says 2 x 3 = 6 bytes but holds 5.* truncated"),
        (idx((2, 3), bytes(7)), "says 2 x 3 = 6 bytes but holds 7"),
        (gzip.compress(idx((9,), bytes(9)), mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(idx((9,), bytes(9)), mtime=0)[:15] + bytes(20), "damaged gzip file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.gz .*{sentence}"):
        read_idx(path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_is_padded_to_32_pixels_in_black(tmp_path: Path, packed: bool) -> None:
    write_set(tmp_path, packed=packed)
    images = IDXFolder(tmp_path)
    assert (len(images), images.channels, images.resolution) == (3, 1, 32)
    picture = images.image(1)[0]
    assert picture[2, 2] == 255  # the white first pixel, after the margin of 2
    assert (picture[2:30, 2:30].flatten()[1:] == 2).all()
    assert picture[:2].sum() + picture[30:].sum() + picture[:, :2].sum() == 0
    assert len(IDXFolder(tmp_path, "heldout")) == 1


def test_other_sizes_show_the_same_frame(tmp_path: Path) -> None:
    write_set(tmp_path)
    assert IDXFolder(tmp_path, resolution=28).image(0)[0, 0, 0] == 255  # as stored, no margin
    assert IDXFolder(tmp_path, resolution=64, channels=3).image(0).shape == (3, 64, 64)
    small = IDXFolder(tmp_path, resolution=16).image(2)[0]
    # the margin of 2 at 32 pixels is one row and column at 16 (the white pixel rings at the left)
    assert small[0, 4:].sum() == 0
    assert small[:, 15].sum() == 0
    assert (small[3:13, 3:13] == 3).all()  # picture 2 is flat grey 3


def test_pictures_of_other_sides_are_only_resized(tmp_path: Path) -> None:
    write_set(tmp_path, side=8)
    assert IDXFolder(tmp_path, resolution=8).image(0)[0, 0, 0] == 255
    assert (IDXFolder(tmp_path, resolution=16).image(1)[0, 6:] == 2).all()  # no black margin


def test_classes_count_from_zero_in_order_of_the_train_labels(tmp_path: Path) -> None:
    write_set(tmp_path, train=(9, 4, 9, 7), heldout=(7, 4))
    images, heldout = IDXFolder(tmp_path), IDXFolder(tmp_path, "heldout")
    assert images.class_names == heldout.class_names == ("4", "7", "9")
    assert images.labels is not None
    assert heldout.labels is not None
    assert images.labels.tolist() == [2, 0, 2, 1]
    assert heldout.labels.tolist() == [1, 0]
    named = IDXFolder(tmp_path, class_names=["cat", "dog", "eel"], name="pets")
    assert (named.class_names, named.name) == (("cat", "dog", "eel"), "pets")


def test_one_of_several_sets_in_a_folder_is_chosen_by_name(tmp_path: Path) -> None:
    write_set(tmp_path, prefix="emnist-digits-", train=(1, 2))
    write_set(tmp_path, prefix="emnist-letters-", train=(1, 2, 3, 4), heldout=(1,))
    assert len(IDXFolder(tmp_path, subset="emnist-letters")) == 4
    with pytest.raises(DataError, match=r"sets 'emnist-digits', 'emnist-letters' and subset=None"):
        IDXFolder(tmp_path)


def test_transposing_swaps_rows_and_columns(tmp_path: Path) -> None:
    write_set(tmp_path, side=8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    pictures = torch.arange(3 * 64, dtype=torch.uint8).view(3, 8, 8)
    path.write_bytes(gzip.compress(idx((3, 8, 8), pictures.numpy().tobytes())))
    images = IDXFolder(tmp_path, resolution=8, transpose=True)
    assert torch.equal(images.image(1)[0], pictures[1].T)


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    def swap(name: str, content: bytes) -> Path:
        root = write_set(tmp_path / "set")
        (root / f"{name}.gz").write_bytes(gzip.compress(content))
        return root

    with pytest.raises(DataError, match=r"holds 3 pictures, but there are 2 labels"):
        IDXFolder(swap("train-labels-idx1-ubyte", idx((2,), bytes(2))))
    with pytest.raises(DataError, match=r"shape \(2, 3\), and square pictures \(n, H, H\)"):
        IDXFolder(swap("train-images-idx3-ubyte", idx((2, 3), bytes(6))))
    with pytest.raises(DataError, match=r"shape \(3, 1\), and labels \(n,\)"):
        IDXFolder(swap("train-labels-idx1-ubyte", idx((3, 1), bytes(3))))
    with pytest.raises(DataError, match=r"heldout labels .* hold class 6, which the train labels"):
        IDXFolder(swap("t10k-labels-idx1-ubyte", idx((1,), b"\x06")), "heldout")
    with pytest.raises(DataError, match=r"hold 2 classes, but 3 class names"):
        IDXFolder(write_set(tmp_path / "set"), class_names=["a", "b", "c"])


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*/nowhere"):
        IDXFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no IDX files"):
        IDXFolder(tmp_path)
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"no labels of the heldout split .* t10k-labels-idx1-ubyte\(.gz\)"
    ):
        IDXFolder(tmp_path, "heldout")
    with pytest.raises(ConfigError, match=r"split='val' is unknown"):
        IDXFolder(tmp_path, "val")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.resolution=600"):
        IDXFolder(tmp_path, resolution=600)


def test_fashion_mnist_is_found_in_its_folders_or_the_script_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(fashion_mnist, "FOLDERS", (first, second))
    with pytest.raises(
        DataError, match=r"none of .*/a and .*/b\. .*scripts/prepare_fashion_mnist.sh"
    ):
        FashionMNIST()
    write_set(second, train=tuple(range(10)), heldout=(7, 9))
    images = FashionMNIST(split="heldout")
    assert (images.name, images.class_names) == ("fashion_mnist", CLASS_NAMES)
    assert [images.class_names[i] for i in images.labels.tolist()] == ["Sneaker", "Ankle boot"]
    module = fashion_mnist_module(
        name="clothes",
        root=str(second),
        resolution=16,
        channels=3,
        num_classes=10,
        flip=True,
        num_workers=0,
        batch_size=2,
        seed=0,
    )
    assert (module.name, len(module.train), len(module.heldout)) == ("clothes", 10, 2)
    assert SCRIPT.is_file()


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")
def test_the_script_leaves_a_complete_folder_alone_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    root = write_set(tmp_path / "set")
    done = subprocess.run(["bash", SCRIPT, root], capture_output=True, text=True, check=True)
    assert f"already in {root}" in done.stdout
    for tool in ("bash", "dirname", "gzip", "cat"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    bare = {**os.environ, "PATH": str(tmp_path)}  # a system without apt
    failed = subprocess.run(
        ["bash", SCRIPT, tmp_path / "new"], capture_output=True, text=True, env=bare, check=False
    )
    assert failed.returncode == 1
    assert "this system has no apt-get" in failed.stderr
    assert not (tmp_path / "new").exists()
