"""How many actors a cluster holds and what each takes. Arithmetic, without Ray."""

import logging
import socket
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from zsplg_ray.cluster.nodes import Cluster
from zsplg_ray.cluster.session import Plan, cluster_address, plan_actors, ray_session
from zsplg_ray.cluster.trainrun import weight_settings
from zsplg_ray.config import ActorsConfig, LabelConfig, RayConfig, TrainConfig
from zsplg_ray.runinfo import label_settings, segment_settings
from zsplg_ray.settings import WorkError, flatten


def plan(have_cpus, have_gpus=0.0, *, growing=False, **config) -> Plan:
    node = {"CPU": float(have_cpus)} | ({"GPU": float(have_gpus)} if have_gpus else {})
    more = None if growing else ()
    return plan_actors(ActorsConfig(**config), Cluster((node,), growing, more))


@pytest.mark.parametrize(
    ("have", "config", "expected"),
    [
        ((2, 0), {}, Plan(1, 1, 0, 1, 1)),
        ((16, 0), {}, Plan(1, 1, 0, 15, 1)),
        ((1, 0), {}, Plan(1, 1, 0, 0.5, 0.5)),
        ((16, 0), {"max": 4}, Plan(1, 4, 0, 3, 1)),
        ((16, 0), {"min": 4}, Plan(4, 4, 0, 3, 1)),
        ((4, 0), {"min": 4}, Plan(4, 4, 0, 0.75, 1)),
        ((16, 0), {"cpus": 2.0}, Plan(1, 1, 0, 2, 1)),
        ((8, 1), {}, Plan(1, 1, 1, 0, 1)),
        ((8, 4), {}, Plan(1, 4, 1, 0, 1)),
        ((8, 4), {"max": 2}, Plan(1, 2, 1, 0, 1)),
        ((8, 4), {"gpus": 0.5}, Plan(1, 8, 0.5, 0, 1)),
        ((8, 4), {"gpus": 0.3}, Plan(1, 12, 0.3, 0, 1)),
        ((8, 4), {"gpus": 0.0}, Plan(1, 1, 0, 7, 1)),
        ((8, 4), {"gpus": 2.0, "min": 2}, Plan(2, 2, 2, 0, 1)),
        ((8, 4), {"cpus": 1.0}, Plan(1, 4, 1, 1, 1)),
        ((8, 0.5), {}, Plan(1, 1, 0, 7, 1)),
        ((8, 0), {"decode_cpus": 0.5}, Plan(1, 1, 0, 7, 0.5)),
        ((3, 0), {"decode_cpus": 8.0}, Plan(1, 1, 0, 1, 1.5)),
    ],
)
def test_what_is_left_open_follows_from_the_cluster(have, config, expected):
    made = plan(*have, **config)
    assert astuple(made)[:5] == pytest.approx(astuple(expected)[:5])


@given(
    cpus=st.integers(1, 300),
    gpus=st.integers(0, 16),
    config=st.fixed_dictionaries(
        {"min": st.integers(1, 4)},
        optional={"max": st.integers(4, 64), "decode_cpus": st.floats(0.01, 8)},
    ),
)
def test_what_nobody_asked_for_always_fits(cpus, gpus, config):
    if gpus and config["min"] > gpus:
        return
    made = plan(cpus, gpus, **config)
    assert made.min_actors * made.gpus <= gpus
    assert made.min_actors * made.cpus + made.decode_cpus <= cpus + 1e-6
    assert 1 <= made.min_actors <= made.max_actors
    assert made.gpus or made.cpus > 0, "an actor that takes nothing"
    assert made.threads >= 1 and made.decode_cpus > 0
    if "max" not in config and gpus:
        assert made.max_actors == gpus, "GPUs left idle"


@pytest.mark.parametrize(
    ("have", "config", "told"),
    [
        ((8, 0), {"gpus": 1.0}, "actors.gpus must be within the cluster's 0 GPUs, got 1 GPUs"),
        ((8, 2), {"min": 3}, "actors.gpus must be within the cluster's 2 GPUs, got 3 GPUs"),
        (
            (8, 1),
            {"gpus": 0.6, "min": 2},
            "actors.gpus must be within the cluster's 1 GPUs, got 1.2",
        ),
        ((8, 0), {"cpus": 8.0}, "actors.cpus must be within the cluster's 8 CPUs, got 9 CPUs"),
        (
            (8, 0),
            {"cpus": 3.0, "min": 3},
            "actors.cpus must be within the cluster's 8 CPUs, got 10",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_at_once(have, config, told, caplog):
    with pytest.raises(ValueError) as caught:
        plan(*have, **config)
    assert str(caught.value).startswith(told)
    assert f"lower {told.split()[0]}" in str(caught.value)
    caplog.set_level(logging.WARNING)
    made = plan(*have, growing=True, **config)
    assert made.min_actors == config.get("min", 1)
    assert "waiting for the cluster" in caplog.text and told.split()[0] in caplog.text


def test_exactly_full_is_not_too_full():
    assert plan(8, 1, gpus=0.1, min=10).min_actors == 10
    assert plan(8, 0, cpus=7.0).cpus == 7


def test_threads_follow_the_cpus():
    assert [Plan(1, 1, 0, cpus, 1).threads for cpus in (0, 0.5, 1, 1.9, 15)] == [1, 1, 1, 1, 15]


def test_where_the_cluster_is(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(RayConfig()) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert cluster_address(RayConfig()) == "ray://head:10001"
    assert cluster_address(RayConfig(address="auto")) == "auto"


def test_an_actor_fits_on_one_node():
    four = Cluster(({"CPU": 8.0},) * 4)
    made = plan_actors(ActorsConfig(), four)
    assert made.cpus == 8 and made.decode_cpus == 1
    with pytest.raises(ValueError, match=r"within the largest node's 8 CPUs, got 16 CPUs"):
        plan_actors(ActorsConfig(cpus=16.0), four)
    with pytest.raises(ValueError, match=r"within the largest node's 1 GPUs, got 2 GPUs"):
        plan_actors(ActorsConfig(gpus=2.0), Cluster(({"CPU": 2.0, "GPU": 1.0},) * 4))
    with pytest.raises(ValueError, match=r"actors.min must be within the 3 actors that find room"):
        plan_actors(ActorsConfig(cpus=3.0, min=4), Cluster(({"CPU": 5.0},) * 3))
    assert plan_actors(ActorsConfig(min=4), Cluster(({"CPU": 5.0},) * 3)).cpus == 2


def test_a_cluster_that_grows_is_not_cut_to_what_it_has_now():
    made = plan(0, growing=True)
    assert made.decode_cpus == 1 and made.cpus == 1
    assert plan(8, growing=True, max=32).cpus == 1


def test_gpus_are_whole_or_parts_of_one():
    with pytest.raises(ValueError, match=r"actors.gpus must be a whole number"):
        ActorsConfig(gpus=1.5)


@pytest.mark.parametrize(
    ("address", "error", "kind", "told"),
    [
        (None, Exception("timed out during startup\nmore"), WorkError, "Ray could not be started"),
        ("auto", ConnectionError("nobody"), ValueError, "ray.address must be a running Ray"),
        ("auto", AuthenticationError("no token"), ValueError, "set RAY_AUTH_MODE=token"),
    ],
)
def test_a_ray_that_cannot_be_had_is_one_line(monkeypatch, address, error, kind, told):
    def init(**_):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(kind, match=told) as caught, ray_session(RayConfig(address=address)):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch, scheme):
    def init(**_):
        raise AssertionError("Ray would try for minutes")

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"{scheme}127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.init", init)
        session = ray_session(RayConfig(address=address))
        with pytest.raises(ValueError, match=r"ray.address .* refused"), session:
            pass


@pytest.mark.parametrize(("address", "alone"), [(None, True), ("auto", False)])
def test_only_a_ray_of_our_own_hides_from_others(monkeypatch, address, alone):
    asked = []

    def init(**_):
        asked.append(not ray_constants.ENABLE_RAY_CLUSTER)
        raise ConnectionError("enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    session = ray_session(RayConfig(address=address))
    with pytest.raises((ValueError, WorkError)), session:
        pass
    assert asked == [alone]


def test_where_processes_stand_changes_no_fingerprint():
    label = LabelConfig(images="i", out="o", classes="voc", actors=ActorsConfig(resources={"a": 1}))
    resolved = {"resolved": flatten(label)}
    assert "actors.resources" in resolved["resolved"]
    assert not {"actors.resources"} & {*segment_settings(resolved), *label_settings(resolved)}
    train = {"config": flatten(TrainConfig(labeled="l", out="o"))}
    assert "workers.resources" in train["config"]
    assert "workers.resources" not in weight_settings(train)
