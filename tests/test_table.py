"""The table on disk: merged by key, whole after an interrupt, and one process's at a time."""

import json
import math
import subprocess
import sys

import pytest

from coding.table import Table
from measuring.intervals import bootstrap
from tests.commands import ROOT, call, photograph
from utils.errors import DiffoError

HOLD = "import sys, time; from pathlib import Path; from utils.files import held\n"
HOLD += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def table(folder, command="now", **options) -> Table:
    return Table(folder, "metrics", lambda: {"command": command}, **options)


def written(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_both_files_say_the_same(tmp_path):
    rows = [
        {"picture": "a.png", "bytes": 100, "bpp": 0.1, "psnr": 20.0, "ms_ssim": 0.8, "vif": 0.25},
        {"picture": "b.png", "bytes": 300, "bpp": 0.2, "psnr": math.inf, "ms_ssim": None, "vif": math.nan},
    ]
    with table(tmp_path) as filled:
        for row in rows:
            filled.add(row)
    found = written(tmp_path)
    assert found["about"] == {"command": "now"} and found["mean"]["bytes"] == 200 and "earlier" not in found
    assert found["pictures"][0] == rows[0] and found["pictures"][1]["psnr"] is None
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["picture,bytes,bpp,psnr,ms_ssim,vif", "a.png,100,0.1,20.0,0.8,0.25", "b.png,300,0.2,inf,,nan"]


def test_means_of_scores_have_the_intervals_of_every_other_table(tmp_path):
    """Of two pictures the ends are the pictures; a score that one lacks has no mean, and bytes are no score."""
    with table(tmp_path) as filled:
        for name, psnr, ms_ssim in (("a", 20.0, 0.8), ("b", 24.0, None)):
            filled.add({"picture": name, "bytes": 100, "psnr": psnr, "ms_ssim": ms_ssim})
    mean = {"picture": "mean of 2", "bytes": 100, "psnr": 22, "psnr_low": 20, "psnr_high": 24}
    assert written(tmp_path)["mean"] == mean
    with table(tmp_path) as filled:
        filled.add({"picture": "c", "bytes": 100, "psnr": 31.0, "ms_ssim": None})
    mean = bootstrap([20.0, 24.0, 31.0])
    assert written(tmp_path)["mean"] | {"psnr_low": mean.low, "psnr_high": mean.high} == written(tmp_path)["mean"]


def test_rows_are_merged_by_their_key(tmp_path):
    with table(tmp_path, "first") as first:
        for name in "ab":
            first.add({"picture": name, "bytes": 1})
    with table(tmp_path, "second") as second:
        assert second.get("a") and second.get("b") == {"picture": "b", "bytes": 1} and not second.get("c")
        second.add({"picture": "a", "bytes": 2})
        second.add({"picture": "c", "bytes": 3})
    found = written(tmp_path)
    assert [(row["picture"], row["bytes"]) for row in found["pictures"]] == [("a", 2), ("b", 1), ("c", 3)]
    assert found["about"]["command"] == "second" and found["earlier"] == [{"command": "first"}]
    with table(tmp_path, "third") as third:
        third.add({"picture": "b", "bytes": 4})
        third.add({"picture": "a", "bytes": 4})
        third.add({"picture": "c", "bytes": 4})
    assert "earlier" not in written(tmp_path)


def test_a_key_of_several_columns(tmp_path):
    options = {"key": ("codec", "picture")}
    with table(tmp_path, **options) as filled:
        filled.add({"codec": "avif", "picture": "a", "bytes": 1})
        filled.add({"codec": "jxl", "picture": "a", "bytes": 2})
    with table(tmp_path, **options) as again:
        assert again.get("jxl", "a")["bytes"] == 2 and again.get("jxl", "b") is None
    assert "mean" not in written(tmp_path)


def test_an_interrupt_loses_no_row_and_the_first_row_is_there_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), table(tmp_path) as filled:
        filled.add({"picture": "a"})
        assert len(written(tmp_path)["pictures"]) == 1
        for name in "bcdef":
            filled.add({"picture": name})
        raise KeyboardInterrupt
    assert [row["picture"] for row in written(tmp_path)["pictures"]] == list("abcdef")


def test_ranks_that_only_compute_read_and_write_nothing(tmp_path):
    with table(tmp_path) as main, table(tmp_path, writes=False) as other:
        main.add({"picture": "a"})
        other.add({"picture": "b"})
    assert [row["picture"] for row in written(tmp_path)["pictures"]] == ["a"]
    with table(tmp_path, writes=False) as other:
        assert other.get("a")


@pytest.mark.parametrize("name", ["metrics.json", "metrics.csv"])
def test_a_foreign_file_stays(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(DiffoError, match=f"{name}.*move it away"), table(tmp_path):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    (tmp_path / name).unlink()
    with table(tmp_path):  # nothing holds the folder
        pass
    assert not list(tmp_path.iterdir())


def test_the_command_adds_to_what_is_there_and_refuses_a_folder_in_use(tmp_path, capsys):
    for i, name in enumerate("ab"):
        photograph(tmp_path / f"{name}.png", 32, 32, seed=i)
    out = tmp_path / "out"
    for name in "ab":
        assert call(capsys, "-i", tmp_path / f"{name}.png", "-o", out, "--mode", "compress")[0] == 0
    assert [row["picture"] for row in written(out)["pictures"]] == ["a.png", "b.png"]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    flags = ["-i", tmp_path / "a.png", "-o", out, "--mode", "compress", "--overwrite"]
    status, _, error = call(capsys, *flags)
    assert status == 1 and f"{out}: another process is at work in this folder" in error
    holder.kill()
    holder.wait()
    assert call(capsys, *flags)[0] == 0


def test_a_table_without_rows_leaves_no_folder(tmp_path):
    with pytest.raises(DiffoError, match="refused"), Table(tmp_path / "deep" / "out", "metrics", dict):
        raise DiffoError("refused")
    assert not (tmp_path / "deep").exists()
