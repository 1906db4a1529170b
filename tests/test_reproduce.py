"""The command reproduce.py: the sweep of the noise level, the fit of c, and rates of one model."""

import csv
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.eta import Sweep, fit
from models.codec import Codec
from models.diffusion import RateParams
from models.entropy_coding import frequency_table
from models.released import load_release
from release.making import write_release
from release.tables import Counts
from reproduce import main
from tests.commands import NANO, photograph
from tests.residual import new_codec
from training.config import load_config

RATES = np.array([0.03, 0.05, 0.08, 0.12])
ETAS = np.geomspace(0.02, 1, 30)


def parabola(best) -> Sweep:
    """Scores with their least value at eta = best(rate)."""
    return Sweep(ETAS, RATES, np.stack([(np.log(ETAS) - np.log(best(b))) ** 2 for b in RATES]))


def test_c_is_found_where_the_best_eta_falls_as_the_rate_rises():
    found = parabola(lambda b: 0.013 / b)
    assert found.identifies_c
    rate = fit(found, RateParams())
    assert rate.c == pytest.approx(0.013, rel=0.03)
    assert found.of_rule(rate) < found.costs.mean(0).min() / 10


@pytest.mark.parametrize("best", [0.001, 100.0])
def test_a_monotone_sweep_identifies_nothing(best):
    """The default stays where every rate wants the least, or the most, noise of the sweep."""
    found = parabola(lambda b: best)
    assert not found.identifies_c
    assert fit(found, RateParams(c=0.02)).c == 0.02


def test_the_rule_is_interpolated_in_log_eta_and_clipped():
    found = Sweep(np.array([0.01, 1.0]), np.array([0.1, 0.1]), np.array([[0.0, 1.0], [2.0, 4.0]]))
    assert found.of_rule(RateParams(c=0.01, eta_min=0.01)) == pytest.approx((0.5 + 3) / 2)  # eta = 0.1
    assert found.of_rule(RateParams(c=1e-9, eta_min=0.01)) == 1 and found.of_rule(RateParams(c=9)) == 2.5


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "nano"
    codec = new_codec()
    write_release(folder, 3, codec, replace(load_config(str(NANO)), networks=codec.params), counted_indices=7)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two pictures")
    for i in range(2):
        photograph(folder / f"{i}.png", 96, 80, seed=i)
    return folder


def test_eta_is_swept_and_stored(release, pictures, tmp_path, capsys):
    stored = tmp_path / "stored"
    command = ["eta", "--weights", release, "--data", pictures, "--held_out", pictures, "-o", tmp_path / "out"]
    command += ["--points", 3, "--limit", 1, "--metric", "gmsd", "--device", "cpu"]
    assert main([str(a) for a in [*command, "--store", stored]]) == 0
    about = json.loads((tmp_path / "out" / "eta.json").read_text())
    assert about["metric"] == "gmsd" and about["better"] == "lower" and about["fit"]["pictures"] == 1
    scores = np.array(about["sweeps"]["fit"]["scores"])
    assert scores.shape == (6, 3) and about["fit"]["its score"] == pytest.approx(scores.mean(0).min(), abs=1e-5)
    rates = about["sweeps"]["fit"]["rates"]
    assert rates == sorted(rates)
    assert Image.open(tmp_path / "out" / "eta.png").size[0] > 500
    new, old = load_release(stored), load_release(release)
    assert new.params.rate.c == pytest.approx(about["c"], abs=1e-5)
    assert (new.fingerprint == old.fingerprint) == (new.params.rate == old.params.rate)
    assert torch.equal(new.unet.state_dict()["out.2.weight"], old.unet.state_dict()["out.2.weight"])
    assert json.loads((stored / "release.json").read_text())["counted_indices"] == 7
    capsys.readouterr()
    assert main([str(a) for a in [*command, "--store", stored]]) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_rates_of_one_model(release, pictures, tmp_path, capsys):
    command = ["rates", "--weights", release, "--data", pictures, "-o", tmp_path, "--qualities", "0", "50"]
    assert main([str(a) for a in [*command, "--metrics", "gmsd", "--device", "cpu"]]) == 0
    rows = list(csv.DictReader((tmp_path / "rates.csv").read_text().splitlines()))
    for row in rows:
        files = list((tmp_path / f"quality_{row['quality']}").glob("*.dfo"))
        assert float(row["bytes"]) == sum(f.stat().st_size for f in files) / 2
    assert float(rows[0]["bpp"]) < float(rows[1]["bpp"])
    command = shlex.split(json.loads((tmp_path / "quality_50" / "metrics.json").read_text())["about"]["command"])
    assert command[:4] == ["python", "inference.py", "-i", str(pictures)] and command[-1] == str(release)
    assert {p.name for p in tmp_path.glob("*.png")} == {"psnr.png", "gmsd.png"}  # too small for MS-SSIM


def test_two_layers_against_a_base_alone_at_its_bytes(release, tmp_path, capsys):
    """The same base and a larger code book: ours never takes more bytes, and the means are those of the rows."""
    rival, data = tmp_path / "k2048", tmp_path / "data"
    config = load_config(str(NANO), ["networks.vq_base.codebook_size=2048"])
    codec = Codec(config.networks)
    codec.base_table = frequency_table(Counts.none(codec).base)
    write_release(rival, 3, codec, config)
    data.mkdir()
    for i in range(2):
        photograph(data / f"{i}.png", 176, 192, seed=i)
    command = ["equal_bytes", "--weights", release, "--against", rival, "--data", data, "-o", tmp_path / "out"]
    assert main([str(a) for a in [*command, "--device", "cpu"]]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "equal_bytes.csv").read_text().splitlines()))
    assert [row["picture"] for row in rows] == ["0.png", "0.png", "1.png", "1.png"]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert all(their["weights"] == "k2048" and int(our["bytes"]) <= int(their["bytes"]) for their, our in pairs)
    won = sum(float(our["ms_ssim"]) > float(their["ms_ssim"]) for their, our in pairs)
    table = capsys.readouterr().out
    assert f"{won} of 2" in table and f"{2 - won} of 2" in table
    photograph(data / "small.png", 96, 96, seed=3)
    assert main([str(a) for a in [*command, "--device", "cpu"]]) == 1
    assert "small.png: MS-SSIM" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        (["eta", "--held_out", "PICTURES", "--metric", "lpips"], "unknown metric lpips"),
        (["eta", "--held_out", "none"], "none: no such file or folder"),
        (["eta", "--held_out", "PICTURES", "--store", "stored", "--weights", "bare"], "release.json: not there"),
        (["eta", "--held_out", "PICTURES", "--metric", "ms_ssim"], "ms_ssim needs sides from 161 pixels"),
        (["rates", "--metrics", "gmsd", "lpips"], "unknown metric lpips"),
        (["rates", "--weights", "none"], "none"),
        (["rates", "--qualities", "0", "101"], "101 is not in 0 to 100"),
        (["equal_bytes", "--against", "RELEASE", "none"], "none"),
    ],
    ids=" ".join,
)
def test_options_are_checked_before_pictures(flags, told, release, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Codec, "analyse", lambda *_: pytest.fail("a picture was coded"))
    flags = [{"PICTURES": str(pictures), "RELEASE": str(release)}.get(flag, flag) for flag in flags]
    try:
        status = main([*flags, "--data", str(pictures), "-o", "out", "--device", "cpu"])
    except SystemExit as stop:
        status = stop.code
    assert status and told in capsys.readouterr().err
