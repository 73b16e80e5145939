"""The MLflow store: where it is, what it shows, and that it is told as MLflow wants it."""

import logging

import pytest

from tests.cluster.tracking import table
from zsplg_ray.cluster.track.store import Store, in_short, is_refused, store_uri
from zsplg_ray.config import MlflowConfig, TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import masked, recorded, user_name
from zsplg_ray.settings import from_mapping


def test_where_runs_are_tracked(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    here, there = RunFolder(str(tmp_path / "run")), RunFolder("s3://bucket/run?region=x")
    assert store_uri(MlflowConfig(), here) == f"sqlite:///{tmp_path}/run/mlflow.db"
    assert store_uri(MlflowConfig(), there) == f"sqlite:///{tmp_path}/mlflow.db"
    assert f"{tmp_path}/mlflow.db; give --mlflow.uri" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_uri(MlflowConfig(), here) == "http://mlflow:5000"
    assert store_uri(MlflowConfig(uri="http://other"), here) == "http://other"
    assert store_uri(MlflowConfig(uri="sqlite:///x/m.db"), here) == f"sqlite:///{tmp_path}/x/m.db"
    assert store_uri(MlflowConfig(uri="off"), here) is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://me:word@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://me:wo@rd@host/db", "postgresql://***@host/db"),
        ("failed at https://token@host, sorry", "failed at https://***@host, sorry"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
    ],
)
def test_credentials_are_not_shown(given, shown):
    assert masked(given) == shown


def test_credentials_stand_in_no_record(tmp_path):
    uri = "http://me:word@host"
    values = {"labeled": "a", "unlabeled": "b", "out": "c", "mlflow.uri": uri}
    flat = recorded(from_mapping(TrainConfig, values))
    assert flat["mlflow.uri"] == "http://***@host" and flat["labeled"] == "a"
    store = Store(MlflowConfig(uri=uri), RunFolder(str(tmp_path)))
    assert store.uri == uri and store.shown == "http://***@host"
    assert in_short(ValueError(f"no {uri}/api\nmore")) == "ValueError: no http://***@host/api"


def test_a_run_is_found_again_and_takes_what_it_has_not_got(mlflow_store, tmp_path):
    config = MlflowConfig(uri=mlflow_store, experiment="store")
    first, second = (Store(config, RunFolder(str(tmp_path))) for _ in range(2))
    first.open()
    second.open()
    run_id, new = first.begin("one", {"zsplg_ray.run": "1"}, {"zsplg_ray.verb": "label"}, 1e9)
    assert new and second.begin("two", {"zsplg_ray.run": "1"}) == (run_id, False)
    assert first.client.get_run(run_id).data.tags["mlflow.user"] == user_name()
    assert second.begin("two", {"zsplg_ray.run": "2"})[0] != run_id
    first.send(run_id, {"a": 1, "odd:name": None}, {"x": 0.5, "none": None}, {"t": "http://a:b@c"})
    second.send_missing_params(run_id, {"a": 2, "b": "http://a:b@c", "odd:name": None})
    for rows in ([0.1, None], [0.2, 0.3]):
        second.send_table(run_id, "t.json", {"class": ["a", "b"], "iou": rows})
    second.end(run_id, "stopped", 1e9 + 5)
    run = first.client.get_run(run_id)
    assert run.data.params == {"a": "1", "odd_name": "None", "b": "http://***@c"}
    assert run.data.metrics == {"x": 0.5} and run.data.tags["t"] == "http://***@c"
    assert run.info.status == "FINISHED" and run.data.tags["zsplg_ray.state"] == "stopped"
    assert (run.info.start_time, run.info.end_time) == (1e12, 1e12 + 5000)
    assert run.data.tags["mlflow.source.name"] == "zsplg label"
    assert table(mlflow_store, run_id, "t.json")["iou"] == [0.2, 0.3], "replaced, not added to"


def test_what_mlflow_refuses_is_told_from_what_did_not_arrive(mlflow_store, tmp_path):
    store = Store(MlflowConfig(uri=mlflow_store, experiment="store"), RunFolder(str(tmp_path)))
    store.open()
    run_id, _ = store.begin("refused", {"zsplg_ray.run": "3"})
    store.send(run_id, {"a": 1})
    with pytest.raises(Exception, match="param") as caught:
        store.send(run_id, {"a": 2})
    assert is_refused(caught.value) and not is_refused(ConnectionError())
