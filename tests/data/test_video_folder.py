"""Folders of videos as clips: keyed cuts, classes, captions, and what is done about bad files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from genscale.data.clip_cutting import ClipTimes
from genscale.data.clips import ClipDataModule
from genscale.data.image_folder import class_folders
from genscale.data.paths import Paths, held_out
from genscale.data.video_checks import check_videos, decode_all
from genscale.data.video_folder import VideoFolder
from genscale.data.video_module import video_folder_module
from genscale.data.video_reader import PyAVReader, Unreadable
from genscale.errors import ConfigError, DataError
from genscale.rng import key
from genscale.training.callbacks.replaced import ReplacedSamples
from tests.data.videos import damage, grey, numbers, write_video

KEYS = key(0, torch.arange(64))


def frames_of(clips: Tensor) -> list[list[int]]:
    """Which frames clips ``(n, C, T, H, W)`` show."""
    return [numbers(clip.transpose(0, 1)) for clip in clips]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: mp4 at 10 and 20 a second and a gif; a folder of frames and a longer mp4."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "fish" / "a.mp4", 20, rate=10)
    write_video(root / "fish" / "b.mp4", 20, rate=20)
    pictures = [Image.fromarray(grey(i)) for i in range(10)]
    pictures[0].save(root / "fish/c.gif", save_all=True, append_images=pictures[1:], duration=100)
    (root / "bird" / "d").mkdir(parents=True)
    for number in range(16):
        Image.fromarray(grey(number)).save(root / "bird" / "d" / f"{number}.png")
    write_video(root / "bird" / "e.mkv", 30, rate=10)
    return root


def folder(root: Path, **options: Any) -> VideoFolder:
    return VideoFolder(root, 16, 4, backend="pyav", **options)


class TestClips:
    def test_rows_classes_and_fixed_clips(self, root: Path) -> None:
        data = folder(root)
        assert [data.path(row) for row in range(5)] == [
            *("bird/d", "bird/e.mkv", "fish/a.mp4", "fish/b.mp4", "fish/c.gif")
        ]
        assert data.class_names == ("bird", "fish")
        assert data.labels is not None
        assert data.labels.tolist() == [0, 0, 1, 1, 1]
        clips = data.images([2, 4, 1])
        assert (clips.shape, clips.dtype) == ((3, 3, 4, 16, 16), torch.uint8)
        assert frames_of(clips) == [[8, 9, 10, 11], [3, 4, 5, 6], [13, 14, 15, 16]]
        assert data.frame_rate(range(5)).tolist() == pytest.approx([25, 10, 10, 20, 10])
        assert data.source_size([0, 4]).tolist() == [[32, 48], [32, 48]]
        assert (data.num_frames, data.usual_frame_rate) == (4, 10.0)
        assert "5 clips, 3x4x16x16, 2 classes" in repr(data)
        with pytest.raises(IndexError, match="Row 5 does not exist"):
            data.images([5])

    def test_one_frame_rate_for_all(self, root: Path) -> None:
        data = folder(root, frame_rate=5.0, begin="first")
        assert frames_of(data.images([2, 3])) == [[0, 2, 4, 6], [0, 4, 8, 12]]
        assert data.frame_rate([2, 3]).tolist() == [5.0, 5.0]

    def test_keys_choose_beginning_and_rate(self, root: Path) -> None:
        data = folder(root, frame_rate=[5.0, 10.0])
        clips, rates = data.clips([2] * 64, KEYS)
        shown = frames_of(clips)
        assert set(rates.tolist()) == {5.0, 10.0}
        for clip, rate in zip(shown, rates.tolist(), strict=True):
            stride = {5.0: 2, 10.0: 1}[rate]
            assert clip == [clip[0] + stride * i for i in range(4)]
        assert len({clip[0] for clip in shown}) > 10

    def test_a_clip_is_a_function_of_its_key_alone(self, root: Path) -> None:
        data = folder(root, crop="random", frame_rate=[5.0, 10.0])
        rows = torch.arange(8) % 5
        clips, rates, taken = data.taken(rows, KEYS[:8])
        assert torch.equal(taken, rows)
        for part in ([3], [7, 0]):
            again, again_rates = folder(root, crop="random", frame_rate=[5.0, 10.0]).clips(
                rows[part], KEYS[part]
            )
            assert torch.equal(again, clips[part])
            assert torch.equal(again_rates, rates[part])

    def test_grey_and_random_crops(self, root: Path) -> None:
        data = folder(root, channels=1, crop="random")
        clips, _ = data.clips([2] * 16, KEYS[:16])
        assert clips.shape == (16, 1, 4, 16, 16)
        # the left half is brighter: where the border lies tells where a clip was cut
        borders = {int((clip[0, 0, 0].int() > int(clip[0, 0, 0, -1]) + 2).sum()) for clip in clips}
        assert len(borders) > 3

    def test_reading_processes_change_nothing(self, root: Path) -> None:
        batches = []
        for workers in (0, 2):
            module = ClipDataModule(folder(root), batch_size=6, num_workers=workers, flip=True)
            loader = iter(module.train_dataloader())
            batches.append([next(loader) for _ in range(2)])
        for one, two in zip(*batches, strict=True):
            assert one.keys() == two.keys() == {"image", "label", "position", "frame_rate"}
            assert all(torch.equal(one[name], two[name]) for name in one)


class TestKnownByContent:
    def test_the_fingerprint_changes_with_what_clips_show(self, root: Path, tmp_path: Path) -> None:
        same = folder(root).fingerprint()
        assert same == folder(root).fingerprint()
        for other in (
            {"frame_rate": 8.0},
            {"crop": "squash"},
            {"begin": "first"},
            {"short": "loop"},
        ):
            assert folder(root, **other).fingerprint() != same
        assert folder(root).some(torch.tensor([0, 1])).fingerprint() != same

    def test_splits_and_parts(self, root: Path) -> None:
        data = folder(root)
        train, heldout = data.split(0.4)
        assert len(train) + len(heldout) == 5
        assert {train.path(i) for i in range(len(train))}.isdisjoint(
            heldout.path(i) for i in range(len(heldout))
        )
        part = data.some(torch.tensor([4, 2]))
        assert torch.equal(part.images([0, 1]), data.images([4, 2]))
        assert part.labels is not None
        assert part.labels.tolist() == [1, 1]
        with pytest.raises(DataError, match="of 5 videos leaves the held-out side empty"):
            data.split(0.001)

    def test_captions_follow(self, root: Path, tmp_path: Path) -> None:
        for number in range(3):
            write_video(tmp_path / f"{number}.mp4", 6)
            (tmp_path / f"{number}.txt").write_text(f"number {number}")
        data = folder(tmp_path, labels="none")
        assert data.captions == ["number 0", "number 1", "number 2"]
        assert data.labels is None
        before = data.fingerprint()
        (tmp_path / "0.txt").write_text("another")
        assert folder(tmp_path, labels="none").fingerprint() != before


class TestShort:
    def test_error_names_them(self, root: Path) -> None:
        with pytest.raises(
            DataError, match=r"2 of 5 videos .* than 12 frames at 10 a second: fish/b"
        ):
            VideoFolder(root, 16, 12, frame_rate=10.0, backend="pyav", assumed_rate=10.0)

    def test_drop_loop_and_hold(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        options: dict[str, Any] = {"frame_rate": 10.0, "assumed_rate": 10.0, "backend": "pyav"}
        dropped = VideoFolder(root, 16, 12, short="drop", **options)
        assert len(dropped) == 3
        assert dropped.left_out == ("fish/b.mp4", "fish/c.gif")
        assert "left out 2 short videos: fish/b.mp4 (1.00 s); fish/c.gif (1.00 s)" in caplog.text
        looped = VideoFolder(root, 16, 12, short="loop", **options)
        assert frames_of(looped.images([4])) == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]]
        held = VideoFolder(root, 16, 12, short="hold", **options)
        assert frames_of(held.images([4])) == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]]
        assert "holding the last frame of 2 short videos" in caplog.text

    def test_without_a_look_at_lengths(self, root: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.short=drop leaves out videos by their length"
        ):
            folder(root, short="drop", verify="none")
        data = VideoFolder(root, 16, 40, verify="none", backend="pyav")
        with pytest.raises(DataError, match=r"c\.gif is too short for a clip: it lasts 1\.00 s"):
            data.images([4])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Six videos with captions, of which one cannot be decoded from its first frame on."""
    for number in range(6):
        write_video(tmp_path / "ab"[number % 2] / f"{number}.mp4", 30, codec="libx264")
        (tmp_path / "ab"[number % 2] / f"{number}.txt").write_text(f"number {number}")
    damage(tmp_path / "b" / "1.mp4", 0.02, 5000)
    return tmp_path


class TestDamage:
    def test_error_names_the_file_at_the_start_or_where_it_is_met(self, broken: Path) -> None:
        with pytest.raises(DataError, match=r"1 of 6 videos in .* cannot be read: b/1\.mp4 \("):
            folder(broken, verify="frames")
        data = folder(broken, verify="none")
        with pytest.raises(DataError, match=r"b/1\.mp4 cannot be read as a video"):
            data.images([3])

    def test_what_is_found_at_the_start_is_left_out(
        self, broken: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = folder(broken, verify="frames", damaged="skip")
        assert data.left_out == ("b/1.mp4",)
        assert len(data) == 5
        assert "left out 1 damaged videos: b/1.mp4" in caplog.text
        (broken / "b/1.mp4").write_bytes(b"")
        assert folder(broken, damaged="skip").left_out == ("b/1.mp4",)

    def test_what_is_found_later_is_replaced_with_label_and_caption(
        self, broken: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = folder(broken, verify="none", damaged="skip")
        with caplog.at_level(logging.WARNING):
            clips, _, taken = data.taken([3] * 32, KEYS[:32])
        assert 3 not in taken.tolist()
        assert set(taken.tolist()) == {0, 1, 2, 4, 5}
        assert data.damaged == ("b/1.mp4",)
        assert caplog.text.count("b/1.mp4 cannot be read as a video") == 1  # once a file
        for place in (0, 17):  # by its key alone
            again, _, row = folder(broken, verify="none", damaged="skip").taken([3], KEYS[[place]])
            assert torch.equal(again[0], clips[place])
            assert int(row) == int(taken[place])
        module = ClipDataModule(data, batch_size=12)
        module.with_captions = True
        batch = next(iter(module.train_dataloader()))
        assert int(batch["replaced"].sum()) == 2  # once an epoch of 6
        for label, caption in zip(batch["label"].tolist(), batch["caption"], strict=True):
            assert caption != "number 1"
            assert int(caption[-1]) % 2 == label

    def test_headers_do_not_show_what_decoding_does(self, broken: Path) -> None:
        late = damage(write_video(broken / "late.mp4", 40, codec="libx264"), length=300)
        with PyAVReader(broken / "a" / "0.mp4") as good, PyAVReader(late) as bad:
            decode_all(good)
            with pytest.raises(Unreadable, match=r"late\.mp4"):
                decode_all(bad)
        paths = ["a/0.mp4", "late.mp4"]
        for whole, left in ((False, paths), (True, paths[:1])):
            infos = check_videos(
                broken,
                paths,
                lambda path: PyAVReader(broken / path),
                times=ClipTimes(4),
                whole=whole,
                skips=True,
            )
            assert list(infos) == left

    def test_a_resumed_run_sees_the_clips_it_would_have_seen(self, broken: Path) -> None:
        def module(seen: int) -> ClipDataModule:
            data = folder(broken, verify="none", damaged="skip", crop="random")
            made = ClipDataModule(data, batch_size=4, flip=True)
            made.load_state_dict({"samples_seen": seen, "fingerprint": data.fingerprint()})
            return made

        whole, rest = iter(module(0).train_dataloader()), iter(module(8).train_dataloader())
        batches = [next(whole) for _ in range(4)]
        for expected in batches[2:]:
            resumed = next(rest)
            assert all(torch.equal(resumed[name], expected[name]) for name in expected)
        assert sum(int(batch["replaced"].sum()) for batch in batches) >= 2

    def test_in_an_evaluation_the_next_of_its_class_takes_its_place(self, broken: Path) -> None:
        data = folder(broken, verify="none", damaged="skip")
        assert data.path(4) == "b/3.mp4"
        assert torch.equal(data.images([3]), data.images([4]))

    def test_processes_share_what_they_found(self, broken: Path) -> None:
        data = folder(broken, verify="none", damaged="skip")
        loader = iter(ClipDataModule(data, batch_size=6, num_workers=1).train_dataloader())
        assert int(next(loader)["replaced"].sum()) == 1
        assert data.damaged == ("b/1.mp4",)

    def test_nothing_but_damage_ends(self, tmp_path: Path) -> None:
        for number in range(2):
            damage(write_video(tmp_path / f"{number}.mp4", 30, codec="libx264"), 0.02, 5000)
        options: dict[str, Any] = {"labels": "none", "verify": "none", "damaged": "skip"}
        with pytest.raises(DataError, match="2 videos drawn in a row cannot be read"):
            folder(tmp_path, **options)  # whose own frame rate would it be?
        data = folder(tmp_path, frame_rate=10.0, **options)
        with pytest.raises(DataError, match="16 videos drawn in a row cannot be read"):
            data.clips([0], KEYS[:1])
        with pytest.raises(DataError, match="None of the 2 videos"):
            folder(tmp_path, labels="none", verify="frames", damaged="skip")

    def test_the_run_counts_them(self, broken: Path) -> None:
        class Trainer:
            world_size = 2

        from genscale.training.step_module import StepModule

        module = StepModule.__new__(StepModule)
        torch.nn.Module.__init__(module)
        module.counts = {}
        counter = ReplacedSamples()
        counter.load_state_dict({"replaced": 5})
        for replaced in ([True, False], [True, True]):
            batch = {"replaced": torch.tensor(replaced)}
            counter.on_train_batch_end(Trainer(), module, None, batch, 0)  # type: ignore[arg-type]
        counter.on_train_batch_end(Trainer(), module, None, {}, 0)  # type: ignore[arg-type]
        # the log takes the mean of 5 + 2 * own over two processes: 5 + the sum of both
        assert int(module.counts["replaced_samples"]) == 5 + 2 * 3
        assert counter.state_dict() == {"replaced": 8}


class TestLayout:
    def test_classes_and_sides_are_told_in_the_words_of_videos(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(DataError, match="holds 1 videos outside class folders"):
            class_folders(["x.mp4", "a/y.mp4"], tmp_path, "videos")
        paths = Paths([f"{i}.mp4" for i in range(40)])
        heldout = held_out(paths, 0.3, "videos")
        assert 3 < int(heldout.sum()) < 25
        # by path alone: what else there is moves nothing
        assert torch.equal(held_out(Paths(list(paths)[:20]), 0.3), heldout[:20])


class TestSettings:
    def test_unknown_words(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.crop='centre' is unknown.*mean 'center'"):
            folder(root, crop="centre")
        with pytest.raises(ConfigError, match=r"data\.assumed_rate=0"):
            folder(root, assumed_rate=0)
        with pytest.raises(ConfigError, match=r"data\.resolution=4 "):
            VideoFolder(root, 4, 4)

    def test_the_module_of_the_yaml(self, root: Path, tmp_path: Path) -> None:
        from omegaconf import OmegaConf

        conf = Path(__file__).parents[2] / "conf/data/video_folder.yaml"
        keys: Any = OmegaConf.to_container(OmegaConf.load(conf))
        del keys["_target_"]
        keys |= {"batch_size": 2, "seed": 0, "num_workers": 0, "resolution": 16, "num_frames": 4}
        with pytest.raises(ConfigError, match=r"data\.root is not set"):
            video_folder_module(**keys)
        keys["root"] = str(root)
        module = video_folder_module(**keys)
        assert (module.num_frames, module.num_classes, module.frame_rate) == (4, 2, 10.0)
        held = video_folder_module(**keys | {"heldout_fraction": 0.4})
        assert held.heldout is not None
        assert len(held.train) + len(held.heldout) == 5
        with pytest.raises(ConfigError, match="both say what is held out"):
            video_folder_module(**keys | {"heldout_fraction": 0.4, "heldout_root": str(root)})
        with pytest.raises(ConfigError, match=r"data\.num_classes=3"):
            video_folder_module(**keys | {"num_classes": 3})
        for number in range(3):
            Image.fromarray(grey(number)).save(tmp_path / f"{number}.png")
        mixed = video_folder_module(**keys | {"image_root": str(tmp_path), "image_ratio": 1.0})
        batch = next(iter(mixed.train_dataloader()))
        assert torch.isinf(batch["frame_rate"]).all()
