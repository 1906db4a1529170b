"""Which checkpoints of a run stay, and which one it goes on from."""

import json
from pathlib import Path

import pytest
import torch

from models.released import NAMES
from tests.small_runs import command, lines, tree
from training.checkpointing import Checkpoints, Point
from utils import checkpoints
from utils.errors import CheckpointError


def fake(folder: Path, steps: list[int], keep_last: int = 2) -> Checkpoints:
    """Checkpoints of stage gt with small contents."""
    kept = Checkpoints(folder, ["gt", "codec"], keep_last)
    for step in steps:
        weights = {"autoencoder": {"w": torch.full((2,), float(step))}}
        kept.save(Point("gt", step), weights, weights, None, {"best": None})
        kept.keep(None)
    return kept


def test_the_last_and_the_best_stay(saved_run):
    best = json.loads((saved_run / "best.json").read_text())
    scores = {
        entry["step"]: entry["loss"] for entry in lines(saved_run, "validation.jsonl") if entry["stage"] == "codec"
    }
    step = min(scores, key=scores.get)
    assert set(scores) == {2, 4, 6} and best == {"stage": "codec", "step": step, "loss": scores[step]}
    steps = {5, 6, step}
    assert {path.stem for path in (saved_run / "states").glob("*.pth")} == {f"codec_{s}" for s in steps} | {"gt_4"}
    weights = {path.name for path in (saved_run / "ema_ckpts").iterdir()}
    assert weights == {name.format(s) for s in steps for name in NAMES.values()} | {"GT_vq_model_4.pth.tar"}
    assert {path.name for path in (saved_run / "ckpts").glob("model_*")} == {f"model_{step}.pth" for step in steps}


def test_the_best_of_an_ended_stage_is_no_longer_named(data, tmp_path):
    """Its files go when the next stage saves; that stage's own best is known after its first validation."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path), "gt.iterations=2", "codec.iterations=1", "validation.every=1"]
    assert main([*args, "stages=[gt]"]) == 0 and (tmp_path / "nano" / "best.json").exists()
    assert main(["--resume", str(tmp_path / "nano"), "stages=[gt,codec]", "validation.folder=null"]) == 0
    assert not (tmp_path / "nano" / "best.json").exists()


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
