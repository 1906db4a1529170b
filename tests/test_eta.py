"""The sweep of the noise level, and the fit of c."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.eta import Sweep, fit
from models.codec import Codec
from models.diffusion import RateParams
from models.released import load_release
from tests.commands import photograph
from tests.small_releases import reproduce, told_in, two_layers

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


def test_eta_is_swept_once_and_stored(tmp_path, capsys, monkeypatch):
    release, stored, pictures = two_layers(tmp_path / "nano"), tmp_path / "stored", tmp_path / "two"
    for i in range(2):
        photograph(pictures / f"{i}.png", 96, 80, seed=i)
    command = ["eta", "--weights", release, "--data", pictures, "--held_out", pictures, "-o", tmp_path / "out"]
    command += ["--points", 3, "--limit", 1, "--metric", "gmsd"]
    assert reproduce(*command, "--store", stored) == 0
    content = told_in(tmp_path / "out" / "eta.json")
    about, fitted = content["about"], content["rows"][0]
    assert about["metric"] == "gmsd" and about["better"] == "lower" and fitted["pictures"] == 1
    scores = np.array(content["sweeps"]["fit"]["scores"])
    assert scores.shape == (6, 3) and fitted["its score"] == pytest.approx(scores.mean(0).min(), abs=1e-5)
    rates = content["sweeps"]["fit"]["rates"]
    assert rates == sorted(rates)
    assert Image.open(tmp_path / "out" / "eta.png").size[0] > 500
    new, old = load_release(stored), load_release(release)
    assert new.params.rate.c == pytest.approx(about["c"], abs=1e-5)
    assert (new.fingerprint == old.fingerprint) == (new.params.rate == old.params.rate)
    assert torch.equal(new.unet.state_dict()["out.2.weight"], old.unet.state_dict()["out.2.weight"])
    assert told_in(stored / "release.json")["counted_indices"] == 7
    capsys.readouterr()
    assert reproduce(*command, "--store", stored) == 1
    assert "not an empty folder" in capsys.readouterr().err
    monkeypatch.setattr(Codec, "analyse", lambda *_: pytest.fail("a picture was coded again"))
    assert reproduce(*command) == 0
    assert told_in(tmp_path / "out" / "eta.json")["sweeps"] == content["sweeps"]
