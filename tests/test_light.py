"""The light decoder and the stage that trains it: cost, start, loss, who learns; memory, precision and graphs."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from datapipe.pictures import Batch
from models.autoencoder import Autoencoder
from models.codec import Codec
from models.layers.norms import GroupNorm
from models.light import LightDecoder, LightParams, fit_linear
from models.records import Draws
from models.released_light import save_light
from models.speed import fast
from models.speed.fast import prepare
from models.speed.graphs import Graphed, use_graphs
from tests.commands import NANO, ROOT
from tests.networks import numbers_of, off_zero
from tests.small_runs import LIGHT
from tests.stages import batch_of, new_stage
from tests.test_objectives import Recorder, as_floats, numbers
from training.config import load_config
from training.light_stage import Distilled, LightStage
from training.progress import Progress
from training.start import new_codec, start_from
from training.step import Step
from utils.errors import ConfigError


def test_it_goes_on_from_that_of_an_earlier_release(tmp_path, monkeypatch):
    """Its parameters, as they were stored; the linear map is not fitted again. Another size is refused by name."""
    config = load_config(str(NANO), [*LIGHT, f"light.start={tmp_path / 'light_model_7.pth'}"])
    monkeypatch.setattr("training.start.start_from_release", lambda *_: [])
    codec, other = new_codec(config), new_codec(replace(config, seed=1))
    off_zero(other)
    save_light(tmp_path / "light_model_7.pth", other.light.state_dict(), config.networks.light, "of another D")
    told = start_from(config, codec)
    assert told == [f"light decoder from {tmp_path / 'light_model_7.pth'}"]
    assert all(torch.equal(value, codec.light.state_dict()[key]) for key, value in other.light.state_dict().items())
    assert not LightStage(config, codec, torch.device("cpu")).begins and new_stage("light").begins
    save_light(
        tmp_path / "light_model_7.pth", LightDecoder(LightParams((4, 2), (1, 1), 1), 2).state_dict(), LightParams(), ""
    )
    with pytest.raises(ConfigError, match="does not fit the configuration. other shape: conv_in"):
        start_from(config, codec)


# The network ----------------------------------------------------------------------------------------------------------


def gflop(decode, channels: int) -> float:
    """Of a latent of 768x512 pixels, as `reproduce.py timing` counts them."""
    with FlopCounterMode(display=False) as counter:
        decode(torch.empty(1, channels, 32, 48, device="meta"))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("name, most, share", [("light", 150, 1 / 10), ("small-light", 10.2, 1 / 4)])
def test_the_configurations_cost_a_share_of_their_d(name, most, share):
    networks = load_config(str(ROOT / "configs" / f"{name}.yaml")).networks
    channels = networks.autoencoder.embed_dim
    with torch.device("meta"):
        light, full = LightDecoder(networks.light, channels), Autoencoder(networks.autoencoder)
    cost = gflop(light, channels)
    assert 0.9 * most < cost <= most and cost <= share * gflop(full.decode, channels)


def test_it_starts_as_the_linear_map_alone_and_ends_in_blocks_of_16():
    """Each latent position gives one block; a value of it that W sends to one channel is one pixel."""
    light = LightDecoder(LightParams((4, 2), (1, 1), 1), 2)
    with torch.no_grad():
        light.linear.weight.zero_()
        light.linear.bias.fill_(0.25)
        light.linear.weight[256 + 16 * 3 + 5, 1] = 2.0  # green, row 3, column 5
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # 1 2 1 2
    expected = torch.full((1, 3, 16, 32), 0.25)
    expected[0, 1, 3, 5], expected[0, 1, 3, 16 + 5] = 0.25 + 6, 0.25 - 2
    assert torch.equal(light(x), expected)


def test_the_linear_map_has_the_least_squared_error():
    """X = 1/2 x + 1/4 n + 1 with x and n of +-1 that are uncorrelated: n's 1/16 of 5/16 is left. One channel never varies."""
    x, n = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    latent = torch.stack([x, torch.zeros(4)], 1)[..., None, None]  # 4 2 1 1
    image = (x / 2 + n / 4 + 1).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    light = LightDecoder(LightParams((4, 2), (1, 1), 1), 2)
    assert fit_linear(light, zip(latent.split(3), image.split(3), strict=True)) == pytest.approx(0.2)
    torch.testing.assert_close(light(latent), (x / 2 + 1).view(4, 1, 1, 1).expand(4, 3, 16, 16))
    assert fit_linear(light, [(latent, torch.ones(4, 3, 16, 16))]) == 0.0


@pytest.mark.parametrize(
    "values, told",
    [
        ({"ch": (8,)}, "ch .8.: two numbers"),
        ({"num_res_blocks": (1, 0)}, "num_res_blocks .1, 0.: one number or more, each from 1 up"),
        ({"ch": (12, 8), "groups": 8}, "ch .12, 8.: multiples of groups, 8"),
        ({"ch": (8, 8), "groups": 8}, "the first at least twice that"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        LightParams(**values)


# The stage ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_stage_light():
    """L = w_t |D(x^) - X^|^2 + w_d |X - X^|^2 + w_c chroma + w_p perceptual, the last two of the original."""
    given = ("light.teacher_weight=0.5", "light.distortion_weight=0.9", "light.chroma_weight=0.6")
    stage = new_stage("light", *given, "light.perceptual={lpips: 0.3}", perceptual={"lpips": Recorder(1.0)})
    image, target, teacher = (numbers(2, 3, 2, 3) for _ in range(3))
    out = Distilled(torch.tensor(image), torch.tensor(teacher), torch.zeros(2))
    error = image - target
    expected = {
        "distortion": (error**2).mean(),
        "chroma": ((error - error.mean(1, keepdims=True)) ** 2).mean(),
        "teacher": ((image - teacher) ** 2).mean(),
        "lpips": (2 * image - target).mean() + 3,
    }
    factors = {"teacher": 0.5, "distortion": 0.9, "chroma": 0.6, "lpips": 0.3}
    expected["loss"] = sum(factor * expected[name] for name, factor in factors.items())
    batch = Batch(torch.tensor(target), torch.arange(2))
    assert as_floats(stage.losses(out, batch)) == pytest.approx(expected, rel=1e-9)
    alone = new_stage("light", "light.teacher_weight=0", "light.distortion_weight=1", "light.perceptual={}")
    alone.codec.autoencoder.decoder.forward = None  # a call would fail
    assert set(alone.losses(alone.forward(alone.network, batch_of(alone)), batch_of(alone))) == {"distortion", "loss"}


def test_the_teachers_picture_in_the_originals_place():
    given = ("light.target=teacher", "light.teacher_weight=0", "light.distortion_weight=0.9", "light.chroma_weight=0.6")
    stage = new_stage("light", *given, "light.perceptual={lpips: 0.3}", perceptual={"lpips": Recorder(1.0)})
    image, original, teacher = (numbers(2, 3, 2, 3) for _ in range(3))
    out = Distilled(torch.tensor(image), torch.tensor(teacher), torch.zeros(2))
    error = image - teacher
    expected = {
        "distortion": (error**2).mean(),
        "chroma": ((error - error.mean(1, keepdims=True)) ** 2).mean(),
        "lpips": (2 * image - teacher).mean() + 3,
    }
    expected["loss"] = 0.9 * expected["distortion"] + 0.6 * expected["chroma"] + 0.3 * expected["lpips"]
    assert as_floats(stage.losses(out, Batch(torch.tensor(original), torch.arange(2)))) == pytest.approx(
        expected, rel=1e-9
    )
    out = stage.forward(stage.network, batch_of(stage))
    assert out.teacher is not None


def test_it_learns_from_clean_latents_and_from_what_a_file_gives():
    """A quarter of the samples, evenly spread, is E(X); the others are x^ of the decoder's one step, at drawn levels."""
    stage = new_stage("light", "light.clean_share=0.25", residual=True)
    batch, codec = batch_of(stage, 8), stage.codec
    assert len({level for level in batch.draws["level"].tolist() if level > 0}) > 3
    out = stage.forward(stage.network, batch)
    draws = Draws(**batch.draws)
    assert (draws.t == 1).all() and draws.decoder_input.all() and not (draws.spread == 1).any()
    coded = codec(batch.image, replace(draws, spread=torch.ones(8, dtype=torch.float64)), decode=False)
    expected = coded.x_hat.clone()
    expected[[3, 7]] = coded.x[[3, 7]]
    latent, _ = stage.latent(batch)
    assert torch.equal(latent, expected) and not torch.equal(coded.x, coded.x_hat)
    assert torch.equal(out.teacher, codec.autoencoder.decode(expected)) and not out.teacher.requires_grad
    assert torch.equal(out.image, codec.light(expected))


def test_the_light_decoder_alone_moves():
    stage = new_stage("light", "light.adversary={weight: 0.5, adaptive: true}", residual=True)
    step, before = Step(stage), {k: v.clone() for k, v in stage.codec.state_dict().items()}
    step(batch_of(stage), Progress(stage.params))
    moved = {key for key, value in stage.codec.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("light.") for key in moved)
    assert all(key.startswith("light.") for key in step.averages.average)
    assert {id(p) for p in stage.trained.parameters()} == {id(p) for p in stage.codec.light.parameters()}
    assert not any(p.requires_grad for k, p in stage.codec.named_parameters() if not k.startswith("light."))


@pytest.mark.parametrize(
    "overrides, told",
    [
        (LIGHT[:1] + LIGHT[2:], ".light. or .texture. with a release: folder"),
        (LIGHT[:2], "networks.light is what stage light trains"),
        (LIGHT[2:], "networks.light is what stage light trains"),
        ((*LIGHT, "light.clean_share=1.5"), "light.clean_share 1.5: in .0, 1."),
        ((*LIGHT, "light.teacher_weight=0", "light.distortion_weight=0"), "teacher_weight, distortion_weight.* all 0"),
    ],
)
def test_configurations_that_distil_nothing_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config(str(NANO), overrides)


# In D's place ---------------------------------------------------------------------------------------------------------


def most_alive(work: Callable[[], object]) -> int:
    """Bytes that were allocated and not yet freed, at the moment of most, by PyTorch's profiler."""
    with profile(profile_memory=True) as told:
        work()
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_memory_is_that_of_its_maps_and_not_of_ds():
    """16 floats a pixel at 1/4 of the resolution, of which 6 maps are alive; D's 8 at full resolution."""
    sizes = ["networks.autoencoder.ch=8", "networks.autoencoder.ch_mult=[1,1,2,2,2]", "networks.residual=null"]
    params = load_config(str(NANO), sizes).networks
    codec = Codec(replace(params, light=LightParams((64, 256), (1, 1), 8))).eval().requires_grad_(False)
    side = 256
    x = torch.randn(1, params.autoencoder.embed_dim, side // 16, side // 16)
    beside = codec.memory(16, 16, "decode") - 16**2 * (3 + 4 * (6 * 16 + 10))
    assert beside == 4 * numbers_of(codec)
    with torch.inference_mode():
        taken = most_alive(lambda: codec.to_picture(x))
    assert taken == pytest.approx(codec.memory(side, side, "decode") - beside, rel=0.25)
    assert codec.memory(side, side, "encode") - beside == side**2 * (3 + 4 * (6 * 8 + 20))
    assert codec.memory(side, side) == codec.memory(side, side, "decode")  # the larger


@pytest.mark.parametrize("precision, width, casts", [("bfloat16", 32, True), ("auto", 64, True), ("auto", 32, False)])
def test_bfloat16_is_by_the_rule_that_d_has(precision, width, casts, monkeypatch):
    """By the width of its maps of most positions; the linear map stays float32."""
    monkeypatch.setattr(fast, "computes_bfloat16", lambda device: True)
    params = load_config(str(NANO), ["networks.residual=null"]).networks
    codec = Codec(replace(params, light=LightParams((64, width), (1, 1), 8))).eval().requires_grad_(False)
    off_zero(codec.light)
    torch.nn.init.normal_(codec.light.conv_out.weight, std=0.1)
    x = torch.randn(1, params.autoencoder.embed_dim, 5, 7)
    exact = codec.picture(x)
    prepare(codec, precision)
    kinds = {name: next(part.parameters()).dtype for name, part in codec.light.named_children()}
    assert kinds.pop("linear") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16 if casts else torch.float32}
    given = codec.picture(x)
    assert given.dtype == torch.float32 and given.is_contiguous() and torch.equal(given, exact) != casts
    assert (given - exact).square().mean() < 1e-3 * exact.var()  # 30 dB


def test_it_has_graphs_of_its_own_and_maps_that_lie_nhwc_stay_so():
    codec = Codec(replace(load_config(str(NANO)).networks, light=LightParams((16, 8), (1, 1), 8)))
    use_graphs(codec)
    assert isinstance(vars(codec.light)["forward"], Graphed)
    light, seen = codec.light.to(memory_format=torch.channels_last), []
    for norm in light.modules():
        if isinstance(norm, GroupNorm):
            norm.register_forward_pre_hook(lambda _, maps: seen.append(maps[0]))
    light(torch.randn(1, codec.params.autoencoder.embed_dim, 3, 5))
    assert len(seen) == 5 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
