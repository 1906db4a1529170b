"""Two processes with batch b train as one with batch 2b, whole or in micro-batches, with all parts of the codec.

In float64, to 1e-9 of each tensor's largest entry.
"""

import copy
from functools import cache, partial

import pytest
import torch
import torch.multiprocessing as multiprocessing

from models.codec import Codec
from models.released import NETWORKS
from tests.commands import NANO, free_port
from training.config import load_config
from training.perceptual import perceptual_term
from training.stages import STAGES
from utils import distributed

RELATIVE = 1e-9
ZERO = 1e-15  # some gradients are rounding alone: the bias of the keys cancels in any softmax
STEPS, BATCH, SIZE = 3, 4, 48
RESIDUAL = "{channels: 8, width: 8, blocks: 1, hyper_channels: 4, scale_width: 8, code_width: 4, levels: 3}"
OVERRIDES = (
    # AdamW divides by |g| + 1e-8: where a gradient is nearly nothing, the step is its rounding times lr / 1e-8.
    "gt.optim.lr=1e-4",
    "codec.optim.lr=1e-4",
    "gt.adversary.start=1",
    "gt.adversary.weight=0.5",
    "gt.chroma_weight=1.0",
    "codec.chroma_weight=1.0",
    "networks.adapter=difference",
    f"networks.residual={RESIDUAL}",
    "networks.vq_base.revive_below=0.995",  # codes that the first update leaves unused are revived in it
)


def new_stage(name: str, *overrides: str):
    """A stage on networks of random weights, in float64."""
    config = load_config(str(NANO), [*OVERRIDES, *overrides])
    torch.manual_seed(0)
    codec = Codec(config.networks).double()
    codec.residual.train_rates()
    torch.manual_seed(1)
    return STAGES[name](config, codec, torch.device("cpu"))


def state_of(stage) -> dict[str, torch.Tensor]:
    """Networks, their averages, and the gradients of the last step."""
    state = {key: value.clone() for key, value in stage.codec.state_dict().items()}
    if stage.name == "gt":
        state |= {f"discriminator.{key}": value.clone() for key, value in stage.discriminator.state_dict().items()}
    gradients = {f"grad.{k}": p.grad.clone() for k, p in stage.codec.named_parameters() if p.grad is not None}
    return state | gradients | {f"ema.{k}": v.clone() for k, v in stage.ema.average.items()}


def train(name: str, world: int, rank: int, microbatch: int | None) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """A few steps on this rank's share of fixed batches; the state afterwards, and what was logged."""
    stage = new_stage(name, f"{name}.microbatch={microbatch or 'null'}")
    images = torch.rand(STEPS, BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logs = []
    for step in range(STEPS):
        mine = torch.arange(rank, BATCH, world)
        logs.append(stage.step(images[step, mine] * 2 - 1, step * BATCH + mine, step)[0])
    return state_of(stage), logs


@cache
def alone(name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return train(name, 1, 0, None)


def worker(rank: int, world: int, port: int, name: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save([train(name, world, rank, microbatch) for microbatch in (None, 1)], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(key.startswith("grad.") for key in expected)
    for key, value in expected.items():
        if value.numel():
            error = (found[key] - value).abs().max().item()
            assert error <= RELATIVE * value.abs().max().item() + ZERO, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_two_processes_train_as_one(name, tmp_path):
    """With the batch whole, and with micro-batches of one."""
    multiprocessing.spawn(worker, args=(2, free_port(), name, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert name == "gt" or 0 < alone(name)[1][1]["revived"] < alone(name)[1][0]["revived"]
    for (state, logs), (other, _) in zip(first, second, strict=True):
        assert all(torch.equal(other[key], value) for key, value in state.items()), "the ranks differ"
        assert_equal(state, alone(name)[0])
        assert_logs_equal(logs, alone(name)[1])


def resuming_worker(rank: int, world: int, port: int, path: str) -> None:
    """Four steps; then the last two again, from the state after the second, in stages made anew."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    images = torch.rand(4, world, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {}
    for name in STAGES:
        stage = new_stage(name)
        for step in range(4):
            if step == 2:
                saved = copy.deepcopy((stage.codec.state_dict(), stage.state_dict()))
            stage.step(images[step, rank : rank + 1] * 2 - 1, torch.tensor([step * world + rank]), step)
        again = new_stage(name)
        again.codec.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        for step in (2, 3):
            again.step(images[step, rank : rank + 1] * 2 - 1, torch.tensor([step * world + rank]), step)
        found[name] = (state_of(stage), state_of(again))
    torch.save(found, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_three_processes_go_on_bit_for_bit(tmp_path):
    """The order in which the gradients of three ranks are summed must not depend on when a run was started."""
    multiprocessing.spawn(resuming_worker, args=(3, free_port(), str(tmp_path)), nprocs=3)
    for rank in range(3):
        for name, (state, again) in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert state.keys() == again.keys()
            assert [key for key, value in state.items() if not torch.equal(again[key], value)] == [], name


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_micro_batches_train_as_the_whole(name):
    """Of unequal sizes: three and one."""
    state, logs = train(name, 1, 0, 3)
    assert_equal(state, alone(name)[0])
    assert_logs_equal(logs, alone(name)[1])


@pytest.mark.parametrize("perceptual", ["ms_ssim", "lpips"])
def test_micro_batches_train_as_the_whole_with_a_perceptual_term(perceptual, monkeypatch):
    """In float64 too; LPIPS with random weights."""
    monkeypatch.setattr("training.codec_stage.perceptual_term", partial(perceptual_term, untrained=True))
    image = torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    found = []
    for microbatch in ("null", "1"):
        torch.manual_seed(3)  # of the untrained LPIPS
        stage = new_stage(
            "codec", "codec.crop_size=176", f"codec.perceptual={perceptual}", f"codec.microbatch={microbatch}"
        )
        logs, _ = stage.step(image, torch.arange(2), 0)
        assert logs["perceptual"] > 1e-3
        found.append((state_of(stage), [logs]))
    assert_equal(found[1][0], found[0][0])
    assert_logs_equal(found[1][1], found[0][1])


def assert_logs_equal(found: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_a_code_book_to_start_from_is_kept():
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    moved = {}
    for start in ("null", "vq.pth.tar"):
        stage = new_stage("codec", f"vq_base={start}", "networks.vq_base.revive_below=0")
        book = stage.codec.vq_base.quantize.embedding.weight
        before = book.clone()
        stage.step(image, torch.arange(2), 0)
        moved[start] = ((book - before).norm(dim=1) / before.norm(dim=1)).max().item()
    assert moved["null"] > 0.5 and moved["vq.pth.tar"] < 0.1


def test_options_of_the_optimiser_are_the_present_ones_after_resuming():
    """Moments come back, what the configuration has changed does not."""
    first = new_stage("codec", "codec.optim.weight_decay=0.1")
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    first.step(image, torch.arange(2), 0)
    second = new_stage("codec", "codec.optim.betas=[0.1,0.2]", "speed.fused_adamw=true")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    groups = second.optimiser.adamw.param_groups
    assert groups[0]["betas"] == (0.1, 0.2) and [group["weight_decay"] for group in groups] == [0, 0]
    assert groups[0]["fused"] and groups[1]["lr"] == second.optimiser.QUANTILE_LR
    moments = [stage.optimiser.adamw.state_dict()["state"] for stage in (first, second)]
    assert all(torch.equal(moments[1][i][key], value) for i, s in moments[0].items() for key, value in s.items())
    second.step(image, torch.arange(2), 1)


def test_unlaunched_is_a_world_of_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    samples = torch.arange(3.0)
    assert torch.equal(distributed.gather_samples(samples), samples)
    assert torch.equal(distributed.all_reduce_mean(samples.clone()), samples)


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_every_trainable_tensor_is_in_one_group_and_gets_a_gradient(name):
    stage = new_stage(name, "gt.adversary.start=0")
    trainable = {id(p): key for key, p in stage.trained.named_parameters() if p.requires_grad}
    groups = [p for group in stage.optimiser.adamw.param_groups for p in group["params"]]
    assert len(groups) == len(trainable) and {id(p) for p in groups} == trainable.keys()
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    stage.step(image, torch.arange(2), 0)
    assert all(p.grad is not None for p in groups)
    assert [p for p in stage.codec.parameters() if p.grad is not None and id(p) not in trainable] == []
    if name == "gt":
        owned = stage.critic_optimiser.adamw.param_groups[0]["params"]
        assert {id(p) for p in owned} == {id(p) for p in stage.discriminator.parameters()}
        assert all(p.grad is not None for p in owned)
    else:
        quantiles = [key for key in trainable.values() if key.endswith("quantiles")]
        assert quantiles and len(stage.optimiser.adamw.param_groups[1]["params"]) == len(quantiles)


def test_frozen_parts_stay_frozen_and_validation_moves_nothing():
    stage = new_stage("codec")
    stage.codec.train()
    frozen = {key: value.clone() for key, value in stage.codec.autoencoder.state_dict().items()}
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    book = stage.codec.vq_base.quantize.embedding.weight.clone()
    stage.step(image, torch.arange(2), 0)
    assert all(torch.equal(value, frozen[key]) for key, value in stage.codec.autoencoder.state_dict().items())
    assert not torch.equal(stage.codec.vq_base.quantize.embedding.weight, book)
    before = state_of(stage)
    with stage.ema.applied(stage.trained):
        assert torch.equal(stage.codec.unet.conv_in_extended.weight, stage.ema.average["unet.conv_in_extended.weight"])
        stage.evaluate(image[:1], 0)
    after = state_of(stage)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_averages_cover_all_that_is_released(name):
    stage = new_stage(name)
    released = stage.states()
    assert set(released) == ({"autoencoder"} if name == "gt" else set(NETWORKS))
    for network, state in released.items():
        assert state.keys() == getattr(stage.codec, network).state_dict().keys()
    trained = {key for key, p in stage.trained.named_parameters() if p.requires_grad}
    assert trained <= stage.ema.average.keys()
