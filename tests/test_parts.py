"""The benchmark of the parts of coding."""

import time

import torch

from benchmarks.parts import NETWORKS, Stopwatch
from tests.commands import photograph, run


def test_a_call_inside_another_counts_for_its_own_part_alone():
    stopwatch = Stopwatch(torch.device("cpu"))

    def outer():
        time.sleep(0.02)
        stopwatch.time("inner", time.sleep, 0.05)

    stopwatch.time("outer", outer)
    assert 0.05 <= stopwatch.seconds["inner"] < 0.5 and 0.02 <= stopwatch.seconds["outer"]
    began = time.perf_counter()
    stopwatch.seconds.clear()
    stopwatch.time("outer", outer)
    assert sum(stopwatch.seconds.values()) <= time.perf_counter() - began


def test_the_command(tmp_path):
    photograph(tmp_path / "a.png", 64, 48)
    told = run("-m", "benchmarks.parts", "--pictures", tmp_path, "--rounds", 1).stdout
    encode, decode = told.partition("decode")[::2]
    for _, _, part in NETWORKS:
        assert part in told
    assert "E  " in encode and "D  " in decode and all("range coder" in half for half in (encode, decode))
    assert "101 is not in 0 to 100" in run("-m", "benchmarks.parts", "--quality", 101, expect=2).stderr
