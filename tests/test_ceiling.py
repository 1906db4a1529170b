"""The image autoencoder alone, and what decoding adds: commands that measure pictures without a rate."""

import pytest

from tests.commands import photograph
from tests.small_releases import reproduce, rows_in, told_in, two_layers


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("weights") / "nano")


@pytest.fixture
def pictures(tmp_path):
    for i in range(2):
        photograph(tmp_path / "two" / f"{i}.png", 96, 80, seed=i)
    return tmp_path / "two"


def test_the_ceiling_goes_on_with_a_score_more_and_sees_a_changed_picture(release, pictures, tmp_path, monkeypatch):
    out, restored = tmp_path / "out", []
    monkeypatch.setattr(
        "experiments.ceiling.restored", lambda network, decode, image: restored.append(image) or image // 2
    )
    command = ["ceiling", "--weights", release, "--data", pictures, "-o", out, "--metrics"]
    assert reproduce(*command, "psnr") == 0 and len(restored) == 2
    assert reproduce(*command, "psnr") == 0 and len(restored) == 2
    assert reproduce(*command, "gmsd") == 0 and len(restored) == 4
    assert all(row["psnr"] and row["gmsd"] for row in rows_in(out / "pictures.csv"))
    assert told_in(out / "ceiling.json")["rows"][0]["gmsd"] > 0
    before = rows_in(out / "pictures.csv")
    photograph(pictures / "1.png", 96, 80, seed=7)
    assert reproduce(*command, "psnr", "gmsd") == 0 and len(restored) == 5
    after = rows_in(out / "pictures.csv")
    assert after[0] == before[0] and after[1]["psnr"] != before[1]["psnr"]


def test_artefacts_of_pictures_too_small_for_a_line(release, pictures, tmp_path):
    """Their spectra have no neighbours to compare a line with; borders, casts and flat areas are measured all the same."""
    command = ["artefacts", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", "psnr"]
    assert reproduce(*command, "--qualities", 0) == 0
    original, row = told_in(tmp_path / "out" / "artefacts.json")["rows"]
    assert original["smooth blocks"] == 0 and "weave" not in row
    assert row["border / middle"] > 0 and "cast R" in row and "line along x" not in row


def test_artefacts_within_a_budget(release, pictures, tmp_path):
    """A flat picture would get the highest level there: its error says nothing of the rate."""
    command = ["artefacts", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--metrics", "psnr"]
    assert reproduce(*command, "--bpp", 1.5) == 0
    _, row = told_in(tmp_path / "out" / "artefacts.json")["rows"]
    assert 0 < row["bytes"] <= 1.5 * 96 * 80 / 8 and row["border / middle"] > 0
    assert not [name for name in row if "largest error" in name]


def test_table1_times_again_what_was_timed_in_another_way(release, pictures, tmp_path, monkeypatch):
    """The number of repeats stands above the table, so it must be that of the times."""
    timed = []
    monkeypatch.setattr("experiments.table1.points", lambda *_: [])
    monkeypatch.setattr("experiments.table1.seconds", lambda *_: timed.append(1) or {"encode_s": 1.0, "decode_s": 2.0})
    command = ["table1", "--weights", release, "--data", pictures, "-o", tmp_path / "out", "--repeats"]
    assert [reproduce(*command, repeats) for repeats in (1, 1, 2)] == [0, 0, 0] and len(timed) == 2
    assert "2 repeats" in rows_in(tmp_path / "out" / "seconds.csv")[0]["made_from"]
