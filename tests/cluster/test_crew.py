"""How many training workers a cluster holds and what each takes. Arithmetic, without Ray."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplg_ray.cluster.crew import Crew, check_batches, plan_crew
from zsplg_ray.cluster.nodes import Cluster, room
from zsplg_ray.config import TrainConfig, WorkersConfig
from zsplg_ray.settings import from_mapping


def training(labelled: int, unlabelled: int, **changes) -> TrainConfig:
    values = {"labeled": "l", "unlabeled": "u", "out": "o", **changes}
    batches = {"train.batch_labeled": labelled, "train.batch_unlabeled": unlabelled}
    return from_mapping(TrainConfig, {**batches, **values})


def plan(*nodes: tuple[float, float], device="auto", growing=False, **config) -> Crew:
    have = [{"CPU": float(c), "GPU": float(g)} if g else {"CPU": float(c)} for c, g in nodes]
    more = None if growing else ()
    return plan_crew(WorkersConfig(**config), Cluster(tuple(have), growing, more), device)


@pytest.mark.parametrize(
    ("nodes", "config", "expected"),
    [
        ([(8, 0)], {}, Crew(1, None, 0, 8)),
        ([(8, 0)], {"num": 3}, Crew(3, None, 0, 2)),
        ([(2, 0)], {"num": 4}, Crew(4, None, 0, 0.5)),
        ([(8, 0), (8, 0)], {"num": 3}, Crew(3, None, 0, 4)),
        ([(8, 0), (2, 0)], {"num": 2}, Crew(2, None, 0, 4)),
        ([(16, 4)], {}, Crew(4, None, 1, 4)),
        ([(96, 4)], {}, Crew(4, None, 1, 8)),
        ([(16, 4), (16, 4)], {"min": 2}, Crew(8, 2, 1, 4)),
        ([(16, 4)], {"num": 2}, Crew(2, None, 1, 8)),
        ([(16, 4)], {"gpus": 0.5}, Crew(8, None, 0.5, 2)),
        ([(16, 4)], {"gpus": 2.0}, Crew(2, None, 2, 8)),
        ([(16, 4)], {"gpus": 0.0}, Crew(1, None, 0, 16)),
        ([(16, 4)], {"device": "cpu"}, Crew(1, None, 0, 16)),
        ([(8, 0)], {"cpus": 2.0, "num": 4}, Crew(4, None, 0, 2)),
        ([(4, 0)], {"min": 2}, Crew(2, 2, 0, 2)),
    ],
)
def test_what_is_left_open_follows_from_the_cluster(nodes, config, expected):
    assert plan(*nodes, **config) == expected


@pytest.mark.parametrize(
    ("nodes", "config", "told"),
    [
        ([(8, 0)], {"gpus": 1.0}, "workers.gpus must be within the 0 GPUs there are, got 1 for"),
        ([(8, 2)], {"num": 3}, "workers.gpus must be within the 2 GPUs there are, got 1 for each"),
        ([(8, 0)], {"cpus": 3.0, "num": 3}, "workers.cpus must be within the 8 CPUs there are"),
        ([(4, 0)] * 3, {"cpus": 3.0, "num": 4}, "workers.cpus must be within the 12 CPUs on 3"),
        ([(8, 1), (8, 1)], {"gpus": 2.0}, "workers.gpus must be within the 2 GPUs on 2 nodes"),
        ([(8, 0)], {"device": "cuda"}, "device must be cpu where workers get no GPU, got cuda"),
        ([(8, 1)], {"device": "cpu", "gpus": 1.0}, "workers.gpus must be 0 with --device cpu"),
        ([(8, 4)], {"gpus": 1.5}, "workers.gpus must be a whole number where it is over 1"),
    ],
)
def test_what_cannot_be_had_is_refused_at_once(nodes, config, told):
    with pytest.raises(ValueError) as caught:
        plan(*nodes, **config)
    assert str(caught.value).startswith(told)


def test_elastic_runs_need_room_only_for_the_fewest_and_growing_clusters_for_none(caplog):
    assert plan((8, 1), num=4, min=1) == Crew(4, 1, 1, 2)
    caplog.set_level(logging.WARNING)
    assert plan((8, 0), num=4, cpus=4.0, growing=True).num == 4
    assert "waiting for the cluster" in caplog.text


def test_cpus_are_asked_for_where_the_nodes_are_not_known(caplog):
    assert plan((0, 0), num=4, gpus=1.0, growing=True).cpus == 1
    assert "workers.cpus: 1" in caplog.text and "set it" in caplog.text
    caplog.clear()
    assert plan((0, 0), num=4, gpus=1.0, cpus=7.0, growing=True).cpus == 7
    assert plan((8, 1)).cpus == 8
    assert "set it" not in caplog.text


@given(
    nodes=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), min_size=1, max_size=5),
    num=st.none() | st.integers(1, 12),
)
def test_what_nobody_asked_for_always_fits(nodes, num):
    gpus = sum(g for _, g in nodes)
    if gpus and num is not None and num > gpus:
        return
    if any(c < g for c, g in nodes):
        return
    crew = plan(*nodes, **({"num": num} if num else {}))
    have = [{"CPU": float(c), "GPU": float(g)} for c, g in nodes]
    assert crew.cpus > 0 and crew.threads >= 1
    if crew.cpus >= 1:
        assert room(have, crew.resources) >= crew.num
    if num is None and gpus:
        assert crew.num == gpus, "GPUs left idle"


def test_what_ray_and_torch_are_told():
    assert Crew(2, None, 0.0, 0.5).resources == {"CPU": 0.5}
    assert Crew(2, None, 1.0, 4.0).resources == {"CPU": 4.0, "GPU": 1.0}
    assert [Crew(1, None, 0, c).threads for c in (0.5, 1, 3.9)] == [1, 1, 3]
    assert [Crew(1, None, g, 1).backend for g in (0, 0.5, 1, 2)] == ["gloo", "gloo", "nccl", "nccl"]


def test_every_part_of_a_step_holds_an_image():
    crew = Crew(2, None, 0, 1)
    check_batches(training(2, 2), crew)
    with pytest.raises(ValueError, match=r"train.batch_unlabeled must be >= 2, one for each of 2"):
        check_batches(training(2, 1), crew)
    check_batches(training(4, 1, unlabeled=None), crew)
    check_batches(training(2, 1, unlabeled=None, **{"student.frozen_bn": True}), crew)
    with pytest.raises(ValueError, match=r"train.batch_labeled must be >= 4, two in each part"):
        check_batches(training(3, 1, unlabeled=None), crew)


def test_no_cutmix_with_one_image_is_told(caplog):
    crew = Crew(2, None, 0, 1)
    check_batches(training(2, 4), crew)
    check_batches(training(2, 2, **{"unimatch.same_image": True}), crew)
    check_batches(training(2, 2, **{"augment.cutmix": 0.0}), crew)
    assert not caplog.records
    check_batches(training(2, 3), crew)
    assert "so no CutMix" in caplog.text
