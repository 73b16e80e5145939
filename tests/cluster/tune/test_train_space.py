"""Which training settings are searched, and what is tried next."""

import typing

import numpy as np
import pytest

from zsplg_ray.cluster.tune.train_space import (
    KNOWN,
    Told,
    given_params,
    grid,
    propose,
    search_space,
)
from zsplg_ray.config import FusionRule, SearchConfig, TrainConfig, TuneTrainConfig
from zsplg_ray.settings import from_mapping, override

RULE = "model_else_zeroshot"


def config(**changes) -> TuneTrainConfig:
    given = {"labeled": "few.txt", "unlabeled": "pool", "zeroshot": "labels", "out": "study"}
    return from_mapping(TuneTrainConfig, {**given, **changes})


def search(space, method, trials, value=lambda params: 0.5, seed=0) -> list[dict]:
    """All proposals of a search in which a trial's mIoU is `value` of its settings."""
    told: list[Told] = []
    while len(told) < trials:
        params = propose(space, SearchConfig(method=method, seed=seed), trials, told, RULE)
        if params is None:
            break
        state = "stopped" if len(told) % 3 == 2 else "complete"
        told.append(Told(params, ((1, value(params) / 2), (2, value(params))), state))
    return [t.params for t in told]


@pytest.mark.parametrize("method", ["tpe", "random", "grid"])
def test_every_proposal_is_a_training_run_and_says_only_what_means_something(method):
    asked = config(trials=40)
    space = search_space(asked)
    assert tuple(dim.name for dim in space) == KNOWN
    found = search(space, method, asked.trials)
    assert len(found) == 40 or (method == "grid" and 24 <= len(found) < 40)
    assert found[0] == given_params(space, RULE)
    assert found[0] == {
        "fusion.rule": RULE,
        "unimatch.conf_thresh": 0.95,
        "fusion.min_score": 0.0,
        "fusion.warmup": 0.0,
        "optim.lr": 1e-3,
    }
    run = from_mapping(TrainConfig, {"labeled": "few.txt", "out": "model"})
    for params in found:
        rule = params["fusion.rule"]
        override(run, params)  # raises if it is out of range
        assert 0.5 <= params["unimatch.conf_thresh"] <= 0.99
        assert 1e-4 <= params["optim.lr"] <= 1e-2
        assert ("fusion.mix_end" in params) == (rule == "mix")
        assert ("fusion.min_score" in params) == (rule != "unimatch")
        assert ("fusion.warmup" in params) == (rule not in ("unimatch", "zeroshot"))
    rules = {params["fusion.rule"] for params in found}
    assert len(rules) >= len(typing.get_args(FusionRule)) - (method != "grid")
    distinct = {tuple(params.items()) for params in found}
    assert len(distinct) == len(found)
    assert search(space, method, asked.trials) == found
    if method != "grid":
        assert search(space, method, asked.trials, seed=1) != found


def test_a_search_learns_from_trials_that_were_stopped_too():
    space = search_space(config(**{"search.over": ["unimatch.conf_thresh", "optim.lr"]}))

    def good(params):
        off = abs(params["unimatch.conf_thresh"] - 0.6) + abs(np.log10(params["optim.lr"]) + 2.5)
        return 1 / (1 + off)

    def last(method):
        found = [search(space, method, 40, good, seed)[-10:] for seed in range(3)]
        return np.mean([good(params) for tail in found for params in tail])

    assert last("tpe") > last("random") + 0.1


def test_the_next_proposal_depends_on_what_is_known_of_trials_alone():
    """As after a restart, when some have ended and some have only begun."""
    space = search_space(config())
    told = [Told(p, ((1, 0.1),), "complete") for p in search(space, "tpe", 12)]
    told[5] = Told(told[5].params, (), "failed")
    running = [Told(t.params, t.curve, "running") if i > 9 else t for i, t in enumerate(told)]
    tpe = SearchConfig()
    assert propose(space, tpe, 20, running, RULE) == propose(space, tpe, 20, running, RULE)
    assert propose(space, tpe, 20, running, RULE) not in [t.params for t in running]
    random = SearchConfig(method="random")
    assert propose(space, random, 20, told, RULE) == propose(space, random, 30, running, RULE)


def test_a_grid_has_as_many_levels_as_there_is_room_for():
    space = search_space(config(**{"search.over": ["optim.lr", "unimatch.conf_thresh"]}))
    points = grid(space, 12, RULE)
    assert len(points) == 12
    assert {p["unimatch.conf_thresh"] for p in points} == {0.5, 0.6633, 0.8267, 0.99}
    assert {p["optim.lr"] for p in points} == {1e-4, 1e-3, 1e-2}
    assert len(grid(space, 5, RULE)) == 4 and len(grid(space, 2, RULE)) == 2
    with pytest.raises(ValueError, match="trials must be enough for two levels") as caught:
        grid(space, 1, RULE)
    assert "got 2;" in str(caught.value)


def test_the_given_settings_are_within_whatever_they_are():
    given = {"unimatch.conf_thresh": 0.2, "fusion.warmup": 0.8, "optim.lr": 30.0}
    by_name = {dim.name: dim for dim in search_space(config(**given))}
    assert (by_name["unimatch.conf_thresh"].low, by_name["unimatch.conf_thresh"].high) == (
        0.2,
        0.99,
    )
    assert by_name["fusion.warmup"].high == 0.8
    assert (by_name["optim.lr"].low, by_name["optim.lr"].high) == (3.0, 100.0)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"zeroshot": None}, ["unimatch.conf_thresh", "optim.lr"]),
        ({"zeroshot": None, "unlabeled": None}, ["optim.lr"]),
        ({"search.over": ["optim.lr", "fusion.rule"]}, ["fusion.rule", "optim.lr"]),
        ({"search.over": ["fusion.mix_end"], "fusion.rule": "mix"}, ["fusion.mix_end"]),
        ({"search.over": ["fusion.min_score"], "fusion.rule": "agree"}, ["fusion.min_score"]),
        (
            {"search.over": ["fusion.mix_end", "fusion.rule"], "fusion.rule": "unimatch"},
            ["fusion.rule", "fusion.mix_end"],
        ),
    ],
)
def test_what_has_no_effect_is_not_searched(changes, names):
    assert [dim.name for dim in search_space(config(**changes))] == names


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"search.over": ["optim.rl"]},
            r"got optim.rl; did you mean optim.lr\? known: fusion.rule",
        ),
        ({"search.over": ["fusion.rule"], "zeroshot": None}, "; add --zeroshot, or"),
        (
            {"search.over": ["unimatch.conf_thresh"], "zeroshot": None, "unlabeled": None},
            "; add --unlabeled, or choose among optim.lr",
        ),
        (
            {"search.over": ["fusion.min_score", "optim.lr"], "fusion.rule": "unimatch"},
            "settings with an effect, got fusion.min_score; add fusion.rule",
        ),
        (
            {"search.over": ["fusion.mix_end", "fusion.warmup"], "fusion.rule": "zeroshot"},
            "got fusion.mix_end fusion.warmup; add fusion.rule",
        ),
        ({"search.over": []}, "search.over must be settings with an effect, got none"),
        ({"optim.lr": 0.0}, "optim.lr must be over 0 where it is searched"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(changes, told):
    with pytest.raises(ValueError, match=told) as caught:
        search_space(config(**changes))
    assert "\n" not in str(caught.value)
