"""What `make bench-cuda` measures, rehearsed on the CPU with the smallest networks; its limits."""

import time

import pytest

from benchmarks import cuda
from experiments import timing
from experiments.stopwatch import NETWORKS
from tests.small_releases import told_in


def test_without_cuda_one_line_says_so(tmp_path, capsys):
    assert cuda.main(["--device", "cpu", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "needs a GPU" in said.err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_part_measures_its_figures(tmp_path, monkeypatch, capsys):
    """All but torch.compile, which takes a minute of any processor."""
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    names = [name for name in cuda.PARTS if "compiled" not in name]
    monkeypatch.setattr(cuda, "TOTAL", 1e4)
    monkeypatch.setattr(cuda, "PARTS", {name: (1e3, part) for name, (_, part) in cuda.PARTS.items()})
    assert cuda.main(["--tiny", "--device", "cpu", "-o", str(tmp_path), "--parts", *names]) == 0
    told = told_in(tmp_path / "cuda.json")
    assert all(told["about"][name].endswith(" s") and "ended" not in told["about"][name] for name in names), told[
        "about"
    ]
    rows, figures = told["rows"], {}
    for row in rows:
        figures.setdefault((row["what"], row["way"]), {})[row["figure"]] = row["value"]
        none = ("programs started", "device busy", "float32, the largest difference")  # on a CPU
        assert row["value"] > 0 or row["figure"] in none
    ways = {way for what, way in figures if what == "published, 48x64"}
    assert len(ways) == 7
    for way in ways:
        found = figures["published, 48x64", way]
        assert {f"encode: {NETWORKS[0][2]}", f"decode: {NETWORKS[-1][2]}"} <= found.keys()
        assert way.startswith("float32") or 20 < found["PSNR to float32"] < 80
    for way in ("TF32", "bfloat16 weights, NCHW"):
        found = figures["published, 48x64, networks alone", way]
        assert {"E", "VQ-E", "VQ-D", "U", "D"} <= found.keys()
    assert 20 < found["PSNR to float32"] < 80
    agreed = figures["small, demo photographs", "CPU and device"]
    assert agreed["files read alike, of 6"] == 6 and agreed["bfloat16, the lowest PSNR to float32"] > 30
    assert agreed["float32, the largest difference"] == 0  # the CPU beside itself
    assert (tmp_path / "cuda.md").read_text().startswith("# Speed on CUDA")


def test_a_part_ends_at_its_limit_and_keeps_what_it_has(monkeypatch):
    def slow():
        yield {"value": 1}
        time.sleep(60)

    def broken():
        yield {"value": 2}
        raise RuntimeError("no kernel image\nand more")

    rows, began = [], time.perf_counter()
    assert cuda.measured_within(0.2, slow(), rows) == "ended after its 0 s"
    assert time.perf_counter() - began < 30
    assert cuda.measured_within(9, broken(), rows) == "failed: RuntimeError: no kernel image"
    assert [row["value"] for row in rows] == [1, 2]
