"""Tar shards: ours and the webdataset library's, read through their indexes as folders are."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from datapipe import prepare
from datapipe.pictures import DataParams, Pictures
from datapipe.shards import ShardSource, find_shards, index_path, write_index
from tests.commands import photograph
from utils.errors import DiffoError, PictureError
from utils.images import find_pictures, read_image

SIZE = 32
LONG = "f/" * 40 + "n" * 160 + ".png"  # a tar holds it in a header of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven photographs of several kinds, with dots and non-ASCII letters in their names and one very long name."""
    root = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(["a.b.png", "a_b.jpg", "c.JPG", "é.webp", "sub/a.b.png", "sub/d.bmp", "x" * 120 + ".png"]):
        photograph(root / name, 60 + i, 50, seed=i)
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shards"
    assert prepare.main(["shards", str(folder), "-o", str(out), "--max_count", "3"]) == 0
    return out


def dataset(workers=0, **where) -> Pictures:
    return Pictures(DataParams(workers=workers, **{k: str(v) for k, v in where.items()}), SIZE, 0)


def png(level: int = 0, side: int = 16) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(data, "png")
    return data.getvalue()


def tar(path, members: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_there_may_be_more_shards_than_open_files(tmp_path):
    """1,024 are usual, and public sets have thousands of shards."""
    resource = pytest.importorskip("resource", reason="this system has no limit of open files")
    for i in range(80):
        write_index(tar(tmp_path / f"{i:03d}.tar", {"a.png": png(i)}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    try:
        source = ShardSource([str(tmp_path)])
        levels = [int(source.read(i)[0, 0, 0]) for i in range(80)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert levels == list(range(80))


# The same pictures, however they are stored ---------------------------------------------------------------------------


def test_shards_give_the_stream_of_their_folder(folder, shards):
    packed, whole = dataset(shards=shards), dataset(folder=folder)
    assert len(packed.source.tars) == 3
    for i in range(7):
        assert torch.equal(packed.source.read(i), read_image(whole.source.path(i)))
    for position in range(14):
        assert torch.equal(packed[position]["image"], whole[position]["image"])


def test_shards_are_told_apart_by_what_they_hold(folder, shards, tmp_path):
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    assert ShardSource([str(moved)]).digest() == ShardSource([str(shards)]).digest()
    names = sorted(str(path) for path in shards.glob("*.tar"))
    assert ShardSource(names[::-1]).digest() != ShardSource(names).digest()


# The library and we read each other -----------------------------------------------------------------------------------


def test_the_library_reads_our_shards(folder, shards):
    tars = [str(path) for path in find_shards([str(shards)])]
    paths = find_pictures(folder)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 7
    for sample, path in zip(samples, paths, strict=True):
        assert sample[path.suffix[1:].lower()] == path.read_bytes() and path.stem[0] in sample["__key__"]
    (first, *_) = webdataset.WebDataset(tars[:1], shardshuffle=False).decode("rgb8")
    np.testing.assert_array_equal(first["png"], read_image(paths[0]).permute(1, 2, 0).numpy())


def test_we_read_the_shards_of_the_library(folder, tmp_path):
    paths = find_pictures(folder)
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i, path in enumerate(paths):
            writer.write(
                {
                    "__key__": f"folder.with.dots/{i}",
                    "json": {"file": path.name},
                    path.suffix[1:].lower(): path.read_bytes(),
                    "txt": "text after the picture",
                }
            )
    assert prepare.main(["index", str(tmp_path)]) == 0
    source = ShardSource([str(tmp_path / "set-{000..002}.tar")])
    assert len(source) == 7
    assert all(torch.equal(source.read(i), read_image(path)) for i, path in enumerate(paths))


def test_the_picture_of_a_sample(tmp_path, capsys):
    """Members without a picture's suffix, folders, links and hidden files do not count; a plain suffix comes first."""
    members = {"a.seg.png": png(1), "a.png": png(2), "b.txt": b"text", "c.JSON": b"{}", "c.left.PNG": png(3)}
    path = tar(tmp_path / "s.tar", members | {".hidden.png": png(4), "noname": b"", "d/.png": png(5), LONG: png(6)})
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        file.addfile(link)
    assert prepare.main(["index", str(path)]) == 0
    assert "3 pictures; 1 samples have none" in capsys.readouterr().out
    source = ShardSource([str(path)])
    assert [source.read(i)[0, 0, 0].item() for i in range(3)] == [2, 3, 6]


def test_the_same_pictures_give_the_same_shards(folder, shards, tmp_path):
    assert prepare.main(["shards", str(folder), "-o", str(tmp_path / "again"), "--max_count", "3"]) == 0
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in shards.iterdir())
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes() for path in shards.iterdir())


# Damage ---------------------------------------------------------------------------------------------------------------


def test_unreadable_pictures_in_shards_are_named_with_their_place(tmp_path):
    """Damaged before or after the tar was indexed, or cut off with its end."""
    path = tmp_path / "s.tar"
    write_index(tar(path, {"a.png": png(), "b.png": b"rubbish", "c.png": b"", "d.png": png(side=400)[:80]}))
    source = ShardSource([str(path)])
    assert source.read(0).shape == (3, 16, 16)
    path.write_bytes(bytes(600))
    for index, told in ((0, "512: not a picture"), (1, "1536: "), (2, "2560: empty file"), (3, "3072: ")):
        with pytest.raises(PictureError, match=f"s.tar, picture at byte {told}"):
            source.read(index)
    path.unlink()
    with pytest.raises(PictureError, match="s.tar: cannot be read"):
        source.read(0)


def test_indexes_that_do_not_fit_are_refused_with_the_command(tmp_path):
    path = tar(tmp_path / "s.tar", {"a.png": png()})
    with pytest.raises(DiffoError, match=f"no index beside it.*datapipe.prepare index {path}"):
        ShardSource([str(path)])
    write_index(path)
    tar(path, {"b.png": png(), "c.png": png(side=70)}, "a")
    with pytest.raises(DiffoError, match="the tar has changed since.*make it anew"):
        ShardSource([str(path)])
    write_index(path)
    assert len(ShardSource([str(path)])) == 3
    old = io.BytesIO()
    np.save(old, np.zeros((2, 2), np.int64))
    for content in (b"", b"rubbish", old.getvalue()):
        index_path(path).write_bytes(content)
        with pytest.raises(DiffoError, match="not an index of this tar"):
            ShardSource([str(path)])


@pytest.mark.parametrize("kept", [300, 900, 1024])
def test_a_cut_tar_is_not_indexed(tmp_path, kept, capsys):
    path = tar(tmp_path / "s.tar", {"a.png": png(), "b.png": b"\1" * 2000})
    path.write_bytes(path.read_bytes()[: kept if kept < 1024 else 2600])
    assert prepare.main(["index", str(path)]) == 1
    assert f"{path}: not a tar, damaged or cut short" in capsys.readouterr().err
    assert not index_path(path).exists()


@pytest.mark.parametrize(
    "name, told",
    [
        ("none.tar", "no such shard"),
        ("{0..2}.tar", "1.tar: no such shard"),
        ("{0..2.tar", "braces"),
        ("0.tar.gz", "gunzip"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path, name, told):
    tar(tmp_path / "0.tar", {"a.png": png()})
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(DiffoError, match=told):
        ShardSource([str(tmp_path / name)])
