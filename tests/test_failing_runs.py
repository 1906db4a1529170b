"""Runs that meet a full disk, a loss that is not finite, a lost process or another run: what is said, and what stays."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from main_diffusion_train_vq import main
from tests.commands import ROOT, TRAIN
from tests.small_runs import command, finished, lines, quick, ranks
from training.checkpointing import Checkpoints, Point
from training.codec_stage import CodecStage
from training.step import Step
from utils import checkpoints


def newest(folder: Path) -> Point:
    return Checkpoints(folder, ["gt", "codec"], 2).points()[-1]


def test_a_lost_worker_is_one_line(data, tmp_path, capfd, monkeypatch):
    """As where memory is short, or Docker's 64 MB of shared memory."""
    plain = Step.__call__

    def losing(self, batch, progress, stop=False):
        if progress.step == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(2)  # until the signal of its end comes
        return plain(self, batch, progress, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", losing)
        assert main(quick(data, tmp_path, "stages=[gt]", "data.workers=1")) == 1
    told = capfd.readouterr().err.splitlines()[-1]
    folder = tmp_path / "nano"
    assert told.startswith("error: ") and "a process that decodes pictures is lost" in told, told
    assert f"--resume {folder} data.workers=" in told and newest(folder) == Point("gt", 2)
    assert main(["--resume", str(folder), "data.workers=0"]) == 0


def test_a_second_run_in_the_folder_of_one_is_refused(data, tmp_path, capsys):
    folder = tmp_path / "nano"
    folder.mkdir()
    code = "import sys, time; from pathlib import Path; from utils.files import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, folder / "train.log"], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    args = quick(data, tmp_path, "stages=[gt]", "gt.iterations=1")
    assert main(args) == 1
    assert f"{folder}: another process is at work in this folder" in capsys.readouterr().err
    holder.kill()  # however it ends
    holder.wait()
    assert main(args) == 0


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(data, processes, saved_run, tmp_path):
    """There is room for all but the checkpoints of stage codec, which begins again in a process that had no stage gt."""
    folder, told = tmp_path / "nano", tmp_path / "stderr"
    limit = (saved_run / "checkpoints" / "codec_6.pth").stat().st_size * 3 // 4
    assert finished(processes, command(data, tmp_path), str(told), limit) == 1
    last = told.read_text().splitlines()[-1]
    assert "Traceback" not in told.read_text() and "File too large" in last, last
    assert last.startswith("error: stage codec, iteration 1 is not saved: cannot write") and "--resume" in last
    assert newest(folder) == Point("gt", 4) and not list(folder.rglob("*.tmp"))
    assert finished(processes, ["--resume", str(folder)]) == 0
    assert lines(folder, "metrics.jsonl") == lines(saved_run, "metrics.jsonl")


def test_a_loss_that_is_not_finite_keeps_the_state_and_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    plain, seen = CodecStage.terms, []

    def broken(self, out, batch):
        seen.append(1)
        terms = plain(self, out, batch)
        return terms | {"commitment": terms["commitment"] * float("nan")} if len(seen) == 4 else terms

    with monkeypatch.context() as patch:
        patch.setattr(CodecStage, "terms", broken)
        assert main(quick(data, tmp_path, "save_every=2", "gt.iterations=1")) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "nano"
    assert "stage codec, step 3: the term commitment is not finite" in told and "failed_state.pth" in told
    failed = checkpoints.read(folder / "failed_state.pth")
    assert (failed["stage"], failed["step"]) == ("codec", 3) and "commitment" in failed["failed"]
    weights = [value for state in failed["codec"].values() for value in state.values() if value.is_floating_point()]
    assert weights and all(value.isfinite().all() for value in weights)
    assert newest(folder) == Point("codec", 2)
    assert main(["--resume", str(folder)]) == 0  # with the fault gone


def test_a_validation_that_is_not_finite_stops_with_its_picture(data, tmp_path, capsys):
    options = ["gt.optim.lr=1e30", f"validation.folder={data}", "validation.every=1"]
    assert main(quick(data, tmp_path, *options)) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: validation, the picture 0.png") and "failed_state.pth" in told
    assert checkpoints.read(tmp_path / "nano" / "failed_state.pth")["step"] == 1


def test_a_reader_of_the_messages_that_goes_does_not_end_the_run(data, tmp_path):
    """`... 2>&1 | head`, or a tee that dies."""
    args = [sys.executable, str(TRAIN), *quick(data, tmp_path, "stages=[gt]")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(args, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert newest(tmp_path / "nano") == Point("gt", 4)


def ends_on_one(rank: int, args: list[str], log: str) -> None:
    if rank == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
        assert main(args) == 1
        return
    plain = Step.__call__
    Step.__call__ = lambda self, batch, progress, stop=False: (
        plain(self, batch, progress, stop) if progress.step < 2 else os._exit(0)
    )
    main(args)


def test_a_rank_whose_other_has_ended_says_so_in_a_line(data, processes, tmp_path):
    log = tmp_path / "stderr"
    assert ranks(processes, 2, ends_on_one, quick(data, tmp_path), str(log)) == [0, 0]
    told = log.read_text()
    assert "Traceback" not in told and "error: another process of this run has ended" in told.splitlines()[-1]


def writes_slowly(rank: int, args: list[str]) -> None:
    save = checkpoints.save

    def slowly(path: Path, content: dict) -> None:
        time.sleep(1)
        save(path, content)

    checkpoints.save = slowly
    sys.exit(main(args))


def test_the_failed_state_is_whole_before_any_rank_ends(data, processes, tmp_path):
    """A launcher stops all ranks when the first has ended, as `ranks` does."""
    assert 1 in ranks(processes, 2, writes_slowly, quick(data, tmp_path, "save_every=9", "gt.optim.lr=1e30"))
    failed = checkpoints.read(tmp_path / "nano" / "failed_state.pth")
    assert failed["stage"] == "gt" and "is not finite" in failed["failed"]
