"""Training from a cache: rows through memory maps, keyed batches, and shards that are checked."""

from __future__ import annotations

import json
import pickle
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.data.base import TensorImages
from genscale.data.image_folder import ImageFolder
from genscale.data.latent_index import (
    DTYPES,
    CacheIndex,
    CachePlan,
    ShardRecord,
    check_shard,
    map_shard,
    read_index,
    shard_name,
    write_shard,
)
from genscale.data.latents import LatentDataModule, Latents, latents_module
from genscale.data.module import ImageDataModule, mirrored
from genscale.errors import ConfigError, DataError
from genscale.rng import Purpose, key, normal, uniform

COUNT, SHARD = 11, 4
VALUES = normal(key(1, torch.arange(COUNT)), (8, 2, 2))


def plan_of(**changes: Any) -> CachePlan:
    fields: dict[str, Any] = {
        "data": "pictures",
        "fingerprint": "f" * 64,
        "count": COUNT,
        "resolution": 16,
        "channels": 3,
        "class_names": ("cat", "dog", "owl"),
        "autoencoder": {"latent_channels": 4, "downsample": 8, "scale": 0.5, "shift": 0.0},
        "shape": (8, 2, 2),
        "flip": True,
        "dtype": "float16",
        "shard_size": SHARD,
        "tf32": False,
    }
    return CachePlan(**{**fields, **changes})


def tensors_of(plan: CachePlan, number: int) -> dict[str, Tensor]:
    """Moments of a row are its own, mirrored ones their negative, labels the row modulo 3."""
    rows = torch.tensor(plan.rows(number))
    moments = VALUES[rows].to(DTYPES[plan.dtype])
    tensors = {"moments": moments}
    if plan.flip:
        tensors["mirrored"] = -moments
    if plan.class_names:
        tensors["labels"] = rows % 3
    return tensors


def cache(folder: Path, **changes: Any) -> Path:
    plan = plan_of(**changes)
    numbers = range(plan.num_shards)
    shards = tuple(write_shard(folder, plan, i, tensors_of(plan, i)) for i in numbers)
    CacheIndex(plan, {"data": {}, "autoencoder": {}}, shards).write(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return cache(tmp_path / "cache")


def attach(module: ImageDataModule, **state: Any) -> ImageDataModule:
    settings = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, **state}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, **settings)  # type: ignore[assignment]
    return module


def read(module: ImageDataModule, count: int) -> list[dict[str, Tensor]]:
    return list(islice(module.train_dataloader(), count))


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class TestRows:
    def test_rows_come_from_any_shard_in_the_order_asked_for(self, root: Path) -> None:
        latents = Latents(root)
        rows = torch.tensor([10, 0, 4, 3, 10])
        assert torch.equal(latents.moments(rows), VALUES[rows].half())
        which = torch.tensor([True, False, False, True, False])
        signs = torch.where(which, -1, 1).view(-1, 1, 1, 1)
        assert torch.equal(latents.moments(rows, which), VALUES[rows].half() * signs)
        assert latents.labels is not None
        assert latents.labels.tolist() == [row % 3 for row in range(COUNT)]
        with pytest.raises(IndexError, match="Row 11 does not exist"):
            latents.moments([11])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_moments_keep_the_type_they_were_stored_in(self, tmp_path: Path, dtype: str) -> None:
        latents = Latents(cache(tmp_path, dtype=dtype))
        assert latents.moments([5]).dtype == DTYPES[dtype]
        assert torch.equal(latents.moments([5])[0], VALUES[5].to(DTYPES[dtype]))

    def test_what_the_pictures_were_is_known(self, root: Path) -> None:
        latents = Latents(root)
        assert (len(latents), latents.channels, latents.resolution) == (COUNT, 3, 16)
        assert (latents.name, latents.num_classes) == ("pictures", 3)
        assert latents.class_names == ("cat", "dog", "owl")

    def test_a_cache_without_labels_or_mirror_images(self, tmp_path: Path) -> None:
        latents = Latents(cache(tmp_path, class_names=(), flip=False))
        assert latents.labels is None
        assert latents.num_classes == 0
        with pytest.raises(DataError, match=r"keeps no mirrored latents. Set data.flip=false"):
            latents.moments([0], torch.tensor([True]))
        with pytest.raises(ConfigError, match=r"data.flip=true, but"):
            LatentDataModule(latents, batch_size=2, flip=True)
        assert read(LatentDataModule(latents, batch_size=2), 1)[0]["label"].tolist() == [-1, -1]

    def test_some_rows_are_a_cache_of_their_own(self, root: Path) -> None:
        whole = Latents(root)
        part = whole.some(torch.tensor([9, 2]))
        assert torch.equal(part.moments([1, 0]), whole.moments([2, 9]))
        assert part.labels is not None
        assert part.labels.tolist() == [0, 2]
        assert part.fingerprint() != whole.fingerprint()
        assert len(whole) == COUNT

    def test_fingerprints_follow_content_and_plan(self, root: Path, tmp_path: Path) -> None:
        first = Latents(root).fingerprint()
        assert Latents(root).fingerprint() == first
        assert Latents(cache(tmp_path / "b")).fingerprint() == first
        assert Latents(cache(tmp_path / "c", dtype="float32")).fingerprint() != first
        assert Latents(cache(tmp_path / "d", fingerprint="0" * 64)).fingerprint() != first


class TestMemoryMap:
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_shards_are_mapped_when_needed_and_never_copied(self, tmp_path: Path) -> None:
        plan = plan_of(count=8, shape=(8, 64, 64), flip=False, class_names=())
        moments = torch.zeros(4, 8, 64, 64, dtype=torch.float16)  # 256 KiB a shard
        shards = [write_shard(tmp_path, plan, i, {"moments": moments + i}) for i in range(2)]
        CacheIndex(plan, {}, tuple(shards)).write(tmp_path)
        latents = Latents(tmp_path)

        def maps() -> dict[str, tuple[int, int]]:
            """KiB of each shard that are mapped, and of these the process's own copies."""
            found: dict[str, tuple[int, int]] = {}
            name = None
            for line in Path("/proc/self/smaps").read_text().splitlines():
                first, *words = line.split()
                if not first.endswith(":"):
                    name = Path(words[-1]).name if str(tmp_path) in line else None
                elif name is not None and first in ("Size:", "Anonymous:"):
                    size, copied = found.get(name, (0, 0))
                    number = int(words[0])
                    more = (number, 0) if first == "Size:" else (0, number)
                    found[name] = (size + more[0], copied + more[1])
            return found

        assert maps() == {}
        assert float(latents.moments([5]).float().mean()) == 1.0
        ((name, (size, copied)),) = maps().items()
        assert name == shard_name(1)
        assert size >= 256  # all of it
        assert copied == 0

    def test_a_worker_is_sent_no_latents(self, root: Path) -> None:
        latents = Latents(root)
        before = len(pickle.dumps(latents))
        expected = latents.moments([0, 10])
        sent = pickle.dumps(latents)
        assert len(sent) == before
        assert torch.equal(pickle.loads(sent).moments([0, 10]), expected)


class TestBatches:
    def test_a_batch_holds_moments_labels_and_positions(self, root: Path) -> None:
        batch = read(LatentDataModule(Latents(root), batch_size=6, seed=1), 2)[1]
        assert batch["moments"].shape == (6, 8, 2, 2)
        assert batch["moments"].dtype == torch.float16
        assert batch["position"].tolist() == [6, 7, 8, 9, 10, 11]
        assert batch["label"].dtype == torch.int64

    def test_flips_are_those_of_the_pictures(self, root: Path) -> None:
        plain = joined(read(LatentDataModule(Latents(root), batch_size=10, seed=3, flip=False), 4))
        flipped = joined(read(LatentDataModule(Latents(root), batch_size=10, seed=3), 4))
        expected = uniform(key(3, torch.arange(40), Purpose.FLIP)) < 0.5
        assert torch.equal(mirrored(3, torch.arange(40)), expected)
        signs = torch.where(expected, -1, 1).view(-1, 1, 1, 1)
        assert torch.equal(flipped["moments"], plain["moments"] * signs)
        assert 0 < int(expected.sum()) < 40

    def test_order_is_that_of_the_pictures(self, root: Path) -> None:
        labels = torch.arange(COUNT) % 3
        pixels = torch.zeros(COUNT, 3, 16, 16, dtype=torch.uint8)
        images = TensorImages(pixels, labels, class_names=("cat", "dog", "owl"))
        ours = joined(read(LatentDataModule(Latents(root), batch_size=8, seed=5), 5))
        theirs = joined(read(ImageDataModule(images, batch_size=8, seed=5), 5))
        assert torch.equal(ours["label"], theirs["label"])
        assert torch.equal(ours["position"], theirs["position"])

    @pytest.mark.parametrize("workers", [1, 2])
    def test_reading_processes_change_nothing(self, root: Path, workers: int) -> None:
        alone = joined(read(LatentDataModule(Latents(root), batch_size=4, seed=2), 6))
        module = LatentDataModule(Latents(root), batch_size=4, seed=2, num_workers=workers)
        together = joined(read(module, 6))
        assert all(torch.equal(alone[name], together[name]) for name in alone)

    def test_two_processes_share_a_step(self, root: Path) -> None:
        whole = joined(read(LatentDataModule(Latents(root), batch_size=6, seed=4), 3))
        parts = [
            joined(
                read(
                    attach(
                        LatentDataModule(Latents(root), batch_size=6, seed=4),
                        global_rank=rank,
                        world_size=2,
                    ),
                    3,
                )
            )
            for rank in (0, 1)
        ]
        both = {name: torch.cat([part[name] for part in parts]) for name in whole}
        order = both["position"].argsort()
        assert all(torch.equal(both[name][order], whole[name]) for name in whole)

    def test_a_limit_draws_the_rows_that_it_draws_of_pictures(self, root: Path) -> None:
        pixels = torch.arange(COUNT).view(-1, 1, 1, 1).expand(COUNT, 3, 16, 16).to(torch.uint8)
        images = ImageDataModule(TensorImages(pixels), batch_size=2, seed=7, limit=3)
        rows = images.train.images([0, 1, 2])[:, 0, 0, 0].long()
        latents = LatentDataModule(Latents(root), batch_size=2, seed=7, limit=3)
        assert torch.equal(latents.train.moments([0, 1, 2]), VALUES[rows].half())

    def test_a_run_resumes_on_the_same_cache_only(self, root: Path, tmp_path: Path) -> None:
        module = LatentDataModule(Latents(root), batch_size=4, seed=2)
        module.samples_seen = 8
        again = LatentDataModule(Latents(root), batch_size=4, seed=2)
        again.load_state_dict(module.state_dict())
        expected = read(LatentDataModule(Latents(root), batch_size=4, seed=2), 3)[2]
        assert torch.equal(read(again, 1)[0]["moments"], expected["moments"])
        other = LatentDataModule(Latents(cache(tmp_path / "o", dtype="float32")), batch_size=4)
        with pytest.raises(DataError, match="was trained on data with fingerprint"):
            other.load_state_dict(module.state_dict())


class TestDamage:
    def test_no_cache_and_an_unfinished_one(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected index.json .*genscale.cli.cache"):
            Latents(tmp_path / "nowhere")
        CacheIndex(plan_of(), {}).write(root)
        (root / shard_name(1)).unlink()
        with pytest.raises(DataError, match=r"is unfinished: 2 of 3 shards.*goes on where"):
            Latents(root)

    def test_missing_and_cut_shards_are_told_at_once(self, root: Path) -> None:
        (root / shard_name(0)).unlink()
        file = root / shard_name(2)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"2 of 3 shards .*00000.*\(missing\).*00002") as told:
            Latents(root)
        assert "Delete them" in str(told.value)
        assert len(Latents(cache(root.parent / "whole"), verify="none")) == COUNT

    def test_digests_find_a_changed_bit(self, root: Path) -> None:
        file = root / shard_name(1)
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        Latents(root)  # of the same size
        with pytest.raises(DataError, match=r"00001.*is damaged: its content is not what"):
            Latents(root, verify="digests")
        with pytest.raises(DataError, match="is damaged"):
            check_shard(root, plan_of(), 1)
        with pytest.raises(ConfigError, match=r"data.verify='all' is unknown"):
            Latents(root, verify="all")  # type: ignore[arg-type]

    def test_a_whole_cache_passes_all_checks(self, root: Path) -> None:
        index = read_index(root)
        assert index is not None
        assert [check_shard(root, index.plan, i) for i in range(3)] == list(index.shards)
        assert len(Latents(root, verify="digests")) == COUNT
        assert all(isinstance(record, ShardRecord) for record in index.shards)

    def test_a_foreign_shard_is_never_opened(self, root: Path, tmp_path: Path) -> None:
        other = cache(tmp_path / "other", fingerprint="0" * 64)
        (root / shard_name(1)).write_bytes((other / shard_name(1)).read_bytes())
        with pytest.raises(DataError, match="is foreign"):
            map_shard(root, plan_of(), 1)
        with pytest.raises(DataError, match="is foreign"):
            Latents(root)  # labels are read at once
        # nor one of the same cache in another's place
        (root / shard_name(1)).write_bytes((root / shard_name(0)).read_bytes())
        with pytest.raises(DataError, match="is foreign"):
            Latents(root)

    def test_a_shard_of_other_tensors_or_none(self, root: Path) -> None:
        plan = plan_of()
        write_shard(root, plan, 0, {"moments": tensors_of(plan, 0)["moments"]})
        with pytest.raises(DataError, match="is damaged: it holds"):
            map_shard(root, plan, 0)
        (root / shard_name(0)).unlink()
        with pytest.raises(DataError, match="is missing"):
            map_shard(root, plan, 0)

    def test_an_index_of_other_make(self, root: Path) -> None:
        file = root / "index.json"
        content = json.loads(file.read_text())
        for change, sentence in (
            ({"format": 9}, "has format 9"),
            ({"dtype": "float32"}, "changed by hand"),
            ({"shards": 3}, "is damaged"),
        ):
            file.write_text(json.dumps(content | change))
            with pytest.raises(DataError, match=sentence):
                read_index(root)
        file.write_text("{")
        with pytest.raises(DataError, match="is damaged"):
            read_index(root)

    def test_a_difference_of_plans_is_named(self) -> None:
        plan = plan_of()
        assert plan.difference(plan) is None
        assert plan.difference(plan_of(dtype="float32")) == "dtype=float16, not float32"
        other = plan_of(autoencoder={**plan.autoencoder, "scale": 1.0})
        assert plan.difference(other) == "autoencoder.scale=0.5, not 1.0"


class TestModule:
    def words(self, folder: Path, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "name": "latents",
            "root": str(folder),
            "resolution": None,
            "channels": None,
            "num_classes": None,
            "verify": "sizes",
            "flip": None,
            "num_workers": 0,
            "batch_size": 4,
            "seed": 0,
        }
        return {**settings, **changes}

    def test_sizes_come_from_the_cache(self, root: Path) -> None:
        module = latents_module(**self.words(root))
        assert (module.resolution, module.channels, module.num_classes) == (16, 3, 3)
        assert (module.name, module.flip) == ("latents", True)
        assert module.fingerprint() == Latents(root).fingerprint()

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"root": None}, "data.root is not set"),
            ({"resolution": 32}, "data.resolution=32, but .* with resolution 16"),
            ({"channels": 1}, "data.channels=1, but .* with channels 3"),
            ({"num_classes": 1000}, "data.num_classes=1000, but 'latents' has 3"),
        ],
    )
    def test_sizes_that_are_stated_are_checked(
        self, root: Path, changes: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ConfigError, match=sentence):
            latents_module(**self.words(root, **changes))


class TestPictures:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        from PIL import Image

        for row in range(COUNT):
            folder = tmp_path / "pictures" / ("cat", "dog", "owl")[row % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (row, 0, 0)).save(folder / f"{row:02d}.png")
        return tmp_path / "pictures"

    def made_of(self, pictures: Path, folder: Path) -> Latents:
        images = ImageFolder(pictures, 16)
        node = {
            "_target_": "genscale.data.image_folder.image_folder_module",
            "root": str(pictures),
            **{"name": "pictures", "resolution": 16, "channels": 3, "num_classes": None},
            **{"labels": "folders", "verify": "headers", "on_damage": "raise"},
            **{"heldout_root": None, "heldout_fraction": 0.0, "flip": True, "num_workers": 0},
            **{"batch_size": 4, "seed": 0},
        }
        cache(folder, fingerprint=images.fingerprint(), class_names=images.class_names)
        index = read_index(folder)
        assert index is not None
        CacheIndex(index.plan, {"data": node}, index.shards).write(folder)
        return Latents(folder)

    def test_they_are_read_from_where_they_were(self, pictures: Path, tmp_path: Path) -> None:
        latents = self.made_of(pictures, tmp_path / "cache")
        assert torch.equal(latents.images([3, 0]), ImageFolder(pictures, 16).images([3, 0]))
        module = LatentDataModule(latents, batch_size=4)
        assert module.pictures().train.fingerprint() == latents.plan.fingerprint
        assert module.pictures() is latents.source()  # read once
        plain = latents.source()
        assert plain.pictures() is plain

    def test_changed_or_missing_pictures_ask_for_a_reference(
        self, pictures: Path, tmp_path: Path
    ) -> None:
        self.made_of(pictures, tmp_path / "cache")
        (pictures / "cat" / "00.png").unlink()
        with pytest.raises(DataError, match=r"they changed.*reference=<statistics or npz>"):
            Latents(tmp_path / "cache").source()
        pictures.rename(tmp_path / "moved")
        with pytest.raises(DataError, match=r"There is no folder.*reference=<statistics or npz>"):
            Latents(tmp_path / "cache").images([0])
