"""What is read off a cluster, what may still come to it, and what a job waits for."""

import itertools
import logging
import threading
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import ray
import yaml

from zsplg_ray.cluster import nodes as nodes_module
from zsplg_ray.cluster.crew import plan_crew
from zsplg_ray.cluster.nodes import (
    Cluster,
    NodeType,
    _startable,
    _type_names,
    _types_on_head,
    look_around,
    room,
    share,
    standing_room,
)
from zsplg_ray.cluster.session import plan_actors
from zsplg_ray.cluster.waiting import telling_of_waits, what_is_missing
from zsplg_ray.config import ActorsConfig, WorkersConfig

HEAD = {"CPU": 0.0}
LABEL = {"CPU": 8.0, "GPU": 1.0, "label_node": 1.0}
DECODE = {"CPU": 16.0}
TRAIN = {"CPU": 48.0, "GPU": 4.0, "train_node": 1.0}
FROM_ZERO = Cluster((HEAD,), grows=True, more=(LABEL,) * 16 + (TRAIN,) * 2)
ON_LABEL = {"label_node": 0.001}


def status(names=(), demands=(), launching=(), failed=(), have=(), version: str | None = "7"):
    """As Ray's ClusterStatus, as far as we look."""
    bundles = [SimpleNamespace(bundle=bundle, count=n) for bundle, n in demands]
    demand = [SimpleNamespace(bundles_by_count=bundles)]
    return SimpleNamespace(
        active_nodes=[SimpleNamespace(ray_node_type_name=n, node_id=i) for i, n in names],
        idle_nodes=[],
        resource_demands=SimpleNamespace(ray_task_actor_demand=demand, placement_group_demand=[]),
        pending_launches=list(launching),
        failed_launches=list(failed),
        total_resources=lambda: dict(have),
        available_resources=lambda: {name: 0.0 for name, _ in have},
        stats=SimpleNamespace(autoscaler_version=version),
    )


def launch(name, count, details=None):
    return SimpleNamespace(ray_node_type_name=name, count=count, details=details)


def test_a_cluster_that_grows_from_nothing_is_planned_by_what_it_may_have():
    made = plan_actors(ActorsConfig(resources=ON_LABEL), FROM_ZERO)
    assert (made.gpus, made.max_actors, made.resources) == (1, 16, ON_LABEL)
    assert made.need == {"CPU": 0.0, "GPU": 1.0, "label_node": 0.001}
    assert plan_actors(ActorsConfig(), FROM_ZERO).max_actors == 24
    assert plan_actors(ActorsConfig(resources=ON_LABEL, gpus=0.5), FROM_ZERO).max_actors == 32
    assert plan_actors(ActorsConfig(resources=ON_LABEL, max=3), FROM_ZERO).max_actors == 3
    with pytest.raises(ValueError, match=r"actors.gpus must be within the cluster's 16 GPUs"):
        plan_actors(ActorsConfig(resources=ON_LABEL, min=17), FROM_ZERO)


def test_pools_are_whole_where_a_cluster_grows_and_never_larger_than_the_work():
    growing = plan_actors(ActorsConfig(resources=ON_LABEL), FROM_ZERO)
    assert [growing.pool(blocks) for blocks in (1, 5, 100)] == [(1, 1), (5, 5), (16, 16)]
    fixed = plan_actors(ActorsConfig(min=2), Cluster((LABEL,) * 4))
    assert [fixed.pool(blocks) for blocks in (1, 3, 100)] == [(1, 1), (2, 3), (2, 4)]


def test_what_is_not_known_is_told_with_the_settings_that_change_it(caplog):
    blind = Cluster((HEAD, {"CPU": 4.0}), grows=True, more=None)
    made = plan_actors(ActorsConfig(), blind)
    assert made.gpus == 0 and made.grows
    assert "--actors.gpus 1 --actors.max N" in caplog.text
    caplog.clear()
    assert plan_actors(ActorsConfig(gpus=1.0, max=8, resources=ON_LABEL), blind).pool(99) == (8, 8)
    assert "no node that is up has it" in caplog.text and "--actors" not in caplog.text


@pytest.mark.parametrize("plan", ["actors", "workers"])
def test_a_resource_that_nobody_has_is_refused_with_those_there_are(plan, caplog):
    def tried(cluster, resources):
        if plan == "actors":
            return plan_actors(ActorsConfig(resources=resources), cluster)
        return plan_crew(WorkersConfig(resources=resources), cluster, "auto")

    for cluster in (Cluster((HEAD, LABEL, TRAIN)), FROM_ZERO):
        told = rf"{plan}.resources must be what one node has \(label_node, train_node\), got lable"
        with pytest.raises(ValueError, match=told):
            tried(cluster, {"lable_node": 0.001})
        with pytest.raises(ValueError, match="got label_node 2;"):
            tried(cluster, {"label_node": 2.0})
    with pytest.raises(ValueError, match="must be empty: no node has any, got label_node"):
        tried(Cluster(({"CPU": 8.0, "node:127.0.0.1": 1.0, "memory": 1e9},)), ON_LABEL)
    tried(Cluster((HEAD,), grows=True, more=None), ON_LABEL)
    assert "waiting for the cluster" in caplog.text


def test_workers_stand_on_their_own_nodes_and_nobody_buys_more_than_is_asked(caplog):
    on_train = {"train_node": 0.001}
    made = plan_crew(WorkersConfig(resources=on_train, num=4), FROM_ZERO, "auto")
    assert (made.num, made.gpus, made.cpus) == (4, 1, 8)
    assert made.resources == {"CPU": 8.0, "GPU": 1.0, "train_node": 0.001}
    caplog.clear()
    assert plan_crew(WorkersConfig(resources=on_train), FROM_ZERO, "auto").num == 1
    assert "workers.num: 1" in caplog.text
    with pytest.raises(ValueError, match=r"workers.gpus must be within the 8 GPUs on 2 nodes"):
        plan_crew(WorkersConfig(resources=on_train, num=9), FROM_ZERO, "auto")


def test_room_counts_processes_that_stand_on_one_node_each():
    assert room([LABEL, TRAIN], {"GPU": 2.0}) == 2
    assert room([TRAIN], {"GPU": 0.3}) == 12
    assert room([LABEL, TRAIN], {"GPU": 1.0, "label_node": 0.001}) == 1
    assert room([LABEL], {"GPU": 0.1, "CPU": 2.0}) == 4
    assert room([LABEL], {"CPU": 0.0}) == 0
    assert standing_room("actors.resources", {}, FROM_ZERO) == FROM_ZERO


def test_nodes_of_all_types_together_are_bound():
    head = {"CPU": 1.0, "node:__internal_head__": 1.0}
    types = (DECODE,) * 3 + (LABEL,) * 16
    bound = Cluster((head, DECODE), grows=True, more=types, bound=3)
    assert (bound.size, bound.total("CPU"), bound.total("GPU")) == (4, 49, 3), "decode may go"
    assert (bound.room({"CPU": 8.0}), bound.room({"GPU": 0.5})) == (6, 6)
    assert bound.largest("CPU") == 16
    made = plan_actors(ActorsConfig(resources=ON_LABEL), bound)
    assert (made.gpus, made.max_actors) == (1, 3)
    with pytest.raises(ValueError, match=r"within the cluster's 3 GPUs"):
        plan_actors(ActorsConfig(resources=ON_LABEL, min=4), bound)
    with pytest.raises(ValueError, match=r"workers.gpus must be within the 3 GPUs on 4 nodes"):
        plan_crew(WorkersConfig(gpus=1.0, num=4), bound, "auto")


def test_what_the_cluster_file_bounds_counts_the_nodes_that_are_up(tmp_path, monkeypatch):
    """Two types of at most 2 each, at most 3 in all, one of which is up beside the head."""
    file = tmp_path / "c.yaml"
    types = {name: {"resources": {"CPU": 8}, "max_workers": 2} for name in ("a", "b")}
    settings = {"available_node_types": {"head": {}, **types}, "head_node_type": "head"}
    file.write_text(yaml.safe_dump({**settings, "max_workers": 3}))
    monkeypatch.setattr(nodes_module, "_types_on_head", partial(_types_on_head, path=str(file)))
    monkeypatch.setattr(nodes_module, "_published_types", lambda: None)
    monkeypatch.setattr(nodes_module, "_type_names", lambda _: Counter(head=1, a=1))
    monkeypatch.setattr(nodes_module, "cluster_status", lambda: status())
    has = {"CPU": 0.0, "node:__internal_head__": 1.0}, {"CPU": 8.0}
    up = [{"Alive": True, "Resources": resources} for resources in has]
    monkeypatch.setattr("ray.nodes", lambda: up)
    found = look_around(local=False)
    assert found.more is not None and len(found.more) == 3
    assert (found.size, found.room({"CPU": 8.0})) == (4, 3)


def test_no_gpu_node_is_started_for_work_without_gpu():
    types = (DECODE,) * 4 + (LABEL,) * 16 + (TRAIN,) * 2
    growing = Cluster((HEAD,), grows=True, more=types)
    assert plan_actors(ActorsConfig(gpus=0.0), growing).cpus == 16
    assert plan_actors(ActorsConfig(gpus=0.0, max=20), growing).cpus == 3
    assert plan_crew(WorkersConfig(), growing, "cpu").cpus == 16
    assert plan_crew(WorkersConfig(num=8), growing, "cpu").cpus == 8
    assert plan_actors(ActorsConfig(gpus=0.0), Cluster((HEAD, *types))).cpus == 48, "it is up"
    assert plan_actors(ActorsConfig(gpus=0.0, resources=ON_LABEL), growing).cpus == 8
    assert plan_actors(ActorsConfig(gpus=0.0), FROM_ZERO).cpus == 48, "there are no others"


def test_shares_are_whole_cpus_as_long_as_all_have_one():
    nodes = Cluster(({"CPU": 8.0}, {"CPU": 3.0, "GPU": 1.0}))
    assert [share(nodes, n, {}) for n in (1, 2, 3, 4, 11, 22)] == [8, 4, 3, 2, 1, 0.5]
    assert share(nodes, 1, {"GPU": 1.0}) == 3
    assert share(nodes, 1, {}, most=2.5) == 2
    assert share(nodes, 1, {}, most=0.5) == 0.5
    assert share(Cluster(()), 1, {}) == 1
    assert share(Cluster(nodes.up, grows=True, more=None), 22, {}) == 1


def test_nodes_have_types_only_where_an_autoscaler_gave_them(monkeypatch):
    monkeypatch.setattr(nodes_module, "_older_names", lambda without: Counter())
    assert not _type_names(status([("ab12", "node_ab12"), ("cd34", "node_cd34"), ("ef56", "")]))
    grown = status([("ab12", "head"), ("cd34", "label"), ("ef56", "label")])
    assert _type_names(grown) == {"head": 1, "label": 2}
    for version in (None, "0"):  # a platform names them where nobody starts any
        named = status([("ab12", "head"), ("cd34", "label")], version=version)
        assert _type_names(named) == {}
    monkeypatch.setattr(nodes_module, "_older_names", lambda without: Counter(head=1))
    assert _type_names(named) == {"head": 1, "label": 1}


@pytest.mark.parametrize("strange", [None, SimpleNamespace(), status([("ab12", "head")])])
def test_a_status_that_is_not_understood_is_as_good_as_none(strange, monkeypatch):
    if strange is not None:
        strange.stats = None
    monkeypatch.setattr(nodes_module, "cluster_status", lambda: strange)
    monkeypatch.setattr(nodes_module.ray, "nodes", lambda: [{"Alive": True, "Resources": LABEL}])
    assert look_around(local=False) == Cluster((LABEL,), grows=True, more=None)


def test_types_are_read_off_the_file_on_the_head(tmp_path):
    file = tmp_path / "c.yaml"
    types = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "label": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 16},
        "decode": {"resources": {"CPU": 16}},
    }
    settings = {"available_node_types": types, "head_node_type": "head", "max_workers": 3}
    file.write_text(yaml.safe_dump(settings))
    label, decode = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}
    found = _types_on_head(["head", "label"], str(file))
    assert found is not None and found == (
        [NodeType("decode", decode, 3), NodeType("label", label, 3)],
        3,
    )
    assert _startable(found[0], {"head": 1, "label": 2}) == (decode,) * 3 + (label,)
    assert _types_on_head(["head", "other"], str(file)) is None, "another cluster's file"
    assert _types_on_head(["head"], str(tmp_path / "none")) is None
    for text in ("[]", "{", "available_node_types: 3\nhead_node_type: 3"):
        file.write_text(text)
        assert _types_on_head(["head"], str(file)) is None


def test_a_wait_is_told_with_what_is_missing_free_and_being_started():
    ours = {"CPU": 0.0, "GPU": 1.0, "label_node": 0.001}
    demands = [({"GPU": 1.0, "label_node": 0.001}, 3), ({"GPU": 1.0}, 5)]
    starts = [launch("label", 2)], [launch("label", 4, "Insufficient\n capacity")]
    told = what_is_missing(status((), demands, *starts, have=[("GPU", 4.0)]), [ours])
    assert told == (
        "3 x (GPU 1, label_node 0.001) have no place; free: GPU 0 of GPU 4; "
        "no node has label_node; being started: 2 x label; "
        "failed to start: 4 x label (Insufficient capacity)"
    )
    assert what_is_missing(status((), demands[1:]), [ours]) is None, "others wait, not we"
    assert what_is_missing(None, [ours]) is None


def test_a_wait_is_told_again_and_again_and_ends_with_the_job(monkeypatch, caplog):
    asked = threading.Semaphore(0)
    looks = itertools.chain([SimpleNamespace()], itertools.repeat(status((), [({"GPU": 1.0}, 1)])))

    def looked():
        asked.release()
        return next(looks)  # the first one is not understood

    monkeypatch.setattr("zsplg_ray.cluster.waiting.cluster_status", looked)
    with telling_of_waits([{"GPU": 1.0}], moved=lambda: 0, every_s=0.05):
        assert all(asked.acquire(timeout=30) for _ in range(3))
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) >= 2 and "1 x (GPU 1) have no place" in told[0].getMessage()
    assert not [t for t in threading.enumerate() if t.name == "waiting"]


@pytest.mark.ray
def test_a_ray_of_our_own_does_not_grow_even_if_nobody_says_so(ray_local):
    for local in (True, False):
        found = look_around(local=local)
        assert not found.grows and found.known and len(found.up) == 1
        assert found.up[0]["CPU"] == 4
    assert ray.is_initialized()
