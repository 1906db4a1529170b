"""Runs that are killed, run out of disk or meet a loss that is not finite: what stays, and that they go on exactly."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from store.triple import NAMES, Triple, load_triple
from tests.commands import NANO, ROOT, free_port, on_board, photograph, run
from training.checkpointing import Checkpoints, Point
from utils import checkpoints
from utils.errors import CheckpointError, DiskFull
from utils.files import make_folder
from utils.images import read_image, to_signed

TRAIN = ROOT / "main_diffusion_train_vq.py"
SETTINGS = (
    "save_every=1",
    "keep_last=2",
    "gt.iterations=4",
    "codec.iterations=6",
    "gt.statistics=2",
    "gt.adversarial_weight=0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed in range(5):
        photograph(folder / f"{seed}.png", 90, 70, seed)
    return folder


def command(data: Path, save_dir: Path) -> list[str]:
    validation = (f"validation.folder={data}", "validation.every=2", "validation.limit=2")
    return ["--cfg_path", str(NANO), "--save_dir", str(save_dir), "--data", str(data), *SETTINGS, *validation]


def train(args: list[str]) -> None:
    """In a process of its own: the command, silent."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    from main_diffusion_train_vq import main

    sys.exit(main(args))


@pytest.fixture(scope="module")
def processes():
    """A server whose children have the command imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_diffusion_train_vq", "training.checkpointing", __name__])
    return context


@pytest.fixture(scope="module")
def finished(data, processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    process = processes.Process(target=train, args=(command(data, folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder / "nano"


def lines(folder: Path, name: str) -> list[dict]:
    """Logged numbers without the times."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "pictures_per_second"} for entry in found]


def kill_while_writing(process, folder: Path, chance: random.Random) -> bool:
    """Kill -9 a run at some moment while it writes a checkpoint; False if it ended before."""
    writes = chance.randrange(1, 20)
    seen: set[Path] = set()
    while process.is_alive():
        seen.update(path for sub in ("ckpts", "ema_ckpts", "states") for path in (folder / sub).glob(".*.tmp"))
        if len(seen) >= writes:
            time.sleep(chance.random() * 0.004)
            process.kill()
            process.join()
            return True
    return False


def test_killed_again_and_again_while_saving(data, processes, finished, tmp_path):
    """A run that saves after every iteration, killed at random moments of saving, gives the trace of one left alone."""
    chance = random.Random(0)
    folder, args, kills = tmp_path / "nano", command(data, tmp_path), 0
    for _ in range(60):
        process = processes.Process(target=train, args=(args,))
        process.start()
        killed = kill_while_writing(process, folder, chance) if kills < 6 else process.join()
        if any((folder / "states").glob("*.pth")):
            args = ["--resume", str(folder)]
        if not killed and process.exitcode == 0:
            break
        assert killed, f"exit status {process.exitcode}: {(folder / 'train.log').read_text()}"
        kills += 1
    assert kills >= 4
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(folder, name) == lines(finished, name)
    assert tree(folder) == tree(finished)
    for stage, score in (("gt", "psnr"), ("codec", "psnr_level_0")):
        told = [(e["step"], e[score]) for e in lines(folder, "validation.jsonl") if e["stage"] == stage]
        events = on_board(folder, f"{stage}-validation").Scalars(f"{stage}/{score}")
        assert told and [(event.step, pytest.approx(event.value)) for event in events] == told
    for name in ("states/codec_6.pth", "ema_ckpts/vq_model_6.pth.tar", "ckpts/model_6.pth"):
        assert flat(checkpoints.read(folder / name)) == flat(checkpoints.read(finished / name)), name


def flat(content) -> list:
    """Keys and values of nested dictionaries and lists, tensors as their bytes."""
    if isinstance(content, torch.Tensor):
        return [tuple(content.shape), content.numpy().tobytes()]
    if isinstance(content, dict):
        content = [part for item in content.items() for part in item]
    return [part for value in content for part in flat(value)] if isinstance(content, (list, tuple)) else [content]


def tree(folder: Path) -> set[str]:
    """Files of a run, hidden ones too, without the log's."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != "tensorboard"}


def test_the_last_and_the_best_stay(finished):
    best = json.loads((finished / "best.json").read_text())
    scores = {
        entry["step"]: entry["loss"] for entry in lines(finished, "validation.jsonl") if entry["stage"] == "codec"
    }
    step = min(scores, key=scores.get)
    assert set(scores) == {2, 4, 6} and best == {"stage": "codec", "step": step, "loss": scores[step]}
    steps = {5, 6, step}
    assert {path.stem for path in (finished / "states").glob("*.pth")} == {f"codec_{s}" for s in steps} | {"gt_4"}
    weights = {path.name for path in (finished / "ema_ckpts").iterdir()}
    assert weights == {name.format(s) for s in steps for name in NAMES.values()} | {"GT_vq_model_4.pth.tar"}
    assert {path.name for path in (finished / "ckpts").glob("model_*")} == {f"model_{step}.pth" for step in steps}


def fake(folder: Path, steps: list[int], keep_last: int = 2) -> Checkpoints:
    """Checkpoints of stage gt with small contents."""
    kept = Checkpoints(folder, ["gt", "codec"], keep_last)
    for step in steps:
        weights = {"autoencoder": {"w": torch.full((2,), float(step))}}
        kept.save(Point("gt", step), weights, weights, None, {"best": None})
        kept.keep(None)
    return kept


def test_a_checkpoint_without_its_files_is_passed_over(tmp_path):
    kept = fake(tmp_path, [1, 2, 3], keep_last=3)
    (tmp_path / "ema_ckpts" / "GT_vq_model_3.pth.tar").unlink()
    (tmp_path / "states" / "gt_2.pth").write_bytes(b"damaged")
    state, refused = kept.newest()
    assert state["step"] == 1 and len(refused) == 2
    assert "GT_vq_model_3.pth.tar" in refused[Point("gt", 3)] and "gt_2.pth" in refused[Point("gt", 2)]
    kept.set_aside(refused)
    kept.keep_last = 1
    kept.keep(None)  # the good one is the last one now
    assert kept.points() == [Point("gt", 1)]
    (tmp_path / "ckpts" / "GT_vq_model_1.pth.tar").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        kept.newest()


def test_a_stage_leaves_the_files_of_the_one_before_alone(tmp_path, monkeypatch):
    """Both stages save an iteration 3; the second one is killed before its state is there."""
    kept = fake(tmp_path, [2, 3], keep_last=2)
    written, spared = [], []
    monkeypatch.setattr(checkpoints, "save", lambda path, content: written.append(path.name))

    def killed(triple, states, params, keep=()):
        spared.append(set(keep))
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpointing.save_triple", killed)
    # An autoencoder of 2 iterations is not the one that stage codec has; nor is one that a full disk has kept from it.
    for step, held in ((2, 3.0), (3, 3.0), (3, 4.0)):
        weights = {"autoencoder": {"w": torch.full((2,), held)}}
        with pytest.raises(KeyboardInterrupt):
            kept.save(Point("codec", step), weights, weights, None, {})
        assert kept.newest()[0]["step"] == 3 and kept.points() == [Point("gt", 3)] and not written
    assert spared == [set(), {tmp_path / "ckpts" / "GT_vq_model_3.pth.tar"}, set()]
    assert not (tmp_path / "ema_ckpts" / "GT_vq_model_2.pth.tar").exists()


def interrupted(data: Path, save_dir: Path, monkeypatch, *options: str) -> Path:
    """A run that is stopped before its third iteration of stage gt; its folder."""
    from main_diffusion_train_vq import main
    from training.gt_stage import GtStage

    plain = GtStage.step

    def step(self, image, positions, step):
        if step == 2:
            raise KeyboardInterrupt
        return plain(self, image, positions, step)

    with monkeypatch.context() as patch:
        patch.setattr(GtStage, "step", step)
        main([*command(data, save_dir), *options])
    return save_dir / "nano"


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stage_that_is_ended_early_is_ended_all_the_same(iterations, data, tmp_path, monkeypatch):
    """Its averages are taken and its latent is scaled, as at any end: the three files of the next stage fit together."""
    from main_diffusion_train_vq import main

    folder = interrupted(data, tmp_path, monkeypatch)
    assert Checkpoints(folder, ["gt", "codec"], 2).points()[-1] == Point("gt", 2)
    assert main(["--resume", str(folder), f"gt.iterations={iterations}", "codec.iterations=2"]) == 0
    assert {path.stem for path in (folder / "states").iterdir()} == {"gt_2", "codec_1", "codec_2"}
    codec = load_triple(Triple.of(folder / "ema_ckpts", 2))
    pictures = torch.stack([to_signed(read_image(path))[:, :64, :64] for path in sorted(data.iterdir())])
    deviation = codec.to_latent(pictures).std((0, 2, 3))
    assert ((0.5 < deviation) & (deviation < 2)).all(), deviation


def test_an_ended_autoencoder_is_not_trained_further(data, tmp_path, capsys):
    """What ends stage gt, averages and a scaled latent, cannot be taken back. Stage codec has nothing of the kind."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path), "gt.iterations=2", "codec.iterations=2"]
    assert main([*args, "stages=[gt]"]) == 0
    folder = str(tmp_path / "nano")
    assert main(["--resume", folder, "gt.iterations=3"]) == 1
    assert "stage gt has ended there" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "nano" / "best.json").read_text())["stage"] == "gt"
    assert main(["--resume", folder, "stages=[gt,codec]", "codec.iterations=1"]) == 0
    assert json.loads((tmp_path / "nano" / "best.json").read_text())["stage"] == "codec"
    assert main(["--resume", folder, "codec.iterations=2"]) == 0
    assert Checkpoints(tmp_path / "nano", ["gt", "codec"], 2).points()[-1] == Point("codec", 2)


def test_the_best_of_an_ended_stage_is_no_longer_named(data, tmp_path):
    """Its files go when the next stage saves; that stage's own best is known after its first validation."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path), "gt.iterations=2", "codec.iterations=1", "validation.every=1"]
    assert main([*args, "stages=[gt]"]) == 0 and (tmp_path / "nano" / "best.json").exists()
    assert main(["--resume", str(tmp_path / "nano"), "stages=[gt,codec]", "validation.folder=null"]) == 0
    assert not (tmp_path / "nano" / "best.json").exists()


def test_a_resumed_run_needs_no_file_that_it_started_from(data, finished, tmp_path, monkeypatch):
    from main_diffusion_train_vq import main

    start = tmp_path / "start.pth.tar"
    start.write_bytes((finished / "ema_ckpts" / "GT_vq_model_4.pth.tar").read_bytes())
    folder = interrupted(data, tmp_path, monkeypatch, f"autoencoder={start}")
    start.unlink()
    assert main(["--resume", str(folder), "codec.iterations=1"]) == 0


def test_a_disk_without_room_for_a_folder_is_full(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="this folder cannot be made"):
        make_folder(tmp_path / "states")


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_saves_and_goes_on_exactly(number, data, finished, tmp_path):
    """As schedulers ask, and Ctrl-C: with its workers, which get the signal too."""
    args = [sys.executable, str(TRAIN), *command(data, tmp_path), "data.workers=1", "save_every=100", "--auto_resume"]
    folder = tmp_path / "nano"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        args, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in told, told
    assert "stopped as asked; go on with --resume" in told
    saved = Checkpoints(folder, ["gt", "codec"], 2).points()[-1]
    assert saved.step + (4 if saved.stage == "codec" else 0) == len(lines(folder, "metrics.jsonl")) < 10
    run(*args[1:])  # the same command: --auto_resume
    assert lines(folder, "metrics.jsonl") == lines(finished, "metrics.jsonl")


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


def test_resuming_tells_what_is_not_as_before(data, tmp_path, monkeypatch):
    from main_diffusion_train_vq import main

    folder = interrupted(data, tmp_path, monkeypatch)
    assert main(["--resume", str(folder), "gt.batch_size=1", "codec.iterations=1"]) == 0
    assert "a step took 2 pictures before and takes 1 from here on" in (folder / "train.log").read_text()


def test_an_autoencoder_that_is_not_rescaled_is_told(data, finished, tmp_path):
    """Checkpoints of stage gt before its last have a latent of any scale."""
    from main_diffusion_train_vq import main

    state = checkpoints.read(finished / "ckpts" / "GT_vq_model_4.pth.tar")["state_dict"]
    told = []
    for name, scale in (("last", 1.0), ("early", 2.0)):
        path = tmp_path / f"{name}.pth.tar"
        checkpoints.save(path, {"state_dict": state | {k: scale * v for k, v in state.items() if "quant_conv" in k}})
        args = [*command(data, tmp_path), f"name={name}", "stages=[codec]", "codec.iterations=1"]
        assert main([*args, f"autoencoder={path}"]) == 0
        told.append("the noise schedule is made for about 1" in (tmp_path / name / "train.log").read_text())
    assert told == [False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_a_deterministic_run_goes_on_bit_for_bit(device, data, tmp_path):
    """With the device's own defaults of precision and layout, and the last iteration taken once more."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path / "whole"), "--device", device, "deterministic=true", "gt.adversarial_weight=0.8"]
    assert main([*args, "gt.adversarial_start=1"]) == 0
    whole, again = tmp_path / "whole" / "nano", tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "states" / "codec_6.pth").unlink()
    assert main(["--resume", str(again), "--device", device]) == 0
    assert lines(again, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    ours, theirs = (checkpoints.read(folder / "states" / "codec_6.pth")["codec"] for folder in (again, whole))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("gone", ["states/codec_4.pth", "ema_ckpts/vq_model_4.pth.tar"])
def test_killed_between_the_files_of_the_first_checkpoint_of_the_second_stage(gone, data, processes, tmp_path):
    """Both stages end at the same iteration, and share the file of the autoencoder."""
    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "--data", str(data), "--iterations", "4"]
    first = processes.Process(target=train, args=([*args, "gt.statistics=2"],))
    first.start()
    first.join()
    folder = tmp_path / "nano"
    trace = lines(folder, "metrics.jsonl")
    assert {path.name for path in (folder / "states").iterdir()} == {"gt_4.pth", "codec_4.pth"}
    (folder / gone).unlink()
    (folder / "states" / ".codec_4.begun").touch()
    again = processes.Process(target=train, args=(["--resume", str(folder)],))
    again.start()
    again.join()
    assert again.exitcode == 0 and lines(folder, "metrics.jsonl") == trace and (folder / gone).is_file()


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    kept = fake(tmp_path, [1])
    (tmp_path / "states" / ".gt_2.begun").touch()
    (tmp_path / "ckpts" / "GT_vq_model_2.pth.tar").touch()
    (tmp_path / "ckpts" / ".GT_vq_model_2.pth.tar.1.ab.tmp").touch()
    (tmp_path / "ckpts" / "GT_vq_model_7.pth.tar").touch()  # the user's
    (tmp_path / "states" / ".gt_1.begun").touch()  # killed between the state and the marker's removal
    kept.remove_unfinished()
    assert tree(tmp_path) == {
        "ckpts/GT_vq_model_1.pth.tar",
        "ckpts/GT_vq_model_7.pth.tar",
        "ema_ckpts/GT_vq_model_1.pth.tar",
        "states/gt_1.pth",
    }
    assert kept.newest()[0]["step"] == 1


def small_disk(bytes: int):
    """For a child process: no file may grow beyond this, which PyTorch meets as it meets a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))


@pytest.mark.parametrize("setting", ["stop", "continue"])
def test_a_full_disk(setting, data, finished, tmp_path):
    """The states of nano are larger than 1 MB, its weights, metrics and events smaller."""
    assert max(p.stat().st_size for p in (finished / "ema_ckpts").iterdir()) < 400_000
    assert (finished / "states" / "codec_6.pth").stat().st_size > 400_000
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
    assert main([*args, "gt.statistics=2", "gt.adversarial_weight=0"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "nano"
    assert "stage codec, step 3: the term commitment is not finite" in told and "failed_state.pth" in told
    failed = checkpoints.read(folder / "failed_state.pth")
    assert (failed["stage"], failed["step"]) == ("codec", 3) and "commitment" in failed["failed"]
    assert all(value.isfinite().all() for value in failed["codec"].values() if value.is_floating_point())
    assert Checkpoints(folder, ["gt", "codec"], 3).newest()[0]["step"] == 2
    assert main(["--resume", str(folder)]) == 0  # with the fault gone


def fails_on_two_ranks(rank: int, port: int, args: list[str]) -> None:
    """The command as torchrun starts it; the main process is slow to write."""
    from main_diffusion_train_vq import main

    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in launched.items()})
    torch.set_num_threads(1)
    save = checkpoints.save

    def slowly(path: Path, content: dict) -> None:
        time.sleep(3)
        save(path, content)

    checkpoints.save = slowly
    sys.exit(main(args))


def test_the_failed_state_is_whole_before_any_rank_ends(data, tmp_path):
    """A launcher stops all ranks when the first has ended, as the spawning here does."""
    args = [*command(data, tmp_path), "validation.folder=null", "save_every=9", "gt.optim.lr=1e30"]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        torch.multiprocessing.spawn(fails_on_two_ranks, args=(free_port(), args), nprocs=2)
    failed = checkpoints.read(tmp_path / "nano" / "failed_state.pth")
    assert failed["stage"] == "gt" and "is not finite" in failed["failed"]
