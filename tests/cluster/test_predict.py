"""`predict` on a real Ray: exactly once, alone and fused, whoever is killed."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.cluster import predicting, rigged
from tests.cluster.predicting import config
from tests.student.models import write_model
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.predict import PredictTask, load_model, predict
from zsplg_ray.config import EvaluateConfig, FusionConfig
from zsplg_ray.images import decode_image
from zsplg_ray.masks import open_truth
from zsplg_ray.records import LABELS, decode_png, encode_png, encode_score
from zsplg_ray.rundir import Kind, RunFolder, part_name
from zsplg_ray.student.checkpoint import load_student
from zsplg_ray.student.predict import Predictor
from zsplg_ray.views.evaluate import evaluate
from zsplg_ray.views.pictures import write_preview
from zsplg_ray.vocab import class_list

pytestmark = pytest.mark.ray


def rows(out, kind: Kind = "labels"):
    table = RunFolder(str(out)).read(kind)
    return {} if table is None else {row["image_id"]: row for row in table.to_pylist()}


def parquet(out):
    return {p: p.read_bytes() for p in Path(out).rglob("*.parquet")}


def refused(given) -> str:
    with pytest.raises(ValueError) as caught:
        predict(given)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture(scope="module")
def first(scenes, model, tmp_path_factory, ray_local):
    """A run over all scenes, by two actors, and its run.json."""
    out = tmp_path_factory.mktemp("predict") / "run"
    actors = {"actors.min": 2, "actors.max": 2, "actors.in_flight": 5}
    return out, predict(config(model, scenes, out, **actors))


# The model alone ---------------------------------------------------------------------------------


def check_labels(out, images, model, conf_thresh):
    """Every stored label is what a plain loop over the images makes, byte for byte."""
    stored, predictor, left_open = rows(out), Predictor(load_student(model)), 0
    for path in images:
        image_HWC = decode_image(path.read_bytes())
        label_HW, confidence_HW = predictor.predict(image_HWC)
        label_HW[confidence_HW < conf_thresh] = 255
        confidence_HW[confidence_HW < conf_thresh] = 0
        row = stored[path.stem] if path.stem in stored else stored[path.name]
        assert row["label_png"] == encode_png(label_HW)
        assert row["score_png"] == encode_score(confidence_HW)
        assert row["class_px"] == [(label_HW == k).sum() for k in range(9)]
        assert (row["source"], row["width"]) == ("model", image_HWC.shape[1])
        sure = confidence_HW[label_HW != 255]
        assert row["confidence"] == pytest.approx(sure.mean() if sure.size else 0, abs=1e-5)
        left_open += (label_HW == 255).sum()
    return left_open


def test_two_actors_give_the_bytes_of_one_plain_loop(scenes, model, first):
    out, run = first
    paths = sorted((scenes / "JPEGImages").iterdir())
    assert len(rows(out)) == len(paths) == 24
    assert check_labels(out, paths, model, 0.0) == 0
    assert not (out / "segments").exists()
    task = PredictTask(config(model, scenes, out), class_list("shapes"), None, load_model)
    assert task.load("cpu").weights == run["weights"], "actors tell what they hold"


def test_run_json_tells_what_the_labels_were_made_with(model, first):
    out, run = first
    assert RunFolder(str(out)).read_run() == run
    counts = {"images": 24, "labelled": 24, "quarantined": 0, "skipped_as_done": 0}
    assert run["counts"] == {**counts, "labelled_now": 24} and run["state"] == "complete"
    assert run["verb"] == "predict" and run["zeroshot"] is None
    assert run["weights"] == {"model": load_student(model).sha256}
    assert run["resolved"]["backbone"] == "test_byobnet" and run["classes"]["names"][1] == "circle"
    assert {"torch", "timm"} <= run["versions"].keys() and run["images_per_s"] > 0
    meta = RunFolder(str(out)).part_meta("labels", RunFolder(str(out)).parts("labels")[0])
    assert meta["labels_fingerprint"] == run["labels_fingerprint"]


def test_the_same_command_again_does_nothing(scenes, model, first):
    out, _ = first
    before = parquet(out)
    run = predict(config(model, scenes, out, **{"ray.address": "nowhere:1"}))
    assert run["counts"]["skipped_as_done"] == 24 and run["counts"]["labelled_now"] == 0
    assert parquet(out) == before


def test_another_model_or_setting_on_the_same_folder_is_refused(scenes, model, first, tmp_path):
    out, _ = first
    other = write_model(tmp_path / "other.pt", seed=1)
    assert refused(config(other, scenes, out)).startswith("weights of the model must be")
    told = refused(config(model, scenes, out, conf_thresh=0.5))
    assert "conf_thresh must be 0.0 as in" in told
    told = refused(config(model, scenes, out, max_side_px=64))
    assert "max_side_px must be 2048 as in" in told
    with pytest.raises(ValueError, match=r"out must be a folder of `zsplg label`, got one of"):
        label(rigged.config(scenes, out))


def test_the_folder_is_one_like_any_other(scenes, model, first):
    out, _ = first
    result = evaluate(EvaluateConfig(labels=str(out), truth=str(scenes)))
    assert result["images"] == 24 and result["coverage"] == 1
    assert result == evaluate(EvaluateConfig(labels=model, truth=str(scenes))), "of the model"
    truth = open_truth(str(out))
    assert len(truth) == 24 and truth.classes == class_list("shapes")
    assert write_preview(RunFolder(str(out))) == "preview.png"
    with pytest.raises(ValueError, match="run must be a run with segments"):
        RunFolder(str(out)).label_settings()  # where `relabel` begins


def test_bad_images_go_to_errors_and_are_tried_again(model, tmp_path, ray_local):
    images = tmp_path / "images"
    images.mkdir()
    colours = {f"good{i}": (10 * i, 99, 40) for i in range(5)}
    colours |= {"poison": (255, 0, 0), "raises": (0, 255, 0), "large": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (32, 20), colour).save(images / f"{name}.png")
    (images / "text.jpg").write_bytes(b"no image")
    given = config(model, images, tmp_path / "run", conf_thresh=0.5)
    run = predict(given, load=predicting.load_rigged)
    assert (run["counts"]["labelled"], run["counts"]["quarantined"]) == (6, 3)
    errors = rows(tmp_path / "run", "errors")
    assert "killed its process 2 times" in errors["poison.png"]["error"]
    assert errors["raises.png"]["error"] == "ArithmeticError: green and more"
    stages = {name: row["stage"] for name, row in errors.items()}
    assert stages == {"poison.png": "predict", "raises.png": "predict", "text.jpg": "decode"}
    assert decode_png(rows(tmp_path / "run")["large.png"]["label_png"]).shape == (20, 32)
    run = predict(given)  # with a model that behaves
    assert (run["counts"]["labelled_now"], run["counts"]["quarantined"]) == (2, 1)
    assert sorted(rows(tmp_path / "run")) == sorted(f"{name}.png" for name in colours)
    same = [path for path in images.glob("*.png") if path.stem != "large"]  # it was seen smaller
    assert check_labels(tmp_path / "run", same, model, 0.5)


def test_bad_input_writes_nothing(scenes, model, tmp_path):
    (tmp_path / "training").mkdir()
    shutil.copy(model, tmp_path / "training" / "best.pt")
    (tmp_path / "training" / "train.json").write_text("{}")
    for changes, told in (
        ({"images": str(tmp_path / "nowhere")}, "images must be"),
        ({"model": str(tmp_path / "no.pt")}, "model must be something that exists"),
        ({"classes": "cat,dog"}, "classes must be those of"),
        ({"fuse": str(scenes)}, "fuse must be a run's folder"),
        ({"out": str(tmp_path / "training")}, "out must be no training run's folder"),
    ):
        values = {"model": model, "images": scenes, "out": tmp_path / "run", **changes}
        assert told in refused(config(**values))
        assert not (tmp_path / "run").exists()


# Fused with zero-shot labels ---------------------------------------------------------------------


def write_zeroshot(out: Path, scenes: Path, n: int, **changes) -> Path:
    """A run of `label` over the first `n` scenes, with random labels and ids that have a suffix."""
    rng, found = np.random.default_rng(0), []
    for path in sorted((scenes / "JPEGImages").iterdir())[:n]:
        size = decode_image(path.read_bytes()).shape[:2]
        label_HW = np.kron(rng.choice([0, 1, 2, 8, 255], (8, 8)), np.ones((64, 64)))
        label_HW = label_HW[: size[0], : size[1]].astype(np.uint8)
        score = rng.integers(0, 256, size, np.uint8)
        row = {"image_id": path.name, "label_png": encode_png(label_HW)}
        found.append({**row, "score_png": encode_png(score), "source": "zeroshot"})
    keys = {key: {} for key in ("config", "resolved", "weights")}
    run = {**keys, "classes": class_list("shapes").to_dict(), "labels_state": "complete"}
    folder = RunFolder(str(out))
    folder.write_run({**run, "labels_fingerprint": "zero", **changes})
    for part in (found[: n // 2], found[n // 2 :]):
        name = part_name(row["image_id"] for row in part)
        folder.write_part("labels", name, pa.Table.from_pylist(part, schema=LABELS), {})
    return out


def test_fused_labels_are_those_fused_by_hand(scenes, model, tmp_path, caplog, ray_local):
    zeroshot = write_zeroshot(tmp_path / "zeroshot", scenes, 20)
    out, rule = tmp_path / "run", {"fusion.rule": "zeroshot_else_model", "fusion.min_score": 0.3}
    run = predict(config(model, scenes, out, fuse=str(zeroshot), **rule))
    assert "4 of 24 images have no zero-shot label" in caplog.text
    assert (run["counts"]["labelled"], run["counts"]["without_zeroshot"]) == (24, 4)
    assert run["zeroshot"] == {"uri": str(zeroshot), "labels_fingerprint": "zero"}
    assert run["resolved"]["conf_thresh"] == 0.6, "the model's own"
    predictor, given = Predictor(load_student(model)), rows(zeroshot)
    rules = FusionConfig(rule="zeroshot_else_model", min_score=0.3)
    for image_id, row in rows(out).items():
        image_HWC = decode_image((scenes / "JPEGImages" / f"{image_id}.jpg").read_bytes())
        own = given.get(f"{image_id}.jpg")
        nothing = np.full(image_HWC.shape[:2], 255, np.uint8)
        zero_HW = decode_png(own["label_png"]) if own else nothing
        score_HW = decode_png(own["score_png"]) if own else nothing
        label_HW, confidence_HW = predictor.enhance(image_HWC, zero_HW, score_HW, rules, 0.6)
        assert row["label_png"] == encode_png(label_HW)
        assert row["score_png"] == encode_score(confidence_HW)
        assert row["source"] == ("enhanced" if own else "model")

    again = config(model, scenes, out, fuse=str(zeroshot), **rule)
    assert predict(again)["counts"]["skipped_as_done"] == 24
    assert "labels of fuse must be zero as in" in refused(config(model, scenes, out, **rule))
    told = refused(dataclasses.replace(again, fusion=FusionConfig(rule="agree", min_score=0.3)))
    assert "fusion.rule must be zeroshot_else_model as in" in told
    write_zeroshot(zeroshot, scenes, 20, labels_fingerprint="relabelled")
    assert "labels of fuse must be zero as in" in refused(again)


def test_zero_shot_runs_that_do_not_fit_are_refused(scenes, model, tmp_path):
    given = config(model, scenes, tmp_path / "run", fuse=str(tmp_path / "zeroshot"))
    write_zeroshot(tmp_path / "zeroshot", scenes, 4, labels_state="relabelling")
    assert "fuse must be a run with whole labels" in refused(given)
    write_zeroshot(tmp_path / "zeroshot", scenes, 4, classes=class_list("cat,dog").to_dict())
    assert "classes must be those of the zero-shot labels, where class 1 is cat" in refused(given)
    shutil.rmtree(tmp_path / "zeroshot")
    write_zeroshot(tmp_path / "zeroshot", scenes, 0)
    assert "fuse must be a run over the same images" in refused(given)
    assert not (tmp_path / "run").exists()
