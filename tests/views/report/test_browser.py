"""The page in a browser: sorting, filters, the divider, focus, hostile names, narrow and dark."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.views.report.runs import HOSTILE, blocks, photo, put_errors, put_masks, put_run, row
from zsplg_ray.config import ReportConfig
from zsplg_ray.views.report import report
from zsplg_ray.vocab import ClassList

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

CLASSES = ClassList.of(["cat", '<b id="x">dog</b>'])
SIZE_HW = (60, 80)


def striped(*values):
    return blocks(*values, size_hw=SIZE_HW)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Five images: of b and d there are masks, d is gone, of c the other run knows nothing."""
    folder = tmp_path_factory.mktemp("page")
    img = folder / "img"
    labels = {
        "a.jpg": (striped(0, 1), 0.9),
        "b.jpg": (striped(1, 2), 0.3),
        "c.jpg": (striped(0, 0, 0, 255), 0.7),
        "d.jpg": (striped(2, 0, 0, 0), 0.5),
        HOSTILE: (striped(1, 1), 0.6),
    }
    rows = []
    for i, (name, (label, score)) in enumerate(labels.items()):
        path = photo(img, f"{i}.jpg", (40 * i + 30, 90, 200 - 30 * i), SIZE_HW)
        rows.append(row(name, label, path, score))
    (img / "3.jpg").unlink()
    run = put_run(folder / "run", rows, CLASSES)
    put_errors(Path(run), {HOSTILE + "2": f"broken: {HOSTILE}"})
    other = {n: striped(1, 1) for n in labels if n != "c.jpg"}
    compare = put_run(folder / "other", [row(n, m, None) for n, m in other.items()], CLASSES)
    masks = put_masks(folder / "masks", {"b.jpg": striped(1, 1), "d.jpg": striped(2, 0, 0, 0)})
    config = {"run": run, "compare": (compare,), "truth": masks}
    return report(ReportConfig(**config, out=str(folder / "page.html")))["url"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Watched:
    """What a page must not do."""

    def __init__(self, page):
        self.told: list[str] = []
        page.on("console", lambda m: self.told.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.told.append(f"error: {e}"))
        page.on("dialog", lambda d: (self.told.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", self.asked)

    def asked(self, request):
        if not re.match("file:|data:|blob:", request.url):
            self.told.append(f"request: {request.url}")


@pytest.fixture
def opened(browser, url):
    """Opens the page; afterwards nothing was logged, asked of the network, or popped up."""
    contexts, watched = [], []

    def open_(fragment="", width=1200, height=900, **more):
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        watched.append(Watched(page))
        page.goto(url + fragment)
        page.wait_for_selector("#grid .tile, #count:not(:empty)")
        return page

    yield open_
    told = [line for one in watched for line in one.told]
    for context in contexts:
        context.close()
    assert told == []


def ids(page) -> list[str]:
    return page.locator("#grid .id").evaluate_all("all => all.map(e => e.textContent)")


def test_sorting(opened):
    page = opened()
    page.select_option("#sort", "confidence+")
    assert ids(page) == ["b.jpg", "d.jpg", HOSTILE, "c.jpg", "a.jpg"]
    page.select_option("#sort", "coverage-")
    assert set(ids(page)[:2]) == {"b.jpg", HOSTILE}
    page.select_option("#sort", "miou+")
    assert ids(page)[:2] == ["b.jpg", "d.jpg"], "images without a mask stand last"
    page.select_option("#sort", "differs-")
    assert ids(page)[0] == "d.jpg" and ids(page)[-1] == "c.jpg"
    page.select_option("#sort", "id-")
    assert ids(page) == sorted([HOSTILE, "a.jpg", "b.jpg", "c.jpg", "d.jpg"], reverse=True)


def test_filters_and_the_address_that_keeps_them(opened):
    page = opened()
    page.get_by_role("searchbox").fill("B.J")
    assert ids(page) == ["b.jpg"]
    assert page.get_by_role("status").text_content() == "1 of 5 images"
    page.fill("#query", "")
    page.locator("#legend button", has_text="dog").click()
    assert ids(page) == ["b.jpg", "d.jpg"]
    page.get_by_text("More filters").click()
    page.get_by_label("confidence, at most, in per cent").fill("40")
    assert ids(page) == ["b.jpg"]
    page.select_option("#sort", "id+")
    fragment = page.evaluate("location.hash")
    assert {"sort=id%2B", "class=2", "confidence=..40"} == set(fragment[1:].split("&"))
    again = opened(fragment)
    assert ids(again) == ["b.jpg"] and again.input_value("#sort") == "id+"
    assert again.locator("#legend [aria-pressed=true]").text_content() == CLASSES.names[2]
    again.get_by_role("button", name="Show all").click()
    assert len(ids(again)) == 5 and again.evaluate("document.activeElement.id") == "query"
    again.fill("#query", "nothing like that")
    assert again.get_by_role("status").text_content() == "No image fits these filters."


@pytest.mark.parametrize("fragment", ["#sort=x&class=99&opacity=no&open=77", "#class=-1&miou=a..b"])
def test_a_strange_address_shows_everything(opened, fragment):
    assert len(ids(opened(fragment))) == 5


def test_a_class_that_is_picked_is_shown_alone(opened):
    page = opened()
    page.get_by_role("searchbox").fill("b.jpg")
    look = """async () => {
        const image = document.querySelector("#grid img.map");
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const drawing = canvas.getContext("2d", { willReadFrequently: true });
        drawing.drawImage(image, 0, 0);
        return [5, 75].map((x) => [...drawing.getImageData(x, 30, 1, 1).data]);
    }"""
    page.wait_for_selector("#grid img.map")
    cat, dog = page.evaluate(look)
    assert cat == [0x2F, 0x7E, 0xD8, 255] and dog == [0xF2, 0x8E, 0x2B, 255]
    page.locator("#legend button", has_text="dog").click()
    page.wait_for_selector("#grid img.map")
    cat, dog = page.evaluate(look)
    assert cat[3] == 0 and dog == [0xF2, 0x8E, 0x2B, 255]


def test_opacity_reaches_every_map(opened):
    page = opened(reduced_motion="reduce")
    page.wait_for_selector("#grid img.map")
    page.focus("#opacity")
    page.keyboard.press("Home")
    maps = page.locator("#grid .picture-box:not(.blank) img.map")
    opacity = maps.evaluate_all("all => all.map(e => getComputedStyle(e).opacity)")
    assert opacity == ["0"] * 4


def test_the_dialog_by_keyboard_alone(opened):
    page = opened("#sort=id%2B")
    page.wait_for_selector("#grid img")
    page.locator("#grid .tile", has_text="a.jpg").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible() and page.locator("#viewer-id").text_content() == "a.jpg"
    assert page.evaluate("document.activeElement.id") == "wipe"
    share = "getComputedStyle(document.getElementById('stage')).getPropertyValue('--wipe')"
    before = page.evaluate(share)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert (before, page.evaluate(share)) == ("50%", "54%")
    page.keyboard.press("Shift+ArrowLeft")
    assert page.evaluate(share) == "44%"
    assert page.locator("#wipe").get_attribute("aria-valuetext") == "44 % Image"
    page.keyboard.press("End")
    clip = "getComputedStyle(document.getElementById('pane-right')).clipPath"
    assert page.evaluate(clip) == "inset(0px 0px 0px 100%)"
    page.keyboard.press("j")
    assert page.locator("#viewer-id").text_content() == "b.jpg"
    assert "open=2" in page.evaluate("location.hash")
    for _ in range(30):  # focus stays inside
        page.keyboard.press("Tab")
        inside = "!document.activeElement || document.activeElement === document.body"
        inside += " || document.getElementById('viewer').contains(document.activeElement)"
        assert page.evaluate(inside)
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and "open" not in page.evaluate("location.hash")
    assert page.evaluate("document.activeElement.textContent").startswith("b.jpg")


def test_what_the_dialog_shows_and_tells(opened):
    page = opened("#open=2&sort=id%2B")  # the hostile name is the first
    assert page.locator("#viewer-id").text_content() == "b.jpg"
    numbers = page.locator("#numbers").inner_text()
    assert re.search(r"mIoU\s+0.25", numbers) and re.search(r"confidence\s+0.30", numbers)
    strip = page.locator("#strip button")
    assert strip.all_inner_texts() == [
        *("Image", "run · mIoU 0.25", "other · mIoU 1.00", "Truth", "run ≠ other", "run ≠ Truth")
    ]
    page.select_option("#left", "2")
    strip.nth(1).click()
    assert strip.nth(1).get_attribute("aria-pressed") == "true"
    assert page.locator("#wipe").get_attribute("aria-label") == "Divider between Truth and run"
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_selector("#here .class")
    told = page.locator("#here .class").all_inner_texts()
    assert told == [f"run: {CLASSES.names[2]}", "other: cat", "Truth: cat"]
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    page.mouse.up()
    wiped = float(page.input_value("#wipe"))
    assert wiped == pytest.approx(25, abs=1.5)


def test_differences_are_drawn_where_they_are(opened):
    page = opened("#open=2")
    page.select_option("#right", "0/2")
    look = """async () => {
        const copy = new OffscreenCanvas(80, 60);
        const drawing = copy.getContext("2d", { willReadFrequently: true });
        const at = (x) => drawing.getImageData(x, 30, 1, 1).data[3];
        for (let i = 0; i < 600 && !at(75); i++) {
            drawing.drawImage(document.querySelector("#pane-right canvas"), 0, 0);
            await new Promise(requestAnimationFrame);
        }
        return [at(5), at(75)];
    }"""
    assert page.evaluate(look) == [0, 255], "left both say cat, right dog and cat"


def test_a_gone_image_is_told_and_still_shows_its_labels(opened):
    page = opened("#open=4&sort=id%2B")
    assert page.locator("#numbers .warn").inner_text() == "the image is gone"
    assert page.locator("#left option[value=photo]").is_disabled()
    assert page.locator("#pane-right img.map").count() == 1
    page.keyboard.press("Escape")
    tile = page.locator("#grid .tile", has_text="d.jpg")
    assert "the image is gone" in tile.inner_text() and tile.locator("img.map").count() == 1


def test_hostile_names_stay_text(opened):
    page = opened()
    tile = page.locator("#grid .tile", has_text="alert(1)")
    assert tile.locator(".id").text_content() == HOSTILE
    tile.click()
    assert page.locator("#viewer-id").text_content() == HOSTILE
    assert page.locator("#pane-left img").first.get_attribute("alt").startswith(HOSTILE)
    assert page.locator("#x").count() == 0 and page.locator("img[src=x]").count() == 0
    assert CLASSES.names[2] in page.locator("#class").inner_text()
    assert HOSTILE.split("\n")[0] in page.locator("#failed").text_content()


def test_every_picture_says_what_it_shows(opened):
    page = opened("#sort=id%2B")
    page.wait_for_selector("#grid img")
    pictures = page.locator("#grid img:not(.map):not(.under-map)")
    alts = pictures.evaluate_all("all => all.map(e => e.alt)")
    assert alts[0] == f"{HOSTILE}: cat 100 %" and alts[1] == "a.jpg: cat 50 %" and len(alts) == 4
    unnamed = """() => [...document.querySelectorAll("button, input, select, svg[role=img], img")]
        .filter((e) => !e.labels?.length && !e.ariaLabel && !e.hasAttribute("alt"))
        .filter((e) => !e.textContent.trim())
        .map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []


@pytest.mark.parametrize("fragment", ["", "#open=0", "#open=4"])
def test_nothing_sticks_out_on_a_phone(opened, fragment):
    page = opened(fragment, 390, 800, has_touch=True)
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    viewer = page.locator(".viewer")
    assert viewer.evaluate("e => e.scrollWidth <= e.clientWidth")


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    values = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(opened, scheme):
    page = opened(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.02) == (scheme == "dark")
    for selector in ("h1", ".lead", ".stats dt", ".chip", "summary", ".tile .meta", ".tile .note"):
        colour = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_focus_can_be_seen_and_motion_can_be_off(opened):
    page = opened(reduced_motion="reduce")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the images"
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert page.evaluate(outline) == "3px"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_without_scripts_the_charts_are_there(browser, url):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert page.get_by_text("The images need JavaScript").is_visible()
    assert page.locator("#charts svg").first.is_visible()
    context.close()


def test_many_images_come_some_dozens_at_a_time(browser, tmp_path):
    rows = [row(f"{i:03d}", striped(0, 1), None, i / 200) for i in range(110)]
    made = report(ReportConfig(run=put_run(tmp_path / "run", rows, CLASSES)))
    page = browser.new_page()
    page.goto(made["url"])
    assert page.locator("#grid .tile").count() == 48
    page.get_by_role("button", name="Show 48 more of 62").click()
    assert page.locator("#grid .tile").count() == 96
    assert page.evaluate("document.activeElement.textContent").startswith("048")
    page.get_by_role("button", name="Show 14 more of 14").click()
    assert page.locator("#grid .tile").count() == 110 and not page.locator("#more").is_visible()
    page.close()
