"""The light decoder of a release: the run that makes it, its file beside the three, who decodes with it."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coding.api import load_codec
from main_diffusion_train_vq import main
from models.light import LightParams
from models.records import ONE_STEP, CodecParams
from models.released import Triple, load_release
from models.released_light import save_light
from models.stated import meaning
from release.__main__ import main as release
from release.making import with_rate
from tests.commands import NANO, call, photograph
from tests.networks import numbers_of
from tests.residual import SMALL, picture
from tests.small_releases import reproduce, rows_in, two_layers
from tests.small_runs import LIGHT, lines
from utils import checkpoints
from utils.errors import CheckpointError

# A run, and the fourth file -------------------------------------------------------------------------------------------


def distil(data: Path, save_dir: Path, source: Path, *options: str) -> int:
    p = SMALL
    sizes = ", ".join(f"{key}: {getattr(p, key)}" for key in p.__dataclass_fields__ if key != "extrapolated")
    own = [option for option in LIGHT if not option.startswith("release=")]
    command = ["--cfg_path", NANO, "--save_dir", save_dir, "--data", data, *own, f"networks.residual={{{sizes}}}"]
    validated = (f"validation.folder={data}", "validation.limit=2", "validation.every=2")
    return main([*map(str, command), f"release={source}", "save_every=2", *validated, *options])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A release without a light decoder, that no test changes."""
    return two_layers(tmp_path_factory.mktemp("plain") / "nano")


@pytest.fixture(scope="module")
def run(plain, data, tmp_path_factory) -> Path:
    """A run of four iterations, whose weights have left the linear map."""
    folder = tmp_path_factory.mktemp("run")
    assert distil(data, folder, plain, "light.iterations=4", "light.optim.lr=0.01", "light.ema=0.1") == 0
    return folder / "nano"


@pytest.fixture(scope="module")
def four(plain, run, tmp_path_factory) -> Path:
    """A release with the run's light decoder, that no test changes."""
    folder = tmp_path_factory.mktemp("four") / "nano"
    shutil.copytree(plain, folder)
    assert release([str(run), str(folder)]) == 0
    return folder


def test_a_run_is_validated_saved_and_goes_on_without_its_release(plain, run, data, tmp_path):
    """Two iterations, and the other two from the checkpoint, as if there had been no stop."""
    source = tmp_path / "gone"
    shutil.copytree(plain, source)
    options = ("light.optim.lr=0.01", "light.ema=0.1")
    assert distil(data, tmp_path, source, "light.iterations=2", *options) == 0
    shutil.rmtree(source)
    assert main(["--resume", str(tmp_path / "nano"), "light.iterations=4"]) == 0
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(tmp_path / "nano", name) == lines(run, name)
    ours, theirs = (checkpoints.read(f / "checkpoints" / "light_4.pth")["averages"] for f in (tmp_path / "nano", run))
    assert checkpoints.digest(ours["light"]) == checkpoints.digest(theirs["light"])
    told = (run / "train.log").read_text()
    assert "linear map of the light decoder: leaves" in told and "psnr_level_3" in told


def test_the_fourth_file_changes_no_other_and_no_fingerprint(plain, four, run):
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in four.iterdir()} - names == {"light_model_3.pth"}
    for name in names - {"release.json"}:
        assert (four / name).read_bytes() == (plain / name).read_bytes(), name
    before, after = (json.loads((folder / "release.json").read_text()) for folder in (plain, four))
    assert after.pop("light") == {"iteration": 4}
    assert after["sha256"].pop("light_model_3.pth") and after["bytes"].pop("light_model_3.pth")
    assert before == after
    full, light = load_release(plain), load_release(four, decoder="light")
    assert full.fingerprint == light.fingerprint == load_release(four).fingerprint and load_release(four).light is None
    averages = checkpoints.read(run / "checkpoints" / "light_4.pth")["averages"]["light"]
    for key, value in light.light.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, averages[key].half().float()), key


def test_a_file_is_the_same_and_its_picture_another(four):
    full, light = load_codec(four), load_codec(four, decoder="light")
    data = full.compress(picture(40, 72), quality=50)
    assert light.compress(picture(40, 72), quality=50) == data
    ours, theirs = light.decompress(data), full.decompress(data)
    assert ours.shape == theirs.shape == (3, 40, 72) and not torch.equal(ours, theirs)
    model = light.model
    with torch.inference_mode():
        contents = model.read(data)
        x_hat, _ = model.denoise(*model.known([contents]), [contents.file], ONE_STEP)
        expected = ((model.light(x_hat)[0, :, :40, :72] + 1) * 127.5).clamp(0, 255).round().byte()
    assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="decoder 'lite': full, light"):
        load_codec(four, decoder="lite")


def test_sizes_of_the_light_decoder_are_no_part_of_what_a_fingerprint_names():
    params = CodecParams()
    assert meaning(replace(params, light=LightParams())) == meaning(params)


def changed(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "nano")
    return tmp_path / "nano"


def test_a_damaged_or_foreign_fourth_file_is_refused_in_one_line(four, tmp_path):
    folder = changed(four, tmp_path)
    path, about = folder / "light_model_3.pth", json.loads((folder / "release.json").read_text())
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(CheckpointError, match="light_model_3.pth: damaged, or of another release: its SHA-256"):
        load_release(folder, decoder="light")
    light = load_release(four, decoder="light").light
    save_light(path, light.state_dict(), LightParams((8, 4), (1, 1), 2), "0" * 64)
    about["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "release.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="reads latents of another image autoencoder"):
        load_release(folder, decoder="light")
    assert load_release(folder).light is None  # what has nothing to do with it is not refused


def test_a_cut_fourth_file_is_refused_in_one_line_by_the_command(four, tmp_path, capsys):
    folder = changed(four, tmp_path)
    path = folder / "light_model_3.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    photograph(tmp_path / "a.png", 64, 48)
    given = ("-i", tmp_path / "a.png", "--weights", folder, "--device", "cpu")
    status, _, told = call(capsys, *given, "-o", tmp_path / "out", "--decoder", "light")
    assert status == 1 and told.count("\n") == 1 and "light_model_3.pth: damaged" in told
    assert not (tmp_path / "out").exists()
    assert call(capsys, *given, "-o", tmp_path / "full")[0] == 0


def test_another_rate_rule_takes_the_fourth_file_along(four, tmp_path):
    """With its digest: what was whole is read, and what was damaged is refused."""
    rate = replace(load_release(four).params.rate, c=0.03)
    about = with_rate(four, rate, tmp_path / "new")
    assert about == json.loads((tmp_path / "new" / "release.json").read_text())
    old, new = (load_release(folder, decoder="light") for folder in (four, tmp_path / "new"))
    assert new.fingerprint != old.fingerprint and new.rate == rate
    assert new.light.sha256 == old.light.sha256 and about["light"] == {"iteration": 4}
    folder = changed(four, tmp_path)
    (folder / "light_model_3.pth").write_bytes(b"cut")
    with_rate(folder, rate, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="light_model_3.pth: damaged"):
        load_release(tmp_path / "damaged", decoder="light")
    (folder / "light_model_3.pth").unlink()
    assert "light" not in with_rate(folder, rate, tmp_path / "without")


def test_a_run_gives_its_decoder_to_its_own_release_and_once(four, run, tmp_path, capsys):
    assert release([str(run), str(four)]) == 1
    assert "light_model_3.pth: is there already; remove it" in capsys.readouterr().err
    folder = changed(four, tmp_path)
    (folder / "light_model_3.pth").unlink()
    other = checkpoints.read(Triple.in_folder(folder).autoencoder)
    other["state_dict"]["quant_conv.bias"] += 1
    checkpoints.save(Triple.in_folder(folder).autoencoder, other)
    assert release([str(run), str(folder)]) == 1
    assert "distilled from another release than" in capsys.readouterr().err
    assert not (folder / "light_model_3.pth").exists()
    assert release([str(run), str(tmp_path / "nothing")]) == 1
    assert "no release there" in capsys.readouterr().err


def test_d_takes_no_memory_beside_it(four):
    full, light = load_release(four), load_release(four, decoder="light")
    of_d = sum(p.numel() for part in full.autoencoder.decoding() for p in part.parameters())
    own = sum(p.numel() for p in light.light.parameters())
    assert of_d > 0 and numbers_of(light) == numbers_of(full) - of_d + own
    assert torch.equal(light.signals(picture(40, 72)[None])[0], full.signals(picture(40, 72)[None])[0])


# Commands -------------------------------------------------------------------------------------------------------------


def test_the_command_decodes_with_it_where_there_is_one(plain, four, tmp_path, capsys):
    photograph(tmp_path / "a.png", 64, 48)
    given = ("-i", tmp_path / "a.png", "--quality", 50, "--device", "cpu", "--weights")
    assert call(capsys, *given, four, "-o", tmp_path / "full")[0] == 0
    assert call(capsys, *given, four, "-o", tmp_path / "light", "--decoder", "light")[0] == 0
    same = [(tmp_path / name / "a.dfo").read_bytes() for name in ("full", "light")]
    assert same[0] == same[1] and json.loads((tmp_path / "light" / "metrics.json").read_text())
    assert (tmp_path / "full" / "a.png").read_bytes() != (tmp_path / "light" / "a.png").read_bytes()
    status, _, told = call(capsys, *given, plain, "-o", tmp_path / "none", "--decoder", "light")
    assert status == 1 and told.count("\n") == 1 and "this release has no light decoder (light_model_3.pth)" in told
    assert not (tmp_path / "none").exists()
    status, _, told = call(capsys, *given, four, "-o", tmp_path / "c", "--mode", "compress", "--decoder", "light")
    assert status == 2 and "--mode compress decodes nothing: leave out --decoder" in told


def test_rates_shows_both_decoders_at_the_same_bytes(four, tmp_path):
    photograph(tmp_path / "two" / "a.png", 96, 80)
    command = ["rates", "--weights", four, "--data", tmp_path / "two", "-o", tmp_path / "out", "--metrics", "psnr"]
    assert reproduce(*command, "--codecs", "--qualities", 0, 50, "--decoder", "full", "light", "--anchor", "nano") == 0
    rows = {(row["codec"], row["label"]): row for row in rows_in(tmp_path / "out" / "rates.csv")}
    assert set(rows) == {(codec, label) for codec in ("nano", "nano-light") for label in ("0", "50")}
    for label in ("0", "50"):
        full, light = rows["nano", label], rows["nano-light", label]
        assert full["bytes"] == light["bytes"] and full["psnr"] != light["psnr"]
        assert "light decoder" in light["made_from"] and "light decoder" not in full["made_from"]
