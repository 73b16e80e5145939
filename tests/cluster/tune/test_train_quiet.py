"""Ray Tune and Optuna are quiet while they work, and as they were afterwards."""

import logging
import os

import optuna
import pytest

from zsplg_ray.cluster.tune.quiet import quiet_optuna, quiet_tune
from zsplg_ray.cluster.tune.train_space import Told, propose, search_space
from zsplg_ray.config import SearchConfig, TuneTrainConfig
from zsplg_ray.settings import from_mapping


def state() -> tuple:
    levels = [logging.getLogger(f"ray.{name}").level for name in ("tune", "air", "train")]
    return dict(os.environ), levels, optuna.logging.get_verbosity()


def test_all_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    before = state()
    with pytest.raises(KeyboardInterrupt), quiet_tune(), quiet_optuna():
        assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"
        assert os.environ["RAY_AIR_NEW_OUTPUT"] == "1", "what a user has set"
        assert not logging.getLogger("ray.tune").isEnabledFor(logging.ERROR)
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
        raise KeyboardInterrupt
    assert state() == before


def test_who_debugs_sees_all(monkeypatch):
    ours = logging.getLogger("zsplg_ray.cluster.tune.quiet")
    monkeypatch.setattr(ours, "level", logging.DEBUG)
    ours.manager._clear_cache()  # type: ignore[attr-defined]
    before = state()[1]
    with quiet_tune():
        assert state()[1] == before


def test_a_proposal_leaves_optuna_as_it_was():
    given = {"labeled": "few", "unlabeled": "pool", "out": "study"}
    space = search_space(from_mapping(TuneTrainConfig, given))
    told = [Told({"unimatch.conf_thresh": 0.9, "optim.lr": 1e-3}, ((1, 0.5),), "complete")]
    before = state()
    assert propose(space, SearchConfig(), 5, told, "unimatch")
    assert state() == before
