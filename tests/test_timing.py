"""Times and operations of the parts of coding."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from experiments import timing
from experiments.published import OURS, published
from experiments.stopwatch import CHOICE, NETWORKS, NOISE, PASSES, Stopwatch
from models.index_model import IndexModel, IndexNetwork
from models.released import load_release
from models.speed.fast import prepare
from models.speed.graphs import use_graphs
from reproduce import parse
from tests.commands import NANO, photograph
from tests.residual import new_codec, picture
from tests.small_releases import reproduce, told_in, two_layers
from tests.test_graphs import Fixed


def test_a_call_inside_another_counts_for_its_own_part_alone():
    now = iter([0, 10, 13, 14])  # outer begins, inner begins, inner ends, outer ends
    stopwatch = Stopwatch(lambda: next(now))
    assert stopwatch.count("outer", lambda: stopwatch.count("inner", lambda: "result")) == "result"
    assert stopwatch.spent == {"inner": 3, "outer": 11}


def test_medians_quartiles_shares_and_the_peak():
    rounds = [{"E": seconds, "D": 0.010} for seconds in (0.010, 0.020, 0.030, 0.050, 0.040)]
    plain = [{"E": factor * each["E"], "D": each["D"]} for factor, each in zip((2, 2, 2, 9, 3), rounds, strict=True)]
    e, d, together = timing.rows_of("encode", rounds, plain, {"E": 6e9}, 1e12)
    assert (e["ms"], e["first quartile"], e["third quartile"]) == pytest.approx((30, 20, 40))
    assert e["share of the way, %"] == pytest.approx(75) and d["share of the way, %"] == pytest.approx(25)
    assert e["GFLOP"] == 6 and e["share of the peak, %"] == pytest.approx(100 * 6 / 30)  # of 1 GFLOP in a millisecond
    assert e["plain float32, ms"] == pytest.approx(60) and e["times as fast"] == pytest.approx(2)  # of each round
    assert (d["times as fast"], together["times as fast"]) == pytest.approx((1, 7 / 4))  # 70 ms for 40
    assert d["GFLOP"] == 0 and together["ms"] == pytest.approx(40) and together["GFLOP"] == 6


def test_every_part_is_timed_and_its_operations_counted(tmp_path, monkeypatch):
    release = two_layers(tmp_path / "nano")
    photograph(tmp_path / "two" / "a.png", 96, 80)
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    (paper,) = (record for record in published(source="paper-table1") if record.system == OURS)
    monkeypatch.setattr(timing, "published", lambda **_: [replace(paper, size="48x64")])
    command = [
        "timing",
        "--precision",
        "bfloat16",
        "--weights",
        release,
        "--data",
        tmp_path / "two",
        "-o",
        tmp_path / "out",
        "--quality",
        60,
    ]
    command += ["--sizes", "48x64", "--repeats", 2]
    assert reproduce(*command) == 0
    rows = told_in(tmp_path / "out" / "timing.json")["rows"]
    parts = {row["part"]: row for row in rows}
    assert set(parts) > {part for *_, part in NETWORKS} | {NOISE}
    for way in timing.WAYS:
        assert sum(row["GFLOP"] for row in rows if row["way"] == way and row["part"] != timing.TOTAL) == pytest.approx(
            next(row["GFLOP"] for row in rows if row["way"] == way and row["part"] == timing.TOTAL)
        )
    # The first convolution of E alone: 3x3x3 multiplications and additions for each of its channels and pixels.
    channels = load_release(release).params.autoencoder.ch
    assert parts[NETWORKS[0][2]]["GFLOP"] > 2 * 27 * channels * 48 * 64 / 1e9
    assert parts[NOISE]["GFLOP"] == 0 and parts[NOISE]["ms"] > 0
    decoding = parts[timing.TOTAL]
    assert decoding["precision"] == "bfloat16" and 30 < decoding["PSNR to float32, dB"] < 90
    assert all(row["plain float32, ms"] > 0 for row in rows)
    both = [(row["way"], row["paper_ms"], row["paper's kind"]) for row in rows if row["paper_ms"]]
    assert both == [("encode", 136, "secondary"), ("decode", 253, "secondary")]  # of all parts together alone
    assert "| median, ms ↓ | median, ms ↓, paper |" in (tmp_path / "out" / "timing.md").read_text()
    assert "TITAN RTX" in told_in(tmp_path / "out" / "timing.json")["about"]["paper"]
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed again"))
    assert reproduce(*command) == 0


def test_operations_that_graphs_replay_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    args = Namespace(quality=60, precision="float32", without=(), repeats=1)
    recorder, found = Fixed(), []
    for prepared in (prepare, lambda codec, *_: use_graphs(codec, recorder) or codec):
        monkeypatch.setattr(timing, "prepare", prepared)
        rows = timing.measure(new_codec(), photograph(tmp_path / "a.png", 64, 48), "48x64", args)
        found.append({(row["way"], row["part"]): row["GFLOP"] for row in rows})
    assert recorder.replayed > 10 and found[1] == found[0] and found[0]["decode", NETWORKS[-1][2]] > 0


def test_networks_of_a_configuration_are_timed_without_a_release(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SIDE", {"cpu": 64})
    kept = []
    monkeypatch.setattr(timing, "keep_freed_memory", kept.append)
    command = ["timing", "--config", NANO, "--sizes", "48x64", "--repeats", 1, "--precision", "float32"]
    command += ["--without", "keep_memory", "graphs"]
    assert reproduce(*command, "-o", tmp_path) == 0
    assert kept == [False, False]
    rows = told_in(tmp_path / "timing.json")["rows"]
    assert all(row["paper_ms"] is None for row in rows)  # of another size
    assert rows[-1]["PSNR to float32, dB"] is None and rows[-1]["precision"] == "float32"  # the very same picture
    args = parse([*map(str, command)])
    codec = next(iter(timing.untrained(args).values()))
    made = timing.made_from(codec, NANO, args)
    args.without = []
    assert timing.made_from(codec, NANO, args) != made  # rows of the one do not stand for the other
    assert all(p.any() for name, p in codec.named_parameters() if name.endswith("conv2.weight"))


def test_the_choice_of_indices_is_a_part_of_its_own():
    """Apart from VQ-E, which is counted once, whether the codes are the nearest or chosen by an index model."""
    codec = new_codec()
    codec.index_model = IndexModel(IndexNetwork(codec.params.vq_base.codebook_size))
    for weight in (0, 0.2):
        codec.choose_by_rate(weight)
        counted = []
        stopwatch = Stopwatch(lambda: 0.0)
        stopwatch.count = lambda part, work, *args, counted=counted, **more: counted.append(part) or work(*args, **more)
        with stopwatch.watching(codec):
            codec.compress(picture(64, 48))
        assert counted.count(CHOICE) == 1 and counted.count(NETWORKS[1][2]) == 1
        assert counted.count(PASSES[0][2]) == (not weight)  # what is chosen is coded on the way


def test_watching_leaves_the_codec_as_it_was(tmp_path):
    codec = load_release(two_layers(tmp_path / "nano"))
    before = codec.encoded, codec.residual.analysis.forward, torch.nn.Module.__call__
    with pytest.raises(KeyboardInterrupt), Stopwatch(lambda: 0.0).watching(codec):
        assert codec.encoded != before[0]
        raise KeyboardInterrupt
    assert (codec.encoded, codec.residual.analysis.forward, torch.nn.Module.__call__) == before
