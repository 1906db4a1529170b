"""The command python -m datapipe.prepare: lists and shards from folders, and downloads from a server of our own."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datapipe import benchmarks, prepare
from datapipe.benchmarks import Remote, centre_crop
from datapipe.shards import ShardSource, find_shards
from datapipe.sources import read_list
from tests.commands import photograph, run
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
    assert (
        "--check: DataLoader worker" in said
        and "was killed; mostly memory is short" in said
        and not (tmp_path / "l.txt").exists()
    )


def test_shards_keep_to_both_limits(folder, tmp_path, capsys):
    (folder / "broken.png").unlink()
    (folder / "d.png").write_bytes(b"\0" * 1_200_000)
    told(capsys, "shards", folder, "-o", tmp_path / "many", "--max_count", 2, "--name", "set", "--max_mb", 1)
    tars = find_shards([str(tmp_path / "many")])
    assert [tar.name for tar in tars] == ["set-000000.tar", "set-000001.tar", "set-000002.tar"]
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
        ("shards", tmp_path / "missing.txt", "-o", tmp_path / "s"): "none.png: cannot be read",
        ("shards", tmp_path / "odd.txt", "-o", tmp_path / "t"): "notes.xyz: no name of a picture",
        ("index", tmp_path / "empty"): "no such shard",
    }.items():
        error = told(capsys, *args, status=1)
        assert message in error and error.startswith("error: ") and error.count("\n") <= 2, error
    assert not (tmp_path / "l.txt").exists() and not list((tmp_path / "s").glob("*"))


def test_as_a_command(folder, tmp_path):
    done = run("-m", "datapipe.prepare", "shards", folder, "-o", tmp_path / "s", "--check")
    assert "3 pictures in 1 shards" in done.stdout and "%" not in done.stderr  # no bars where nobody looks


# Downloads ------------------------------------------------------------------------------------------------------------

BODY = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `server.files`; /cut/ breaks off after 100,000 bytes, /slow/ never answers."""

    def do_GET(self):
        _, *kind, name = self.path.split("/")
        body = self.server.files.get(name)
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
    path = tmp_path / "new" / "f.bin"
    for way, sha256 in (("/cut", SHA256), ("", "0" * 64)):
        with pytest.raises(DiffoError, match=f"f.bin: cut short or changed, its SHA-256 does not begin with {sha256}"):
            fetch(f"{server.address}{way}/f.bin", path, sha256)
        assert not list(path.parent.iterdir())
    fetch(f"{server.address}/f.bin", path, SHA256[:8])
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["f.bin"]
    with pytest.raises(DiffoError, match="this folder cannot be made"):
        fetch(f"{server.address}/f.bin", path / "f.bin", SHA256)


def test_a_server_that_does_not_answer_is_given_up(server, tmp_path, capsys):
    began = time.monotonic()
    out = tmp_path / "k"
    error = told(
        capsys, "download", "kodak", "-o", out, "--base_url", f"{server.address}/slow", "--timeout", 0.3, status=1
    )
    assert "timed out" in error and "kodim01.png" in error and str(out) in error
    error = told(capsys, "download", "kodak", "-o", out, "--base_url", "http://127.0.0.1:9", "--timeout", 2, status=1)
    assert "Is this machine online?" in error
    assert "answers 404" in told(capsys, "download", "kodak", "-o", out, "--base_url", server.address, status=1)
    assert "not an address" in told(capsys, "download", "kodak", "-o", out, "--base_url", "mirror", status=1)
    assert time.monotonic() - began < 8 and not list(out.iterdir())


def test_kodak_is_fetched_once_and_checked(server, tmp_path, monkeypatch, capsys):
    pictures = {f"kodim{i:02d}.png": png(i) for i in range(1, 4)}
    server.files |= pictures
    remotes = [Remote(f"https://example.org/{n}", hashlib.sha256(b).hexdigest()) for n, b in pictures.items()]
    monkeypatch.setattr(benchmarks, "KODAK", remotes)
    args = ["download", "kodak", "-o", tmp_path / "k", "--base_url", server.address + "/"]
    assert told(capsys, *args).count("fetched, SHA-256 agrees") == 3
    assert {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()} == pictures
    assert told(capsys, *args).count("already there, SHA-256 agrees") == 3 and len(server.asked) == 3
    (tmp_path / "k" / "kodim02.png").write_bytes(b"something else")
    assert "kodim02.png: its SHA-256 is not" in told(capsys, *args, status=1)


def test_the_known_checksums_are_whole():
    remotes = [*benchmarks.KODAK, *benchmarks.CLIC2020]
    assert len({remote.name for remote in remotes}) == len({remote.sha256 for remote in remotes}) == 26
    assert all(len(bytes.fromhex(remote.sha256)) == 32 for remote in remotes)
    assert sum(remote.pictures for remote in benchmarks.CLIC2020) == 428


def test_kodak_here_has_the_known_checksums():
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "kodak"
    if not folder.is_dir():
        pytest.skip(f"no Kodak pictures in {folder}")
    for remote in benchmarks.KODAK:
        assert hashlib.sha256((folder / remote.name).read_bytes()).hexdigest() == remote.sha256


def png(seed: int, width: int = 90, height: int = 60) -> bytes:
    data = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(data, "png")
    return data.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def clic(server, monkeypatch):
    """Two small archives in place of the real ones."""
    put(server, monkeypatch, archive({"test/": b"", "test/a.png": png(1), "b.png": png(2), "__MACOSX/._a.png": b"x"}))
    return server


def put(server, monkeypatch, first: bytes) -> None:
    server.files |= {"p.zip": first, "m.zip": archive({"c.png": png(3, 60, 90), "notes.txt": b"", "../d.png": png(4)})}
    remotes = [
        Remote(f"{server.address}/{name}", hashlib.sha256(server.files[name]).hexdigest(), 2)
        for name in ("p.zip", "m.zip")
    ]
    monkeypatch.setattr(benchmarks, "CLIC2020", remotes)


def test_clic2020_is_unpacked_and_cropped(clic, tmp_path, capsys):
    args = ["download", "clic2020", "-o", tmp_path / "clic"]
    assert told(capsys, *args).count("fetched, SHA-256 agrees") == 2
    assert sorted(p.name for p in (tmp_path / "clic" / "full").iterdir()) == ["a.png", "b.png", "c.png", "d.png"]
    for name in ("a.png", "b.png", "c.png", "d.png"):
        whole, crop = (read_image(tmp_path / "clic" / folder / name) for folder in ("full", "768"))
        assert crop.shape == (3, 768, 768) and torch.equal(crop, centre_crop(whole, 768))
    assert told(capsys, *args).count("already there, SHA-256 agrees") == 2 and len(clic.asked) == 2


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": b"1"}, "holds 1 pictures"),
        ({"c.png": b"1", "e.png": b"2"}, "picture of the same name"),
        (None, "zip"),
    ],
)
def test_archives_that_are_not_the_test_set(clic, monkeypatch, tmp_path, capsys, members, message):
    put(clic, monkeypatch, archive(members) if members else b"no archive")
    assert message in told(capsys, "download", "clic2020", "-o", tmp_path / "clic", status=1)


def test_the_centre_is_cut_from_the_scaled_picture():
    rows, columns = torch.meshgrid(torch.arange(120), torch.arange(200), indexing="ij")
    picture = torch.stack([columns, rows * 2, torch.full_like(rows, 9)]).to(torch.uint8)
    assert torch.equal(centre_crop(picture, 120), picture[:, :, 40:160])
    assert torch.equal(centre_crop(picture.mT, 120), picture.mT[:, 40:160])
    half = centre_crop(picture, 60).float()  # each level near the mean of two neighbours, the centre kept
    assert half.shape == (3, 60, 60)
    torch.testing.assert_close(half[0, 30], 40.5 + 2 * torch.arange(60.0), rtol=0, atol=1)
    assert centre_crop(picture, 240).shape == (3, 240, 240)
