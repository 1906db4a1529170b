"""Runs that meet a full disk, a loss that is not finite, a lost process or another run: what is said, and what stays."""

import errno
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from datapipe.pictures import DataParams, Pictures, lost_worker, stream
from tests.commands import NANO, ROOT, TRAIN, free_port, run
from tests.small_runs import command, lines, tree
from training.checkpointing import Checkpoints
from utils import checkpoints
from utils.errors import DiskFull
from utils.files import make_folder


def test_a_lost_worker_is_one_line(data, tmp_path, capfd, monkeypatch):
    """As where memory is short, or Docker's 64 MB of shared memory. It is no error of the step that it comes in."""
    from main_diffusion_train_vq import main
    from training.gt_stage import GtStage

    step = GtStage.step

    def losing(self, image, positions, number):
        if number == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(5)  # until the signal of its end comes
        return step(self, image, positions, number)

    args = [*command(data, tmp_path), "validation.folder=null", "stages=[gt]", "data.workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(GtStage, "step", losing)
        assert main(args) == 1
    told = capfd.readouterr().err.splitlines()[-1]
    folder = tmp_path / "nano"
    assert told.startswith("error: data.workers=1: a process that decodes pictures is lost (DataLoader worker"), told
    assert f"--resume {folder} data.workers=" in told
    assert main(["--resume", str(folder), "data.workers=0"]) == 0


@pytest.mark.parametrize(
    "told, lost",
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", True),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: a bug", False),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate shared memory(shm)",
            True,
        ),
        ("out of resource: shared memory, Required: 1, Hardware limit: 0", False),
        ("", False),
    ],
)
def test_a_bug_in_a_worker_is_not_taken_for_its_loss(told, lost):
    line = lost_worker(RuntimeError(told))
    assert (line is not None) == lost and (not lost or line == told.splitlines()[-1].strip())
    assert lost_worker(ValueError(told)) is None


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers that are not forked lack the patch")
def test_a_worker_lost_with_a_lock_does_not_keep_the_run(data, tmp_path):
    """Killed just then, it takes the lock with it by which PyTorch would tell the workers that they are done."""
    code = """
import multiprocessing.synchronize, os, signal, sys
from main_diffusion_train_vq import main
ours, calls = os.getpid(), []
def is_set(self):
    with self._cond:
        calls.append(1)
        if os.getpid() != ours and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return False
multiprocessing.synchronize.Event.is_set = is_set
sys.exit(main(sys.argv[1:]))
"""
    args = [*command(data, tmp_path), "validation.folder=null", "stages=[gt]", "data.workers=1"]
    done = run("-c", code, *args, expect=1, timeout=120)
    assert "a process that decodes pictures is lost" in done.stderr.splitlines()[-1]


def test_however_the_loss_of_a_worker_shows_it_is_reported_once(data):
    """It may be killed while its pictures are on their way: then their pipe ends first."""
    killer = random.Random(0)
    for _ in range(12):
        before = multiprocessing.active_children()
        batches = stream(Pictures(DataParams(str(data), workers=1), 64, 0), 2, 0, 1, 0)
        next(batches)
        (worker,) = (child for child in multiprocessing.active_children() if child not in before)
        timer = threading.Timer(killer.uniform(0, 0.1), worker.kill)
        with pytest.raises(RuntimeError) as caught:
            timer.start()
            for _ in batches:
                pass
        assert lost_worker(caught.value)
        timer.join()


def test_a_second_run_in_the_folder_of_one_is_refused(data, tmp_path, capsys, monkeypatch):
    from main_diffusion_train_vq import main

    folder = tmp_path / "nano"
    folder.mkdir()
    code = "import sys, time; from pathlib import Path; from utils.files import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, folder / "train.log"], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    args = [*command(data, tmp_path), "stages=[gt]"]
    assert main(args) == 1
    assert f"{folder}: another process is at work in this folder" in capsys.readouterr().err
    holder.kill()  # however it ends
    holder.wait()
    assert main(args) == 0


def test_a_disk_without_room_for_a_folder_is_full(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="this folder cannot be made"):
        make_folder(tmp_path / "states")


def small_disk(bytes: int):
    """For a child process: no file may grow beyond this, which PyTorch meets as it meets a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))


@pytest.mark.parametrize("setting", ["stop", "continue"])
def test_a_full_disk(setting, data, saved_run, tmp_path):
    """The states of nano are larger than 1 MB, its weights, metrics and events smaller."""
    assert max(p.stat().st_size for p in (saved_run / "ema_ckpts").iterdir()) < 400_000
    assert (saved_run / "states" / "codec_6.pth").stat().st_size > 400_000
    args = [sys.executable, TRAIN, *command(data, tmp_path), f"on_full_disk={setting}"]
    done = subprocess.run(
        list(map(str, args)), cwd=ROOT, capture_output=True, text=True, preexec_fn=small_disk(400_000), timeout=300
    )
    folder = tmp_path / "nano"
    assert "Traceback" not in done.stderr and "is not saved: cannot write" in done.stderr, done.stderr
    assert "File too large" in done.stderr
    left = tree(folder) - {"config.yaml", "metrics.jsonl", "validation.jsonl", "train.log"}
    assert left == set()
    if setting == "stop":
        assert done.returncode == 1 and "on_full_disk=continue" in done.stderr.splitlines()[-1]
        assert len(lines(folder, "metrics.jsonl")) == 1
    else:
        assert done.returncode == 0 and "training goes on" in done.stderr
        assert len(lines(folder, "metrics.jsonl")) == 10


def test_a_full_disk_leaves_no_half_line(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from utils.logging import RunLog
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
log = RunLog(Path(sys.argv[1]), True, patient=True)
log.begin("gt", 0)
for step in range(40):
    log.step("gt", step, {f"term{i}": 0.1 for i in range(40)})
log.close()
"""
    done = run("-c", code, tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= len(entries) < 40
    assert done.stderr.count("metrics.jsonl: File too large; training goes on") == 1


def test_a_loss_that_is_not_finite_keeps_the_state_and_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    from main_diffusion_train_vq import main
    from training.codec_stage import CodecStage

    losses, seen = CodecStage.losses, []

    def broken(self, out, image, draws):
        seen.append(1)
        terms = losses(self, out, image, draws)
        return terms | {"commitment": terms["commitment"] * float("nan")} if len(seen) == 4 else terms

    monkeypatch.setattr(CodecStage, "losses", broken)
    args = [
        "--cfg_path",
        str(NANO),
        "--save_dir",
        str(tmp_path),
        "--data",
        str(data),
        "save_every=2",
        "gt.iterations=1",
    ]
    assert main([*args, "gt.statistics=2", "gt.adversary.weight=0"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "nano"
    assert "stage codec, step 3: the term commitment is not finite" in told and "failed_state.pth" in told
    failed = checkpoints.read(folder / "failed_state.pth")
    assert (failed["stage"], failed["step"]) == ("codec", 3) and "commitment" in failed["failed"]
    assert all(value.isfinite().all() for value in failed["codec"].values() if value.is_floating_point())
    assert Checkpoints(folder, ["gt", "codec"], 3).newest()[0]["step"] == 2
    assert main(["--resume", str(folder)]) == 0  # with the fault gone


def launched(rank: int, port: int) -> None:
    """Tell this process that it is one of two, as torchrun does."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()})
    torch.set_num_threads(1)


def fails_on_two_ranks(rank: int, port: int, args: list[str]) -> None:
    """The command as torchrun starts it; the main process is slow to write."""
    from main_diffusion_train_vq import main

    launched(rank, port)
    save = checkpoints.save

    def slowly(path: Path, content: dict) -> None:
        time.sleep(3)
        save(path, content)

    checkpoints.save = slowly
    sys.exit(main(args))


def test_a_reader_of_the_messages_that_goes_does_not_end_the_run(data, tmp_path):
    """`... 2>&1 | head`, or a tee that dies."""
    args = [sys.executable, str(TRAIN), *command(data, tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(args, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "nano" / "states" / "codec_6.pth").exists()


def ends_on_one_of_two_ranks(rank: int, port: int, args: list[str], log: str) -> None:
    from main_diffusion_train_vq import main
    from training.gt_stage import GtStage

    launched(rank, port)
    if rank == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
        assert main(args) == 1
        return
    step = GtStage.step
    GtStage.step = lambda self, image, positions, number: (
        step(self, image, positions, number) if number < 2 else os._exit(0)
    )
    main(args)


def test_a_rank_whose_other_has_ended_says_so_in_a_line(data, tmp_path):
    args = [*command(data, tmp_path), "validation.folder=null"]
    log = tmp_path / "stderr"
    torch.multiprocessing.spawn(ends_on_one_of_two_ranks, args=(free_port(), args, str(log)), nprocs=2)
    told = log.read_text()
    assert "Traceback" not in told and "error: another process of this run has ended" in told.splitlines()[-1]


def test_the_failed_state_is_whole_before_any_rank_ends(data, tmp_path):
    """A launcher stops all ranks when the first has ended, as the spawning here does."""
    args = [*command(data, tmp_path), "validation.folder=null", "save_every=9", "gt.optim.lr=1e30"]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        torch.multiprocessing.spawn(fails_on_two_ranks, args=(free_port(), args), nprocs=2)
    failed = checkpoints.read(tmp_path / "nano" / "failed_state.pth")
    assert failed["stage"] == "gt" and "is not finite" in failed["failed"]
