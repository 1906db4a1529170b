"""Where pictures come from: folders and lists, what is said of pictures that cannot be read, and the configuration."""

import itertools
import os
import shutil
import tracemalloc
from collections import Counter

import pytest
import torch
import torch.multiprocessing
from PIL import Image

from datapipe.pictures import TRIED, DataParams, Pictures, epoch_order, stream
from datapipe.sources import FileSource, data_options, open_source, read_list
from tests.commands import NANO, photograph
from training.config import load_config
from utils.errors import ConfigError, DiffoError
from utils.files import HEIF, PICTURES, find_files, tell_left_out
from utils.images import find_pictures, read_image

SIZE = 32


def dataset(workers=0, **where) -> Pictures:
    return Pictures(DataParams(workers=workers, **where), SIZE, 0)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        photograph(tmp_path / "in" / f"{i}.png", 60, 60, seed=i)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "in"


# Lists ----------------------------------------------------------------------------------------------------------------


def test_lists_name_pictures_relative_to_themselves_or_absolutely(tmp_path):
    for i in range(3):
        photograph(tmp_path / "in" / f"{i} é.png", 60, 60, seed=i)
    absolute = tmp_path / "in" / "2 é.png"
    (tmp_path / "a.txt").write_bytes(f"\ufeffin/0 é.png\r\n\r\n  in/1 é.png\n{absolute}".encode())
    assert list(read_list(str(tmp_path / "a.txt"))) == [str(tmp_path / "in" / f"{i} é.png") for i in range(3)]
    (tmp_path / "b.txt").write_text("in/0 é.png\n", encoding="utf-8")
    several = open_source(txt_file_path=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    assert len(several) == 4 and torch.equal(several.read(0), several.read(3))
    assert torch.equal(several.read(2), read_image(absolute))


@pytest.mark.parametrize(
    "content, told", [(None, "no such list"), (b"\n \n", "no pictures there"), (b"\xff\xfe\x00", "not a readable text")]
)
def test_lists_that_cannot_be_used_are_named(tmp_path, content, told):
    path = tmp_path / "l.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DiffoError, match=told) as caught:
        dataset(txt_file_path=str(path))
    assert str(path) in str(caught.value)


# Folders --------------------------------------------------------------------------------------------------------------


def test_names_take_their_bytes_and_eight_more(tmp_path):
    """Not hundreds, in every process: the data of large sets would not fit the memory of a node."""
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    names = [f"class/{i:08d}.png" for i in range(50_000)]
    found = [(folder, [os.path.join(folder, name) for name in names]) for folder in folders]
    tracemalloc.start()
    source = FileSource([*found, (folders[0], ["/elsewhere/é.png"])], "many")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / 100_001 < len(names[0]) + 10
    for index in (0, 49_999):
        assert source.path(index) == found[0][1][index] and source.path(50_000 + index) == found[1][1][index]
    assert source.path(100_000) == "/elsewhere/é.png"
    assert list(source.names())[49_999:] == [names[-1], *names, "é.png"]


def test_linked_folders_are_entered_and_loops_end(tmp_path):
    """Data sets are put together from links."""
    for name in ("set/z/a.png", "set/z.png", "elsewhere/b.jfif", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in {"set/1": "../elsewhere", "elsewhere/back": "../set", "set/self.png": "self.png"}.items():
        (tmp_path / link).symlink_to(target)
    found = find_pictures(tmp_path / "set")
    assert [str(path.relative_to(tmp_path / "set")) for path in found] == ["1/b.jfif", "z/a.png", "z.png"]
    assert found == sorted(found)


def test_a_folder_takes_every_kind_of_picture_and_says_what_it_left_out(tmp_path, monkeypatch):
    """Left out of Pillow's kinds: what is no still picture (video, drawings), and measurements without a range."""
    Image.init()
    others = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
    read = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - others}
    assert read - {".pfm", ".heics", ".heifs", ".jxl"} <= set(PICTURES)
    for name in ("a.png", "b.JFIF", "c.heic", "d.HEIC", "e.txt", "README", "sub/f.heic", "sub/g.avif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    plain = tuple(suffix for suffix in PICTURES if suffix not in HEIF)
    left_out = Counter()
    assert len(find_files(tmp_path, plain, True, left_out)) == 3
    besides = tell_left_out(left_out)
    assert besides.startswith(", 3 .heic: no reader (pip install pillow-heif), 1 ")
    for part in (", 1 .txt: no reader", ", 1 without a suffix: no reader", ", 1 .png: not a file"):
        assert part in besides
    left_out.clear()
    assert len(find_files(tmp_path, plain, False, left_out)) == 2
    assert ", 2 .heic: no reader (" in tell_left_out(left_out)
    assert tell_left_out(Counter({f".{i}: no reader": 9 - i for i in range(7)})).endswith(
        "5 .4: no reader, and 7 of other kinds"
    )
    monkeypatch.setattr("datapipe.sources.PICTURES", plain)
    assert open_source(folder=str(tmp_path)).left_out == besides
    for name in ("a.png", "b.JFIF", "sub/g.avif"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"no pictures there, 3 \.heic: no reader \(pip install pillow-heif\)"):
        open_source(folder=str(tmp_path))


# Unreadable pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_counted_and_named_once(folder, workers, capfd):
    pictures = dataset(workers, folder=str(folder))
    found = list(itertools.islice(stream(pictures, 4, 0, 1, 0), 3))
    order = [[os.path.basename(pictures.source.path(i)) for i in epoch_order(0, epoch, 4)] for epoch in range(3)]
    for epoch, names in enumerate(order):
        at = names.index("broken.png")
        follower = folder / names[(at + 1) % 4]
        assert torch.equal(pictures._picture(4 * epoch + at), read_image(follower))
        assert torch.equal(found[epoch].image[at], pictures[4 * epoch + at]["image"])
    lines = pictures.source.unreadable_lines()
    assert len(lines) == 2 and "broken.png: not a picture" in lines[0] and "1 of 4 pictures" in lines[1]
    list(itertools.islice(stream(pictures, 4, 0, 1, 12), 2))
    assert pictures.source.unreadable_lines() == []
    assert "broken" not in capfd.readouterr().err  # the processes that decode say nothing themselves


def test_what_all_ranks_found_is_told_by_the_main_one(folder, monkeypatch):
    (folder / "0.png").write_bytes(b"")
    source = open_source(folder=str(folder))
    source.mark_unreadable(3)
    monkeypatch.setattr("utils.distributed.gather_objects", lambda found: [found, [0]])
    first, second, total = source.unreadable_lines()
    assert "0.png: empty file" in first and "broken.png" in second and "2 of 4" in total
    monkeypatch.setattr("utils.distributed.is_main", lambda: False)
    assert open_source(folder=str(folder)).unreadable_lines() == []


def test_a_source_without_readable_pictures_is_an_error(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=f"{tmp_path}: 2 pictures in a row cannot be read.*png: not a picture"):
        dataset(folder=str(tmp_path))  # at once, not in a worker later
    many = FileSource([("", ["none.png"] * 10**6)], "many")
    with pytest.raises(ConfigError, match=f"many: {TRIED} pictures in a row"):
        Pictures(DataParams(), SIZE, 0, many)


def test_a_disk_that_goes_away_is_one_line(folder):
    pictures = dataset(1, folder=str(folder))
    for path in folder.iterdir():
        os.remove(path)
    with pytest.raises(ConfigError) as caught:
        next(iter(stream(pictures, 2, 0, 1, 0)))
    assert "in a row cannot be read" in str(caught.value) and "Traceback" not in str(caught.value)


def test_sets_are_told_apart_by_names_and_order_and_not_by_place(folder, tmp_path):
    """Ranks that see different sets would train on them without a word."""
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "pictures")
    names = sorted(path.name for path in moved.iterdir())
    for number, order in enumerate((names, names[::-1])):
        (moved / f"{number}.txt").write_text("".join(f"{name}\n" for name in order))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "far.txt").write_text("".join(f"{moved / name}\n" for name in names))
    same = open_source(folder=str(folder)).digest()
    assert open_source(folder=str(moved)).digest() == same
    assert open_source(txt_file_path=str(moved / "0.txt")).digest() == same
    assert open_source(txt_file_path=str(tmp_path / "lists" / "far.txt")).digest() == same
    assert open_source(txt_file_path=str(moved / "1.txt")).digest() != same


def test_empty_and_missing_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=f"{tmp_path}: no pictures there"):
        dataset(folder=str(tmp_path))
    with pytest.raises(DiffoError, match="none: no such folder"):
        dataset(folder=str(tmp_path / "none"))


# Configuration --------------------------------------------------------------------------------------------------------


def test_one_place_or_several_of_one_kind():
    def data(**where):
        return load_config(str(NANO), values={f"data.{key}": value for key, value in where.items()}).data

    assert data(txt_file_path="a.txt").txt_file_path == "a.txt"
    assert data(txt_file_path=["a.txt", "b.txt"]).txt_file_path == ("a.txt", "b.txt")
    with pytest.raises(ConfigError, match="folder and shards are both set"):
        data(folder="a", shards="b")
    with pytest.raises(ConfigError, match="folder"):
        data(folder=3)


def test_the_data_option_tells_what_it_is_given(tmp_path):
    (tmp_path / "a.tar").touch()
    for path, kind in {
        "pictures": "folder",
        "train.txt": "txt_file_path",
        "s/{000..127}.tar": "shards",
        "s/*.tar": "shards",
        str(tmp_path): "shards",
    }.items():
        options = data_options(path)
        assert len(options) == 3 and {k for k, v in options.items() if v == path} == {f"data.{kind}"}
        assert [v for k, v in options.items() if k != f"data.{kind}"] == [None, None]
