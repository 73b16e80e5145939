"""What verbs say when they are done."""

import shlex

import pyarrow as pa
import pytest

from zsplg_ray import cli
from zsplg_ray.config import LabelConfig, ShapesConfig, TrainConfig
from zsplg_ray.records import ERRORS
from zsplg_ray.rundir import RunFolder
from zsplg_ray.summary import counted, duration, told
from zsplg_ray.views.summaries import of_labels, of_scenes, of_training

COUNTS = {"images": 5, "labelled": 4, "quarantined": 0, "labelled_now": 4, "skipped_as_done": 0}
RUN = {"counts": COUNTS, "seconds": 80.0, "images_per_s": 0.254, "relabel_seconds": 2.0}


def commands(text: str) -> list[list[str]]:
    """The commands of a summary as a shell reads them."""
    lines = text.partition("\nnext\n")[2].splitlines()
    return [shlex.split(line[line.index("zsplg ") :]) for line in lines]


def test_a_run_of_label(tmp_path):
    out = str(tmp_path / "my run")
    text = of_labels(RUN, out, "preview.png", "label")
    assert text.splitlines()[0] == "4 images labelled in 1 min 20 s, 0.25 images/s"
    assert f"  pictures  {out}/preview.png" in text and "errors" not in text
    report, evaluate, tune = commands(text)
    assert report == ["zsplg", "report", out, "--out", f"{out}/report.html"]
    assert evaluate == ["zsplg", "evaluate", out, "--truth", "MASKS"]
    assert tune == ["zsplg", "tune", "labels", "--run", out, "--truth", "MASKS"]


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (1, "4 images labelled, 1 of them in 1 min 20 s, 0.25 images/s"),
        (0, "4 images labelled, all of them before"),
    ],
)
def test_a_run_that_went_on(tmp_path, now, line):
    run = {**RUN, "counts": {**COUNTS, "labelled_now": now}}
    assert of_labels(run, str(tmp_path), None, "label").splitlines()[0] == line


def test_errors_are_told_with_the_commonest_reason(tmp_path):
    folder = RunFolder(str(tmp_path))
    reasons = ["NoImage: cannot read '/a/1.jpg'", "NoImage: cannot read '/b/2.jpg'", "\x1b[2J"]
    rows = [
        {"image_id": str(i), "uri": str(i), "stage": "decode", "error": e, "detail": ""}
        for i, e in enumerate(reasons)
    ]
    folder.write_part("errors", "part-" + "0" * 20, pa.Table.from_pylist(rows, schema=ERRORS), {})
    run = {**RUN, "counts": {**COUNTS, "quarantined": 3}}
    text = of_labels(run, str(tmp_path), None, "predict")
    assert "3 images could not be done (2 of them: decode: NoImage: cannot read" in text
    assert f"  errors  {tmp_path}/errors" in text and "\x1b" not in text
    export = commands(text)[-1]
    assert export[1:] == ["export", str(tmp_path), "--format", "voc", "--to", f"{tmp_path}_voc"]


def test_labels_made_again():
    text = of_labels(RUN, "run", None, "relabel")
    assert text.startswith("4 images labelled again in 2 s\n") and "tune" not in text


def test_addresses_are_masked_and_their_reports_are_here():
    text = of_labels(RUN, "s3://me:secret@bucket/run", None, "label")
    assert "secret" not in text and "--out report.html" in text


TRAINED = {
    "last": {"epoch": 3, "val_miou": 0.25},
    "best": {"epoch": 2, "val_miou": 0.5},
    "seconds": 61.0,
    "images_per_s": 12.3,
    "preview": "preview.png",
}


def test_a_training_says_what_to_do_with_the_model(monkeypatch):
    given = TrainConfig(labeled="few.txt", unlabeled="my photos", out="a model/", root="r", val="v")
    text = of_training(TRAINED, given)
    assert text.splitlines()[:2] == [
        "3 epochs in 1 min 01 s, 12.3 images/s",
        "val mIoU 0.5000 at epoch 2, the best, and 0.2500 at the end",
    ]
    judge, use = commands(text)
    assert judge == ["zsplg", "evaluate", "a model/", "--truth", "v", "--root", "r"]
    where = ["--images", "my photos", "--root", "r", "--out", "a model_predicted"]
    assert use == ["zsplg", "predict", "--model", "a model/", *where]
    for line in (judge, use):
        cli.parse(cli.VERBS[line[1]][0], line[2:], line[1])  # raises if it is no good command


def test_a_training_on_labelled_images_alone():
    judge, use = commands(of_training(TRAINED, TrainConfig(labeled="few.txt", out="m")))
    assert judge[-1] == "MASKS" and use[4:] == ["--images", "IMAGES", "--out", "m_predicted"]


def test_scenes():
    (line,) = commands(of_scenes(ShapesConfig(out="some scenes", n=3)))
    made = cli.parse(cli.VERBS["label"][0], line[2:], "label")
    assert isinstance(made, LabelConfig)
    assert made.images == "some scenes" and made.out == "some scenes_labels"


def test_the_form():
    text = told(["done\nx"], {"a": "1", "long": "2", "none": None}, [("b", "zsplg x")])
    assert text.splitlines() == ["done\\nx", "  a     1", "  long  2", "next", "  b  zsplg x"]
    assert told(["done"]) == "done"
    assert [counted(n, "image") for n in (1, 2, 1000)] == ["1 image", "2 images", "1,000 images"]


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0.4, 59.6, 3599, 7322)] == [
        *("0 s", "1 min 00 s", "59 min 59 s", "2 h 02 min")
    ]
