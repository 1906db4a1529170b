"""The command reproduce.py rates: codecs at equal bytes, scores and distances, and that nothing is done twice."""

import shlex
from collections import Counter

import pytest

from coding import budget
from experiments.baselines import BASELINES, Baseline
from measuring.patches import PatchDistances
from models.bitstream import unpack
from models.codec import Codec
from models.released import load_release
from tests.commands import photograph, run
from tests.small_releases import SCORES, larger_base, reproduce, rows_in, told_in, two_layers, two_photographs
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


@pytest.fixture
def coded(monkeypatch) -> Counter:
    """How often pictures are analysed, decoded, and searched by another codec, from now on."""
    counts = Counter()
    for owner, name in ((Codec, "analyse"), (Codec, "decode"), (Baseline, "fit")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), name, counts))
    return counts


def counting(work, name, counts):
    def counted(*args, **options):
        counts[name] += 1
        return work(*args, **options)

    return counted


def rates(release, pictures, out, *more) -> list[object]:
    return ["rates", "--weights", release, "--data", pictures, "-o", out, "--metrics", *SCORES, *more]


def test_rates_of_two_releases_and_another_codec_at_the_first_ones_bytes(release, plain, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["rates", "--weights", release, plain, "--data", pictures, "-o", out, "--metrics", *SCORES]
    command += ["--qualities", 0, 50, "--codecs", "webp"]
    assert reproduce(*command) == 0
    rows = {(row["codec"], row["label"], row["picture"]): row for row in rows_in(out / "rates.csv")}
    points = [("nano", "0"), ("nano", "50"), ("k2048", "0"), ("webp", "at 0"), ("webp", "at 50")]
    assert set(rows) == {(*point, f"{i}.png") for point in points for i in range(2)}
    for (codec, label, picture), row in rows.items():
        if row["bytes"]:
            suffix = ".webp" if codec == "webp" else ".dfo"
            file = out / "files" / codec / label / f"{picture[0]}{suffix}"
            assert int(row["bytes"]) == file.stat().st_size
            assert float(row["bpp"]) == pytest.approx(8 * int(row["bytes"]) / (96 * 80))
            assert read_image(out / "decoded" / codec / label / picture).shape == (3, 80, 96)
        if codec == "webp":
            target = int(rows["nano", label.removeprefix("at "), picture]["bytes"])
            assert int(row["bytes"] or row["floor_bytes"]) <= target or not row["bytes"]
    means = told_in(out / "means.json")
    assert [(mean["codec"], mean["label"]) for mean in means["rows"]] == points
    for mean, point in zip(means["rows"], points, strict=True):
        of_point = [rows[*point, f"{i}.png"] for i in range(2)]
        assert mean["reached"] == sum(row["bytes"] != "" for row in of_point)
        if mean["reached"] == 2:
            assert mean["psnr"] == pytest.approx(sum(float(row["psnr"]) for row in of_point) / 2)
            assert mean["psnr_low"] <= mean["psnr"] <= mean["psnr_high"]
        else:
            assert mean["bytes"] is None and "psnr" not in mean and mean["floor_bytes"] > 0
    words = shlex.split(means["about"]["command"])
    assert words == ["python", "reproduce.py", *map(str, command), "--device", "cpu"]
    assert means["about"]["weights"]["nano"] == load_release(release).fingerprint.hex()
    assert {path.name for path in out.glob("psnr.*")} == {"psnr.png", "psnr.pdf"}
    assert (out / "bd_rate.md").read_text().startswith("# BD-rate against WebP")


def test_rates_by_budget(release, pictures, tmp_path, monkeypatch, coded):
    """Below the smaller base a smaller picture is coded, at those of the highest level the whole. Rows stand while the
    rule of scales does.
    """
    monkeypatch.setattr("experiments.rates.draw", lambda *_: None)
    codec = load_release(release)
    images = [read_image(path) for path in sorted(pictures.iterdir())]
    low = (min(len(codec.compress(image)) for image in images) - 1) / (96 * 80 / 8)
    high = max(len(codec.compress(image, 100)) for image in images) / (96 * 80 / 8)
    command = ["rates", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", "psnr"]
    assert reproduce(*command, "--bpp", low, high, "--codecs", "jpeg2000") == 0
    rows = {(row["codec"], row["label"], row["picture"]): row for row in rows_in(tmp_path / "out" / "rates.csv")}
    labels = [f"{rate:g}bpp" for rate in (low, high)]
    points = [("nano", label) for label in labels] + [("jpeg2000", f"at {label}") for label in labels]
    assert set(rows) == {(*point, f"{i}.png") for point in points for i in range(2)}
    for label, rate in zip(labels, (low, high), strict=True):
        for i in range(2):
            row = rows["nano", label, f"{i}.png"]
            file = (tmp_path / "out" / "files" / "nano" / label / f"{i}.dfo").read_bytes()
            assert float(row["bpp"]) == pytest.approx(8 * len(file) / (96 * 80)) and float(row["bpp"]) <= rate
            assert float(row["scale"]) == unpack(file).scale / 16 and (float(row["scale"]) < 1) == (rate == low)
            told = f", scale {float(row['scale']):g}" if rate == low else ""
            assert row["setting"] == f"at most {rate:g} bits per pixel, one step{told}"
            other = rows["jpeg2000", f"at {label}", f"{i}.png"]
            assert other["made_from"].startswith(f"within {len(file)} bytes")
    means = {(row["codec"], row["label"]): row for row in told_in(tmp_path / "out" / "means.json")["rows"]}
    assert means["nano", labels[0]]["scale"] < 1 == means["nano", labels[1]]["scale"]
    for share, decoded in ((budget.BASE_SHARE, 0), (0.4, 4)):
        monkeypatch.setattr(budget, "BASE_SHARE", share)
        coded.clear()
        assert reproduce(*command, "--bpp", low, high, "--codecs") == 0
        assert coded["decode"] == decoded


def test_a_budget_that_a_picture_cannot_meet_is_told_with_its_name(release, pictures, tmp_path, capsys):
    command = ["rates", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", "psnr"]
    assert reproduce(*command, "--bpp", 0.002, "--codecs") == 1
    assert "0.png, --bpp 0.002: 1 bytes (0.0010 bpp) are too few for this picture" in capsys.readouterr().err
    assert reproduce(*command, "--bpp", 0.1, "--qualities", 0) == 2
    assert "--qualities and --bpp contradict each other" in capsys.readouterr().err


def test_by_payload_the_containers_of_other_codecs_do_not_count(release, pictures, tmp_path, monkeypatch):
    """Both searches stand in one table. At the quality of the largest file AVIF reaches both pictures only by payload, or
    has there the larger files."""
    monkeypatch.setattr("experiments.rates.draw", lambda *_: None)
    command = ["rates", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", "psnr"]
    command += ["--qualities", 100, "--codecs", "avif"]
    assert reproduce(*command) == 0
    assert reproduce(*command, "--by", "payload") == 0
    rows = {(row["codec"], row["label"], row["picture"]): row for row in rows_in(tmp_path / "out" / "rates.csv")}
    assert len(rows) == 6
    for i in range(2):
        ours, file, payload = (
            rows[codec, label, f"{i}.png"]
            for codec, label in (("nano", "100"), ("avif", "at 100"), ("avif", "at 100 by payload"))
        )
        assert payload["made_from"].startswith(f"payload within {ours['bytes']} bytes")
        assert int(payload["payload_bytes"] or payload["floor_bytes"]) <= int(ours["bytes"]) or not payload["bytes"]
        assert int(file["bytes"] or 0) <= int(payload["bytes"] or 0)
        assert int(payload["bytes"]) > int(ours["bytes"])  # the whole file would not have been within it
    told = told_in(tmp_path / "out" / "means.json")
    ours, theirs = told["rows"]
    counted = sum(int(rows["avif", "at 100 by payload", f"{i}.png"]["payload_bytes"]) for i in range(2))
    assert theirs["bpp"] == pytest.approx(8 * counted / 2 / (96 * 80)) and theirs["bytes"] > theirs["payload_bytes"]
    assert ours["bpp"] == pytest.approx(8 * ours["bytes"] / (96 * 80))
    assert "by payload" in told["title"] and "without containers" in told["about"]["bytes"]


def test_what_is_done_is_not_done_again(release, pictures, tmp_path, coded, monkeypatch):
    monkeypatch.setattr("experiments.rates.draw", lambda *_: None)  # which takes longer than all of this
    command = ["rates", "--weights", release, "--data", pictures, "-o", tmp_path / "out"]
    command += ["--codecs", "webp", "--metrics", "psnr", "--qualities"]
    assert reproduce(*command, 50) == 0
    assert coded == {"analyse": 2, "decode": 2, "fit": 2}
    before = (tmp_path / "out" / "rates.csv").read_text()
    assert reproduce(*command, 50) == 0
    assert coded == {"analyse": 2, "decode": 2, "fit": 2} and (tmp_path / "out" / "rates.csv").read_text() == before
    assert reproduce(*command, 50, 100) == 0  # a quality more: that alone
    assert coded == {"analyse": 4, "decode": 4, "fit": 4}
    assert reproduce(*command, 50, 100, "--metrics", *SCORES) == 0  # a score more: of what is there
    assert coded == {"analyse": 4, "decode": 4, "fit": 4}
    assert all(row["psnr_red"] for row in rows_in(tmp_path / "out" / "rates.csv") if row["bytes"])
    photograph(pictures / "1.png", 96, 80, seed=5)  # another picture of that name
    assert reproduce(*command, 50) == 0
    assert coded == {"analyse": 5, "decode": 5, "fit": 5}
    assert reproduce(*command, 50, "--codecs") == 0  # no other codec, and no anchor
    assert [mean["codec"] for mean in told_in(tmp_path / "out" / "means.json")["rows"]] == ["nano"]


def test_an_interrupted_command_goes_on(release, pictures, tmp_path, coded, monkeypatch, capsys):
    command = rates(release, pictures, tmp_path / "out", "--codecs", "--qualities", 0)
    counted = Codec.decode
    monkeypatch.setattr(Codec, "decode", lambda *args: _interrupt() if coded["decode"] else counted(*args))
    assert reproduce(*command) == 130
    assert [row["picture"] for row in rows_in(tmp_path / "out" / "rates.csv")] == ["0.png"]
    monkeypatch.setattr(Codec, "decode", counted)
    assert reproduce(*command) == 0
    assert coded["decode"] == 2 and len(rows_in(tmp_path / "out" / "rates.csv")) == 2


def _interrupt():
    raise KeyboardInterrupt


def test_a_codec_that_cannot_get_so_small_says_how_small_it_gets(release, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "fit", lambda *_, **__: None)
    command = rates(release, pictures, tmp_path / "out", "--codecs", "jpeg", "--qualities", 0)
    assert reproduce(*command) == 0
    mean = told_in(tmp_path / "out" / "means.json")["rows"][-1]
    assert (mean["codec"], mean["pictures"], mean["reached"], mean["bytes"]) == ("jpeg", 2, 0, None)
    floors = [len(BASELINES["jpeg"].smallest(read_image(pictures / f"{i}.png")).data) for i in range(2)]
    assert mean["floor_bytes"] == sum(floors) / 2 and "psnr" not in mean


def test_distances_between_patches_stand_beside_the_means(release, tmp_path, capsys):
    for i in range(4):
        photograph(tmp_path / "two" / f"{i}.png", 256, 272, seed=i)
    out = tmp_path / "out"
    command = [
        *rates(release, tmp_path / "two", out, "--codecs", "--qualities", 0),
        "--distances",
        "kid-lite0",
        "fid-lite0",
    ]
    assert reproduce(*command) == 0
    assert "fid-lite0" in capsys.readouterr().err  # of a handful of patches
    by = PatchDistances(["kid-lite0"])
    sides = [
        [by.features(read_image(folder / f"{i}.png")) for i in range(4)]
        for folder in (tmp_path / "two", out / "decoded" / "nano" / "0")
    ]
    (mean,) = told_in(out / "means.json")["rows"]
    assert mean["kid-lite0"] == pytest.approx(by.between(*sides)[0]["kid-lite0"].mean, rel=1e-4)
    assert "fid-lite0" not in mean and "KID-Lite0 ↓" in (out / "means.md").read_text()


@pytest.mark.slow
def test_two_processes_share_the_pictures_and_write_one_table(release, pictures, tmp_path):
    flags = rates(release, pictures, tmp_path / "out", "--qualities", 0, "--codecs", "webp", "--device", "cpu")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "reproduce.py", *flags)
    assert reproduce(*rates(release, pictures, tmp_path / "alone", "--qualities", 0, "--codecs", "webp")) == 0
    shared, alone = ((tmp_path / name / "rates.csv").read_text() for name in ("out", "alone"))
    assert shared == alone
    about = told_in(tmp_path / "out" / "means.json")["about"]
    assert about["processes"] == 2 and about["command"].startswith("torchrun --nproc_per_node=2 reproduce.py rates")
