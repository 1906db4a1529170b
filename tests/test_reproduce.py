"""The commands of reproduce.py beside `rates`: what each one's table says, what `all` leaves out, what any refuses."""

import math
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from experiments import all as everything
from experiments import artefacts, branches, variance
from experiments.baselines import BASELINES
from experiments.coded import Variant
from measuring.artefacts import smooth_blocks
from models.codec import Codec
from models.records import Sampling
from models.released import load_release
from reproduce import parse
from tests.commands import photograph
from tests.small_releases import (
    SCORES,
    base_alone,
    larger_base,
    reproduce,
    rows_in,
    told_in,
    two_layers,
    two_photographs,
)
from utils.images import read_image


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("weights") / "nano")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return larger_base(tmp_path_factory.mktemp("weights") / "k2048")


@pytest.fixture
def pictures(tmp_path):
    return two_photographs(tmp_path / "two")


def test_steps_of_the_schedule_beside_the_papers(plain, pictures, tmp_path):
    one = base_alone(tmp_path / "one", "networks.diffusion.steps=1")
    command = ["table2", "--weights", plain, one, "--data", pictures, "-o", tmp_path / "out", "--metrics", *SCORES]
    assert reproduce(*command) == 0
    rows = {row["label"]: row for row in told_in(tmp_path / "out" / "table2.json")["rows"]}
    assert list(rows)[:3] == ["1 step", "2 steps", "trained with 2 steps, run with 1"]
    assert rows["2 steps"]["paper_psnr"] == 22.21 and rows["2 steps"]["paper's kind"] == "secondary"
    assert rows["50 steps"]["codec"] == "paper alone" and rows["50 steps"].get("psnr") is None
    data = load_release(plain).compress(read_image(pictures / "0.png"))
    decoded = load_release(plain).decode(data, Sampling(2)).image
    assert torch.equal(read_image(tmp_path / "out" / "decoded" / "k2048" / "2 steps" / "0.png"), decoded)
    assert {path.suffix for path in (tmp_path / "out").glob("psnr.*")} == {".png", ".pdf"}
    text = (tmp_path / "out" / "table2.md").read_text()
    assert "PSNR dB ↑, paper" in text and "LPIPS-vgg ↓, paper" in text and "- secondary: through a third party" in text
    assert reproduce(*command, "--weights", plain, tmp_path / "one", one) == 1  # one folder twice


def test_branches_are_switched_off_in_decoding(plain, pictures, tmp_path):
    command = ["branches", "--weights", plain, "--data", pictures, "-o", tmp_path, "--metrics", *SCORES]
    assert reproduce(*command) == 0
    rows = [row for row in told_in(tmp_path / "branches.json")["rows"] if row["codec"] == "k2048"]
    assert [row["label"] for row in rows] == ["base only", "residual only", "both"]
    assert len({row["bytes"] for row in rows}) == 1 and len({row["psnr"] for row in rows}) == 3
    codec = load_release(plain)
    decoded = codec.decompress(codec.compress(read_image(pictures / "0.png")))
    assert torch.equal(read_image(tmp_path / "decoded" / "k2048" / "both" / "0.png"), decoded)
    off = base_alone(tmp_path / "detail-off", "networks.detail_branch=false")
    assert [v.label for v in branches.variants_of("detail-off", load_release(off), 0)] == ["base only"]


def test_ablations_beside_their_reference(tmp_path, capsys):
    """A second seed of an ablation is a row of its own; KID has an interval, and so has its change."""
    torch.manual_seed(2)
    for name in ("config", "codebook-64", "codebook-64-seed-1"):
        base_alone(tmp_path / "releases" / name)
    unfinished = tmp_path / "releases" / "shift-off"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("name: shift-off")
    for i in range(4):
        photograph(tmp_path / "four" / f"{i}.png", 256, 256, seed=i)
    command = ["ablation", "--releases", tmp_path / "releases", "--data", tmp_path / "four", "-o", tmp_path / "out"]
    command += ["--metrics", *SCORES, "--distances", "kid-stlpips-alex", "fid-stlpips-alex"]
    assert reproduce(*command) == 0
    told = capsys.readouterr().err
    assert "shift-off has no release yet" in told and "left out: fid-stlpips-alex: 4 patches" in told
    rows = {row["codec"]: row for row in told_in(tmp_path / "out" / "ablation.json")["rows"]}
    assert list(rows) == ["codebook-64", "codebook-64-seed-1", "config"]
    for name in ("psnr", "kid-stlpips-alex"):
        change, row = rows["codebook-64"][name] - rows["config"][name], rows["codebook-64"]
        assert row[f"change-of-{name}"] == pytest.approx(change) and change != 0
        assert row[f"change-of-{name}_low"] <= row[f"change-of-{name}"] <= row[f"change-of-{name}_high"]
        assert f"change-of-{name}" not in rows["config"]
    first = "64 base codes: 0.0234 bits per pixel at fixed length."
    assert [row["changes"] for row in rows.values()] == [first, f"{first} Seed 1.", None]
    assert "change of KID-ST-LPIPS-alex ↓" in (tmp_path / "out" / "ablation.md").read_text()


def test_two_layers_against_a_base_alone_at_its_bytes(release, plain, pictures, tmp_path):
    """Ours never takes more bytes, and what was won is said by score."""
    command = ["equal_bytes", "--weights", release, "--against", plain, "--data", pictures, "-o", tmp_path / "out"]
    assert reproduce(*command, "--metrics", "psnr", "gmsd") == 0
    rows = rows_in(tmp_path / "out" / "pictures.csv")
    theirs, ours = ([row for row in rows if row["codec"] == codec] for codec in ("base alone", "two layers"))
    assert [row["label"] for row in theirs + ours] == ["k2048"] * 2 + ["at k2048"] * 2
    pairs = list(zip(theirs, ours, strict=True))
    assert all(int(our["bytes"]) <= int(their["bytes"]) for their, our in pairs)
    their_mean, our_mean = told_in(tmp_path / "out" / "equal_bytes.json")["rows"]
    won = sum(float(our["psnr"]) > float(their["psnr"]) for their, our in pairs)
    assert (our_mean["won by PSNR"], their_mean["won by PSNR"]) == (f"{won} of 2", f"{2 - won} of 2")
    won = sum(float(our["gmsd"]) < float(their["gmsd"]) for their, our in pairs)  # less is better
    assert our_mean["won by GMSD"] == f"{won} of 2"


def test_the_rate_varies_with_the_content_unless_indices_are_at_fixed_length(release, tmp_path):
    """Three pictures; a picture of 96x80 has 6 x 5 indices, and 16 bytes of header and check beside them."""
    for i in range(3):
        photograph(tmp_path / "three" / f"{i}.png", 96, 80, seed=i)
    out, images = tmp_path / "out", [read_image(tmp_path / "three" / f"{i}.png") for i in range(3)]
    command = ["variance", "--weights", release, "--data", tmp_path / "three", "-o", out, "--codecs", "webp"]
    assert reproduce(*command) == 0
    codec = load_release(release)
    ours, fixed, webp = told_in(out / "variance.json")["rows"]
    rates = [8 * len(codec.compress(image)) / (96 * 80) for image in images]
    assert (ours["label"], ours["bpp"]) == ("0", pytest.approx(statistics.mean(rates)))
    assert ours["standard deviation, bits per pixel"] == pytest.approx(statistics.stdev(rates)) and min(rates) < max(
        rates
    )
    assert (ours["least, bits per pixel"], ours["largest, bits per pixel"]) == pytest.approx((min(rates), max(rates)))
    size = 16 + math.ceil(30 * math.log2(codec.params.vq_base.codebook_size) / 8)
    assert fixed["bpp"] == pytest.approx(8 * size / (96 * 80)) and fixed["of the mean, %"] == pytest.approx(0)
    means = {q: statistics.mean(len(BASELINES["webp"].at(image, q).data) for image in images) for q in range(0, 101, 5)}
    closest = min(abs(mean - ours["bpp"] * 96 * 80 / 8) for mean in means.values())
    assert abs(webp["bpp"] - ours["bpp"]) * 96 * 80 / 8 <= closest + 1e-9 and webp["label"].startswith("quality ")
    assert (out / "variance.pdf").is_file()


def test_the_nearest_setting_is_found_on_either_side_of_the_bytes():
    """Files of 10, 20, 40 and 80 bytes at settings 0 to 3, and where even the smallest is too large."""
    sizes, codec = (10, 20, 40, 80), SimpleNamespace(name="a", setting="{}", settings=range(4))

    def measure(name, label, made, size):
        return [{"bytes": sizes[int(label)], "label": label}]

    for aim, expected in ((28, "1"), (32, "2"), (40, "2"), (5, "0"), (500, "3")):
        assert variance.nearest(measure, codec, aim)[0]["label"] == expected


def test_a_distribution_is_about_its_mean():
    assert variance.distribution([0.3, 0.1, 0.2, 0.2]) == [
        (pytest.approx(x), y) for x, y in ((-50, 12.5), (0, 37.5), (0, 62.5), (50, 87.5))
    ]


def test_the_autoencoder_alone_beside_principal_components(release, pictures, tmp_path):
    """Eight components of the pictures' own blocks: no other linear map of eight channels has a smaller error there."""
    out = tmp_path / "out"
    command = ["ceiling", "--weights", release, "--data", pictures, "--fit", pictures, "-o", out]
    assert reproduce(*command, "--metrics", "psnr") == 0
    rows = {row["label"]: row for row in told_in(out / "ceiling.json")["rows"]}
    assert rows["D(E(X))"]["codec"] == "nano" and rows["D(E(X))"]["pictures"] == 2
    blocks = torch.cat([F.pixel_unshuffle(read_image(path).double(), 16).flatten(1).T for path in pictures.iterdir()])
    centred = blocks - blocks.mean(0)
    lost = torch.linalg.eigvalsh(centred.T @ centred)[:-8].sum() / centred.numel()  # squared grey values
    assert rows["principal components"]["psnr"] == pytest.approx(10 * math.log10(255**2 / lost), abs=0.5)


def test_artefacts_are_measured_on_the_decoded_pictures(release, tmp_path):
    photograph(tmp_path / "one" / "a.png", 256, 208, seed=0)
    out = tmp_path / "out"
    command = ["artefacts", "--weights", release, "--data", tmp_path / "one", "-o", out, "--metrics", "psnr"]
    assert reproduce(*command, "--qualities", 0, "--beside", "webp") == 0
    grain, row, other = told_in(out / "artefacts.json")["rows"]
    decoded, original = out / "decoded" / "nano" / "0" / "a.png", tmp_path / "one" / "a.png"
    error = read_image(decoded).double() - read_image(original).double()
    assert [row[f"cast {c}"] for c in "RGB"] == pytest.approx(error.mean((1, 2)).tolist())
    inner = error[:, 4:-4, 4:-4].square()
    outer = (error.square().sum() - inner.sum()) / (error.numel() - inner.numel())
    assert row["border / middle"] == pytest.approx((outer / inner.mean()).sqrt().item())
    assert row["black, largest error"] >= 0 and row["line along x"] > 0
    blocks, _ = smooth_blocks(read_image(tmp_path / "one" / "a.png"), read_image(decoded))
    assert grain["codec"] == "original" and grain["smooth blocks"] == len(blocks)
    assert other["codec"] == "webp" and "black, largest error" not in other


@pytest.mark.parametrize("name, value", [("black", 0), ("white", 255)])
def test_the_error_of_a_flat_picture_is_its_largest_either_way(name, value):
    """A codec that makes everything 120 and one value 130: off by 130 of black, by 135 of white."""

    class Greys:
        analyse = write = staticmethod(lambda given, *_: given)
        level_code = staticmethod(lambda quality: 0)

        @staticmethod
        def decode(picture, sampling):
            assert picture.unique().tolist() == [artefacts.FLAT[name]] == [value]
            image = torch.full_like(picture, 120)
            image[0, 0, 0] = 130
            return SimpleNamespace(image=image)

    assert artefacts.flat(Variant("greys", "0", Greys), value) == max(130 - value, value - 120)


def test_table1_has_rates_sizes_and_seconds(release, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.table1.SIZE", "64x64")
    command = ["table1", "--weights", release, "--data", pictures, "-o", tmp_path, "--codecs", "webp", "--repeats", 1]
    assert reproduce(*command, "--metrics", *SCORES, "--qualities", 0, 100, "--anchor", "nano") == 0
    ours, webp, *paper = told_in(tmp_path / "table1.json")["rows"]
    assert ours["parameters"] == sum(p.numel() for p in load_release(release).parameters())
    assert ours["encode_s"] > 0 and ours["decode_s"] > 0
    assert (ours["paper_parameters"], ours["paper_decode_s"]) == (210_000_000, 0.253)
    assert webp["codec"] == "webp" and {row["codec"] for row in paper} > {"DiffEIC (paper alone)"}
    assert all(key.startswith(("paper", "codec")) for row in paper for key in row)


def test_all_says_what_each_command_lacks(release, plain, pictures, tmp_path, monkeypatch, capsys):
    done = {}
    names = (
        "rates",
        "table1",
        "variance",
        "timing",
        "equal_bytes",
        "branches",
        "ceiling",
        "artefacts",
        "crops",
        "report",
    )
    for name in names:
        monkeypatch.setattr(getattr(everything, name), "run", lambda args, name=name: done.update({name: args}))
    command = ["all", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", *SCORES]
    assert reproduce(*command, "--against", plain, "--side", 64) == 0
    assert set(done) == set(names)
    assert "jpeg2000" in done["rates"].codecs and "jpeg2000" not in done["variance"].codecs  # it meets any size
    assert done["crops"].qualities == [0, 40] and done["crops"].out_path == tmp_path / "out" / "crops"
    assert done["timing"].out_path == tmp_path / "out" / "timing" and done["timing"].data.name == "0.png"
    assert done["rates"].command.startswith("python reproduce.py all --weights")
    told = capsys.readouterr().err
    for line in ("table2 needs releases", "ablation needs a release of config", "eta needs --held_out"):
        assert f"left out: {line}" in told
    # Every option that a command reads is one of all's.
    for name in ("rates", "table1", "timing", "ceiling", "artefacts", "crops", "report"):
        own = vars(parse([name, *(["--data", "x"] if name not in ("timing", "report") else [])]))
        assert set(own) <= set(vars(done[name]))


def test_table_2_takes_one_release_for_each_number_of_steps():
    """Second seeds, and ablations of another size, have the same numbers of steps."""
    names = ("steps-1", "steps-15", "steps-1-seed-1", "small-steps-1", "small-steps-1-seed-1", "config")
    folders = {name: Path(name) for name in names}
    assert everything.by_steps(folders, "config") == [Path("steps-1"), Path("steps-15")]
    assert everything.by_steps(folders, "small-steps-2") == [Path("small-steps-1")]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["eta", "--held_out", "PICTURES", "--metric", "lpips"], "unknown metric lpips"),
        (["eta", "--held_out", "none"], "none: no such file or folder"),
        (["eta", "--held_out", "PICTURES", "--store", "stored", "--weights", "bare"], "release.json: not there"),
        (["eta", "--held_out", "PICTURES", "--metric", "ms_ssim"], "ms_ssim needs sides from 161 pixels"),
        (["rates", "--metrics", "gmsd", "lpips"], "unknown metric lpips"),
        (["rates", "--weights", "none"], "none"),
        (["rates", "--qualities", "20", "200"], "usage: reproduce.py rates"),
        (["rates", "--qualities", "20", "200"], "200 is not in 0 to 100"),
        (["rates", "--distances", "fvd"], "unknown distance fvd"),
        (["rates", "--codecs", "bmp"], "--codecs bmp: unknown"),
        (["artefacts", "--beside", "bmp"], "--beside bmp: unknown"),
        *(([name, "--weights", "webp"], "a release is called webp") for name in ("rates", "artefacts", "variance")),
        (["rates", "--anchor", "vvc"], "--anchor vvc: not among what is measured"),
        (["rates", "--published", "moon"], "--published moon: no such set"),
        (["rates", "--weights", "RELEASE", "RELEASE"], "two releases of one folder name"),
        (["rates", "--weights", "PLAIN", "--qualities", "20"], "k2048: this release codes the base alone"),
        (["table2", "--quality", "50", "--weights", "PLAIN"], "--quality 50: k2048 codes the base alone"),
        (["ablation", "--releases", "PLAIN"], "--reference config: none of the releases is called so"),
        (["timing", "--config", "any.yaml", "--weights", "RELEASE"], "leave out --weights and --decoder"),
        (["timing", "--config", "any.yaml", "--decoder", "light"], "leave out --weights and --decoder"),
        (["equal_bytes", "--against", "RELEASE", "none"], "none"),
        (["equal_bytes", "--against", "RELEASE"], "--against: nano has a residual codec"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_options_are_checked_before_pictures(flags, told, release, plain, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Codec, "analyse", lambda *_: pytest.fail("a picture was coded"))
    shutil.copytree(release, "webp")
    named = {"PICTURES": str(pictures), "RELEASE": str(release), "PLAIN": str(plain)}
    status = reproduce(*(named.get(flag, flag) for flag in flags), "--data", pictures, "-o", "out")
    assert status and told in capsys.readouterr().err
    assert not [path for path in Path("out").rglob("*") if path.is_file()]
