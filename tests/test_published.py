import json
import re
from itertools import groupby

from experiments.published import KINDS, published, records
from tests.commands import photograph
from tests.small_releases import reproduce, told_in, two_layers


def test_every_record_names_its_kind_and_source_and_says_something():
    assert len(records()) > 200
    for record in records():
        assert record.kind in KINDS and record.where, record
        assert record.scores or record.decode_s, record
        assert record.bpp is None or 0 < record.bpp <= 0.3, record
        assert set(record.scores) <= {
            *("psnr", "ms_ssim", "ms_ssim_rgb", "lpips-vgg", "lpips-alex", "dists", "fid", "kid"),
            *("bd-rate-lpips-vgg", "bd-rate-dists"),
        }


def test_a_curve_has_one_source_and_gets_better_with_its_rate():
    """Points of one system, set and score can be joined by a line; reading off a curve may err by 0.003."""
    joined = 0
    for dataset in ("kodak", "clic2020-768", "clic2020-full", "div2k", "div2k-full"):
        for score in ("lpips-alex", "lpips-vgg", "dists"):
            found = [record for record in published(dataset, score) if not record.variant]
            for system, points in groupby(found, key=lambda record: record.system):
                points = list(points)
                joined += len(points) > 2
                assert len({record.source for record in points}) == 1, system
                values = [record.scores[score] for record in points]
                assert all(b < a + 0.003 for a, b in zip(values, values[1:], strict=False)), (system, dataset, score)
                assert all(a.bpp < b.bpp for a, b in zip(points, points[1:], strict=False)), (system, dataset, score)
    assert joined > 20


def test_filters_narrow_down_to_the_papers_tables():
    steps = published(source="paper-table2", score="lpips-vgg")
    assert {record.variant for record in steps} >= {"1 step", "50 steps", "trained with 2 steps, run with 1"}
    assert {record.bpp for record in steps} == {0.0294} and {record.kind for record in steps} == {"secondary"}
    (ours,) = (record for record in published(source="paper-table1") if record.system == "DiffO")
    assert (ours.encode_s, ours.decode_s, ours.size) == (0.136, 0.253, "768x768")
    assert ours.scores["bd-rate-lpips-vgg"] == -45.65 and ours.parameters == 210_000_000
    assert {record.system for record in published("div2k-full", "dists")} == {"MS-ILLM", "StableCodec"}


def test_the_papers_point_of_kodak_is_a_row_of_rates_and_no_picture_of_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.rates.draw", lambda *_: None)
    pictures, results = tmp_path / "kodak", tmp_path / "results"
    photograph(pictures / "0.png", 96, 80)
    command = ["rates", "--weights", two_layers(tmp_path / "nano"), "--data", pictures, "-o", results / "rates"]
    command += ["--metrics", "psnr", "--qualities", 0, "--codecs"]
    assert reproduce(*command) == 0
    ours, paper = told_in(results / "rates" / "means.json")["rows"]
    assert (paper["label"], paper["paper's kind"]) == ("trained with 2 steps, run with 1", "secondary")
    assert (paper["paper_bpp"], paper["paper_psnr"], paper["paper_dists"]) == (0.0294, 22.19, 0.122)
    assert paper["psnr"] is None is ours["paper_psnr"] and ours["psnr"] > 0
    text = (results / "rates" / "means.md").read_text()
    assert "| PSNR dB ↑ | PSNR dB ↑, paper |" in text and "- paper: arXiv" in text
    assert reproduce("report", "--data", pictures, "-o", results) == 0
    data = re.search(r'id="data">(.*?)</script>', (results / "report.html").read_text())[1]
    assert [each["picture"] for each in json.loads(data)["compared"]["pictures"]] == ["0.png"]
    assert reproduce(*command, "--published", "clic2020-768") == 0  # not Kodak, whatever its folder is called
    assert len(told_in(results / "rates" / "means.json")["rows"]) == 1
    assert "- paper:" not in (results / "rates" / "means.md").read_text()
