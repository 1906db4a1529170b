import errno
import os
import stat
from pathlib import Path

import pytest

from utils.errors import DiffoError
from utils.files import atomic_path, atomic_write


def test_permissions_follow_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "atomic", b"x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "mine", "source.png")])
def test_error_in_the_block_passes_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", [(Path, "write_bytes"), (os, "fsync"), (os, "replace")], ids=lambda step: step[1])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(*step, fail)
    with pytest.raises(DiffoError, match=f"in the folder {tmp_path}: No space left"):
        atomic_write(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    steps = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("sync"), real_sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("rename"), real_replace(*paths)))
    (tmp_path / "a.bin").write_bytes(b"old and longer")
    atomic_write(tmp_path / "a.bin", b"x")
    assert steps[:2] == ["sync", "rename"] and (tmp_path / "a.bin").read_bytes() == b"x"


def test_missing_and_closed_folders_are_named_before_the_work(tmp_path, monkeypatch):
    # Simulated, because no folder is closed to the superuser that tests may run as.
    def refuse(path, exist_ok):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(DiffoError, match=f"there is no folder {tmp_path / 'none'}"):
        atomic_write(tmp_path / "none" / "a.bin", b"x")
    monkeypatch.setattr(Path, "touch", refuse)
    began = False
    with pytest.raises(DiffoError, match=f"in the folder {tmp_path}: Permission denied"), atomic_path(tmp_path / "a"):
        began = True
    assert not began


def test_folders_and_devices_are_not_replaced(tmp_path):
    with pytest.raises(DiffoError, match="is a folder"):
        atomic_write(tmp_path, b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DiffoError, match="not an ordinary file"):
        atomic_write(tmp_path / "pipe", b"x")
    assert os.listdir(tmp_path) == ["pipe"]


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 127)
    atomic_write(path, b"x")
    assert path.read_bytes() == b"x"
