"""Learning rate, clipping and progress, in numbers worked out by hand; what AdamW is really given."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.stages import batch_of, new_stage
from training import progress as progress_module
from training.optimiser import Optimiser
from training.progress import Progress
from training.stage_config import CodecStageParams, OptimParams
from training.step import Step

SCHEDULE = dict(lr=5e-3, lr_end=1e-3, warmup=4)


def optimiser(iterations: int = 12, shares: dict | None = None, **options) -> Optimiser:
    """Of two weights and quantiles, with gradients (3, 0), (0, -4) and 100."""
    named = {"a": torch.ones(2), "b": torch.ones(2), "bottleneck.quantiles": torch.ones(1)}
    named = {name: torch.nn.Parameter(value) for name, value in named.items()}
    made = Optimiser(named.items(), OptimParams(**options), iterations, shares=shares)
    for parameter, gradient in zip(named.values(), ([3.0, 0.0], [0.0, -4.0], [100.0]), strict=True):
        parameter.grad = torch.tensor(gradient)
    made.named = named
    return made


@pytest.mark.parametrize(
    "at, lr",
    [
        (0, 5e-3 / 4),  # the warm-up's first quarter
        (2, 5e-3 * 3 / 4),
        (3, 5e-3),  # its end
        (3.5, 5e-3),
        (4, 5e-3),  # where the cosine begins
        (6, 1e-3 + 4e-3 * (1 + math.sqrt(0.5)) / 2),  # a quarter of it
        (8, 3e-3),  # half of it
        (12, 1e-3),  # the end
        (50, 1e-3),
    ],
)
def test_the_learning_rate(at, lr):
    assert optimiser(**SCHEDULE).lr(at) == pytest.approx(lr, rel=1e-12)


def test_the_learning_rate_without_a_schedule():
    assert {optimiser(lr=3e-4).lr(at) for at in (0, 1, 6, 11, 12, 50)} == {3e-4}
    constant = optimiser(lr=3e-4, warmup=2)
    assert [constant.lr(at) for at in (0, 1, 2, 9)] == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4], rel=1e-12)


@pytest.mark.parametrize("at", [0, 8])
def test_adamw_takes_the_learning_rate_of_the_place(at):
    """Its first update moves every weight by lr against the gradient's sign; quantiles by 1e-3 wherever it is."""
    made = optimiser(**SCHEDULE, weight_decay=0.1)
    made.update(at)
    lr = {0: 1.25e-3, 8: 3e-3}[at]
    kept = 1 - 0.1 * lr  # by weight decay, which quantiles do not have
    expected = {"a": [kept - lr, kept], "b": [kept, kept + lr], "bottleneck.quantiles": [1 - 1e-3]}
    for name, values in expected.items():
        assert made.named[name].tolist() == pytest.approx(values, abs=1e-7), name


def test_adamw_takes_the_configured_betas():
    """Gradients 3, then 1, with betas 1/2 and 9/10: moments 1.25 / (1 - 1/4) and 0.91 / (1 - 0.81) after the second."""
    made = optimiser(lr=1e-3, betas=(0.5, 0.9))
    made.update(0)
    made.named["a"].grad[0] = 1.0
    made.update(1)
    second = (1.25 / 0.75) / math.sqrt(0.91 / 0.19)
    assert made.named["a"][0].item() == pytest.approx(1 - 1e-3 * (1 + second), abs=2e-7)


def test_a_share_of_the_learning_rate():
    """For parameters by the start of their names; all others, and the quantiles, as ever."""
    made = optimiser(shares={"b": 0.1}, **SCHEDULE)
    made.update(8)
    expected = {"a": [1 - 3e-3, 1], "b": [1, 1 + 3e-4], "bottleneck.quantiles": [1 - 1e-3]}
    for name, values in expected.items():
        assert made.named[name].tolist() == pytest.approx(values, abs=1e-7), name
    step = Step(new_stage("codec", "codec.train_decoder=0.1", "codec.optim.lr=0.001"))
    layers = step.stage.codec.autoencoder.decoder.last_layer, step.stage.codec.unet.last_layer
    before = [layer.detach().clone() for layer in layers]
    step(batch_of(step.stage), Progress(step.stage.params, step=1))
    moved = [(layer - old).abs().median().item() for layer, old in zip(layers, before, strict=True)]
    assert moved == pytest.approx([step.optimiser.lr(1) * share for share in (0.1, 1)], rel=0.01)


@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (2.0, 0.4), (7.0, 1.0)])
def test_clipping(clip, factor):
    """The norm of (3, 0, 0, -4) is 5; quantiles are neither in it nor clipped."""
    made = optimiser(clip=clip)
    assert made.clip().item() == pytest.approx(5.0)
    gradients = [value for parameter in made.named.values() for value in parameter.grad.tolist()]
    assert gradients == pytest.approx([3 * factor, 0, 0, -4 * factor, 100], rel=1e-5)


def test_a_step_updates_with_the_rate_of_its_place():
    """Every step of AdamW, and of the discriminator's, takes lr(k) at step k: 1/2 and 1 in the warm-up, then the cosine."""
    options = ("gt.iterations=6", "gt.adversary.start=0", "gt.optim.warmup=2")
    step = Step(new_stage("gt", *options, "gt.optim.lr=0.001", "gt.optim.lr_end=0.0"))
    progress, used = Progress(step.stage.params), []
    for made in (step.optimiser, step.adversary.optimiser):
        plain = made.adamw.step
        made.adamw.step = lambda made=made, plain=plain: (used.append(made.adamw.param_groups[0]["lr"]), plain())
    told = [step(batch_of(step.stage), progress).numbers["lr"] for _ in range(5)]
    half = math.sqrt(0.5) / 2
    expected = [0.0005, 0.001, 0.001, 0.001 * (0.5 + half), 0.0005]
    assert told == pytest.approx(expected, rel=1e-12)
    assert used == pytest.approx([lr for lr in expected for _ in range(2)], rel=1e-12)
    assert progress.step == 5


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def test_progress_by_iterations(clock):
    progress = Progress(CodecStageParams(iterations=3))
    seen = []
    while not progress.done:
        seen.append(progress.at)
        clock.now += 1e6
        progress.advance(progress.clock())
    assert seen == [0, 1, 2] and progress.step == progress.at == 3
    assert Progress(CodecStageParams(iterations=3), step=2).at == 2


def test_progress_by_the_clock(clock):
    """Two minutes, of which 30 seconds are a quarter of the 100 iterations, however many steps they took."""
    params = CodecStageParams(iterations=100, minutes=2.0)
    progress = Progress(params)
    assert progress.at == 0 and not progress.done
    clock.now += 30
    assert progress.clock() == 30 and progress.at == 0  # it is told with the step's flags
    progress.advance(30.0)
    assert (progress.step, progress.seconds, progress.at, progress.done) == (1, 30, 25, False)
    progress.advance(119.0)
    assert progress.at == pytest.approx(100 * 119 / 120) and not progress.done
    progress.advance(120.0)
    assert progress.at == 100 and progress.done
    progress.advance(500.0)
    assert progress.at == 100
    clock.now += 1e6  # between two runs no time is counted
    resumed = Progress(params, step=7, seconds=90.0)
    assert resumed.at == 75 and resumed.clock() == 90
    clock.now += 30
    resumed.advance(resumed.clock())
    assert (resumed.step, resumed.seconds, resumed.done) == (8, 120, True)


def test_schedules_follow_the_share_of_the_time(clock):
    """Warm-up and the adversary's start are given in iterations of 100, here for 200 seconds: two seconds each."""
    options = ("gt.minutes=" + str(200 / 60), "gt.iterations=100", "gt.adversary.start=50")
    step = Step(new_stage("gt", *options, "gt.optim.warmup=20", "gt.optim.lr=0.001", "gt.optim.lr_end=0.0"))
    progress = Progress(step.stage.params)
    told = []
    for seconds in (18.0, 99.0, 120.0, 200.0):
        clock.now = 1000.0 + seconds
        done = step(batch_of(step.stage), progress)
        told.append((done.numbers["lr"], "adversarial" in done.means))
        assert progress.seconds == done.flags.seconds == seconds
    assert progress.done and progress.step == 4
    # At 0, 9, 49.5 and 60 of 100: twice in the warm-up, then 29.5 and 40 of the cosine's 80.
    rates = [0.001 / 20, 0.001 * 10 / 20, 0.0005 * (1 + math.cos(math.pi * 29.5 / 80)), 0.0005]
    assert [lr for lr, _ in told] == pytest.approx(rates, rel=1e-9)
    assert [joined for _, joined in told] == [False, False, False, True]


def test_every_rank_goes_by_the_main_processs_clock(clock, monkeypatch):
    """The share that another rank puts into the sums of a step: its flags' last two entries are stop and the clock's seconds."""
    step = Step(new_stage("gt", "gt.minutes=1", "gt.adversary.weight=0"))
    clock.now += 40
    sent = []

    def with_another(tensor):
        sent.append(tensor.clone())
        return tensor + torch.tensor([0.0] * (len(tensor) - 1) + [25.0])

    monkeypatch.setattr("utils.distributed.all_reduce_sum", with_another)
    progress = Progress(step.stage.params)
    clock.now += 40
    step(batch_of(step.stage), progress)
    assert sent[-1][-1] == 40 and progress.seconds == 65  # the main process tells its own
    monkeypatch.setattr("utils.distributed.is_main", lambda: False)
    step(batch_of(step.stage), progress)
    assert sent[-1][-1] == 0 and progress.seconds == 25  # another takes what it is told
