"""What `make bench-cuda` measures, rehearsed on the CPU with the smallest networks; its limits; what a codec is made of."""

import time

import pytest
import torch
from torch import nn

from benchmarks import cuda
from experiments import timing
from experiments.stopwatch import NETWORKS
from models import fused_norm
from models.graphs import Graphed
from models.on_cuda import FAST_PATHS, prepare
from tests.residual import new_codec, picture
from tests.small_releases import told_in


def test_without_cuda_one_line_says_so(tmp_path, capsys):
    assert cuda.main(["--device", "cpu", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "needs a GPU" in said.err and not (tmp_path / "out").exists()


def test_every_part_measures_its_figures(tmp_path, monkeypatch, capsys):
    """All but torch.compile, which takes a minute of any processor."""
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    names = [name for name in cuda.PARTS if name != "compiled"]
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
        assert row["value"] > 0 or row["figure"] in ("programs started", "device busy")  # of which a CPU knows none
    ways = {way for what, way in figures if what == "published, 48x64"}
    assert len(ways) == 7
    for way in ways:
        found = figures["published, 48x64", way]
        assert {f"encode: {NETWORKS[0][2]}", f"decode: {NETWORKS[-1][2]}"} <= found.keys()
        assert way.startswith("float32") or 20 < found["PSNR to float32"] < 80
    agreed = figures["small, demo photographs", "CPU and device"]
    assert agreed["files read alike, of 6"] == 6 and agreed["bfloat16, the lowest PSNR to float32"] > 30
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


@pytest.mark.parametrize("without", [(), FAST_PATHS], ids=["all", "none"])
def test_a_prepared_codec_has_its_large_weights_in_bfloat16_and_codes_the_same_symbols(without):
    """Code book, norms and integers stay float32; files are read as an unprepared codec reads them."""
    plain, ours = new_codec(), new_codec()
    prepare(ours, bfloat16=True, without=without)
    try:
        assert fused_norm.enabled == (not without)
    finally:
        fused_norm.enabled = True
    for module in ours.modules():
        if isinstance(module, nn.GroupNorm | nn.Embedding):
            assert module.weight.dtype == torch.float32
    convolutions = [m for m in ours.autoencoder.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert {m.weight.dtype for m in convolutions} == {torch.bfloat16}
    assert ours.vq_base.quantize.embedding.weight.dtype == torch.float32
    assert isinstance(vars(ours.unet).get("forward"), Graphed) == (not without)
    image = picture(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        data = [plain.compress(image, 60), ours.compress(image, 60)]
        decoded = ours.decompress(data[0])
    for one in data:
        found = [codec.read(one) for codec in (plain, ours)]
        assert torch.equal(found[0].k, found[1].k)
        assert (found[0].symbols.residual == found[1].symbols.residual).all()
    assert (decoded.int() - plain.decompress(data[0]).int()).abs().float().mean() < 3
