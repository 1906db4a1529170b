"""The report: what its page says and embeds, and, marked `browser`, how it behaves in headless Chromium."""

import base64
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from experiments import compared
from experiments.baselines import BASELINES
from experiments.embedding import MIN_PSNR, close_to
from experiments.inputs import spread
from experiments.report import DEMO, TABLES, caution, page
from measuring.metrics import psnr
from release.making import write_release
from reproduce import COMMANDS, main
from tests.commands import NANO, photograph
from tests.residual import new_codec, picture
from training.config import load_config
from utils.images import decode_image, read_image, resized, write_image

CODECS = ["jpeg", "jpeg2000", "webp"]
SIZES = {"small.png": (96, 80), "large.png": (176, 192)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`rates`, `eta` and `variance` of two pictures by a release of small random networks, and the report of them."""
    folder, codec = tmp_path_factory.mktemp("report"), new_codec()
    config = replace(load_config(str(NANO)), networks=codec.params)
    write_release(folder / "nano", 3, codec, config, counted_indices=7)
    for seed, (name, size) in enumerate(SIZES.items()):
        photograph(folder / "pictures" / name, *size, seed)
    shared = ["--data", folder / "pictures", "--device", "cpu"]
    options = ["--weights", folder / "nano", "--qualities", 0, 50, 75, 100, "--metrics", "psnr", "psnr_red"]
    assert command("rates", *shared, *options, "--codecs", *CODECS, "-o", folder / "results" / "rates") == 0
    others = {
        "eta": ["--held_out", folder / "pictures", "--points", 3, "--metric", "psnr"],
        "variance": ["--codecs", "webp"],
    }
    for name, more in others.items():
        assert command(name, *shared, "--weights", folder / "nano", *more, "-o", folder / "results" / name) == 0
    assert command("report", *shared, "-o", folder / "results") == 0
    return folder


def command(*args) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "results" / "report.html").read_text()


@pytest.fixture(scope="module")
def content(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


def decoded(uri: str):
    """The bytes of a data URI, and the picture that they hold."""
    kind, _, text = uri.partition(";base64,")
    data = base64.b64decode(text, validate=True)
    kinds = {b"\xff\xd8": "data:image/jpeg", b"RI": "data:image/webp", b"\x89P": "data:image/png"}
    assert kind == kinds.get(data[:2], "data:image/avif")
    return data, decode_image(data, "embedded")


def test_the_page_needs_nothing_but_itself(html):
    rest = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", html).replace("http://www.w3.org/2000/svg", "")
    assert "://" not in rest and not re.search(r"\bsrc=|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", rest)


def test_every_picture_decodes_close_to_what_it_stands_for(folder, content):
    rates, coded = folder / "results" / "rates", [0, 0]  # at whole size, at half size
    assert [picture["picture"] for picture in content["compared"]["pictures"]] == sorted(SIZES)
    for each in content["compared"]["pictures"]:
        name = each["picture"]
        original = read_image(folder / "pictures" / name)
        assert (each["width"], each["height"]) == SIZES[name] == original.shape[:0:-1]
        assert psnr(original, decoded(each["original"]["uri"])[1]) >= MIN_PSNR
        for file in each["files"]:
            data, shown = decoded(file["uri"])
            stem = f"{file['codec']}/{file['label']}/{name.removesuffix('.png')}"
            assert file["halved"] == (shown.shape != original.shape) == ("half size" in file["told"]), file["told"]
            whole = resized(shown, *original.shape[1:])
            assert psnr(read_image(rates / "decoded" / f"{stem}.png"), whole) >= MIN_PSNR, stem
            if file["codec"] in ("jpeg", "webp"):
                assert file["told"].startswith("the coded file itself")
                assert data == (rates / "files" / f"{stem}{BASELINES[file['codec']].suffix}").read_bytes()
                assert len(data) == file["bytes"]
                coded[file["halved"]] += 1
    assert min(coded) > 1


def test_files_are_the_nearest_in_bytes_to_the_releases(folder, content):
    rows = json.loads((folder / "results" / "rates" / "rates.json").read_text())["pictures"]
    for each in content["compared"]["pictures"]:
        sizes = {
            codec: [row["bytes"] for row in rows if (row["codec"], row["picture"]) == (codec, each["picture"])]
            for codec in each["nearest"]
        }
        ours = sizes["nano"]
        assert each["aims"] == [ours[0], ours[2], ours[3]]  # qualities 0, 75 and 100 of the four
        for codec, positions in each["nearest"].items():
            files = [each["files"][position] for position in positions]
            assert {file["codec"] for file in files} == {codec}
            for file, aim in zip(files, each["aims"], strict=True):
                ratios = [max(size / aim, aim / size) for size in sizes[codec] if size is not None]
                assert max(file["bytes"] / aim, aim / file["bytes"]) == pytest.approx(min(ratios))
    small = content["compared"]["pictures"][1]
    assert small["picture"] == "small.png" and small["aims"][0] < 60
    assert small["files"][small["nearest"]["webp"][0]]["bytes"] > 150  # its floor, and not nothing


def test_the_page_says_how_it_was_measured(content, folder):
    about = content["about"]
    assert about["command"].startswith("python reproduce.py rates --data") and about["libraries"]["torch"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"]) and about["weights"]["nano"]
    assert re.match(r"nano has \d\.\d million parameters; the paper's model has 210 million", content["caution"])
    assert "small model" in content["caution"]
    assert caution({"weights": {"nano": "00"}}) is None  # of results from before they told how many parameters
    assert [table["title"] for table in content["tables"]][0] == content["title"] == "Rates and scores on pictures"


def test_the_sweep_of_eta_says_which_rate_its_curves_have(content, folder):
    """B_eta is that of the coded sections of whole cells, and no picture's bits per pixel."""
    swept = json.loads((folder / "results" / "eta" / "eta.json").read_text())["sweeps"]["fit"]
    (group,) = [group for group in content["groups"] if group["title"].startswith("Fig. 5")]
    labels = [curve["label"] for curve in group["charts"][0]["curves"]]
    assert labels == [f"{rate:.3f} bpp of coded sections" for rate in swept["rates"]]


def test_curves_have_every_mean(content, folder):
    means = json.loads((folder / "results" / "rates" / "means.json").read_text())["rows"]
    group, eta, variance = content["groups"]
    assert [len(curve["points"]) for curve in eta["charts"][0]["curves"]] == [3] * 6
    assert [curve["label"] for curve in variance["charts"][0]["curves"]][:2] == [
        "nano, quality 0",
        "nano, base at fixed length",
    ]
    assert [len(curve["points"]) for curve in variance["charts"][0]["curves"]] == [2] * 3
    assert [chart["title"] for chart in group["charts"]] == ["PSNR", "PSNR of red"]
    for chart, score in zip(group["charts"], ("psnr", "psnr_red"), strict=True):
        drawn = {(x, y) for curve in chart["curves"] for x, y, _ in curve["points"]}
        assert drawn == {(row["bpp"], row[score]) for row in means if row["bpp"] is not None}
        assert {"nano", "JPEG 2000"} <= {curve["label"] for curve in chart["curves"]}


def test_names_cannot_leave_the_data():
    html = page({"title": "</script><script>alert(1)</script><!--"})
    assert html.count("<script") == page({"title": ""}).count("<script") and "<!--" not in html
    assert json.loads(re.search(r'id="data">(.*?)</script>', html)[1])["title"].startswith("</script>")


def test_a_picture_that_no_quality_comes_close_to_is_there_without_loss(monkeypatch):
    noise = picture(64, 64, seed=3)
    near = close_to(noise)
    assert near.told.startswith("AVIF of 4") and MIN_PSNR <= psnr(noise, decoded(near.uri)[1]) < 50
    small = picture(33, 32, seed=4)
    halved = close_to(resized(small, 65, 64), small)
    shown = decoded(halved.uri)[1]
    assert halved.halved and shown.shape == small.shape
    assert MIN_PSNR <= psnr(resized(small, 65, 64), resized(shown, 65, 64))
    monkeypatch.setattr("experiments.embedding.MIN_PSNR", 90)
    whole = close_to(noise)
    assert whole.told == "lossless WebP" and torch.equal(decoded(whole.uri)[1], noise)


@pytest.mark.parametrize(
    "count, spread_out", [(1, [0]), (2, [0, 1]), (4, [0, 2, 3]), (7, [0, 3, 6])], ids=lambda value: str(value)
)
def test_three_rates_are_spread_with_both_ends(count, spread_out):
    assert spread(range(count), 3) == spread_out


def test_the_tables_of_every_command_have_a_place():
    assert {*TABLES} == {*COMMANDS} - {"all", "report"}


def test_what_is_wrong_is_said_in_a_line(folder, tmp_path, capsys):
    shutil.copytree(folder / "results" / "rates", tmp_path / "rates")
    others = photograph(tmp_path / "others" / "small.png", 96, 80, seed=8).parent
    photograph(others / "large.png", 176, 192, seed=9)
    only = photograph(tmp_path / "only" / "small.png", 96, 80).parent
    (tmp_path / "empty").mkdir()
    for options, told in [
        (["-o", tmp_path / "empty"], "no results there"),
        (["-o", tmp_path], "coded by: python reproduce.py rates"),
        (["-o", tmp_path, "--data", only], "large.png: not in --data"),
        (["-o", tmp_path, "--data", others], "large.png: not the picture of this name"),
        (["-o", tmp_path, "--data", others, "--demo"], "leave out --data"),
    ]:
        assert command("report", *options, "--device", "cpu") == 1
        assert told in capsys.readouterr().err
    (tmp_path / "rates" / "means.json").write_text("{")
    assert command("report", "-o", tmp_path, "--data", others, "--device", "cpu") == 1
    assert "means.json: not a table" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_demo_codes_its_pictures_and_reports_on_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.inputs.demo_photographs", lambda: [folder / "pictures" / "large.png"])
    monkeypatch.setitem(DEMO, "metrics", ("psnr",))
    monkeypatch.setitem(DEMO, "codecs", ("webp",))
    assert command("report", "--demo", "-o", tmp_path, "--device", "cpu") == 0
    html = (tmp_path / "report.html").read_text()
    assert "Rates and scores on photographs" in html and "python reproduce.py report --demo" in html
    assert (tmp_path / "report-demo" / "rates" / "means.md").is_file()


@pytest.fixture(scope="module")
def chromium():
    """A headless browser: the system's Chromium, or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-browser")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path)
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started (make test-browser): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, folder):
    """A function that opens the report at a width; afterwards nothing may have been said on the console, or asked for."""
    said, pages = [], []

    def open_at(width: int, **options):
        view = chromium.new_page(viewport={"width": width, "height": 800}, **options)
        pages.append(view)
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda asked: asked.url[:5] in ("data:", "file:") or said.append(asked.url))
        view.goto((folder / "results" / "report.html").as_uri())
        return view

    yield open_at
    for view in pages:
        view.close()
    assert said == []


def divider(view) -> float:
    """Where the divider stands, of the picture's width."""
    stage, line = (view.locator(name).bounding_box() for name in (".stage", ".divider"))
    return (line["x"] + line["width"] / 2 - stage["x"]) / stage["width"]


@pytest.mark.browser
def test_the_slider_moves_by_mouse_and_by_key(opened):
    view = opened(1000)
    stage = view.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert divider(view) == pytest.approx(0.5, abs=0.01)
    view.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    view.mouse.down()
    view.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 20, steps=4)
    assert divider(view) == pytest.approx(0.2, abs=0.01)
    view.mouse.up()
    view.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 20)
    assert divider(view) == pytest.approx(0.2, abs=0.01)  # let go
    for key, place in (("ArrowRight", 0.21), ("ArrowLeft", 0.20), ("Home", 0), ("End", 1)):
        view.keyboard.press(key)
        assert divider(view) == pytest.approx(place, abs=0.01), key
    assert (
        view.locator("#right-picture").evaluate("image => getComputedStyle(image).clipPath")
        == "inset(0px 0px 0px 100%)"
    )


@pytest.mark.browser
def test_all_pictures_load_and_the_scores_are_theirs(opened, content):
    view = opened(1000)
    shown = content["compared"]
    for index, each in enumerate(shown["pictures"]):
        view.locator("#film button").nth(index).click()
        for rate in range(len(shown["rates"])):
            view.locator("#rates span").nth(rate).click()
            for codec in ["original", *each["nearest"]]:
                view.select_option("#right", codec)
                width = "image => image.decode().then(() => image.naturalWidth)"
                assert view.locator("#right-picture").evaluate(width) == each["width"]
                if codec != "original":
                    file = each["files"][each["nearest"][codec][rate]]
                    told = view.locator("#sides").inner_text()
                    assert f"{file['bytes']:,} bytes" in told and f"{file['scores']['psnr']:.2f}" in told
    assert view.locator("#film img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")


@pytest.mark.browser
def test_what_was_coded_at_half_size_is_enlarged_as_it_was_measured(opened, content, folder):
    view = opened(1000)
    index, each = next(
        (i, each) for i, each in enumerate(content["compared"]["pictures"]) if each["picture"] == "small.png"
    )
    view.locator("#film button").nth(index).click()
    view.locator("#rates span").first.click()
    file = each["files"][each["nearest"]["webp"][0]]
    assert file["halved"]
    view.select_option("#right", "webp")
    view.wait_for_function("document.getElementById('right-picture').src.startsWith('data:image/png')")
    _, shown = decoded(view.locator("#right-picture").get_attribute("src"))
    measured = folder / "results" / "rates" / "decoded" / "webp" / file["label"] / "small.png"
    assert psnr(read_image(measured), shown) > 50


@pytest.mark.browser
def test_charts_show_values_and_hide_curves(opened):
    view = opened(1000, color_scheme="dark")
    chart, tip = view.locator(".chart svg").first, view.locator("#tip")
    chart.scroll_into_view_if_needed()
    marks = chart.locator(".marker")
    drawn = marks.count()
    box = marks.first.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible() and "bpp" in tip.inner_text() and "bytes" in tip.inner_text()
    view.mouse.move(1, 1)
    assert tip.is_hidden()
    chart.focus()
    view.keyboard.press("ArrowRight")
    assert tip.is_visible() and "nano" in tip.inner_text()
    entry = view.locator(".legend").first.locator("button", has_text="nano")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false" and marks.count() == drawn - 4


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_overflows(width, opened):
    view = opened(width, device_scale_factor=2)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    outside = """all => all.filter(each => !each.closest(".scroll, .film") && each.getClientRects().length)
        .map(each => [each.outerHTML.slice(0, 80), each.getBoundingClientRect()])
        .filter(([, box]) => box.right > innerWidth + 1 || box.left < -1)"""
    assert view.locator("body *").evaluate_all(outside) == []


def test_a_smaller_picture_of_ours_is_shown_as_it_was_enlarged(tmp_path):
    path = tmp_path / "decoded" / "nano" / "0.05bpp" / "a.png"
    path.parent.mkdir(parents=True)
    write_image(path, torch.full((3, 64, 48), 90, dtype=torch.uint8))
    row = {"codec": "nano", "label": "0.05bpp", "picture": "a.png", "scale": 0.5}
    shown = compared._embedded(tmp_path, row)
    assert not shown.halved and shown.told.startswith("what it decodes to, as")
    assert decoded(shown.uri)[1].shape == (3, 64, 48)
