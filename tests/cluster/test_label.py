"""`label` on a real Ray: exactly once, whatever the images are and whoever is killed."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.cluster.rigged import (
    LoadCounting,
    config,
    load_blind,
    load_broken_device,
    load_killing,
    load_others,
    load_strange,
)
from zsplg_ray.cluster.label import label
from zsplg_ray.images import decode_image
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.label.naming import prepare
from zsplg_ray.label.presets import resolve_label
from zsplg_ray.records import decode_png, encode_png, encode_score
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError, override
from zsplg_ray.vocab import class_list

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def rows(out, kind, *columns):
    table = RunFolder(str(out)).read(kind, list(columns) or None)
    return [] if table is None else table.to_pylist()


def ids(out, kind):
    return sorted(row["image_id"] for row in rows(out, kind, "image_id"))


def fill(folder, colours):
    """One-colour 32 x 32 images, named after what they are."""
    folder.mkdir(exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    return folder


def test_two_actors_give_the_bytes_of_one_plain_loop(scenes, tmp_path):
    given = config(scenes, tmp_path / "run", **{"actors.min": 2, "actors.max": 2})
    run = label(override(given, {"actors.in_flight": 5}))
    assert run["state"] == "complete" and run["counts"]["labelled"] == 24

    resolved = resolve_label(given)
    naming, _ = prepare(resolved, class_list("shapes"))
    labeler = Labeler.load(resolved, naming)
    stored = {row["image_id"]: row for row in rows(tmp_path / "run", "labels")}
    segments = {row["image_id"]: row for row in rows(tmp_path / "run", "segments")}
    painted = 0
    for path in sorted((scenes / "JPEGImages").iterdir()):
        found, composed = labeler.label(decode_image(path.read_bytes()))
        row = stored.pop(path.stem)
        assert row["label_png"] == encode_png(composed.label_HW)
        assert row["score_png"] == encode_score(composed.score_HW)
        assert sum(row["class_px"]) == (composed.label_HW != 255).sum()
        assert [s["rle"] for s in segments[path.stem]["segments"]] == found.rle
        painted += (composed.label_HW > 0).sum()
    assert not stored and painted > 0


def test_the_same_command_does_only_what_is_missing(scenes, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    sources = sorted((scenes / "JPEGImages").iterdir())
    for path in sources[:6]:
        shutil.copy(path, images)
    (images / "late.jpg").write_bytes(b"not yet")
    notes = tmp_path / "notes"
    given = config(images, tmp_path / "run")

    def calls():
        return len(notes.read_text().splitlines()) if notes.exists() else 0

    label(given, load=LoadCounting(notes))
    assert calls() == 6 and ids(tmp_path / "run", "errors") == ["late.jpg"]
    run = label(given, load=LoadCounting(notes))
    assert calls() == 6 and run["counts"]["skipped_as_done"] == 6
    assert ids(tmp_path / "run", "errors") == ["late.jpg"]  # tried again, failed again, stands once
    shutil.copy(sources[6], images / "late.jpg")  # mended
    shutil.copy(sources[7], images)  # added since
    run = label(given, load=LoadCounting(notes))
    assert calls() == 8 and run["counts"]["labelled"] == 8
    assert ids(tmp_path / "run", "errors") == []
    assert (
        len(ids(tmp_path / "run", "segments")) == len(set(ids(tmp_path / "run", "segments"))) == 8
    )
    assert ids(tmp_path / "run", "labels") == ids(tmp_path / "run", "segments")


def test_an_image_that_kills_its_process_is_found_and_the_rest_goes_on(tmp_path):
    images = fill(tmp_path / "images", {f"good{i:02d}": (10 * i, 99, 40) for i in range(11)})
    fill(images, {"poison": (255, 0, 0), "raises": (0, 255, 0)})
    given = config(images, tmp_path / "run", **{"actors.in_flight": 4})
    run = label(given, load=load_killing)
    assert run["counts"] | {"skipped_as_done": 0} == run["counts"]
    assert ids(tmp_path / "run", "segments") == [f"good{i:02d}.png" for i in range(11)]
    errors = {row["image_id"]: row for row in rows(tmp_path / "run", "errors")}
    assert set(errors) == {"poison.png", "raises.png"}
    assert "killed its process 2 times" in errors["poison.png"]["error"]
    assert errors["raises.png"]["error"] == "ArithmeticError: green and more"
    assert "Traceback" in errors["raises.png"]["detail"]


def test_max_errors_stops_the_run(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        (images / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(WorkError, match=r"max_errors must be >= .* got 2"):
        label(config(images, tmp_path / "run", max_errors=2))
    assert (RunFolder(str(tmp_path / "run")).read_run() or {})["state"] == "failed"
    run = label(config(images, tmp_path / "run", max_errors=6))
    assert run["state"] == "complete" and run["counts"]["quarantined"] == 6


def test_another_setting_on_the_same_folder_is_refused(scenes, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(next((scenes / "JPEGImages").iterdir()), images)
    given = config(images, tmp_path / "run")
    label(given)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.parquet")}
    for changes, told in (
        ({"sam.points_per_side": 5}, r"sam.points_per_side must be 4 as in .*, got 5"),
        ({"clip.embedder": "crop"}, r"clip.embedder must be gem as in .*, got crop"),
        ({"classes": "circle,square"}, r"classes must be .*zsplg relabel"),
        ({"compose.order": "area"}, r"compose.order must be score .*zsplg relabel"),
        ({"sam.random_weights": True}, r"sam.random_weights must be False"),
    ):
        with pytest.raises(ValueError, match=told):
            label(override(given, changes))
    label(override(given, {"sam.points_per_batch": 3, "actors.in_flight": 2}))  # no matter
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.parquet")}


def test_bad_input_writes_nothing(tmp_path):
    images = fill(tmp_path / "images", {"a": (1, 2, 3)})
    for changes, told in (
        ({"images": str(tmp_path / "nowhere")}, "images must be"),
        ({"compose.min_similarity": {"circel": 0.3, "*": 0.1}}, "circle"),
        ({"sam.checkpoint": str(tmp_path / "no.pth")}, "sam.checkpoint must be"),
        ({"clip.model": "ViT-B-61/openai"}, "ViT-B-16"),
        ({"actors.cpus": 400.0}, r"actors.cpus must be within the cluster's 4 CPUs"),
        ({"device": "cuda"}, "device must be cpu"),
        ({"actors.gpus": 1.0}, r"actors.gpus must be within the cluster's 0 GPUs"),
    ):
        with pytest.raises(ValueError, match=told):
            label(override(config(images, tmp_path / "run"), changes))
        assert not (tmp_path / "run").exists()


def test_an_image_without_segments_is_a_row_and_all_background(tmp_path):
    images = fill(tmp_path / "images", {"plain": (90, 90, 90)})
    run = label(config(images, tmp_path / "run"), load=load_blind)
    assert run["counts"]["labelled"] == 1
    (row,) = rows(tmp_path / "run", "segments")
    assert row["segments"] == []
    (row,) = rows(tmp_path / "run", "labels")
    assert (decode_png(row["label_png"]) == np.zeros((32, 32))).all() and row["confidence"] == 0


def test_only_one_run_at_a_time(tmp_path):
    from zsplg_ray.cluster.lock import only_run

    images = fill(tmp_path / "images", {"a": (1, 2, 3)})
    folder = RunFolder(str(tmp_path / "run"))
    with only_run(folder):
        for _ in range(2):  # being refused must not take the lock from who has it
            with pytest.raises(ValueError, match="one run at a time"):
                label(config(images, tmp_path / "run"))


def test_a_row_that_cannot_be_made_is_an_error_and_nothing_else(scenes, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((scenes / "JPEGImages").iterdir())[:3]:
        shutil.copy(path, images)
    run = label(config(images, tmp_path / "run"), load=load_strange)
    assert (run["counts"]["labelled"], run["counts"]["quarantined"]) == (0, 3)
    assert ids(tmp_path / "run", "segments") == ids(tmp_path / "run", "labels") == []


def test_a_gpu_that_failed_for_good_costs_one_image_and_not_the_rest(tmp_path):
    images = fill(tmp_path / "images", {f"good{i}": (10 * i, 99, 40) for i in range(5)})
    fill(images, {"breaks": (255, 0, 0)})
    run = label(config(images, tmp_path / "run"), load=load_broken_device)
    assert (run["counts"]["labelled"], run["counts"]["quarantined"]) == (5, 1)
    assert ids(tmp_path / "run", "errors") == ["breaks.png"]


def test_other_weights_on_a_node_than_on_the_driver_are_refused(tmp_path):
    images = fill(tmp_path / "images", {"a": (1, 2, 3)})
    with pytest.raises(WorkError, match=r"weights must be those of the driver"):
        label(config(images, tmp_path / "run"), load=load_others)
    assert not (tmp_path / "run" / "segments").exists()


def test_lost_labels_are_composed_again_without_sam(scenes, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((scenes / "JPEGImages").iterdir())[:4]:
        shutil.copy(path, images)
    given = config(images, tmp_path / "run", **{"actors.in_flight": 2})
    label(given)
    before = {row["image_id"]: row for row in rows(tmp_path / "run", "labels")}
    lost, torn = sorted((tmp_path / "run" / "labels").iterdir())
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:100])
    run = label(given, load=load_killing)
    assert run["counts"]["labelled_now"] == 0
    assert {row["image_id"]: row for row in rows(tmp_path / "run", "labels")} == before
