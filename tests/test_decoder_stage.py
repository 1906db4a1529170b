"""Stage `decoder`: its loss, who learns, its run, and the release that it makes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from coding.api import load_codec
from datapipe.pictures import Batch
from main_diffusion_train_vq import main
from models.records import Draws
from models.released import load_release
from release.__main__ import main as release
from release.making import halved, round_to_half, write_release
from tests.commands import NANO
from tests.residual import SMALL, new_codec, picture
from tests.small_runs import ALONE, lines
from tests.stages import batch_of, new_stage
from tests.test_objectives import Recorder, as_floats, numbers
from training.config import load_config
from training.decoder_stage import Shown
from training.progress import Progress
from training.step import Step
from utils import checkpoints
from utils.errors import ConfigError

OURS = ALONE["decoder"]


def test_the_loss_of_stage_decoder():
    """L = w_d |X - X^|^2 + w_c chroma + w_p perceptual."""
    given = ("decoder.distortion_weight=0.9", "decoder.chroma_weight=0.6", "decoder.perceptual={lpips: 0.3}")
    stage = new_stage("decoder", *given, perceptual={"lpips": Recorder(1.0)})
    image, target = (numbers(2, 3, 2, 3) for _ in range(2))
    error = image - target
    expected = {
        "distortion": (error**2).mean(),
        "chroma": ((error - error.mean(1, keepdims=True)) ** 2).mean(),
        "lpips": (2 * image - target).mean() + 3,
    }
    expected["loss"] = 0.9 * expected["distortion"] + 0.6 * expected["chroma"] + 0.3 * expected["lpips"]
    out = Shown(torch.tensor(image), torch.zeros(2))
    assert as_floats(stage.losses(out, Batch(torch.tensor(target), torch.arange(2)))) == pytest.approx(
        expected, rel=1e-9
    )


def test_d_is_given_what_a_file_gives_and_clean_latents():
    """A quarter of the samples, evenly spread, is E(X); the others are x^ of the decoder's one step, without gradient."""
    stage = new_stage("decoder", "decoder.clean_share=0.25", residual=True)
    batch, codec = batch_of(stage, 8), stage.codec
    spread = torch.ones(8, dtype=torch.float64)
    coded = codec(batch.image, replace(Draws(**batch.draws), spread=spread), decode=False)
    latent = coded.x_hat.clone()
    latent[[3, 7]] = coded.x[[3, 7]]
    out = stage.forward(stage.network, batch)
    assert torch.equal(out.image, codec.autoencoder.decode(latent)) and out.image.requires_grad
    assert not stage.latent(batch)[0].requires_grad and not torch.equal(coded.x, coded.x_hat)
    scores = stage.evaluate(batch.image[:1], 0).results
    assert list(scores) == ["_level_0", "_level_3"] and scores["_level_0"][1] < scores["_level_3"][1]


def test_d_alone_moves():
    stage = new_stage("decoder", "decoder.adversary={weight: 0.5, adaptive: true}", residual=True)
    step, before = Step(stage), {k: v.clone() for k, v in stage.codec.state_dict().items()}
    step(batch_of(stage), Progress(stage.params))
    moved = {key for key, value in stage.codec.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith(("autoencoder.decoder.", "autoencoder.post_quant_conv.")) for key in moved)
    learns = {key for key, p in stage.codec.named_parameters() if p.requires_grad}
    assert moved == learns


@pytest.mark.parametrize(
    "overrides, told",
    [
        (OURS[:1], "or .decoder., .light. or .texture. with a release: folder"),
        ((*OURS, "autoencoder=gt.pth"), "leave out autoencoder"),
        ((*OURS, "decoder.clean_share=1.5"), "decoder.clean_share 1.5: in .0, 1."),
        ((*OURS, "decoder.distortion_weight=0"), "distortion_weight, .* are all 0"),
    ],
)
def test_configurations_that_teach_nothing_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config(str(NANO), overrides)


# A run and its release ------------------------------------------------------------------------------------------------


def taught(data: Path, save_dir: Path, source: Path, *options: str) -> int:
    sizes = ", ".join(f"{key}: {getattr(SMALL, key)}" for key in SMALL.__dataclass_fields__ if key != "extrapolated")
    own = "stages=[decoder]", f"release={source}", f"networks.residual={{{sizes}}}", "save_every=2"
    validated = (f"validation.folder={data}", "validation.limit=2", "validation.every=2")
    learns = "decoder.optim.lr=0.01", "decoder.ema=0.1", "networks.rate.c=0.07"
    command = ["--cfg_path", NANO, "--save_dir", save_dir, "--data", data, *own, *validated, *learns, *options]
    return main([*map(str, command)])


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A release in half precision, as training runs make them, that no test changes."""
    folder, codec = tmp_path_factory.mktemp("before") / "nano", new_codec()
    round_to_half(codec)
    config = replace(load_config(str(NANO)), networks=codec.params)
    write_release(folder, 3, codec, config, "float16", counted_indices=7)
    return folder


@pytest.fixture(scope="module")
def run(before, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert taught(data, folder, before, "decoder.iterations=4") == 0
    return folder / "nano"


def test_a_run_goes_on_without_its_release(before, run, data, tmp_path):
    """Two iterations, and the other two from the checkpoint, as if there had been no stop."""
    source = tmp_path / "gone"
    shutil.copytree(before, source)
    assert taught(data, tmp_path, source, "decoder.iterations=2") == 0
    shutil.rmtree(source)
    assert main(["--resume", str(tmp_path / "nano"), "decoder.iterations=4"]) == 0
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(tmp_path / "nano", name) == lines(run, name)


def test_its_release_has_the_same_bytes_and_other_pictures(before, run, tmp_path):
    """E, base, residual and all integers stay; the fingerprint does not."""
    assert release([str(run), str(tmp_path / "out")]) == 0
    old, new = load_codec(before), load_codec(tmp_path / "out")
    image = picture(64, 48)
    for quality in (0, 50, 100):
        ours, theirs = new.compress(image, quality=quality), old.compress(image, quality=quality)
        assert len(ours) == len(theirs)
        ours, theirs = new.model.read(ours), old.model.read(theirs)
        assert torch.equal(ours.k, theirs.k)
        assert not quality or (ours.symbols.residual == theirs.symbols.residual).all()
        assert not torch.equal(new.model.render(ours).image, old.model.render(theirs).image)
    assert new.model.fingerprint != old.model.fingerprint
    told, earlier = (json.loads((folder / "release.json").read_text()) for folder in (tmp_path / "out", before))
    assert told["iteration"] == 4 and told["counted_indices"] == earlier["counted_indices"]
    ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (tmp_path / "out", before))
    assert ours["networks"] == theirs["networks"] and told["c"] == ours["networks"]["rate"]["c"] != 0.07
    averages = halved(checkpoints.read(run / "checkpoints" / "decoder_4.pth")["averages"]["autoencoder"], "autoencoder")
    decoder = load_release(tmp_path / "out").autoencoder.state_dict()
    assert all(torch.equal(decoder[key], value.float()) for key, value in averages.items())


def test_a_checkpoint_between_and_the_best_one_do_as_well(run, tmp_path):
    folder, best = tmp_path / "run", json.loads((run / "best.json").read_text())["step"]
    shutil.copytree(run, folder)
    for path in (folder / "ema_ckpts").glob("*_2.*"):  # there if it is the best one
        path.unlink()
    for source, iteration, number in ((folder, "2", 2), (run, "best", best)):
        assert release([str(source), str(tmp_path / iteration), "--iteration", iteration]) == 0
        assert json.loads((tmp_path / iteration / "release.json").read_text())["iteration"] == number


def test_a_release_that_became_another_is_refused_in_one_line(before, run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copytree(before, tmp_path / "other")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(before), str(tmp_path / "other")))
    (tmp_path / "other" / "release.json").unlink()
    assert release([str(folder), str(tmp_path / "out")]) == 1
    assert "release.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "other")
    codec = load_release(before)
    codec.vq_base.quantize.embedding.weight.add_(1)
    write_release(tmp_path / "other", 3, codec, replace(load_config(str(NANO)), networks=codec.params))
    assert release([str(folder), str(tmp_path / "out")]) == 1
    assert "started from another release" in capsys.readouterr().err and not (tmp_path / "out").exists()
