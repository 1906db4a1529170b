"""Averaged weights: their recursion by hand, and that validation, the end of a stage and its files take them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datapipe.pictures import Batch
from models.autoencoder import fit_linear
from models.records import CodecOutput
from models.vq_base import BaseCode
from tests.commands import photograph
from tests.stages import batch_of, new_stage, pictures
from training.config import ValidationParams
from training.progress import Progress
from training.stage import Evaluated
from training.step import Step
from training.trainer import Trainer
from training.validation import Validation
from utils.ema import Ema


def test_three_updates_by_hand():
    """d = min(0.15, (1 + n) / (10 + n)): 1/10 first, then 0.15, where 2/11 and 3/12 are larger."""
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(2.0)
    averages, expected = Ema(network, 0.15), 2.0
    for decay, value in ((0.1, 5.0), (0.15, -1.0), (0.15, 8.0)):
        network.weight.data.fill_(value)
        averages.update()
        expected = decay * expected + (1 - decay) * value
        assert averages.average["weight"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_a_step_averages_what_it_has_updated(name):
    """After the first, 1/10 of the weights before and 9/10 of those after it; after the second, 2/11 of that."""
    stage = new_stage(name, f"{name}.adversary.weight=0")
    step, progress = Step(stage), Progress(stage.params, step=1)
    expected = {key: value.clone() for key, value in stage.trained.state_dict().items()}
    for decay in (1 / 10, 2 / 11):
        step(batch_of(stage), progress)
        state = stage.trained.state_dict()
        expected = {key: decay * value + (1 - decay) * state[key] for key, value in expected.items()}
        for key, value in expected.items():
            torch.testing.assert_close(step.averages.average[key], value, rtol=1e-5, atol=1e-6)
    layer = f"{name.replace('codec', 'unet').replace('gt', 'autoencoder')}."
    assert any(not torch.equal(state[key], value) for key, value in expected.items() if key.startswith(layer))


def shifted(step: Step, by: float = 0.01) -> dict[str, torch.Tensor]:
    """Let the averages differ from the weights; the weights as they are."""
    for value in step.averages.average.values():
        if value.is_floating_point():
            value.add_(by)
    return {key: value.clone() for key, value in step.stage.trained.state_dict().items()}


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """Over two pictures of 33 x 40 pixels, cut to 32 x 32."""
    folder = tmp_path_factory.mktemp("validation")
    for seed in range(2):
        photograph(folder / f"{seed}.png", 33, 40, seed)
    return Validation(ValidationParams(folder=str(folder)), torch.device("cpu"), {})


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_validation_scores_the_averages(name, validation):
    """The loss is that of a stage whose weights are the averages; its own are the same bits afterwards."""
    step = Step(new_stage(name, f"{name}.adversary.weight=0", residual=name == "codec"))
    raw = shifted(step)
    scores, rows = validation.run(step.stage, step.averages)
    assert all(torch.equal(value, raw[key]) for key, value in step.stage.trained.state_dict().items())
    other = Step(new_stage(name, f"{name}.adversary.weight=0", residual=name == "codec"))
    with_raw, _ = validation.run(other.stage, other.averages)
    other.stage.trained.load_state_dict(step.averages.average)
    expected, _ = validation.run(other.stage, Ema(other.stage.trained, 0.9))
    assert scores == pytest.approx(expected, rel=1e-6) and scores["loss"] != pytest.approx(with_raw["loss"], rel=1e-6)
    assert len(rows) == (3 if name == "codec" else 2)


def test_the_trainer_validates_the_averages():
    step, given, losses = Step(new_stage("gt", "gt.adversary.weight=0")), [], iter([1.0, 2.0, 0.5])

    def run(stage, averages):
        given.append((stage, averages))
        return {"loss": next(losses)}, []

    trainer = SimpleNamespace(
        validation={"gt": SimpleNamespace(run=run)},
        config=SimpleNamespace(validation=ValidationParams(every=2)),
        log=SimpleNamespace(validation=lambda *_: None),
        best=None,
    )
    found = [Trainer._validate(trainer, step, Progress(step.stage.params, step=number)) for number in (2, 3, 4, 6)]
    assert found == [True, False, False, True]  # 3 is not its time, and at 4 the loss is larger
    assert given == [(step.stage, step.averages)] * 3
    assert trainer.best == {"stage": "gt", "step": 6, "loss": 0.5}


def made_up_output(image: torch.Tensor, draws) -> CodecOutput:
    """As if every decoded picture were the original and 0.1; commitment 0.04; rate 0.5 bits per pixel above level 0."""
    n = len(image)
    z = torch.zeros(n, 8, 2, 2)
    base = BaseCode(z, z + 0.2, torch.zeros(n, 2, 2).long(), torch.zeros(16), torch.zeros(16, 8))
    rate = torch.where(draws.level > 0, 0.5, 0.0)
    return CodecOutput(z, z, z, image + 0.1, base, rate, torch.tensor(7.0))


def test_validation_decodes_as_a_file_is_decoded():
    """At t = T-1 from the decoder's own input with the rate's own noise level, at level 0 and at the highest."""
    options = ("codec.rate_weights=[4.0,0.25]", "codec.forward=published", "networks.diffusion.steps=5")
    stage, seen = new_stage("codec", *options, residual=True), []
    stage.codec.forward = lambda image, draws: (seen.append((image, draws)), made_up_output(image, draws))[1]
    picture = pictures(1)
    made = stage.evaluate(picture, position=3)
    ((image, draws),) = seen
    assert image.shape == (2, 3, 32, 32) and torch.equal(image[0], picture[0]) and torch.equal(image[1], picture[0])
    assert draws.t.tolist() == [4, 4] and draws.spread.tolist() == [1, 1] and draws.decoder_input.tolist() == [True] * 2
    assert draws.level.tolist() == [0, 3] and draws.shift
    own = stage.drawn([3], (32, 32))
    assert torch.equal(draws.noise, own["noise"].expand(2, -1, -1, -1))
    # 0.8 x 0.01 + 0.25 x 0.04 and half of lambda_3 x 0.5
    assert made.loss == pytest.approx(0.8 * 0.01 + 0.25 * 0.04 + 0.25 * 0.5 / 2, rel=1e-5)
    base = 4 / 256  # log2 of 16 codes
    assert {suffix: bpp for suffix, (_, bpp) in made.results.items()} == pytest.approx(
        {"_level_0": base, "_level_3": base + 0.5}
    )
    torch.testing.assert_close(made.results["_level_3"][0], picture + 0.1)


def test_the_means_of_validation(validation):
    """Of a stage that knows the answer but for one grey value: 20 lg 255 dB."""

    class Knows:
        trained = nn.Linear(1, 1)

        @staticmethod
        def evaluate(image, position):
            return Evaluated(0.5 + position, {"": (image - 2 / 255 * image.sign(), 0.25 * (1 + position))})

    scores, _ = validation.run(Knows, Ema(Knows.trained, 0.9))
    assert scores["loss"] == 1.0 and scores["bpp"] == pytest.approx(0.375)
    assert scores["psnr"] == pytest.approx(48.13, abs=0.01)


def known_latents(stage, *values: torch.Tensor):
    """Let E give these latents, one batch each; what the statistics come to."""
    found, given = [], iter(values)
    stage.network.encode = lambda image: next(given)
    stage.network.fold_statistics = lambda mean, deviation: found.append((mean.tolist(), deviation.tolist()))
    stage.finish([Batch(pictures(1), torch.arange(1)) for _ in values])
    return found


@pytest.mark.parametrize("scale, deviations", [("channel", [1.0, 3.0]), ("common", [5**0.5, 5**0.5])])
def test_the_latents_moments(scale, deviations):
    """Channel 1 holds 1 and 3 (mean 2, deviation 1), channel 2 holds -2 and 4 (mean 1, deviation 3); in two batches."""
    stage = new_stage("gt", f"gt.latent_scale={scale}")
    one = torch.tensor([[1.0, 3.0], [-2.0, -2.0]]).view(1, 2, 1, 2)
    other = torch.tensor([[3.0, 1.0], [4.0, 4.0]]).view(1, 2, 1, 2)
    ((mean, deviation),) = known_latents(stage, one, other)
    assert mean == pytest.approx([2, 1]) and deviation == pytest.approx(deviations, rel=1e-6)


def test_stage_gt_ends_with_the_averages_and_a_latent_of_unit_variance():
    stage = new_stage("gt", "gt.adversary.weight=0")
    step, batches = Step(stage), [batch_of(stage, 2, seed) for seed in (1, 2)]
    shifted(step)
    plain = new_stage("gt", "gt.adversary.weight=0").network
    plain.load_state_dict(stage.networks(step.averages.average)["autoencoder"])
    image = torch.cat([batch.image for batch in batches])
    step.finish(batches)
    with torch.no_grad():
        x = stage.network.encode(image)
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
        torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(8), rtol=0, atol=1e-3)
        torch.testing.assert_close(stage.network(image), plain(image), rtol=1e-3, atol=1e-3)  # pictures stay
    layer = "encoder.conv_in.weight"
    assert torch.equal(stage.network.state_dict()[layer], plain.state_dict()[layer])
    for key, value in stage.trained.state_dict().items():  # released next
        assert torch.equal(step.averages.average[key], value), key


def test_stage_gt_begins_with_its_linear_shortcut():
    """Fitted to the pictures: an untrained D(E(X)) is their projection. Not where the weights are given."""
    linear = "networks.autoencoder.shortcut=linear"
    stage, batch = new_stage("gt", linear), Batch(pictures(8), torch.arange(8))
    assert (
        stage.begins
        and not new_stage("gt").begins
        and not new_stage("gt", linear, "gt.latent_scale=kept", "release=folder").begins
    )
    told = stage.begin([batch])
    variances = fit_linear(new_stage("gt", linear).network, [batch.image])
    assert f"{variances[:8].sum() / variances.sum():.1%} of the variance in 8 channels" in told
    shortcut = stage.network.shortcut
    error = (shortcut.decode(shortcut.encode(batch.image)) - batch.image).square().mean()
    assert error.item() == pytest.approx(variances[8:].sum().item() / 768, rel=1e-3)


def test_evaluation_of_stage_gt():
    stage = new_stage("gt", "gt.adversary.weight=0", "gt.distortion_weight=2.0")
    stage.network.forward = lambda image: image + 0.25
    made = stage.evaluate(pictures(1), 0)
    assert made.loss == pytest.approx(0.5) and made.results[""][1] is None
    torch.testing.assert_close(made.results[""][0], pictures(1) + 0.25)
