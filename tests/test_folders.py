"""Folders through inference.py: in batches and lanes, going on where a run stopped, split over processes."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from coding import batch
from coding import run as running
from coding.lanes import in_lanes
from coding.plan import Job
from coding.run import Result
from models.bitstream import unpack
from models.codec import Codec
from tests.commands import ROOT, call, grey_values, photograph
from tests.commands import run as command
from tests.small_releases import base_alone, two_layers
from utils.errors import PictureError
from utils.images import is_whole
from utils.stopping import StopRequest

SIZES = [(64, 48), (64, 48), (32, 80), (64, 48), (32, 80), (64, 48), (20, 20)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small release with a residual, as a flag."""
    return ["--weights", two_layers(tmp_path_factory.mktemp("releases") / "two")]


@pytest.fixture
def pictures(tmp_path):
    for number, size in enumerate(SIZES):
        photograph(tmp_path / "in" / f"{number}.png", *size, seed=number)
    return tmp_path / "in"


def rows_of(folder) -> dict[str, dict]:
    rows = json.loads((folder / "metrics.json").read_text())["pictures"]
    found = {row["picture"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def stamps(folder) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in folder.rglob("*") if path.suffix in (".dfo", ".png")]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.mark.parametrize("flags", [["--quality", "40"], ["--max_bytes", "300"]])
def test_batches_and_lanes_give_what_one_after_the_other_gives(flags, pictures, weights, tmp_path, capsys, monkeypatch):
    threads, taken = torch.get_num_threads(), []
    signals = Codec.signals
    monkeypatch.setattr(Codec, "signals", lambda codec, images: taken.append(len(images)) or signals(codec, images))
    for name, size in {"alone": ["--batch", "1"], "three": ["--batch", "3"], "default": []}.items():
        assert call(capsys, "-i", pictures, "-o", tmp_path / name, *size, *flags, *weights)[0] == 0
        assert sum(taken) == len(SIZES) and (max(taken) == 1) == (name == "alone")
        taken.clear()
    assert torch.get_num_threads() == threads
    alone = rows_of(tmp_path / "alone")
    for other in ("three", "default"):
        assert list(rows_of(tmp_path / other)) == list(alone)  # in the order of the folder
        for name, row in rows_of(tmp_path / other).items():
            files = [(tmp_path / run / name).with_suffix(".dfo").read_bytes() for run in ("alone", other)]
            assert files[0] == files[1]
            decoded = [grey_values(tmp_path / run / name) for run in ("alone", other)]
            assert np.abs(decoded[0] - decoded[1]).max() <= 1
            assert all(row[key] == alone[name][key] for key in ("bytes", "eta", "estimated_bits", "code"))
            assert row["encode_s"] > 0 and row["decode_s"] > 0


def test_what_fails_in_a_batch_fails_alone(pictures, weights, tmp_path, capsys, monkeypatch):
    """A damaged picture, and one that the networks cannot take, in the middle of a batch of one size."""
    (pictures / "1.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    render, asked = Codec.render_all, []

    def fail(codec, contents, sampling):
        asked.append(len(contents))
        if any(each.file.base == bad for each in contents):
            raise PictureError("not enough memory")
        return render(codec, contents, sampling)

    monkeypatch.setattr(Codec, "render_all", fail)
    monkeypatch.setattr(running, "in_lanes", lambda work, jobs, _, *rest: in_lanes(work, jobs, 1, *rest))  # one batch
    files = tmp_path / "files"
    assert call(capsys, "--mode", "compress", "-i", pictures / "3.png", "-o", files, *weights)[0] == 0
    bad = unpack((files / "3.dfo").read_bytes()).base
    status, _, error = call(capsys, "-i", pictures, "-o", tmp_path / "out", "--batch", len(SIZES), *weights)
    assert status == 1 and f"error: {len(SIZES) - 5} of {len(SIZES)} inputs" in error and 3 in asked
    assert error.count(f"error: {pictures / '1.png'}: damaged") == 1
    assert error.count(f"error: {pictures / '3.png'}: not enough memory") == 1
    assert list(rows_of(tmp_path / "out")) == [f"{number}.png" for number in (0, 2, 4, 5, 6)]


def test_skip_existing_leaves_what_is_whole_and_does_the_rest(pictures, weights, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ["-i", pictures, "-o", out, "--quality", "40", *weights]
    (pictures / "3.png").rename(tmp_path / "3.png")
    assert call(capsys, *args)[0] == 0
    before, rows = stamps(out), rows_of(out)
    status, _, error = call(capsys, *args)
    assert status == 1 and "--skip_existing leaves them and does the rest" in error and stamps(out) == before
    (tmp_path / "3.png").rename(pictures / "3.png")
    status, table, error = call(capsys, *args, "--skip_existing")
    assert status == 0 and "6 of 7 are there already and stay" in error and "0.png" not in table
    assert list(rows_of(out)) == [f"{number}.png" for number in range(7)]
    assert all(rows_of(out)[name] == row for name, row in rows.items())
    assert before.items() <= stamps(out).items() and {"3.dfo", "3.png"} == stamps(out).keys() - before.keys()

    before, rows = stamps(out), rows_of(out)
    for name in ("0.png", "1.dfo"):  # a picture that is cut, a file that is damaged
        (out / name).write_bytes(before[name][1][:-5])
    (out / "2.png").unlink()
    coded = _calls(monkeypatch, Codec, "signals")
    assert call(capsys, *args, "--skip_existing")[0] == 0
    after = stamps(out)
    assert after.keys() == before.keys() and all(is_whole(out / name) for name in after if name.endswith(".png"))
    assert all(after[name][1] == before[name][1] for name in after if name.endswith(".dfo"))
    assert {name for name in after if after[name][0] != before[name][0]} == {"0.png", "1.dfo", "1.png", "2.png"}
    assert sum(coded) == 1 and rows_of(out)["0.png"]["encode_s"] == rows["0.png"]["encode_s"]

    rendered = _calls(monkeypatch, Codec, "render_all")
    (out / "metrics.json").unlink(), (out / "metrics.csv").unlink()
    assert call(capsys, *args, "--skip_existing")[0] == 0  # rows are made from the files
    assert stamps(out) == after and not rendered
    found = rows_of(out)
    for name, row in rows.items():
        assert all(found[name][key] == row[key] for key in ("bytes", "estimated_bits"))
        assert float(found[name]["psnr"]) == pytest.approx(
            float(row["psnr"]), abs=0.01
        )  # another batch rounds otherwise


def test_skip_existing_adds_a_score_without_decoding_again(pictures, weights, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ["-i", pictures, "-o", out, *weights]
    assert call(capsys, *args)[0] == 0
    before, rows = stamps(out), rows_of(out)
    coded = [_calls(monkeypatch, Codec, name) for name in ("signals", "render_all")]
    assert call(capsys, *args, "--skip_existing", "--metrics", "psnr_red", "--overview")[0] == 0
    assert coded == [[], []] and before.items() <= stamps(out).items() and is_whole(out / "overview.png")
    for name, row in rows_of(out).items():
        assert row["psnr_red"] > 0 and row["note"] == rows[name]["note"] and row["decode_s"] == rows[name]["decode_s"]


def test_skip_existing_of_the_other_modes(pictures, weights, tmp_path, capsys):
    for mode, given, made in (("compress", pictures, "files"), ("decompress", tmp_path / "files", "decoded")):
        args = ["--mode", mode, "-i", given, "-o", tmp_path / made, "--skip_existing", *weights]
        assert call(capsys, *args)[0] == 0
        before = stamps(tmp_path / made)
        status, table, error = call(capsys, *args)
        assert status == 0 and "7 of 7 are there already" in error and not table and stamps(tmp_path / made) == before
    alone = ["--mode", "compress", "-i", pictures / "0.png", "-o", tmp_path / "x.dfo", "--skip_existing", *weights]
    assert [call(capsys, *alone)[2], call(capsys, *alone)[2]] == [
        "",
        "1 of 1 are there already and stay (--skip_existing)\n",
    ]


def test_skip_existing_takes_no_files_of_other_weights_for_its_own(pictures, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, "-i", pictures / "0.png", "-o", out, *weights)[0] == 0
    before, other = stamps(out), ["--weights", base_alone(tmp_path / "base")]
    status, table, error = call(capsys, "-i", pictures, "-o", out, "--skip_existing", *other)
    assert status == 1 and not table and error.startswith(f"error: {out / '0.dfo'} is there, of the weights ")
    assert "choose another -o, or replace it with --overwrite" in error and stamps(out) == before
    assert call(capsys, "-i", pictures, "-o", out, "--overwrite", *other)[0] == 0


def test_skip_existing_leaves_pictures_of_others(pictures, weights, tmp_path, capsys):
    photograph(tmp_path / "out" / "0.png", 64, 48)
    status, _, error = call(capsys, "-i", pictures, "-o", tmp_path / "out", "--skip_existing", *weights)
    assert status == 1 and "no picture of this codec's: it stays" in error


def test_the_overview_is_of_the_first_pictures(pictures, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(running, "SHEET", 2)
    assert call(capsys, "-i", pictures, "-o", tmp_path / "out", "--overview", *weights)[0] == 0
    height = grey_values(tmp_path / "out" / "overview.png").shape[0]
    assert height == 3 * 24 + 2 * (48 + 36)  # margins; pictures and captions


def test_large_pictures_take_turns(pictures, weights, tmp_path, capsys, monkeypatch):
    """Side by side, or one lane's networks at a time, as their memory says."""
    inside, most, lock = [0], [0], threading.Barrier(2)
    render = Codec.render_all

    def count(codec, contents, sampling):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            lock.wait(timeout=0.3)
        except threading.BrokenBarrierError:
            lock.reset()
        inside[0] -= 1
        return render(codec, contents, sampling)

    monkeypatch.setattr(Codec, "render_all", count)
    for limit, expected in ((1 << 29, 2), (0, 1)):
        most[0] = 0
        monkeypatch.setattr("coding.steps.SIDE_BY_SIDE", limit)
        monkeypatch.setattr(running, "BATCH_PIXELS", {"cpu": 1})
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # and so two lanes
        assert call(capsys, "-i", pictures, "-o", tmp_path / str(limit), *weights)[0] == 0
        assert most[0] == expected


def test_large_pictures_give_their_memory_back(pictures, weights, tmp_path, capsys, monkeypatch):
    returned = []

    @contextmanager
    def record():
        returned.append(1)
        yield

    monkeypatch.setattr("coding.steps.freed_memory_returned", record)
    many, kept = 1 << 32, ["--without", "keep_memory"]
    for most, pixels, without, expected in ((many, many, [], 0), (0, many, [], 2), (many, 0, [], 2), (0, 0, kept, 0)):
        returned.clear()
        monkeypatch.setattr("coding.steps.KEEPS_UP_TO", most)
        monkeypatch.setattr("coding.steps.KEEPS_PIXELS", pixels)
        out = tmp_path / f"{most}{pixels}{without}"
        assert call(capsys, "-i", pictures / "0.png", "-o", out, "--device", "cpu", *weights, *without)[0] == 0
        assert len(returned) == expected  # once to encode, once to decode


def test_lanes_share_the_items_and_stop_when_asked():
    def double(items):
        for item in items:
            yield threading.current_thread().name, 2 * item

    found = []
    in_lanes(double, range(100), 3, found.append, lambda: False)
    assert sorted(value for _, value in found) == list(range(0, 200, 2))
    assert not {name for name, _ in found} & {"MainThread"}
    found.clear()
    in_lanes(double, range(100), 3, found.append, lambda: len(found) > 4)
    assert 4 < len(found)
    stopped = []
    in_lanes(double, range(100), 3, stopped.append, lambda: True)
    assert not stopped

    def fail(items):
        for item in items:
            if item == 5:
                raise ArithmeticError("five")
            yield item

    with pytest.raises(ArithmeticError, match="five"):
        in_lanes(fail, range(100), 3, found.append, lambda: False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_every_picture_is_one_processs_and_a_request_to_one_ends_all(monkeypatch):
    """As rank 0 and 1 of two would split 200 pictures, in rounds of 64 each; at last, rank 1 is to stop in the first."""

    class Work:
        def each(self, jobs, take, stopped):
            for job in jobs:
                take(Result(Job(job, job, None), {"picture": job}, None))

    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    done = []
    for rank, signals in ((0, None), (1, None), (0, signal.SIGTERM)):
        monkeypatch.setattr("utils.distributed.rank", lambda rank=rank: rank)
        others = [signals, None]
        monkeypatch.setattr(
            "utils.distributed.gather_objects",
            lambda own, rank=rank, others=others: [own, ([], others.pop(0))] if rank == 0 else [([], None), own],
        )
        tally = batch.Tally(None, 200, 200, "roundtrip")
        ended = batch._shared_out(Work(), list(range(200)), tally, StopRequest())
        assert ended == signals
        done.append(list(tally.rows))
    assert sorted(done[0] + done[1]) == list(range(200)) and len(done[0]) == len(done[1]) == 100
    assert batch.ROUND == 64 and done[2] == done[0][:64] == list(range(0, 128, 2))


@pytest.mark.slow
def test_two_processes_share_a_folder_and_write_one_table(pictures, weights, tmp_path):
    for number in (1, 2):  # met by one process each, which says so
        (pictures / f"{number}.png").write_bytes(b"no picture")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "inference.py"]
    args = [*launch, "-i", pictures, "-o", tmp_path / "out", *weights]
    done = subprocess.run([str(arg) for arg in args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "error: 2 of 7 inputs could not be done" in done.stderr
    for number in (1, 2):
        assert done.stderr.count(f"error: {pictures}{os.sep}{number}.png: ") == 1
    assert list(rows_of(tmp_path / "out")) == [f"{number}.png" for number in (0, 3, 4, 5, 6)]
    assert done.stdout.count("mean of 5") == 1 and "written to" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").glob("*.dfo")) == [f"{n}.dfo" for n in (0, 3, 4, 5, 6)]


@pytest.mark.slow
def test_memory_stays_the_same_over_many_pictures(weights, tmp_path, capsys):
    """As much for 2,000 pictures as for 200, but for their rows, of a kilobyte or two."""
    peaks = []
    for count in (200, 2000):
        photograph(tmp_path / str(count) / "0.png", 128, 128)
        for number in range(1, count):
            os.link(tmp_path / str(count) / "0.png", tmp_path / str(count) / f"{number}.png")
        program = "import resource, sys, inference; inference.main(sys.argv[1:]); "
        program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        args = ["-i", tmp_path / str(count), "-o", tmp_path / f"out{count}", *weights]
        told = command("-c", program, *args, timeout=1500).stdout
        peaks.append(int(told.split()[-1]) / 1024)  # MiB
    assert peaks[1] - peaks[0] < 50  # decoded pictures would be 88


def _calls(monkeypatch, owner, name) -> list[int]:
    """How many pictures each call of a method of the codec is given, from now on."""
    counts, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda codec, *args: counts.append(len(args[0])) or method(codec, *args))
    return counts
