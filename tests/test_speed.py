"""The block `speed`: each option computes the same as plain float32, and what needs full precision keeps it."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.train import OPTIONS, PLAIN
from datapipe.pictures import Batch
from models.blocks import nearest_codes
from models.records import Draws
from tests.commands import NANO, run
from tests.small_runs import ALONE, RESIDUAL
from training.config import load_config
from training.dry_run import activations
from training.optimiser import Optimiser
from training.progress import Progress
from training.speed import Speed, SpeedParams
from training.stage_config import OptimParams
from training.stages import STAGES
from training.start import new_codec
from training.step import Step
from utils.checkpoints import digest

CPU, SIZE, BATCH = torch.device("cpu"), 64, 2


def new_step(name: str, speed: SpeedParams | None = PLAIN, *overrides: str) -> Step:
    """A stage of random networks; `speed` None leaves the block to the overrides."""
    own = ALONE.get(name, ())
    config = load_config(str(NANO), [*own, f"networks.residual={RESIDUAL}", "gt.adversary.start=0", *overrides])
    config = replace(config, speed=speed) if speed else config
    return Step(STAGES[name](config, new_codec(config), CPU))


def batch_of(step: Step, number: int = 0) -> Batch:
    positions = range(number * BATCH, (number + 1) * BATCH)
    image = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return Batch(image, torch.tensor(positions), step.stage.drawn(positions, (SIZE, SIZE)))


def trained(name: str, speed: SpeedParams, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradients of the last of a few steps."""
    ours = new_step(name, speed)
    progress = Progress(ours.stage.params)
    losses = [ours(batch_of(ours, number), progress).means["loss"].item() for number in range(steps)]
    return losses, {key: p.grad for key, p in ours.stage.codec.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain():
    return {name: trained(name, PLAIN) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("option", ["channels_last", "fused_adamw", "checkpointing", "bfloat16", "defaults"])
def test_an_option_trains_as_plain_float32_does(name, option, plain):
    """Rounding apart; checkpointing computes the very same numbers again."""
    (losses, gradients), (ours, own) = plain[name], trained(name, OPTIONS[option])
    assert own.keys() == gradients.keys()
    if option == "checkpointing":
        assert ours == losses
        assert all(torch.equal(own[key], value) for key, value in gradients.items())
    elif Speed(OPTIONS[option], CPU).bfloat16:
        assert ours[0] == pytest.approx(losses[0], rel=0.02) and ours[0] != losses[0]
        assert all(value.dtype == torch.float32 for value in own.values())
    else:
        assert ours == pytest.approx(losses, rel=1e-4)
        for key, value in gradients.items():
            assert (own[key] - value).abs().max() <= 2e-2 * value.abs().max() + 1e-6, key


def test_checkpointing_keeps_less_and_wraps_once():
    less, plain = (new_step("gt", OPTIONS[option], "gt.adversary.weight=0") for option in ("checkpointing", "plain"))
    assert activations(less, batch_of(less), []) < 0.7 * activations(plain, batch_of(plain), [])
    ours = less.stage
    block = ours.network.decoder.up[0].block[0]
    ours.speed.prepare(ours.network)
    assert block.forward.args[0].func is type(block).forward


def test_bfloat16_stays_inside_the_networks():
    """Autocast on: results of the rooms, distances, averages, rates, weights and their averages are float32."""
    ours = new_step("codec", OPTIONS["bfloat16"])
    codec, seen = ours.stage.codec, {}
    watched = {
        "integers": codec.residual.scale_network,
        "rates": codec.residual.rate_model,
        "convolution": codec.unet.middle_block[0].in_layers[2],
    }
    for name, module in watched.items():
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: (inputs[0].dtype, torch.is_autocast_enabled("cpu"))})
        )
    batch = batch_of(ours)
    with ours.speed.autocast():
        out = ours.model(batch.image, Draws(**batch.draws))
    assert seen == {
        "integers": (torch.float32, False),
        "rates": (torch.float32, False),
        "convolution": (torch.bfloat16, True),
    }
    results = [out.x, out.y_hat, out.x_hat, out.image, out.base.z, out.base.z_q, out.base.counts, out.base.sums]
    assert {v.dtype for v in (*results, out.residual_bpp, out.auxiliary)} == {torch.float32}
    assert torch.equal(out.auxiliary, codec.residual.rate_model.auxiliary_loss())
    vectors = out.base.z.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(nearest_codes(vectors, codec.vq_base.quantize.embedding.weight), out.base.indices.flatten())
    ours(batch, Progress(ours.stage.params))
    assert {v.dtype for v in ours.averages.average.values() if v.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in codec.parameters()} == {torch.float32}


def test_the_layout_does_not_change_the_fingerprint():
    ours, theirs = (new_step("codec", OPTIONS[option]).stage.codec.vq_base for option in ("channels_last", "plain"))
    assert ours.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert digest(ours.state_dict()) == digest(theirs.state_dict())


@pytest.mark.parametrize("can, fast", [("avx2", set()), ("avx512_f", {"channels_last"}), ("avx512_bf16", {"bfloat16"})])
def test_auto_on_the_cpu(can, fast, monkeypatch):
    """Options that did not win there are off (docs/speed.md)."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {can: True})
    speed = Speed(SpeedParams(), CPU)
    assert {n for n in ("bfloat16", "channels_last", "fused_adamw", "compile") if getattr(speed, n)} == fast


def test_tf32_is_off_unless_asked_for():
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        Speed(OPTIONS["tf32"], CPU).settle()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        Speed(PLAIN, CPU).settle()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def test_moments_are_resumed_in_the_layout_of_the_weights_and_options_are_the_present_ones():
    """A run without channels_last goes on with it: the fused update would pair weights and moments wrongly."""
    torch.manual_seed(0)
    gradient, ends = torch.randn(4, 6, 3, 3), []
    network = torch.nn.Conv2d(6, 4, 3)
    first = Optimiser(network.named_parameters(), OptimParams(weight_decay=0.1), 10)
    network(torch.randn(1, 6, 8, 8)).square().mean().backward()
    first.update(0)
    start, saved = copy.deepcopy(network.state_dict()), copy.deepcopy(first.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        network = torch.nn.Conv2d(6, 4, 3).to(memory_format=layout)
        network.load_state_dict(start)
        second = Optimiser(network.named_parameters(), OptimParams(lr=0.1, betas=(0.1, 0.2)), 10, fused=True)
        second.load_state_dict(copy.deepcopy(saved))
        group = second.adamw.param_groups[0]
        assert group["betas"] == (0.1, 0.2) and group["fused"] and group["weight_decay"] == 0
        network.weight.grad, network.bias.grad = gradient.to(memory_format=layout), torch.ones(4)
        second.update(1)
        ends.append(network.weight.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_the_benchmark_prints_pictures_per_second_and_memory():
    small = ["gt.batch_size=3", "--config", NANO, "--device", "cpu", "--stages", "gt", "--options", "checkpointing"]
    _, header, (name, rate, ratio, peak, _) = map(
        str.split, run("-m", "benchmarks.train", *small, "--steps", 1, "--rounds", 1).stdout.splitlines()
    )
    assert header[:3] == ["stage", "gt", "pictures/s"] and name == "checkpointing"
    assert float(rate) > 0 and ratio == "1.00" and 50 < float(peak) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_compiled_networks_train_as_plain_ones(name, plain):
    for option in (OPTIONS["compile"], SpeedParams("float32", compile=True, checkpointing=True)):
        assert trained(name, option)[0] == pytest.approx(plain[name][0], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_autoencoder_meets_its_discriminator_later():
    """The first backward passes keep no graph, those of the adaptive weight do."""
    ours = new_step("gt", OPTIONS["compile"], "gt.adversary.start=1")
    progress = Progress(ours.stage.params)
    terms = [ours(batch_of(ours, number), progress).means for number in range(2)]
    assert "adversarial" not in terms[0] and "adversarial" in terms[1]
