"""What `make bench-cuda` measures, rehearsed on the CPU with the smallest networks; its limits."""

import time

import pytest
import torch

from benchmarks import cuda, cuda_parts
from experiments import timing
from experiments.stopwatch import NETWORKS
from models.codec import Codec
from models.layers import fused_norm
from models.speed.fast import precision_of, prepare
from models.speed.graphs import Graphed
from tests.small_releases import told_in


def test_without_cuda_one_line_says_so(tmp_path, capsys):
    assert cuda.main(["--device", "cpu", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "needs a GPU" in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", cuda_parts.MODES, ids=lambda mode: mode.name)
def test_a_mode_is_timed_as_it_is_named(mode, monkeypatch):
    seen, bench = [], cuda_parts.Bench(cuda_parts.TINY, torch.device("cpu"))

    def prepared(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Codec, "device", torch.device("cuda"))
            return prepare(*args)

    def code(codec, *args, work=timing.code, **named):
        if codec is not bench.codec:  # which is the plain one of each round
            graphed = isinstance(vars(codec.unet).get("forward"), Graphed)
            seen.append((precision_of(codec), fused_norm.enabled, graphed, torch.is_autocast_enabled("cpu")))
        return work(codec, *args, **named)

    monkeypatch.setattr(fused_norm, "enabled", True)
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    monkeypatch.setattr(timing, "code", code)
    for module in (timing, cuda_parts):
        monkeypatch.setattr(module, "prepare", prepared)
    assert all(row["way"] == mode.name for row in bench.parts((mode,)))
    fused, graphed = (name in mode.name for name in ("fused_norm", "graphs"))
    precision = "bfloat16" if mode.name.startswith("bfloat16") else "float32"
    *timed, counted = seen
    assert set(timed) == {(precision, fused, graphed, "autocast" in mode.name)}
    assert counted == (precision, fused, False, "autocast" in mode.name)


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
