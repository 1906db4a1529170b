"""The weights that ship: files written with them stay readable, and they do what weights/README.md says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coding.compressai_view import CompressAIView
from datapipe.sources import demo_photographs
from measuring.metrics import psnr
from models.entropy_coding import fixed_length_bytes
from models.records import Sampling
from models.released import ABOUT, RELEASES, SMALL, load_release, releases
from tests.commands import ROOT, grey_values, run
from utils.images import read_image

GOLDEN = Path(__file__).parent / "golden"
KODAK = ROOT.parent / "shared" / "data" / "kodak"
LOOKED_FOR = "Kodak is looked for in ../shared/data/kodak beside the repository"


@pytest.fixture(scope="module")
def codec():
    return load_release(SMALL)


golden = pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.dfo")), ids=lambda p: p.name)


@golden
def test_golden_files_decode_to_the_same_indices(path):
    """A file of a release, and the SHA-256 of its indices and symbols as little-endian int64 in row order."""
    expected = json.loads(path.with_suffix(".json").read_text())
    contents = load_release(RELEASES / expected["release"]).read(path.read_bytes())
    assert [contents.file.height, contents.file.width] == expected["size"]
    decoded = {"indices": contents.k[0].numpy()}
    if contents.symbols is not None:
        decoded |= {"hyper": contents.symbols.hyper, "residual": contents.symbols.residual}
    for name, values in decoded.items():
        assert hashlib.sha256(values.astype("<i8").tobytes()).hexdigest() == expected.get(f"{name}_sha256"), name


SAMPLINGS = {"one step": Sampling(), "schedule": Sampling(steps=99)}
TOLERANCE = 0.1  # grey values: rounding moves a mean by 0.01, another noise by 0.3, no denoiser by 2.4


@pytest.mark.parametrize("name", SAMPLINGS)
@golden
def test_golden_files_decode_to_the_same_picture(path, name):
    """The means of every channel in 8x8 blocks, in grey values, the RMS of grey's detail of 3x3 pixels there, and eta.

    A tenth less of texture moves a mean by 0.09 at most, and detail by 0.4.
    """
    expected = json.loads(path.with_suffix(".json").read_text())
    decoded = load_release(RELEASES / expected["release"]).decode(path.read_bytes(), SAMPLINGS[name])
    assert decoded.image.shape == (3, *expected["size"])
    picture = expected["pictures"][name]
    assert decoded.eta == pytest.approx(picture["eta"], rel=1e-12)
    image = decoded.image.double()
    grey = image.mean(0, keepdim=True)
    detail = grey - F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    means, deviations = F.adaptive_avg_pool2d(image, 8), F.adaptive_avg_pool2d(detail.square(), 8).sqrt()
    assert (means - torch.tensor(picture["means"])).abs().max() <= TOLERANCE
    assert (deviations - torch.tensor(picture["detail"])).abs().max() <= TOLERANCE


def test_there_is_a_golden_file_for_every_release():
    kept = {json.loads(p.read_text())["release"] for p in GOLDEN.glob("*.json")}
    assert kept == {folder.name for folder in releases().values()}


@pytest.mark.parametrize("folder", releases().values(), ids=lambda p: p.name)
def test_releases_are_what_they_state(folder):
    about = json.loads((folder / ABOUT).read_text())
    assert load_release(folder).fingerprint.hex() == about["fingerprint"]
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert digest in (RELEASES / "README.md").read_text(), f"weights/README.md does not list {name}"
    light = about["bytes"].pop(next((name for name in about["bytes"] if name.startswith("light_model")), ""), 0)
    assert sum(about["bytes"].values()) < 30e6 and light < 4e6


def test_the_light_decoder_draws_what_d_does():
    photo = read_image(next(p for p in demo_photographs() if p.name == "chelsea.png"))
    full, light = (load_release(SMALL, decoder=kind) for kind in ("full", "light"))
    data = full.compress(photo, 40)
    assert light.compress(photo, 40) == data  # the same file
    assert psnr(full.decompress(data), light.decompress(data)) > 36


def test_same_picture_with_one_and_two_threads_in_two_processes(tmp_path):
    chelsea = next(p for p in demo_photographs() if p.name == "chelsea.png")
    run("inference.py", "--mode", "compress", "-i", chelsea, "-o", tmp_path)
    for threads in (1, 2):
        args = ["--mode", "decompress", "-i", tmp_path, "-o", tmp_path / str(threads), "--ddim", "--one_step"]
        run("inference.py", *args, threads=threads)
    one, two = (grey_values(tmp_path / str(threads) / "chelsea.png") for threads in (1, 2))
    assert np.abs(one - two).max() <= 1
    cells = -(-one.shape[0] // 16) * -(-one.shape[1] // 16)
    assert (tmp_path / "chelsea.dfo").stat().st_size <= 20 + fixed_length_bytes(cells, 2048)


@pytest.mark.parametrize("quality", [0, 0.4, 45, 100])
def test_the_estimate_is_what_is_written(codec, quality):
    """Of pictures that no table was counted on: forward's likelihoods, with the integer tables, and the bytes."""
    if not KODAK.is_dir():
        pytest.skip(LOOKED_FOR)
    view = CompressAIView(codec, quality)
    for number in (3, 13, 20):
        image = read_image(KODAK / f"kodim{number:02}.png")
        bits = -sum(p.log2().sum().item() for p in view(image[None].float() / 255)["likelihoods"].values())
        written = 8 * len(codec.compress(image, quality))
        assert abs(bits - written) < 64


@pytest.mark.slow
def test_kodak_scores(tmp_path):
    """The small model on all of Kodak, from its files: the limits that it was released with."""
    if not KODAK.is_dir():
        pytest.skip(LOOKED_FOR)
    ways = ((["--ddim", "--one_step"], 0.0355, 23.2, 0.854), (["--target_bpp", 0.033], 0.033, 23.5, 0.844))
    for way, most, decibels, structure in ways:
        out = tmp_path / way[0]
        run("inference.py", "-i", KODAK, "-o", out, *way, threads=2, timeout=900)
        mean = json.loads((out / "metrics.json").read_text())["mean"]
        print(mean)
        assert mean["bpp"] <= most and mean["psnr"] >= decibels and mean["ms_ssim"] >= structure


@pytest.mark.slow
def test_rates_on_kodak(tmp_path):
    """Files of six levels of the small model: rates that rise, estimates that are the bytes, budgets that are used."""
    if not KODAK.is_dir():
        pytest.skip(LOOKED_FOR)
    means, largest = [], {}
    for quality in (0, 0.4, 20, 40, 60, 80, 100):
        out = tmp_path / str(quality)
        run("inference.py", "--mode", "compress", "-i", KODAK, "-o", out, "--quality", quality, threads=2, timeout=900)
        rows = json.loads((out / "metrics.json").read_text())["pictures"]
        for row in rows:
            parts = [row.get(f"{name}_bits") or 0 for name in ("header", "base", "hyper", "residual", "check")]
            assert sum(parts) == 8 * row["bytes"]
            assert abs(row["estimated_bits"] - sum(parts)) < 0.02 * sum(parts) + 128
        means.append(sum(row["bpp"] for row in rows) / len(rows))
        largest = {row["picture"]: row["bytes"] for row in rows}
    assert means == sorted(means) and means[0] < 0.0355 and means[1] < 0.0395 and means[-1] > 0.2
    for allowed in (400, 1000, 1600, 2200, 3000, 4000, 8000):
        out = tmp_path / f"{allowed} bytes"
        flags = ["--mode", "compress", "-i", KODAK, "-o", out, "--max_bytes", allowed]
        run("inference.py", *flags, threads=2, timeout=900)
        for row in json.loads((out / "metrics.json").read_text())["pictures"]:
            assert row["bytes"] <= allowed <= largest[row["picture"]] and row["code"]
            assert row["bytes"] >= 0.95 * allowed


@pytest.mark.slow
def test_the_training_line_of_the_readme(tmp_path):
    """The line with the demo's pictures, shortened to two iterations of each stage by the option for that."""
    line = next(t for t in (ROOT / "README.md").read_text().splitlines() if "configs/tiny.yaml" in t).split()
    assert line[0] == "python" and line[-2:] == ["--data", "pictures/"]
    arguments = [str(tmp_path) if word == "runs" else word for word in line[1:-2]]
    done = run(*arguments, "--iterations", 2, threads=2, timeout=900)
    assert done.stderr.startswith("no pictures are named")
    assert (tmp_path / "tiny" / "ema_ckpts" / "ema_model_2.pth").is_file()
