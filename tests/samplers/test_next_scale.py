"""Next-scale decoding keeps the promises of every sampler, and those of its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.base import ScaleBackbone
from genscale.backbones.mvar import MVAR
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.scale_wise import GuidedScales, ScaleGuidance
from genscale.layers.scales import scale_spans
from genscale.objectives.base import Batch, ScaleDecoder, ScalePrediction
from genscale.objectives.next_scale import NextScale as Objective
from genscale.objectives.next_scale import scale_terms
from genscale.objectives.scale_view import check_alike
from genscale.rng import for_step
from genscale.samplers.base import State
from genscale.samplers.next_scale import NextScale, keep_tokens
from genscale.samplers.token_filters import draw_tokens, filter_logits, smooth_weights

SCALES = [1, 2, 3, 4]
LENGTH = 1 + 4 + 9 + 16
VOCAB = 24
COUNT = 4
BACKBONES: dict[str, type[ScaleBackbone]] = {"var": VAR, "mvar": MVAR}
SAMPLERS = {
    "plain": NextScale(4),
    "filtered": NextScale(4, top_k=9, top_p=0.8, temperature=[1.0, 1.0, 0.5, 0.0]),
    "smooth": NextScale(4, top_k=12, smooth=True, smooth_from=1),
}
GUIDANCES: dict[str, Guidance] = {
    "unguided": Unguided(),
    "ramp": ScaleGuidance(4.0),
    "cut off": ScaleGuidance(4.0, form="constant", stop=2),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> MSVQ:
    torch.manual_seed(3)
    model = MSVQ(
        scales=SCALES, vocab_size=VOCAB, latent_channels=6, image_channels=1, hidden_size=8,
        channel_multipliers=(1, 2), num_blocks=1, norm_groups=4,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def backbone(name: str) -> ScaleBackbone:
    torch.manual_seed(4)
    model = BACKBONES[name](
        scales=SCALES, latent_channels=6, vocab_size=VOCAB, num_classes=5, hidden_size=32, depth=2,
        num_heads=4,
    )  # fmt: skip
    with torch.no_grad():  # a fresh network says the same of everything
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


class Counted:
    """A view that notes the rows of every call of the network."""

    def __init__(self, network: ScaleBackbone) -> None:
        self.rows: list[int] = []
        forward = network.forward

        def counted(features: Tensor, *arguments: Any) -> Any:
            self.rows.append(len(features))
            return forward(features, *arguments)

        network.forward = counted  # type: ignore[method-assign]


@pytest.fixture(params=BACKBONES)
def network(request: pytest.FixtureRequest) -> ScaleBackbone:
    return backbone(request.param)


@pytest.fixture(params=GUIDANCES.values(), ids=GUIDANCES)
def guidance(request: pytest.FixtureRequest) -> Guidance:
    return request.param


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> NextScale:
    return request.param


@pytest.fixture
def model(network: ScaleBackbone, tokenizer: MSVQ, guidance: Guidance) -> Any:
    return guidance.wrap(Objective().view(network, tokenizer))


def start(sampler: NextScale, model: Any, rows: list[int] | None = None) -> State:
    rows = list(range(COUNT)) if rows is None else rows
    return sampler.start(model, Conditioning(labels=torch.tensor(rows)), torch.tensor(rows) + 50)


def finish(sampler: NextScale, model: Any, state: State) -> State:
    while int(state.step.min()) < sampler.num_steps:
        state = sampler.advance(model, state)
    return state


def same(one: State, other: State, rows: list[int] | None = None) -> bool:
    rows = list(range(len(other))) if rows is None else rows
    tokens = torch.equal(one.history["tokens"], other.history["tokens"][rows])
    return tokens and torch.allclose(one.x, other.x[rows], atol=1e-5)


class TestConformance:
    def test_a_snapshot_continues_bit_for_bit(self, sampler: NextScale, model: Any) -> None:
        state = start(sampler, model)
        expected = finish(sampler, model, start(sampler, model))
        for taken in range(sampler.num_steps):
            saved = sampler.evaluate(model, state) if taken % 2 else state
            file = io.BytesIO()
            torch.save(saved, file)
            restored = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
            assert torch.equal(finish(sampler, model, restored).x, expected.x)
            state = sampler.advance(model, state)
        assert torch.equal(state.x, expected.x)

    def test_branches_that_were_never_copied_do_not_disturb_each_other(
        self, sampler: NextScale, model: Any
    ) -> None:
        expected = finish(sampler, model, start(sampler, model))
        trunk = sampler.advance(model, start(sampler, model))
        other = sampler.advance(model, trunk, noise=torch.zeros(COUNT, 16))
        own = sampler.advance(model, trunk)
        while int(own.step.min()) < sampler.num_steps:  # in turns: each finds the other's writes
            other = sampler.advance(model, other, noise=torch.zeros(COUNT, 16))
            own = sampler.advance(model, own)
        assert torch.equal(own.x, expected.x)
        # and a state left behind is still what it was
        assert torch.equal(finish(sampler, model, trunk).x, expected.x)

    @pytest.mark.parametrize("evaluated", [False, True])
    def test_selected_particles_continue(
        self, sampler: NextScale, model: Any, evaluated: bool
    ) -> None:
        whole = finish(sampler, model, start(sampler, model))
        state = sampler.advance(model, start(sampler, model))
        if evaluated:
            state = sampler.evaluate(model, state)
        rows = [2, 0, 2]
        assert same(finish(sampler, model, state.select(torch.tensor(rows))), whole, rows)

    def test_a_sample_does_not_depend_on_its_batch(self, sampler: NextScale, model: Any) -> None:
        whole = finish(sampler, model, start(sampler, model))
        for rows in ([3], [1, 0]):
            assert same(finish(sampler, model, start(sampler, model, rows)), whole, rows)

    def test_evaluating_twice_is_evaluating_once(self, sampler: NextScale, model: Any) -> None:
        state = sampler.advance(model, start(sampler, model))
        once = sampler.evaluate(model, state)
        assert sampler.evaluate(model, once) is once
        assert state.clean is None
        assert torch.equal(finish(sampler, model, once).x, finish(sampler, model, state).x)

    def test_the_clean_estimate_is_where_advance_arrives(
        self, sampler: NextScale, model: Any
    ) -> None:
        state = sampler.evaluate(model, start(sampler, model))
        assert state.clean is not None
        after = sampler.advance(model, state)
        assert torch.equal(after.x, state.clean)
        assert after.clean is None
        assert after.pending is None
        assert set(after.history) == {"tokens"}

    def test_other_noise_draws_again_without_another_call(
        self, sampler: NextScale, model: Any, network: ScaleBackbone
    ) -> None:
        state = sampler.evaluate(model, start(sampler, model))
        counted = Counted(network)
        drawn = sampler.advance(model, state, noise=torch.full((COUNT, 1), -8.0))
        assert counted.rows == []
        logits = filter_logits(state.history["logits"][:, :1], sampler.top_k, sampler.top_p)
        least = (logits > -torch.inf).int().argmax(dim=-1)
        assert torch.equal(drawn.history["tokens"][:, :1], least)

    def test_particles_at_different_scales_go_together(
        self, sampler: NextScale, model: Any
    ) -> None:
        whole = start(sampler, model)
        separate = finish(sampler, model, start(sampler, model))
        parts = []
        for row in range(COUNT):
            part = whole.select(torch.tensor([row]))
            for _ in range(row + 1):  # the last one has finished
                part = sampler.advance(model, part)
            parts.append(part)
        mixed = State.cat(parts)
        assert mixed.shared_step is None
        assert same(finish(sampler, model, sampler.evaluate(model, mixed)), separate)
        assert same(finish(sampler, model, mixed), separate)

    def test_finished_particles_cost_nothing_and_stay(self, sampler: NextScale, model: Any) -> None:
        done = finish(sampler, model, start(sampler, model))
        assert sampler.advance(model, done) is done
        assert sampler.evaluate(model, done).clean is done.x
        assert torch.equal(sampler.finish(done), done.x)
        with pytest.raises(ValueError, match="A particle has 4 of 4 scales left"):
            sampler.finish(start(sampler, model))

    def test_noise_of_all_tokens_can_be_given_at_the_start(
        self, sampler: NextScale, model: Any
    ) -> None:
        cond, seeds = Conditioning(labels=torch.arange(2)), torch.tensor([1, 2])
        noise = torch.randn(2, *sampler.noise_shape(model))
        assert noise.shape == (2, LENGTH)
        one = sampler.run(model, cond, seeds, noise)
        if not sampler.smooth:  # whose Gumbel noise is keyed
            other = sampler.run(model, cond, seeds + 1, noise)
            assert torch.equal(one.history["tokens"], other.history["tokens"])
        state = sampler.start(model, cond, seeds)
        for begin, end in scale_spans(model.scales):
            state = sampler.advance(model, state, noise=noise[:, begin:end])
        assert same(state, one)
        with pytest.raises(ValueError, match="2 seeds were given with 2 conditions and 3 noises"):
            sampler.start(model, cond, seeds, torch.zeros(3, LENGTH))

    def test_copies_part_by_their_lineage(self, model: Any) -> None:
        sampler = SAMPLERS["plain"]
        state = sampler.advance(model, start(sampler, model)).select(torch.tensor([0, 0]))
        twins = finish(sampler, model, state)
        assert torch.equal(twins.x[0], twins.x[1])
        parted = finish(sampler, model, state.replace(lineage=torch.tensor([0, 1])))
        assert not torch.equal(parted.x[0], parted.x[1])


class TestTeacherForcing:
    def test_logits_step_by_step_are_those_of_all_scales_at_once(
        self, network: ScaleBackbone, tokenizer: MSVQ
    ) -> None:
        view, sampler = Objective().view(network, tokenizer), NextScale(4)
        tokens = torch.randint(VOCAB, (COUNT, LENGTH))
        cond = Conditioning(labels=torch.arange(COUNT))
        whole = network(tokenizer.features(tokens), cond).logits
        state = sampler.start(view, cond, torch.arange(COUNT))
        for begin, end in scale_spans(view.scales):
            state = sampler.evaluate(view, state)
            found = state.history["logits"][:, : end - begin]
            torch.testing.assert_close(found, whole[:, begin:end], atol=1e-5, rtol=0)
            state = sampler.commit(view, state, tokens[:, begin:end])
        torch.testing.assert_close(state.x, tokenizer.latent(tokens))
        assert torch.equal(state.history["tokens"], tokens)

    def test_a_prefix_of_scales_is_the_prefix_of_all(
        self, network: ScaleBackbone, tokenizer: MSVQ
    ) -> None:
        features = tokenizer.features(torch.randint(VOCAB, (2, LENGTH)))
        cond = Conditioning(labels=torch.arange(2))
        whole = network(features, cond).logits
        part = network(features[:, :5], cond).logits
        torch.testing.assert_close(part, whole[:, :5], atol=1e-5, rtol=0)


class TestGuidance:
    def test_logits_are_extrapolated_by_scale(
        self, network: ScaleBackbone, tokenizer: MSVQ
    ) -> None:
        plain, sampler = Objective().view(network, tokenizer), NextScale(4, temperature=0.0)
        model = ScaleGuidance(4.0).wrap(plain)
        assert isinstance(model, GuidedScales)
        assert isinstance(model, ScaleDecoder)
        cond = Conditioning(labels=torch.arange(COUNT))
        assert isinstance(model(torch.zeros(COUNT, 1, 6), 0, cond), ScalePrediction)
        state = start(sampler, model)
        wanted, unwanted = start(sampler, plain), start(sampler, plain)
        unwanted = sampler.start(plain, wanted.cond.null(), wanted.seeds)
        for weight in (1.0, 2.0, 3.0, 4.0):
            state = sampler.evaluate(model, state)
            tokens = state.history["drawn"]
            logits = []
            for name in (wanted, unwanted):
                logits.append(sampler.evaluate(plain, name).history["logits"])
            expected = logits[1] + weight * (logits[0] - logits[1])
            torch.testing.assert_close(state.history["logits"], expected, atol=1e-4, rtol=1e-4)
            count = scale_spans(model.scales)[int(state.step[0])]
            forced = tokens[:, : count[1] - count[0]]
            wanted = sampler.commit(plain, wanted, forced)
            unwanted = sampler.commit(plain, unwanted, forced)
            state = sampler.advance(model, state)

    def test_the_null_half_is_not_computed_after_the_cut(
        self, network: ScaleBackbone, tokenizer: MSVQ
    ) -> None:
        guidance = ScaleGuidance(4.0, stop=2)
        counted = Counted(network)
        model = guidance.wrap(Objective().view(network, tokenizer))
        state = finish(NextScale(4), model, start(NextScale(4), model))
        assert counted.rows == [2 * COUNT, 2 * COUNT, COUNT, COUNT]
        assert [guidance.branches(k) for k in range(4)] == [2, 2, 1, 1]
        assert state.nfe.tolist() == [6.0] * COUNT

    def test_no_guidance_costs_nothing(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        view = Objective().view(network, tokenizer)
        assert ScaleGuidance(1.0).wrap(view) is view
        assert ScaleGuidance(3.0, stop=0).wrap(view) is view
        assert ScaleGuidance(per_scale=[1, 1, 1, 1]).wrap(view) is view

    def test_weights(self) -> None:
        assert [ScaleGuidance(3.0).weight(k, 5) for k in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
        late = ScaleGuidance(3.0, form="constant", start=1, stop=3)
        assert [late.weight(k, 4) for k in range(4)] == [1.0, 3.0, 3.0, 1.0]
        assert ScaleGuidance(per_scale=[1, 2, 5]).weight(2, 3) == 5.0
        assert ScaleGuidance(2.0, stop=2).label == "ScaleGuidance ramp up to scale 2"

    def test_what_makes_no_sense_is_told(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        view = Objective().view(network, tokenizer)
        with pytest.raises(ConfigError, match="has 2 weights, but the model has 4 scales"):
            ScaleGuidance(per_scale=[1, 2]).wrap(view)
        with pytest.raises(ConfigError, match=r"start=3 and guidance\.stop=1 must be"):
            ScaleGuidance(start=3, stop=1)
        with pytest.raises(ConfigError, match="form must be one of ramp, constant"):
            ScaleGuidance(form="rampe")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="finite and not negative, but is -1"):
            ScaleGuidance(-1.0)
        with pytest.raises(ConfigError, match="needs a class or text condition"):
            NextScale(4).start(ScaleGuidance(2.0).wrap(view), Conditioning(), torch.arange(2))


class TestEditing:
    def test_kept_tokens_stay(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        view, sampler = Objective().view(network, tokenizer), NextScale(4)
        tokens = torch.randint(VOCAB, (COUNT, LENGTH))
        mask = torch.zeros(COUNT, 8, 8)
        mask[:, :, :4] = 1
        keep = keep_tokens(mask, view.scales)
        assert keep[:, 0].all()  # coarse scales are kept whole
        assert keep[0, -16:].view(4, 4)[:, :2].all()
        assert not keep[0, -16:].view(4, 4)[:, 2:].any()
        state = sampler.edit(start(sampler, view), tokens, keep)
        state = finish(sampler, view, state)
        assert torch.equal(state.history["tokens"][keep], tokens[keep])
        assert not torch.equal(state.history["tokens"], tokens)


class TestDraws:
    def test_filters_keep_the_likeliest(self) -> None:
        logits = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]))

        def kept(**options: Any) -> list[int]:
            return (filter_logits(logits, **options) > -torch.inf).nonzero()[:, 0].tolist()

        assert kept() == [0, 1, 2, 3, 4]
        assert kept(top_k=3) == [0, 2, 3]
        assert kept(top_p=0.69) == [0, 2]
        assert kept(top_p=0.71) == [0, 2, 3]
        assert kept(top_p=0.01) == [0]  # never none
        assert kept(top_k=3, top_p=0.8) == [0, 2]  # of 0.85 that three have
        assert (filter_logits(torch.zeros(4), top_k=2) == 0).all()  # equals of the last are kept

    def test_draws_have_the_law_of_the_logits(self) -> None:
        logits = torch.randn(1, 1, 7)
        noise = torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000)
        drawn = draw_tokens(logits.expand(1, 20_000, 7), noise[None])
        share = torch.bincount(drawn[0], minlength=7) / 20_000
        torch.testing.assert_close(share, logits.softmax(-1)[0, 0], atol=1e-4, rtol=0)

    def test_what_has_no_probability_is_never_drawn(self) -> None:
        logits = torch.full((1, 3, 5), -torch.inf)
        logits[..., 1:3] = 0.0
        extremes = torch.tensor([[-40.0, 0.1, 40.0]])
        assert draw_tokens(logits, extremes).tolist() == [[1, 2, 2]]

    def test_smooth_weights_sharpen_towards_fine_scales(self) -> None:
        logits, gumbel = torch.tensor([[[2.0, 0.0, -torch.inf]]]), torch.zeros(1, 1, 3)
        coarse, fine = (smooth_weights(logits, gumbel, r)[0, 0] for r in (0.0, 1.0))
        assert coarse[0] < fine[0]
        assert coarse[2] == fine[2] == 0
        torch.testing.assert_close(coarse[1] / coarse[0], torch.tensor(-2 / 0.27).exp())

    def test_impossible_numbers_are_told(self) -> None:
        with pytest.raises(ConfigError, match=r"top_p must be in \[0, 1\], but is 3"):
            NextScale(4, top_p=3)
        with pytest.raises(ConfigError, match="one for each of 4 scales"):
            NextScale(4, temperature=[1.0, 2.0])
        with pytest.raises(ConfigError, match="top_k must not be negative"):
            NextScale(4, top_k=-1)
        with pytest.raises(ConfigError, match="num_scales must be the number of"):
            NextScale(0)

    def test_labels_say_what_changes_the_samples(self) -> None:
        assert NextScale(4).label == "NextScale"
        assert SAMPLERS["filtered"].label == (
            "NextScale, top_k 9, top_p 0.8, temperature [1.0, 1.0, 0.5, 0.0]"
        )
        assert NextScale(4, temperature=0.0).stochastic is False
        assert NextScale(4, top_k=1).stochastic is False
        assert NextScale(4).stochastic is True


class TestObjective:
    def test_every_token_counts_alike(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        tokens = torch.randint(VOCAB, (COUNT, LENGTH))
        cond, position = Conditioning(labels=torch.arange(COUNT)), torch.arange(COUNT)
        batch = Batch(tokens, cond, position, features=tokenizer.features(tokens))
        out = Objective().loss(network, batch, for_step(0, position))
        logits = network(batch.features, cond).logits.log_softmax(-1)
        picked = -logits.gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(out.per_sample, picked.mean(1))
        torch.testing.assert_close(out.loss, picked.mean())
        torch.testing.assert_close(out.terms["loss_scale_1"], picked[:, 1:5].mean())
        right = (logits.argmax(-1) == tokens).float()
        torch.testing.assert_close(out.terms["accuracy_scale_3"], right[:, 14:].mean())
        assert scale_terms(picked, right > 0, network).keys() == out.terms.keys()
        smoothed = Objective(label_smoothing=0.1).loss(network, batch, for_step(0, position))
        expected = 0.9 * picked.mean() - 0.1 * logits.mean()
        torch.testing.assert_close(smoothed.loss, expected)
        with pytest.raises(ConfigError, match="label_smoothing must be in"):
            Objective(label_smoothing=1.0)

    def test_another_tokenizer_is_refused(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        check_alike(network, tokenizer)
        with pytest.raises(ConfigError, match="the autoencoder is NoneType"):
            Objective().view(network)
        other = MSVQ(
            scales=[1, 2, 4], vocab_size=VOCAB, latent_channels=6, image_channels=1, hidden_size=8,
            channel_multipliers=(1, 2), num_blocks=1, norm_groups=4,
        )  # fmt: skip
        with pytest.raises(
            ConfigError, match=r"is \[1, 2, 3, 4\], but the tokenizer has \[1, 2, 4\]"
        ):
            Objective().view(network, other)


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def full_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def test_the_same_tokens_are_drawn(
        self, network: ScaleBackbone, tokenizer: MSVQ, guidance: Guidance
    ) -> None:
        sampler = NextScale(4, top_k=9, top_p=0.9)
        drawn = []
        for device in ("cpu", "cuda"):
            network.to(device)  # type: ignore[arg-type]
            model = guidance.wrap(Objective().view(network, copy.deepcopy(tokenizer).to(device)))
            drawn.append(finish(sampler, model, start(sampler, model)).history["tokens"].cpu())
        assert torch.equal(*drawn)

    def test_a_trajectory_is_one_graph(self, network: ScaleBackbone, tokenizer: MSVQ) -> None:
        network.to("cuda")  # type: ignore[arg-type]
        view = Objective().view(network, copy.deepcopy(tokenizer).to("cuda"))
        model, sampler = ScaleGuidance(3.0, stop=3).wrap(view), NextScale(4)
        labels = torch.arange(COUNT, device="cuda")
        noise = torch.randn(COUNT, LENGTH, device="cuda")

        def tokens() -> Tensor:
            cond = Conditioning(labels=labels)
            return sampler.run(model, cond, torch.arange(COUNT), noise).history["tokens"]

        for _ in range(3):  # kernels are chosen before the capture
            tokens()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tokens()
        noise.copy_(torch.randn(COUNT, LENGTH))
        graph.replay()
        assert torch.equal(captured, tokens())
