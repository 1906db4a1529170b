"""The command python -m datapipe.prepare: lists and shards from folders, and downloads from a server of our own."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datapipe import prepare, test_sets
from datapipe.shards import ShardSource, find_shards
from datapipe.sources import read_list
from datapipe.test_sets import Remote
from tests.commands import photograph
from utils.download import fetch
from utils.errors import DiffoError
from utils.images import read_image


@pytest.fixture
def folder(tmp_path):
    """Three photographs, one of them in a sub-folder, and a file that only looks like one."""
    for i, name in enumerate(["b.png", "a.jpg", "sub/c.png"]):
        photograph(tmp_path / "in" / name, 60, 50, seed=i)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "in"


def told(capsys, *args, status: int = 0) -> str:
    assert prepare.main([str(arg) for arg in args]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out + captured.err


# Lists and shards -----------------------------------------------------------------------------------------------------


def test_lists_are_relative_where_they_can_be(folder, tmp_path, capsys):
    assert "train.txt: 4 pictures" in told(capsys, "list", folder, "-o", tmp_path / "train.txt")
    (folder / "notes.txt").touch()
    assert "4 pictures, 1 .txt: no reader" in told(capsys, "list", folder, "-o", tmp_path / "train.txt")
    names = ["a.jpg", "b.png", "broken.png", "sub/c.png"]
    assert (tmp_path / "train.txt").read_text().splitlines() == [f"in/{name}" for name in names]
    (tmp_path / "lists").mkdir()
    told(capsys, "list", folder / "sub", tmp_path / "train.txt", "-o", tmp_path / "lists" / "l.txt")
    wanted = [folder / name for name in ["sub/c.png", *names]]
    assert list(read_list(str(tmp_path / "lists" / "l.txt"))) == list(map(str, wanted))


def test_check_leaves_unreadable_pictures_out(folder, tmp_path, capsys):
    for out, args in ((tmp_path / "l.txt", ["list"]), (tmp_path / "shards", ["shards"])):
        said = told(capsys, *args, folder, "--check", "-o", out)
        assert said.count("left out: ") == 1 and "broken.png: not a picture" in said and f"{out}: 3 pictures" in said
    assert len(ShardSource([str(tmp_path / "shards")])) == 3


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes that are not forked lack the patch")
def test_a_lost_process_of_check_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    said = told(capsys, "list", folder, "--check", "-o", tmp_path / "l.txt", status=1)
    assert "--check: a process that reads pictures was killed" in said and not (tmp_path / "l.txt").exists()


def test_shards_keep_to_both_limits(folder, tmp_path, capsys):
    (folder / "broken.png").unlink()
    (folder / "d.png").write_bytes(b"\0" * 1_200_000)
    told(capsys, "shards", folder, "-o", tmp_path / "many", "--max_count", 2, "--name", "5%d", "--max_mb", 1)
    tars = find_shards([str(tmp_path / "many")])
    assert [tar.name for tar in tars] == ["5%d-000000.tar", "5%d-000001.tar", "5%d-000002.tar"]
    assert [len(ShardSource([str(tar)])) for tar in tars] == [2, 1, 1]
    assert len(list((tmp_path / "many").iterdir())) == 6


def test_what_cannot_be_prepared_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "missing.txt").write_text("none.png\n")
    (tmp_path / "odd.txt").write_text("in/a.jpg\nin/notes.xyz\n")
    photograph(folder / "two\nlines.png", 20, 20)
    for args, message in {
        ("list", tmp_path / "empty", "-o", tmp_path / "l.txt"): "no pictures there",
        ("list", folder, "-o", tmp_path / "l.txt"): "cannot stand in a list",
        ("shards", tmp_path / "none", "-o", tmp_path / "s"): "no such folder",
        ("shards", folder, "-o", tmp_path / "full"): "not an empty folder",
        (
            "shards",
            tmp_path / "missing.txt",
            "-o",
            tmp_path / "s",
        ): "none.png: cannot be read (No such file or directory)",
        ("shards", tmp_path / "odd.txt", "-o", tmp_path / "t"): "notes.xyz: no name of a picture",
        ("index", tmp_path / "empty"): "no such shard",
    }.items():
        error = told(capsys, *args, status=1)
        assert message in error and error.startswith("error: ") and error.count("\n") <= 2, error
    assert not (tmp_path / "l.txt").exists() and not (tmp_path / "s").exists()
    for name in ("a/b", "../b", ""):
        with pytest.raises(SystemExit, match="2"):
            prepare.main(["shards", str(folder), "-o", str(tmp_path / "s"), "--name", name])
        assert "is not a name without folders" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device", "a.tar")], ids=repr)
def test_packing_that_is_broken_off_leaves_nothing_and_can_begin_again(error, folder, tmp_path, capsys, monkeypatch):
    content, asked = Path.read_bytes, []

    def fail(path):
        asked.append(path)
        if len(asked) == 3:
            raise error
        return content(path)

    args = ["shards", folder, "-o", tmp_path / "new" / "s", "--max_count", 1]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        told(capsys, *args, status=130 if isinstance(error, KeyboardInterrupt) else 1)
    assert len(asked) == 3 and not (tmp_path / "new").exists()
    assert "4 pictures in 4 shards" in told(capsys, *args)


# Downloads ------------------------------------------------------------------------------------------------------------

BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `server.files`; /cut/ breaks off after 100,000 bytes, /slow/ never answers."""

    def do_GET(self):
        _, *kind, name = self.path.split("/")
        body = None if "none" in kind else self.server.files.get(name)
        self.server.asked.append(self.path)
        if "slow" in kind:
            self.server.released.wait(10)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:100_000] if "cut" in kind else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.released, server.asked, server.files = threading.Event(), [], {"f.bin": BODY}
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_what_is_fetched_is_whole_or_not_there(server, tmp_path):
    path = tmp_path / "new" / "f.bin"  # its folder is made for a file, and not left without
    for way in ("/slow", "/none"):
        with pytest.raises(DiffoError, match=f"cannot fetch .*{way}.*(timed out|404).*Is this machine online"):
            fetch(f"{server.address}{way}/f.bin", path, SHA256, timeout=0.3)
    for way, sha256 in (("/cut", SHA256), ("", "0" * 64)):
        with pytest.raises(DiffoError, match=f"f.bin: cut short or changed, its SHA-256 does not begin with {sha256}"):
            fetch(f"{server.address}{way}/f.bin", path, sha256)
        assert not path.parent.exists()
    fetch(f"{server.address}/f.bin", path, SHA256[:8])
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["f.bin"]
    with pytest.raises(DiffoError, match="this folder cannot be made"):
        fetch(f"{server.address}/f.bin", path / "f.bin", SHA256)


def remotes(server, files: dict[str, bytes]) -> list[Remote]:
    """Files that a server has, as entries of a test set."""
    server.files |= files
    return [Remote(f"{server.address}/{name}", hashlib.sha256(data).hexdigest()[:16]) for name, data in files.items()]


def test_kodak_is_fetched_once_and_checked(server, tmp_path, monkeypatch, capsys):
    pictures = {f"kodim{i:02d}.png": png(i) for i in range(1, 4)}
    monkeypatch.setattr(test_sets, "KODAK", remotes(server, pictures))
    args = ["download", "kodak", "-o", tmp_path / "k"]
    assert told(capsys, *args).count("fetched, SHA-256 agrees") == 3
    assert {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()} == pictures
    assert told(capsys, *args).count("already there, SHA-256 agrees") == 3 and len(server.asked) == 3
    (tmp_path / "k" / "kodim02.png").write_bytes(b"something else")
    assert "kodim02.png: its SHA-256 does not begin with" in told(capsys, *args, status=1)


def test_kodak_here_has_the_known_checksums():
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "kodak"
    if not folder.is_dir():
        pytest.skip(f"no Kodak pictures in {folder}")
    for remote in test_sets.KODAK:
        assert hashlib.sha256((folder / remote.name).read_bytes()).hexdigest()[:16] == remote.sha256


@pytest.mark.parametrize("name", ["clic2020", "div2k"])
def test_a_set_is_unpacked_and_cropped(name, server, tmp_path, monkeypatch, capsys):
    """The central square of a picture, its short side scaled to 768: of 192 and 256 columns, those from 32 to 223."""
    archives = {"p.zip": archive({"test/a.png": png(1), "__MACOSX/._a.png": b"x"}), "m.zip": archive({"b.png": png(2)})}
    monkeypatch.setattr(test_sets, name.upper(), remotes(server, archives))
    assert "768: 2 crops, 768x768" in told(capsys, "download", name, "-o", tmp_path / "set")
    for name, seed in (("test/a.png", 1), ("b.png", 2)):
        assert (tmp_path / "set" / "full" / name).read_bytes() == png(seed)
        crop = read_image(tmp_path / "set" / "768" / Path(name).name)
        assert crop.shape == (3, 768, 768)
        columns = (torch.arange(768.0) + 0.5) / 4 - 0.5 + 32
        torch.testing.assert_close(crop[0, 384].float()[8:-8], columns[8:-8], rtol=0, atol=0.6)
        assert (crop[1] == seed).all()


def test_a_picture_of_a_set_that_cannot_be_read_is_one_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(test_sets, "DIV2K", remotes(server, {"v.zip": archive({"a.png": png(1)[:300]})}))
    said = told(capsys, "download", "div2k", "-o", tmp_path / "set", status=1)
    assert "a.png: damaged or cut short" in said and not list((tmp_path / "set" / "768").iterdir())


def test_pictures_to_train_on_are_unpacked_whole(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(test_sets, "COCO", remotes(server, {"t.zip": archive({"train/a.png": png(1)})}))
    assert "full: 1 pictures" in told(capsys, "download", "coco", "-o", tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["archives", "full"]
    assert (tmp_path / "set" / "full" / "train" / "a.png").read_bytes() == png(1)


def png(seed: int) -> bytes:
    """192 rows and 256 columns: red is the column, green the seed."""
    rows, columns = np.mgrid[:192, :256]
    data = io.BytesIO()
    Image.fromarray(np.stack([columns, 0 * rows + seed, rows], axis=-1).astype(np.uint8)).save(data, "png")
    return data.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()
