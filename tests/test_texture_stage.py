"""Stage `texture`: its loss, who learns, its run, and the release that it makes."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from coding.api import load_codec
from datapipe.draws import draw
from main_diffusion_train_vq import main
from models.autoencoder import DECODING
from models.blocks import finished
from models.records import Draws
from models.released import Triple, load_release
from models.texture import FILTERS
from release.__main__ import main as release
from release.making import halved, round_to_half, write_about, write_release
from tests.commands import NANO, call, photograph
from tests.residual import SMALL, new_codec, picture
from tests.small_runs import TEXTURE, lines
from tests.stages import batch_of, new_stage
from tests.test_decoder_stage import taught as taught_d
from training.config import load_config
from training.progress import Progress
from training.step import Step
from utils import checkpoints
from utils.errors import ConfigError


def test_it_is_given_what_d_makes_of_a_file_and_noise_for_every_pixel():
    """X~ = T(D(x^), x^, noise), finished as decoders finish; no gradient reaches D."""
    stage = new_stage("texture", "texture.clean_share=0", "networks.colour_blur=0.5", residual=True)
    torch.nn.init.normal_(stage.codec.texture.conv_out.weight, std=0.1)
    batch, codec = batch_of(stage, 4), stage.codec
    assert batch.draws["grain"].shape == (4, 256, 2, 2)
    spread = torch.ones(4, dtype=torch.float64)
    x_hat = codec(batch.image, replace(Draws(**batch.draws), spread=spread), decode=False).x_hat.detach()
    image = codec.autoencoder.decode(x_hat).detach()
    out = stage.forward(stage.network, batch)
    expected = finished(codec.texture(image, x_hat, batch.draws["grain"]), 0.0, 0.5)
    torch.testing.assert_close(out.image, expected)
    assert not torch.allclose(out.image, finished(image, 0.0, 0.5), atol=1e-3)
    scores = stage.evaluate(batch.image[:1], 0).results
    assert list(scores) == ["_level_0", "_level_3"] and scores["_level_0"][1] < scores["_level_3"][1]


def test_noise_of_pixels_comes_after_all_other_numbers_of_a_sample():
    """So that a sample's other numbers are those of a run without texture."""
    stage, plain = new_stage("texture", residual=True), new_stage("decoder", residual=True)
    with_grain, without = (draw(each.draw_params(32, 32), 0, 5) for each in (stage, plain))
    assert with_grain.keys() - without.keys() == {"grain"}
    assert all(torch.equal(value, with_grain[key]) for key, value in without.items())
    assert abs(with_grain["grain"].std() - 1) < 0.1


def test_texture_alone_moves():
    stage = new_stage("texture", "texture.adversary={weight: 0.5, adaptive: true}", residual=True)
    step, before = Step(stage), {k: v.clone() for k, v in stage.codec.state_dict().items()}
    for _ in range(2):  # what lies before a layer that starts at zero moves from the second step on
        step(batch_of(stage), Progress(stage.params))
    moved = {key for key, value in stage.codec.state_dict().items() if not torch.equal(value, before[key])}
    learns = {key for key, p in stage.codec.named_parameters() if p.requires_grad}
    assert moved == learns == {key for key in before if key.startswith("texture.")}


def test_d_moves_with_it_at_its_share_of_the_learning_rate():
    """AdamW's first steps are as long as the learning rate: D's a tenth of texture's. E stays."""
    stage = new_stage("texture", "texture.train_decoder=0.1", "texture.optim.lr=0.01", residual=True)
    codec = stage.codec
    torch.nn.init.normal_(codec.texture.conv_out.weight, std=0.1)
    step, before = Step(stage), {k: v.clone() for k, v in codec.state_dict().items()}
    step(batch_of(stage), Progress(stage.params))
    moved = {
        key: (value - before[key]).abs().max().item() for key, value in codec.state_dict().items() if value.numel()
    }
    decoding = tuple(f"autoencoder.{part}." for part in DECODING)
    for key, distance in moved.items():
        if key.endswith(".k.bias"):  # attention does not depend on it, and AdamW divides noise by noise
            continue
        if key.startswith(("texture.", *decoding)):
            most = 0.01 if key.startswith("texture.") else 0.001
            assert 0.5 * most < distance < 1.1 * most, key
        else:
            assert distance == 0, key


@pytest.mark.parametrize(
    "overrides, told",
    [
        (TEXTURE[:2], "networks.texture is what stage texture trains"),
        (TEXTURE[2:], "networks.texture is what stage texture trains"),
        (TEXTURE[::2], "or .texture. with a release: folder"),
        ((*TEXTURE, "unet=u.pth"), "leave out unet"),
        ((*TEXTURE, "texture.distortion_weight=0"), "distortion_weight, .* are all 0"),
    ],
)
def test_configurations_that_teach_nothing_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_config(str(NANO), overrides)


# A run and its release ------------------------------------------------------------------------------------------------


def taught(data: Path, save_dir: Path, source: Path, *options: str) -> int:
    sizes = ", ".join(f"{key}: {getattr(SMALL, key)}" for key in SMALL.__dataclass_fields__ if key != "extrapolated")
    own = "stages=[texture]", f"release={source}", TEXTURE[2], f"networks.residual={{{sizes}}}", "save_every=2"
    validated = (f"validation.folder={data}", "validation.limit=2", "validation.every=2")
    learns = "texture.optim.lr=0.01", "texture.ema=0.1", "networks.colour_blur=0.5", "networks.rate.c=0.07"
    command = ["--cfg_path", NANO, "--save_dir", save_dir, "--data", data, *own, *validated, *learns, *options]
    return main([*map(str, command)])


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A release in half precision with a light decoder, whose contents nobody reads; no test changes it."""
    folder, codec = tmp_path_factory.mktemp("before") / "nano", new_codec(sharpening=0.5)
    round_to_half(codec)
    config = replace(load_config(str(NANO)), networks=codec.params)
    about = write_release(folder, 3, codec, config, "float16", counted_indices=7)
    light = Triple.in_folder(folder).light
    light.write_bytes(b"light")
    about["sha256"][light.name], about["bytes"][light.name] = hashlib.sha256(b"light").hexdigest(), 5
    write_about(folder, about | {"light": {"iteration": 9}})
    return folder


@pytest.fixture(scope="module")
def run(before, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert taught(data, folder, before, "texture.iterations=4") == 0
    return folder / "nano"


def test_a_run_goes_on_without_its_release(before, run, data, tmp_path):
    """Two iterations, and the other two from the checkpoint, as if there had been no stop."""
    source = tmp_path / "gone"
    shutil.copytree(before, source)
    assert taught(data, tmp_path, source, "texture.iterations=2") == 0
    shutil.rmtree(source)
    assert main(["--resume", str(tmp_path / "nano"), "texture.iterations=4"]) == 0
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(tmp_path / "nano", name) == lines(run, name)


def test_its_release_has_the_same_bytes_and_other_pictures(before, run, tmp_path):
    """All that was there stays, the light decoder too; the fingerprint does not."""
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
    rules = {key: new.model.params.rules[key] for key in ("sharpening", "colour_blur")}
    assert rules == {"sharpening": 0.0, "colour_blur": 0.5} and old.model.params.sharpening == 0.5
    told, earlier = (json.loads((folder / "release.json").read_text()) for folder in (tmp_path / "out", before))
    assert told["iteration"] == 4 and told["counted_indices"] == earlier["counted_indices"]
    assert told["light"] == {"iteration": 9} and (tmp_path / "out" / "light_model_4.pth").read_bytes() == b"light"
    assert told["sha256"]["light_model_4.pth"] == earlier["sha256"]["light_model_3.pth"]
    networks = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["networks"]
    assert (
        networks["texture"] == {"width": 4, "num_res_blocks": 1, "fade": 0.0}
        and told["c"] == networks["rate"]["c"] != 0.07
    )
    averages = halved(checkpoints.read(run / "checkpoints" / "texture_4.pth")["averages"]["texture"], "texture")
    state = load_release(tmp_path / "out").texture.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in averages.items())
    assert averages["conv_out.bias"][:FILTERS].abs().max() > 0.01


def test_the_command_adds_as_much_texture_as_is_asked(run, tmp_path, capsys):
    """The same file; none, all and more of it. An encoder has nothing to add it to."""
    assert release([str(run), str(tmp_path / "out"), "--fade", "0.25"]) == 0
    assert load_release(tmp_path / "out").params.texture.fade == 0.25
    assert release([str(run), str(tmp_path / "no"), "--masking", "0.1"]) == 1
    assert "--masking: a run of stage texture leaves the rules of its release" in capsys.readouterr().err
    photograph(tmp_path / "a.png", 64, 48)
    given = ("-i", tmp_path / "a.png", "--quality", 50, "--device", "cpu", "--weights", tmp_path / "out")
    for share in ("0", "1", "2"):
        assert call(capsys, *given, "-o", tmp_path / share, "--texture", share)[0] == 0
    assert call(capsys, *given, "-o", tmp_path / "default")[0] == 0
    files, pictures = ({(tmp_path / n / f"a.{kind}").read_bytes() for n in ("0", "1", "2")} for kind in ("dfo", "png"))
    assert len(files) == 1 and len(pictures) == 3
    assert (tmp_path / "default" / "a.png").read_bytes() == (tmp_path / "1" / "a.png").read_bytes()
    status, _, told = call(capsys, *given, "-o", tmp_path / "c", "--mode", "compress", "--texture", "0")
    assert status == 2 and "--mode compress decodes nothing: leave out --texture" in told
    status, _, told = call(capsys, *given, "-o", tmp_path / "c", "--texture", "2.5")
    assert status == 2 and "in 0 to 2" in told


def test_a_release_of_d_that_learnt_with_texture(before, data, tmp_path, capsys):
    """Both are the run's averages; files keep their bytes; the light decoder knew another D and stays behind."""
    assert taught(data, tmp_path, before, "texture.iterations=2", "texture.train_decoder=0.1") == 0
    capsys.readouterr()
    assert release([str(tmp_path / "nano"), str(tmp_path / "out")]) == 0
    assert f"without the light decoder of {before}: trained for the D that it had\n" in capsys.readouterr().err
    old, new = (load_codec(each, precision="float32") for each in (before, tmp_path / "out"))
    image = picture(64, 48)
    assert len(new.compress(image, quality=50)) == len(old.compress(image, quality=50))
    averages = checkpoints.read(tmp_path / "nano" / "checkpoints" / "texture_2.pth")["averages"]
    assert averages.keys() == {"texture", "autoencoder"}
    for name, average in averages.items():
        stored, earlier = (getattr(each.model, name) for each in (new, old))
        changed = set()
        for key, value in halved(average, name).items():
            assert torch.equal(stored.state_dict()[key], value.float()), key
            if earlier and not torch.equal(earlier.state_dict()[key], value.float()):
                changed.add(key)
        assert not earlier or (changed and all(key.startswith(DECODING) for key in changed))
    told = json.loads((tmp_path / "out" / "release.json").read_text())
    assert "light" not in told and not Triple.in_folder(tmp_path / "out").light.is_file()


def test_no_path_of_the_machine_that_trained_stands_in_a_release(tmp_path):
    overrides = (
        *TEXTURE,
        "release=/far/away/first",
        "texture.start=/far/away/third",
        "light.start=/far/away/fourth.pth",
    )
    write_release(tmp_path / "out", 3, new_codec(), load_config(str(NANO), overrides))
    text = (tmp_path / "out" / "config.yaml").read_text()
    kept = yaml.safe_load(text)
    assert "/far" not in text and kept["texture"]["start"] == "third" and kept["light"]["start"] == "fourth.pth"
    assert kept["release"] == "first"


def test_a_checkpoint_between_does_as_well_and_another_d_leaves_texture_out(run, data, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in (folder / "ema_ckpts").glob("*_2.*"):  # there if it is the best one
        path.unlink()
    assert release([str(folder), str(tmp_path / "two"), "--iteration", "2"]) == 0
    assert load_release(tmp_path / "two").texture is not None
    assert taught_d(data, tmp_path, tmp_path / "two", "decoder.iterations=1") == 0
    capsys.readouterr()
    assert release([str(tmp_path / "nano"), str(tmp_path / "another")]) == 0
    assert f"without the light decoder and texture of {tmp_path / 'two'}: trained" in capsys.readouterr().err
    codec = load_release(tmp_path / "another")
    assert codec.texture is None and codec.params.texture is None


def test_a_release_whose_d_became_another_is_refused_in_one_line(before, run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(before), str(tmp_path / "other")))
    codec = load_release(before)
    codec.autoencoder.post_quant_conv.bias.add_(1)
    write_release(tmp_path / "other", 3, codec, replace(load_config(str(NANO)), networks=codec.params))
    assert release([str(folder), str(tmp_path / "out")]) == 1
    assert "started from another release" in capsys.readouterr().err and not (tmp_path / "out").exists()
