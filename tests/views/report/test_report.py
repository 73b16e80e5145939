"""The page: what it holds, what it says of what is missing, what is refused, what it never does."""

import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.views.report.runs import (
    CLASSES,
    HOSTILE,
    SIZE_HW,
    blocks,
    photo,
    put_errors,
    put_masks,
    put_run,
    row,
)
from zsplg_ray import cli
from zsplg_ray.config import ReportConfig
from zsplg_ray.records import LABELS, encode_png
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.storage import Place
from zsplg_ray.views.report import build, report
from zsplg_ray.views.report.records import failures
from zsplg_ray.views.report.sources import _names
from zsplg_ray.views.summaries import of_page
from zsplg_ray.vocab import class_list


class Blocks(html.parser.HTMLParser):
    """The scripts of a page by id, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.text = ""
        self.inside = ""

    def handle_starttag(self, tag, attrs):
        self.text += " "
        self.inside = f"{tag} {dict(attrs).get('id', '')}"

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside.startswith("script"):
            name = self.inside.split()[1:]
            self.scripts[name[0] if name else ""] = data
        elif self.inside != "style ":
            self.text += data


class Page:
    def __init__(self, path: Path) -> None:
        blocks_ = Blocks()
        blocks_.feed(path.read_text("utf-8"))
        blocks_.close()
        self.text = " ".join(blocks_.text.split())
        self.index = json.loads(blocks_.scripts["index"])
        self.images = self.index["images"]
        n = len(self.images)
        self.data = [json.loads(blocks_.scripts[f"image-{i}"]) for i in range(n)]
        assert set(blocks_.scripts) == {"index", "", *(f"image-{i}" for i in range(n))}


def make(tmp_path, run, **config) -> tuple[Page, dict]:
    out = tmp_path / "page.html"
    result = report(ReportConfig(run=str(run), out=str(out), **config))
    assert result["path"] == str(out) and result["bytes"] == out.stat().st_size
    assert result["url"] == out.as_uri()
    return Page(out), result


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture
def run(tmp_path):
    """Three images: half a cat at .5, a dog at .9, and one with nothing."""
    rows = [
        row("a.png", blocks(0, 1), photo(tmp_path / "img", "a.png"), 0.5),
        row("b.png", blocks(2, 2), photo(tmp_path / "img", "b.png"), 0.9),
        row("c.png", blocks(0, 255), photo(tmp_path / "img", "c.png"), float("nan")),
    ]
    return put_run(tmp_path / "run", rows)


@pytest.fixture
def masks(tmp_path):
    """Of a (all right) and b (half of it is a cat)."""
    return put_masks(tmp_path / "masks", {"a.png": blocks(0, 1), "b.png": blocks(1, 2)})


def test_numbers_of_a_plain_run(tmp_path, run):
    page, result = make(tmp_path, run)
    found = {image["id"]: image["m"] for image in page.images}
    assert found["a.png"] == {
        **{"doubt": 0.5, "confidence": 0.5, "coverage": 0.5},
        **dict.fromkeys(("miou", "wrong", "differs")),
    }
    assert found["b.png"]["coverage"] == 1.0
    assert found["c.png"] == {**found["c.png"], "confidence": None, "doubt": 1.0, "coverage": 0.0}
    assert page.images[2]["maps"][0]["shares"] == [[0, 0.5], [255, 0.5]]
    assert [layer["shown"] for layer in page.index["layers"]] == [True, False]
    assert (result["images"], result["left_out"], result["miou"]) == (3, 0, None)
    assert (
        "3 images with zero-shot labels of 2 classes; 17 % of the pixels are left open" in page.text
    )
    assert "IoU by class" not in page.text and "Class balance" in page.text


def test_pictures_are_the_image_and_the_map(tmp_path, run):
    page, _ = make(tmp_path, run)
    image = opened(page.data[0]["photo"])
    assert image.format == "JPEG" and image.size == SIZE_HW[::-1]
    assert np.abs(np.asarray(image).astype(int) - (90, 120, 60)).max() < 6
    label = opened(page.data[0]["maps"][0])
    assert label.mode == "P" and (np.asarray(label) == blocks(0, 1)).all()


def test_large_images_are_made_smaller_and_maps_with_them(tmp_path):
    big = (300, 400)
    path = photo(tmp_path / "img", "big.jpg", size_hw=big)
    run = put_run(tmp_path / "run", [row("big", blocks(0, 1, 2, 255, size_hw=big), path)])
    page, _ = make(tmp_path, run, side_px=100)
    assert opened(page.data[0]["photo"]).size == opened(page.data[0]["maps"][0]).size == (100, 75)
    small = np.asarray(opened(page.data[0]["maps"][0]))
    assert (small == blocks(0, 1, 2, 255, size_hw=(75, 100))).all()


def test_truth_of_some_images(tmp_path, run, masks):
    page, result = make(tmp_path, run, truth=masks)
    found = {image["id"]: image["m"] for image in page.images}
    assert (found["a.png"]["miou"], found["a.png"]["wrong"]) == (1.0, 0.0)
    assert (found["b.png"]["miou"], found["b.png"]["wrong"]) == (0.25, 0.5)
    assert found["c.png"]["miou"] is None
    assert found["b.png"]["doubt"] == pytest.approx((0.1 + 0.5) / 2, abs=1e-4)
    # background 12/12 columns... cat: 16 of 32 px hit, none false; dog: 16 hits of 32 given.
    assert result["miou"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert "judged by 2 masks" in page.text and "50 % of cat is taken for dog" in page.text
    assert page.data[2]["maps"] == [page.data[2]["maps"][0], None]


def test_counting_strip_by_strip_gives_the_same(tmp_path, run, masks, monkeypatch):
    whole, _ = make(tmp_path, run, truth=masks, compare=(run,))
    monkeypatch.setattr("zsplg_ray.views.report.counts._STRIP_PX", 50)
    strips, _ = make(tmp_path, run, truth=masks, compare=(run,))
    assert strips.index == whole.index and strips.text == whole.text


def test_the_threshold_curve_is_that_of_relabelling(tmp_path, run, masks):
    """Below .5 nothing changes; up to .9 the cat of a is lost; then the dog is, too."""
    from zsplg_ray.views.report.charts import _thresholded
    from zsplg_ray.views.report.counts import Totals, count, read_maps
    from zsplg_ray.views.report.sources import in_batches, open_sources

    sources = open_sources(ReportConfig(run=run, truth=masks))
    totals = Totals(3, 0)
    for batch in in_batches(sources, [0, 1, 2]):
        for one in batch:
            count(one, read_maps(one, sources.truth, 3), CLASSES.names, totals)
    half = SIZE_HW[0] * SIZE_HW[1] // 2
    curve = _thresholded(totals.joint_SKL, open_=False)
    assert curve[0].tolist() == [[half, 0, 0, 0], [0, half, half, 0], [0, 0, half, 0]]
    assert curve[17].tolist() == [[half, 0, 0, 0], [half, 0, half, 0], [0, 0, half, 0]]
    assert curve[30].tolist() == [[half, 0, 0, 0], [half * 2, 0, 0, 0], [half, 0, 0, 0]]
    opened_ = _thresholded(totals.joint_SKL, open_=True)
    assert opened_[30].tolist() == [[half, 0, 0, 0], [0, 0, 0, half * 2], [0, 0, 0, half]]


def test_other_runs_beside(tmp_path, run):
    rows = [row("a.jpg", blocks(1, 1), None), row("z", blocks(1, 1), None)]
    other = put_run(tmp_path / "x" / "run", rows)
    page, _ = make(tmp_path, run, compare=(other,))
    assert [layer["name"] for layer in page.index["layers"]] == ["run", "run (2)", "Truth"]
    assert page.images[0]["m"]["differs"] == 0.5, "ids match without their suffix"
    assert page.images[1]["m"]["differs"] is None
    assert "Agreement with run (2)" in page.text and "compared with run (2)" in page.text
    assert np.asarray(opened(page.data[0]["maps"][1])).min() == 1


def test_what_went_wrong_is_told(tmp_path, run):
    errors = {"x.png": "no '/a/x.png' here", "y.png": "no '/a/y.png' here", "z": "torn <b>"}
    put_errors(Path(run), errors)
    page, result = make(tmp_path, run)
    assert result["failed"] == 3
    assert "no '/a/IMAGE' here x.png, y.png" in page.text and "torn <b>" in page.text


@pytest.mark.parametrize(
    ("image_id", "error", "told"),
    [
        ("e", "the header ended; see 'e'", "the header ended; see 'IMAGE'"),
        ("", "torn", "torn"),
        ("t", "it didn't end", "it didn't end"),
        ("a.png", "/d/a.png: not /d/aa.png", "/d/IMAGE: not /d/aa.png"),
        ("a+(b", 'no "a+(b"', 'no "IMAGE"'),
    ],
)
def test_an_id_is_taken_out_of_a_reason_only_whole(tmp_path, image_id, error, told):
    put_errors(tmp_path, {image_id: error})
    assert failures(RunFolder(str(tmp_path)))[1][0].error == told


def test_errors_are_read_once_and_without_their_details(tmp_path, run, monkeypatch):
    put_errors(Path(run), {str(i): f"torn at byte {i}" for i in range(3)})
    asked, read = [], RunFolder.read

    def noting(self, kind, columns=None):
        asked.append((kind, columns))
        return read(self, kind, columns)

    monkeypatch.setattr(RunFolder, "read", noting)
    page, result = make(tmp_path, run)
    assert result["failed"] == 3 and "torn at byte 0 0, 1, 2" in page.text
    assert [a for a in asked if a[0] == "errors"] == [("errors", ["image_id", "stage", "error"])]


def test_a_tuned_run(tmp_path, run):
    part = {"miou": 0.5, "sd": 0.1}
    study = {
        "chosen": "tuned",
        "result": {"default": {"tuning": part, "held_out": {"miou": 0.4, "sd": None}}},
    }
    folder = RunFolder(run)
    folder.write_bytes("tune.json", json.dumps(study).encode())
    folder.write_bytes("tuned/thresholds.png", encode_png(blocks(1)))
    page, _ = make(tmp_path, run)
    assert "as labelled 0.500 ± 0.100 0.400" in page.text and "Scores against the" in page.text
    folder.write_bytes("tune.json", b'{"chosen": 1, "result": {"default": 3}}')
    assert "Tuned thresholds" not in make(tmp_path, run)[0].text


def test_images_that_are_gone_or_broken_are_told(tmp_path):
    img = tmp_path / "img"
    rows = [row(name, blocks(0, 1), photo(img, f"{name}.png")) for name in "abcd"]
    rows += [row("e", blocks(0, 1), None), row("f", blocks(0, 1), str(img))]
    (img / "a.png").unlink()
    (img / "b.png").write_bytes(b"rubbish")
    photo(img, "c.png", size_hw=(10, 10))
    rows[3]["label_png"] = b"rubbish"
    page, result = make(tmp_path, put_run(tmp_path / "run", rows))
    notes = {image["id"]: image["notes"] for image in page.images}
    assert notes["a"] == ["the image is gone"]
    assert notes["b"] == ["the file is no image any more"]
    assert notes["c"] == ["the image is 10 x 10 now, not as it was labelled"]
    assert notes["d"] == ["its labels are broken"]
    assert notes["e"] == ["its address is not known"]
    assert notes["f"] == ["the image cannot be read"]
    assert result["gone"] == 5 and result["counted"] == 5
    assert "5 without their picture" in of_page(result)
    assert page.data[3]["photo"] and page.data[3]["maps"] == [None, None]
    assert page.images[3]["m"]["doubt"] == 1.0, "broken labels stand in front"


def test_an_address_that_is_none_does_not_stop_the_page(tmp_path):
    run = put_run(tmp_path / "run", [row("a", blocks(0, 1), "http://[x/a.jpg")])
    page, result = make(tmp_path, run)
    assert page.images[0]["notes"] == ["its address cannot be understood"]
    assert result["gone"] == result["counted"] == 1


def test_masks_without_any_truth_show_what_needs_none(tmp_path, run):
    empty = put_masks(tmp_path / "empty", {"a.png": blocks(255), "b.png": blocks(255)})
    page, result = make(tmp_path, run, truth=empty, compare=(run,))
    assert result["miou"] is None and "Class balance" in page.text
    assert "IoU by class" not in page.text and "What is taken for what" not in page.text
    assert "mIoU, which is highest" not in page.text and "would keep a class if" in page.text


def test_masks_that_do_not_fit_are_told_or_refused(tmp_path, run):
    odd = put_masks(tmp_path / "odd", {"a.png": blocks(0, 1), "b.png": blocks(7, 2)})
    page, _ = make(tmp_path, run, truth=odd)
    assert page.images[1]["notes"] == ["its mask does not fit"]
    assert "1 mask could not be compared" in page.text and "got 7" in page.text
    (tmp_path / "odd" / "a.png").unlink()
    with pytest.raises(ValueError, match="map must be of class indices below 3, or 255, got 7"):
        make(tmp_path, run, truth=odd)


def test_a_store_that_does_not_answer_is_left_alone(tmp_path, monkeypatch):
    from zsplg_ray.views.report import tiles

    asked = []

    def dead(uri):
        asked.append(uri)
        raise OSError("no answer")

    monkeypatch.setattr(tiles, "read_bytes", dead)
    camera = tiles.Photographer(64, 10_000)
    whys = [camera.take(f"s3://b/{i}.jpg", None).why for i in range(6)]
    assert len(asked) == 3 and whys[2:4] == [
        "the image cannot be read",
        "the storage does not answer",
    ]
    camera.take("s3://other/0.jpg", None)
    assert len(asked) == 4


# Many images -------------------------------------------------------------------------------------


def many(tmp_path, n: int) -> str:
    rows = []
    for i in range(n):
        label = blocks(2, 0) if i == 7 else blocks(1, 0)
        rows.append(row(f"{i:03d}", label, None, 0.2 if i in (20, 21, 22, 23) else 0.9 - i / 1000))
    return put_run(tmp_path / "many", rows)


def test_of_many_images_the_telling_ones_are_shown(tmp_path):
    run = many(tmp_path, 60)
    page, result = make(tmp_path, run, max_images=10)
    shown = [image["id"] for image in page.images]
    assert len(shown) == len(set(shown)) == 10 and result["left_out"] == 50
    assert "50 of 60 images are left out" in page.text
    assert "007" in shown, "the only one of its class"
    assert {"020", "021", "022", "023"} <= set(shown), "the most doubtful"
    assert min(shown) < "005" and max(shown) > "055", "and a spread"
    again, _ = make(tmp_path, run, max_images=10)
    assert [image["id"] for image in again.images] == shown


def test_counting_is_bounded_too(tmp_path):
    page, result = make(tmp_path, many(tmp_path, 60), max_images=5, max_counted=20)
    assert (result["counted"], result["images"], result["left_out"]) == (20, 5, 55)
    assert "Counted over 20 of 60 images" in page.text


def test_images_with_masks_are_counted_wherever_they_are(tmp_path):
    masks = put_masks(tmp_path / "m", {"031": blocks(1, 0), "047": blocks(1, 0)})
    page, result = make(tmp_path, many(tmp_path, 60), truth=masks, max_counted=2, max_images=4)
    assert result["miou"] == 1.0 and "judged by 2 masks" in page.text
    assert {"031", "047"} <= {image["id"] for image in page.images}


def test_each_image_is_read_once(tmp_path, reads):
    make(tmp_path, many(tmp_path, 60))
    parts = [name for kind, name in reads if kind == "labels"]
    assert len(parts) <= 3 * len(set(parts))


# Text stays text ---------------------------------------------------------------------------------


def test_hostile_names_end_no_script_and_begin_no_markup(tmp_path):
    classes = class_list("cat").of(['<script>alert("k")</script>', "</style>&'"])
    path = photo(tmp_path / "img", "a.png")
    run = put_run(tmp_path / "run", [row(HOSTILE, blocks(1, 2), path)], classes)
    put_errors(Path(run), {HOSTILE: f"broken {HOSTILE}", "b": "<svg onload=alert(3)>"})
    page, _ = make(tmp_path, run)
    assert page.images[0]["id"] == HOSTILE
    assert page.index["classes"][1:] == list(classes.names[1:])
    raw = (tmp_path / "page.html").read_text()
    assert len(re.findall("<script", raw)) == len(re.findall("</script>", raw)) == 3
    assert not re.search(r"<(img src=x|svg onload)", raw)
    assert raw.count("</style>") == 1


def test_nothing_is_fetched_and_policy_names_what_may_run(tmp_path, run):
    make(tmp_path, run)
    raw = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', raw)
    assert policy and policy[1].startswith(
        "default-src 'none'; img-src data: blob:; style-src 'sha"
    )
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", raw)
    assert " style=" not in raw and " onclick=" not in raw


def test_credentials_are_not_on_the_page(tmp_path, run):
    rows = [row("a", blocks(1), "s3://bucket/a.jpg")]
    resolved = {"images": "s3://key:secret@bucket/x", "mlflow.uri": "http://me:pass@host"}
    run = put_run(tmp_path / "again", rows, resolved=resolved)
    make(tmp_path, run)
    raw = (tmp_path / "page.html").read_text()
    assert "secret" not in raw and "me:pass" not in raw and "***@bucket" in raw


@pytest.mark.parametrize(
    "address", ["s3://AKIA:hush@bucket", "s3://bucket?secret_key=hush", "s3://AKIA:hush@bucket/"]
)
def test_a_bucket_is_named_without_credentials(address):
    first, again, other = _names([address, address, "s3://bucket/runs/one"])
    assert again == f"{first} (2)" and other == "one"
    assert first.endswith("bucket") and "hush" not in first and "AKIA" not in first


def test_what_is_returned_has_no_credentials(tmp_path, run, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(Place, "kind", lambda self: None)
    monkeypatch.setattr(
        build, "RunFolder", lambda uri: kept.append(uri) or RunFolder(str(tmp_path))
    )
    out = "s3://AKIA:hush@bucket/page.html?secret_key=hush"
    assert cli.main(["report", run, "--out", out, "--json"]) == 0
    told = capsys.readouterr().out
    assert "hush" not in told and "AKIA" not in told and "hush" in kept[0]
    result = json.loads(told)
    assert result["path"] == result["url"] == "s3://***@bucket/page.html?secret_key=***"


# What is refused ---------------------------------------------------------------------------------


def refused(capsys, *argv: str) -> str:
    assert cli.main(["report", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_no_labels(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nothing"):
        line = refused(capsys, str(tmp_path / folder), "--out", str(tmp_path / "x.html"))
        assert line.startswith("error: run must be a run's folder with labels/ in it, got ")
    assert not (tmp_path / "x.html").exists() and not list((tmp_path / "empty").iterdir())


def test_a_half_relabelled_run(tmp_path, capsys):
    rows = [row("a", blocks(1), None)]
    half = put_run(tmp_path / "half", rows, labels_state="relabelling")
    whole = put_run(tmp_path / "whole", rows)
    assert "error: run must be whole, got a half" in refused(capsys, half)
    assert "error: compare must be whole" in refused(capsys, whole, "--compare", half)
    assert not (tmp_path / "whole" / "report.html").exists()


def test_other_classes_or_images(tmp_path, run, capsys):
    others = put_run(tmp_path / "others", [row("a", blocks(1), None)], class_list("dog,cat"))
    line = refused(capsys, run, "--compare", others)
    assert "classes must be those of the labels in" in line and "where class 1 is dog" in line
    line = refused(capsys, run, "--truth", others)
    assert "classes must be those of the truth, where class 1 is dog, got cat" in line
    foreign = put_run(tmp_path / "foreign", [row("q", blocks(1), None)])
    assert "compare must be a run over the same images" in refused(
        capsys, run, "--compare", foreign
    )
    masks = put_masks(tmp_path / "m", {"q": blocks(1)})
    assert "truth must be masks of the labelled images" in refused(capsys, run, "--truth", masks)


def test_places_that_are_none_for_a_page(tmp_path, run, capsys):
    assert "out must be a file, got" in refused(capsys, run, "--out", str(tmp_path))
    assert "out must be a file, got" in refused(capsys, run, "--out", f"{tmp_path}/new/")
    line = refused(capsys, run, "--out", f"{run}/run.json")
    assert "out must be a file that ends in .html" in line
    assert json.loads((Path(run) / "run.json").read_text())["labels_state"] == "complete"


def test_a_page_appears_whole_or_not_at_all(tmp_path, run, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report(ReportConfig(run=run, out=str(out)))
    assert out.read_text() == "old" and not list(tmp_path.glob("_*"))


# Command line ------------------------------------------------------------------------------------


def test_the_verb(tmp_path, run, capsys):
    assert cli.main(["report", run]) == 0
    page = Path(run) / "report.html"
    out = capsys.readouterr().out
    assert out.startswith("3 images on one page, 0.") and f"  open  {page.as_uri()}\n" in out
    assert cli.main(["report", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"path", "bytes", "images", "seconds"} <= result.keys() and result["images"] == 3


def test_a_run_without_run_json_or_segments(tmp_path, run):
    (Path(run) / "run.json").unlink()
    page, _ = make(tmp_path, run)
    assert len(page.images) == 3 and "the folder has no run.json" in page.text


def test_object_stores(tmp_path, bucket):
    path = photo(tmp_path / "img", "a.png")
    RunFolder(bucket.uri("img")).write_bytes("a.png", Path(path).read_bytes())
    uri = Place.parse(bucket.uri("img")).child("a.png").uri
    assert uri.startswith("s3://")
    rows = [row("a", blocks(1), uri)]
    page, _ = make(tmp_path, put_run(tmp_path / "run", rows))
    assert page.data[0]["photo"] and page.images[0]["notes"] == []
    table = pa.Table.from_pylist(rows, schema=LABELS)
    there = RunFolder(bucket.uri("run"))
    there.write_part("labels", part_name(["a"]), table, {"classes": CLASSES.to_dict()})
    result = report(ReportConfig(run=bucket.uri("run")))
    assert result["path"].startswith("s3://") and result["images"] == 1
    assert len(there.read_bytes("report.html") or b"") == result["bytes"]
