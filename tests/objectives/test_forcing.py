"""Levels a frame, and the objectives of block-causal video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dit import DiT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.video_cache import commit_frames
from genscale.objectives.base import Batch, Level, on
from genscale.objectives.block_schedules import ShiftedTable, fused_snr_weights, ramp
from genscale.objectives.cached_view import CachedView, block_size_of, shared_by_frames
from genscale.objectives.conversion import target_of
from genscale.objectives.diffusion_forcing import DiffusionForcing, frame_error
from genscale.objectives.paths import TrigonometricVP
from genscale.objectives.schedule import LinearFlow
from genscale.objectives.teacher_forcing import TeacherForcing, context_mean
from genscale.rng import Purpose

SHAPE = (2, 6, 4, 4)


class Network(torch.nn.Module):
    """Stands in for a block-causal network; keeps what it was given."""

    independent_first_frame = False

    def __init__(self, block_size: int = 2) -> None:
        super().__init__()
        self.block_size = block_size
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.sample_shape = SHAPE

    def begin(self, batch: int, device: Any, dtype: Any, *, shape: Any = None) -> Any:
        return {"calls": torch.zeros(batch)}

    def forward(
        self, x: Tensor, t: Tensor, cond: Any, memory: Any = None, clean: Any = None,
        clean_t: Any = None,
    ) -> BackboneOutput:  # fmt: skip
        self.given = {"x": x, "t": t, "memory": memory, "clean": clean, "clean_t": clean_t}
        memory = None if memory is None else {"calls": memory["calls"] + 1}
        return BackboneOutput(self.weight * x, memory)


def batch(count: int = 64, first: int = 0) -> Batch:
    position = torch.arange(first, first + count)
    clean = rng.normal(rng.key(7, position), SHAPE)
    return Batch(clean, Conditioning(), position)


def step(b: Batch) -> rng.StepRandom:
    return rng.for_step(3, b.position)


def video(**settings: Any) -> CausalVideo:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "input_size": [6, 4, 4], "in_channels": 2, "patch_size": 2, "hidden_size": 24, "depth": 2,
        "num_heads": 2, "mlp_size": 32, "frequency_size": 16, "block_size": 2, "num_classes": 3,
    }  # fmt: skip
    network = CausalVideo(**{**given, **settings})
    with torch.no_grad():  # a fresh head says nothing
        network.head.linear.weight.normal_(std=0.2)
    return network.eval()


class TestLevels:
    level = LinearFlow().level(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))

    def test_a_level_has_a_number_a_frame(self) -> None:
        assert self.level.by_frame
        assert len(self.level) == 2
        assert self.level.alpha.shape == (2, 3)
        assert not LinearFlow().level(0.5).by_frame
        torch.testing.assert_close(
            self.level.log_snr, torch.log(self.level.alpha / self.level.sigma)
        )

    def test_rows_are_selected_and_expanded(self) -> None:
        assert torch.equal(self.level.select(torch.tensor([1])).sigma, self.level.sigma[1:])
        shared = LinearFlow().level(torch.tensor([[0.1, 0.2]]))
        assert shared.select(torch.tensor([0, 0])) is shared
        wide = shared.expand(3)
        assert wide.time is not None
        assert wide.time.shape == wide.sigma.shape == (3, 2)

    def test_numbers_of_frames_broadcast_against_clips(self) -> None:
        clip = torch.zeros(2, 5, 3, 4, 4)
        sigma = on(self.level.sigma, clip)
        assert sigma.shape == (2, 1, 3, 1, 1)
        assert torch.equal((clip + sigma)[1, 0, :, 0, 0], self.level.sigma[1].float())
        assert on(torch.ones(2), clip).shape == (2, 1, 1, 1, 1)

    def test_frames_that_share_a_level_are_told_once(self) -> None:
        same = LinearFlow().level(torch.tensor([[0.3, 0.3]]))
        found = shared_by_frames(same, 5)
        assert found.sigma.tolist() == pytest.approx([0.3])
        assert shared_by_frames(LinearFlow().level(0.3), 5).sigma.shape == (1,)
        other = shared_by_frames(LinearFlow().level(torch.tensor([[0.3, 0.4]])), 5)
        assert other.sigma.shape == (5, 2)


class TestCachedView:
    def test_a_level_of_another_process_is_matched_frame_by_frame(self) -> None:
        network = Network()
        view = CachedView(network, LinearFlow(), "velocity", "index")  # type: ignore[arg-type]
        vp = TrigonometricVP().level(torch.tensor([[0.2, 0.2, 0.6, 0.6]]))
        x = torch.randn(3, 2, 4, 4, 4)
        bare = Level(vp.alpha, vp.sigma)
        prediction = view(x, bare, Conditioning())
        scale = vp.alpha + vp.sigma  # of the flow at equal signal-to-noise ratio
        torch.testing.assert_close(network.given["x"], x / on(scale, x))
        expected = (1000 * vp.sigma / scale).float().expand(3, -1)
        torch.testing.assert_close(network.given["t"], expected)
        back = on(vp.alpha, x) * prediction.clean + on(vp.sigma, x) * prediction.noise
        torch.testing.assert_close(back, x)

    def test_a_video_begins_with_an_empty_memory(self) -> None:
        network = Network()
        view = DiffusionForcing().view(network)  # type: ignore[arg-type]
        assert view.block_size == 2
        assert view.sample_shape == SHAPE
        x = torch.randn(3, *SHAPE)
        first = view(x, LinearFlow().level(0.5), Conditioning())
        assert first.memory["calls"].tolist() == [1] * 3
        again = view.refresh(x, LinearFlow().level(0.5), Conditioning(), first.memory)
        assert again.memory["calls"].tolist() == [2] * 3
        assert first.cost.tolist() == [1.0] * 3

    def test_other_networks_are_refused(self) -> None:
        dit = DiT(input_size=4, in_channels=2, patch_size=2, hidden_size=8, depth=1, num_heads=2)
        with pytest.raises(ConfigError, match="DiT does not make videos block by block"):
            DiffusionForcing().view(dit)
        assert block_size_of(video()) == 2

    def test_block_by_block_it_says_what_teacher_forcing_says(self) -> None:
        """The promise on which everything rests, through the views and the real network."""
        network, flow = video(), LinearFlow()
        view = TeacherForcing().view(network)
        clean, noise = torch.randn(2, 2, *SHAPE)
        cond = Conditioning(labels=torch.tensor([0, 2]))
        time = torch.tensor([[0.9, 0.9, 0.4, 0.4, 0.6, 0.6]], dtype=torch.float64)
        level = flow.level(time)
        x = on(level.alpha, clean) * clean + on(level.sigma, clean) * noise
        with torch.no_grad():
            whole = network(x, (1000 * time).float(), cond, clean=clean).sample
            memory, parts = None, []
            for start in (0, 2, 4):
                rows = slice(start, start + 2)
                part = flow.level(time[:, rows])
                for _ in range(2):  # writes over itself
                    found = view(x[:, :, rows], part, cond, memory)
                    memory = found.memory
                parts.append(found.noise - found.clean)
                memory = view.refresh(clean[:, :, rows], flow.level(0.0), cond, memory).memory
                memory = commit_frames(memory, 2)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-4, atol=1e-5)


class TestDiffusionForcing:
    @pytest.mark.parametrize("target", ["velocity", "v"])
    def test_the_loss_is_the_error_of_the_prediction(self, target: Any) -> None:
        objective, network, b = DiffusionForcing(target=target), Network(), batch()
        out = objective.loss(network, b, step(b))  # type: ignore[arg-type]
        time = objective.times(step(b), [2, 2, 2])
        alpha, sigma = (on(part, b.clean) for part in objective.process.coefficients(time))
        noise = step(b).normal(Purpose.NOISE, SHAPE)
        x = alpha * b.clean + sigma * noise
        torch.testing.assert_close(network.given["x"], x)
        torch.testing.assert_close(network.given["t"], (1000 * time).float())
        wanted = target_of(target, b.clean, noise, alpha, sigma)
        error = frame_error(0.5 * x, wanted)
        assert error.shape == (64, 6)
        torch.testing.assert_close(out.per_sample, error.mean(1))
        torch.testing.assert_close(out.loss, error.mean())
        assert out.t.shape == (64,)

    def test_times_are_equal_inside_a_block_or_differ_by_frame(self) -> None:
        b = batch(4000)
        blockwise = DiffusionForcing().times(step(b), [1, 2, 3])
        assert torch.equal(blockwise[:, 1], blockwise[:, 2])
        assert torch.equal(blockwise[:, 3], blockwise[:, 5])
        framewise = DiffusionForcing(levels="frame").times(step(b), [1, 2, 3])
        for times in (blockwise[:, [0, 1, 3]], framewise):
            assert torch.corrcoef(times.T).triu(1).abs().max() < 0.06  # independent
            assert (times.mean(0) - 0.5).abs().max() < 0.02  # and uniform

    def test_the_shift_moves_times_towards_noise(self) -> None:
        b = batch(500)
        plain, moved = (DiffusionForcing(time_shift=s).times(step(b), [2] * 3) for s in (1.0, 5.0))
        torch.testing.assert_close(moved, 5 * plain / (1 + 4 * plain))
        law = DiffusionForcing(time_law="logit_normal").times(step(b), [2] * 3)
        assert float(law.var()) < float(plain.var())

    def test_sampling_does_not_depend_on_the_batch(self) -> None:
        whole, part = batch(8), batch(3, first=4)
        objective, network = DiffusionForcing(), Network()
        out = objective.loss(network, whole, step(whole))  # type: ignore[arg-type]
        some = objective.loss(network, part, step(part))  # type: ignore[arg-type]
        torch.testing.assert_close(out.per_sample[4:7], some.per_sample)

    def test_later_blocks_are_at_least_as_noisy_as_the_floor(self) -> None:
        b = batch(2000)
        sizes = [2, 2, 2]
        times = DiffusionForcing(noise_floor=[0.1, 0.7]).times(step(b), sizes)
        floors = ramp(3, 0.1, 0.7)
        assert times.amin(0).tolist() == pytest.approx([f for f in floors for _ in (0, 1)])
        plain = DiffusionForcing().times(step(b), sizes)
        above = plain[:, 4] > floors[2]
        assert torch.equal(times[above, 4], plain[above, 4])
        framewise = DiffusionForcing(noise_floor=[0.1, 0.7], levels="frame").times(step(b), sizes)
        assert float(framewise[:, 5].min()) == pytest.approx(floors[2])

    def test_the_partition_is_that_of_the_network(self) -> None:
        network = Network()
        network.independent_first_frame = True
        objective = DiffusionForcing()
        assert objective.sizes(network, 5) == [1, 2, 2]  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Frames must be 1 \\+ a multiple of 2"):
            objective.sizes(network, 6)  # type: ignore[arg-type]

    def test_the_bell_weighs_levels_as_its_table_does(self) -> None:
        objective, b = DiffusionForcing(weighting="bell", time_shift=5.0), batch(16)
        time = objective.times(step(b), [2] * 3)
        alpha, sigma = objective.process.coefficients(time)
        weight = objective.weights(time, alpha, sigma)
        assert weight is not None
        table = ShiftedTable(5.0).weight_at(1000 * time)
        torch.testing.assert_close(weight, table.float())

    def test_v_is_weighed_by_the_fused_signal_to_noise_ratio(self) -> None:
        objective = DiffusionForcing(target="v", levels="frame", weighting="fused_snr")
        b, network = batch(16), Network()
        out = objective.loss(network, b, step(b))  # type: ignore[arg-type]
        time = objective.times(step(b), [2] * 3)
        alpha, sigma = TrigonometricVP().coefficients(time)
        weight = fused_snr_weights((alpha / sigma) ** 2).float()
        noise = step(b).normal(Purpose.NOISE, SHAPE)
        wanted = target_of("v", b.clean, noise, on(alpha, noise), on(sigma, noise))
        error = frame_error(0.5 * network.given["x"], wanted)
        torch.testing.assert_close(out.per_sample, (weight * error).mean(1))

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"target": "velocty"}, "Did you mean 'velocity'"),
            ({"levels": "blok"}, "Did you mean 'block'"),
            ({"weighting": "bell", "target": "v"}, "made for objective.target=velocity"),
            ({"weighting": "fused_snr"}, "made for objective.target=v"),
            ({"noise_floor": [0.5, 0.2]}, "objective.noise_floor must be"),
            ({"time_shift": 0.0}, "objective.time_shift must be positive"),
            ({"noise_ramp": "sine"}, "A ramp must be one of"),
        ],
    )
    def test_what_makes_no_sense_is_told(self, settings: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            DiffusionForcing(**settings)


class TestTeacherForcing:
    def test_the_clean_half_is_the_batch(self) -> None:
        network, b = Network(), batch(8)
        out = TeacherForcing().loss(network, b, step(b))  # type: ignore[arg-type]
        plain = DiffusionForcing().loss(network, b, step(b))  # type: ignore[arg-type]
        torch.testing.assert_close(out.loss, plain.loss)  # of a network that looks at one half
        TeacherForcing().loss(network, b, step(b))  # type: ignore[arg-type]
        assert torch.equal(network.given["clean"], b.clean)
        assert bool((network.given["clean_t"] == 0).all())

    def test_it_may_be_noised_a_little(self) -> None:
        network, b = Network(), batch(256)
        objective = TeacherForcing(augmentation=0.2)
        objective.loss(network, b, step(b))  # type: ignore[arg-type]
        t = network.given["clean_t"] / 1000
        assert torch.equal(t[:, 0], t[:, 1])
        assert float(t.max()) == pytest.approx(0.2, abs=0.01)
        torch.testing.assert_close(
            t.double(), objective.history_times(step(b), [2] * 3).float().double()
        )
        off = network.given["clean"] - (1 - t)[:, None, :, None, None] * b.clean
        noise = off / t[:, None, :, None, None]
        assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
        own = step(b).normal(Purpose.NOISE, SHAPE)
        assert abs(float((noise * own).mean())) < 0.02  # not the noise of the noisy half

    def test_it_trains_the_network(self) -> None:
        network, b = video(num_classes=0), batch(4)
        out = TeacherForcing(time_shift=3.0).loss(network, b, step(b))
        torch.autograd.backward(out.loss)
        assert all(p.grad is not None for p in network.blocks.parameters())

    @pytest.mark.parametrize("kind", ["context_mix", "literal"])
    def test_velocity_forcing_adds_an_error(self, kind: Any) -> None:
        network, b = Network(), batch(8)
        objective = TeacherForcing(velocity_forcing=kind, velocity_forcing_scale=0.8)
        out = objective.loss(network, b, step(b))  # type: ignore[arg-type]
        plain = TeacherForcing().loss(network, b, step(b))  # type: ignore[arg-type]
        context = context_mean(b.clean, [2, 2, 2])
        if kind == "context_mix":
            context = 0.95 * b.clean + 0.05 * context
        noise = step(b).normal(Purpose.NOISE, SHAPE)
        error = frame_error(0.5 * network.given["x"], noise - 0.8 * context).mean(1)
        torch.testing.assert_close(out.per_sample, plain.per_sample + error)
        torch.testing.assert_close(out.loss, plain.loss + error.mean())
        torch.testing.assert_close(out.terms["loss_velocity_forcing"], error.mean())
        torch.testing.assert_close(out.terms["loss_denoising"], plain.loss)

    def test_full_mix_of_the_frame_itself_is_plain_flow_matching(self) -> None:
        network, b = Network(), batch(8)
        objective = TeacherForcing(velocity_forcing="context_mix", velocity_forcing_mix=0.0)
        out = objective.loss(network, b, step(b))  # type: ignore[arg-type]
        torch.testing.assert_close(out.terms["loss_velocity_forcing"], out.terms["loss_denoising"])

    def test_the_context_is_the_mean_of_the_blocks_before(self) -> None:
        frames = torch.arange(5.0).view(1, 1, 5, 1, 1)
        found = context_mean(frames, [1, 2, 2]).flatten().tolist()
        # block 1 sees frame 0 twice; block 2 the mean of (0, 0) and (1, 2)
        assert found == [0.0, 0.0, 0.0, 0.5, 1.0]

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            # told by check_name
            ({"velocity_forcing": "litteral"}, "Did you mean 'literal'"),
            ({"velocity_forcing": "literal", "target": "v"}, "compares velocities"),
            ({"augmentation": 2.0}, "objective.augmentation must lie in"),
        ],
    )
    def test_what_makes_no_sense_is_told(self, settings: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            TeacherForcing(**settings)

    def test_off_of_yaml_is_off(self) -> None:
        assert TeacherForcing(velocity_forcing=False).velocity_forcing == "off"  # type: ignore[arg-type]
