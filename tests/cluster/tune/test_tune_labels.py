"""`tune labels` whole: what is written, whether it is true, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cluster.rigged import config
from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.relabel import relabel
from zsplg_ray.cluster.tune import labels as room
from zsplg_ray.cluster.tune.labels import summary, tune_labels
from zsplg_ray.config import EvaluateConfig, LabelConfig, RelabelConfig, TuneLabelsConfig
from zsplg_ray.settings import WorkError, from_mapping
from zsplg_ray.views.evaluate import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

STRICT = {"compose.min_similarity": 0.95}
"""Lets next to nothing pass, so that there is something to find."""


@pytest.fixture(scope="module")
def labelled(scenes, tmp_path_factory, ray_local):
    """A run of 24 scenes, labelled badly."""
    out = tmp_path_factory.mktemp("tune") / "run"
    label(config(scenes, out, **{"clip.embedder": "crop", "mlflow.uri": "off", **STRICT}))
    return out


@pytest.fixture()
def run(labelled, tmp_path):
    return shutil.copytree(labelled, tmp_path / "run")


def tune(folder, masks, **changes):
    values = {"run": [str(folder)], "truth": str(masks), "trials": 60, "quiet": True}
    values |= {"mlflow.uri": "off", "search.concurrent": 1}
    return tune_labels(from_mapping(TuneLabelsConfig, {**values, **changes}))


def settings_in(run):
    return yaml.safe_load((Path(run) / "tuned.yaml").read_text())


@pytest.fixture(scope="module")
def tuned(labelled, scenes, tmp_path_factory):
    """Tuned with two folds, two sets of templates, and MLflow."""
    run = shutil.copytree(labelled, tmp_path_factory.mktemp("tuned") / "run")
    uri = f"sqlite:///{run.parent}/mlflow.db"
    changes = {"folds": 2, "templates": ["run", "seven"], "mlflow.uri": uri}
    return run, tune(run, scenes, **changes), uri


def test_it_finds_better_settings_and_says_so(tuned):
    run, result, _ = tuned
    study = json.loads((run / "tune.json").read_text())
    assert result == {"verb": "tune labels", "best": str(run), "runs": [study]}
    assert study["chosen"] in ("tuned", "per_class") and study["state"] == "complete"
    worth = study["result"]
    assert worth["default"]["held_out"]["miou"] < 0.3 < worth["tuned"]["held_out"]["miou"]
    assert worth["tuned"]["held_out"]["gain"]["miou"] > 0.1
    assert len(worth["tuned"]["held_out"]["folds"]) == 2
    assert study["search"]["tried"] == 3 * 60
    assert sorted(i for group in study["images"]["groups"] for i in group) == [
        f"scene_{n:06}" for n in range(24)
    ]
    told = summary(result)
    assert f"zsplg relabel --run {run} --config {run}/tuned.yaml" in told
    assert "compose.min_similarity: 0.95 -> " in told and "2 folds" in told


def test_its_figures_are_those_of_labels_made_with_it(tuned, labelled, scenes, tmp_path):
    """What was counted over regions is found again in pixels; the last search saw all images."""
    run, result, _ = tuned
    study = result["runs"][0]
    rows = (run / "tuned" / "trials.csv").read_text().splitlines()
    default = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    before = evaluate(EvaluateConfig(labels=str(labelled), truth=str(scenes)))["miou"]
    assert float(default["miou"]) == pytest.approx(before, abs=1e-9)  # trial 0
    copy = shutil.copytree(run, tmp_path / "copy")
    given = settings_in(copy)
    assert given.pop("clip") == {"model": "shapes", "embedder": "crop"}
    values = {**given, "run": str(copy), "quiet": True, "mlflow.uri": "off"}
    relabel(from_mapping(RelabelConfig, values))
    after = evaluate(EvaluateConfig(labels=str(copy), truth=str(scenes)))
    assert after["miou"] == pytest.approx(study["miou_on_all"], abs=1e-9)
    assert after["miou"] > before + 0.1


def test_other_verbs_take_the_file(tuned, monkeypatch):
    from zsplg_ray.cli import parse

    run, result, _ = tuned
    file, study = str(run / "tuned.yaml"), result["runs"][0]
    flags = ["--config", file, "--images", "x", "--classes", "shapes", "--out", "y"]
    parsed = parse(LabelConfig, flags, "label")
    assert (parsed.clip.model, parsed.clip.embedder) == ("shapes", "crop")
    again = parse(RelabelConfig, ["--run", str(run), "--config", file], "relabel")
    for made in (parsed, again):
        assert made.compose.min_similarity == study["settings"]["compose.min_similarity"]
        assert made.prompts.templates and made.prompts.background == ("background",)


def test_files_and_mlflow(tuned):
    from mlflow import MlflowClient

    run, result, uri = tuned
    names = {"thresholds.png", "iou.png", "confusion.png", "coverage.png", "trials.csv"}
    assert {p.name for p in (run / "tuned").iterdir()} == names
    assert (run / "tuned.yaml").read_text().startswith("# zsplg tune labels")
    assert sorted(p.name for p in (run / "regions").iterdir()) == sorted(
        p.name for p in (run / "segments").iterdir()
    )
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(result["runs"][0]["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    held_out = result["runs"][0]["result"]["tuned"]["held_out"]["miou"]
    assert parent.data.metrics["held_out_miou/tuned"] == pytest.approx(held_out)
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(nested) == 60 and {r.info.status for r in nested} == {"FINISHED"}
    assert all({"miou", "coverage", "precision"} <= r.data.metrics.keys() for r in nested)
    assert {r.data.params["prompts.templates"] for r in nested} == {"run", "seven"}


def test_what_cannot_be_beaten_stays(run, scenes):
    """A search over an order that makes no difference for segments that do not pass."""
    changes = {"search.over": ["compose.order"], "trials": 4, "per_class": False}
    result = tune(run, scenes, folds=1, **changes)
    study = result["runs"][0]
    assert study["chosen"] == "default"
    assert settings_in(run)["compose"]["min_similarity"] == 0.95
    assert "could not be beaten" in summary(result) and "zsplg relabel" not in summary(result)
    assert "nothing better was found" in (run / "tuned.yaml").read_text()
    held_out = study["images"]["groups"][1]
    assert len(held_out) == round(0.3 * 24)


def test_several_runs_are_compared(run, labelled, scenes, tmp_path):
    """The same labels with a good threshold are the better run."""
    other = shutil.copytree(labelled, tmp_path / "good")
    content = json.loads((other / "run.json").read_text())
    for key in ("config", "resolved"):
        content[key]["compose.min_similarity"] = 0.5
    (other / "run.json").write_text(json.dumps(content))
    changes = {"search.over": ["compose.order"], "trials": 2, "per_class": False}
    result = tune(run, scenes, run=[str(run), str(other)], folds=1, **changes)
    assert result["best"] == str(other)
    assert [s["folder"] for s in result["runs"]] == [str(run), str(other)]
    groups = [s["images"]["groups"] for s in result["runs"]]
    assert groups[0] == groups[1]
    assert f"best on held-out images: {other}" in summary(result)
    assert (other / "tuned.yaml").exists() and (run / "tuned.yaml").exists()


def test_a_failing_search_is_told_and_writes_nothing(run, scenes, monkeypatch):
    def fail(*args, **kwargs):
        raise WorkError("the search failed: x")

    monkeypatch.setattr(room, "run_searches", fail)
    with pytest.raises(WorkError, match="the search failed"):
        tune(run, scenes)
    assert not (run / "tuned.yaml").exists() and not (run / "tune.json").exists()


def test_ctrl_c_comes_through_and_ends_the_mlflow_run(run, scenes, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "run_searches", stop)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(KeyboardInterrupt):
        tune(run, scenes, **{"mlflow.uri": uri})
    assert not (run / "tuned.yaml").exists()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("zsplg_ray")
    assert experiment is not None
    assert [r.info.status for r in client.search_runs([experiment.experiment_id])] == ["KILLED"]


def test_bad_input_is_refused_before_anything_is_written(run, scenes, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(scenes / "SegmentationClass" / "scene_000003.png", masks)
    before = sorted(p.name for p in run.rglob("*"))
    for changes, message in (
        ({"folds": 25}, r"^folds must be <= 24, .* got 25; "),
        ({"truth": str(masks)}, r"^truth must be masks of at least 2 images, got 1 "),
        ({"run": [str(tmp_path / "no")]}, r"^run must be a run's folder"),
        ({"search.over": ["compose.unsure"]}, r"^search.over must be "),
        ({"search.method": "grid", "trials": 20}, r"^trials must be >= \d+ for a grid"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(run, scenes, **changes)
    left = sorted(p.name for p in run.rglob("*") if p.parent.name != "regions")
    assert [n for n in left if n not in ("regions", ".lock")] == [n for n in before if n != ".lock"]
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "labels_state": "relabelling"}))
    with pytest.raises(ValueError, match=r"half relabelled; run `zsplg relabel"):
        tune(run, scenes)
