"""`relabel`: same settings, same bytes; other settings as if labelled with them; interruptions."""

import pytest

from tests.cluster.rigged import config
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.relabel import relabel
from zsplg_ray.config import EvaluateConfig, RelabelConfig
from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import from_mapping
from zsplg_ray.views.evaluate import evaluate, open_labels

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def settings(run, **changes) -> RelabelConfig:
    """As the command line does it: what the labels were made with, and changes."""
    stored = RunFolder(str(run)).label_settings()
    return from_mapping(RelabelConfig, {"run": str(run), "quiet": True, **stored, **changes})


def run_json(run):
    content = RunFolder(str(run)).read_run()
    assert content is not None
    return content


def labels(run):
    table = RunFolder(str(run)).read("labels")
    assert table is not None
    return {row["image_id"]: row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def first(scenes, tmp_path_factory, ray_local):
    """A run, labelled with the defaults."""
    out = tmp_path_factory.mktemp("relabel") / "run"
    label(config(scenes, out, **{"actors.in_flight": 7}))
    return out


@pytest.fixture()
def run(first, tmp_path):
    """A copy of it that a test may change."""
    import shutil

    return shutil.copytree(first, tmp_path / "run")


def test_the_same_settings_give_the_same_bytes(first, run):
    for name in RunFolder(str(run)).parts("labels")[:2]:
        RunFolder(str(run)).delete_part("labels", name)  # and lost labels come back
    made = relabel(settings(run))
    assert labels(run) == labels(first)
    assert made["labels_fingerprint"] == run_json(first)["labels_fingerprint"]


def test_other_settings_are_as_if_labelled_with_them(scenes, run, tmp_path):
    changes = {"compose.order": "area", "compose.score": "softmax", "compose.unsure": "ignore"}
    changes |= {"compose.min_similarity": 0.4, "prompts.templates": ["a {class}", "one {class}"]}
    made = relabel(settings(run, **changes, classes="circle,square,star"))
    fresh = tmp_path / "fresh"
    again = label(config(scenes, fresh, **{**changes, "classes": "circle,square,star"}))
    assert labels(run) == labels(fresh)
    assert made["labels_fingerprint"] == again["labels_fingerprint"]
    assert set(labels(run)["scene_000000"]["class_px"][4:]) <= {0}
    kept = relabel(settings(run, **{"compose.order": "score"}))  # the rest stays as it was
    assert kept["resolved"]["compose.score"] == "softmax" and len(kept["classes"]["names"]) == 4


def test_an_interrupted_relabel_is_refused_by_readers_and_goes_on(scenes, run, monkeypatch):
    folder = RunFolder(str(run))
    written = []
    keep = RunFolder.write_run

    def stop_at_the_end(self, content):
        if content["labels_state"] == "complete":
            raise KeyboardInterrupt
        keep(self, content)

    monkeypatch.setattr(RunFolder, "write_run", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        relabel(settings(run, **{"compose.unsure": "ignore"}))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"zsplg relabel --run"):
        open_labels(str(run))
    with pytest.raises(ValueError, match="half relabelled"):
        label(config(scenes, run))
    stamps = {p: p.stat().st_mtime_ns for p in (run / "labels").iterdir()}
    last = sorted(stamps)[-1]
    table, meta = folder.read_part("labels", last.stem), folder.part_meta("labels", last.stem)
    folder.write_part("labels", last.stem, table, {**meta, "labels_fingerprint": "older"})
    relabel(settings(run))  # no settings needed to finish
    for path, stamp in stamps.items():
        if path.stat().st_mtime_ns != stamp:
            written.append(path)
    assert written == [last]  # only what was missing
    assert any((decode_png(row["label_png"]) == 255).any() for row in labels(run).values())


def test_scores_of_a_run(scenes, first):
    result = evaluate(EvaluateConfig(labels=str(first), truth=str(scenes)))
    assert result["images"] == 24 and result["coverage"] == 1.0
    assert 0.1 < result["miou"] < 1.0
    assert list(result["iou"]) == run_json(first)["classes"]["names"]


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="run must be a run's folder"):
        relabel(RelabelConfig(run=str(tmp_path)))
    before = RunFolder(str(run)).read_run()
    with pytest.raises(ValueError, match="circle"):
        relabel(settings(run, **{"compose.min_similarity": {"cirlce": 0.3, "*": 0.1}}))
    assert RunFolder(str(run)).read_run() == before


def test_a_run_that_was_killed_before_it_counted_can_be_relabelled(run):
    folder = RunFolder(str(run))
    content = run_json(run)
    del content["counts"]
    folder.write_run({**content, "state": "running"})
    made = relabel(settings(run, **{"compose.order": "area"}))
    assert made["counts"]["labelled"] == 24 and run_json(run)["labels_state"] == "complete"


def test_a_cluster_out_of_reach_leaves_the_labels_whole(run, monkeypatch):
    before = run_json(run)

    def unreachable(config):
        raise ValueError("ray.address must be a running Ray cluster, got auto; start it")

    monkeypatch.setattr("zsplg_ray.cluster.relabel.ray_session", unreachable)
    with pytest.raises(ValueError, match=r"ray.address"):
        relabel(settings(run, **{"compose.order": "area"}))
    assert run_json(run) == before
