"""One search over settings: which to try next, which was best. Optuna behind one small face.

What enters: a `Space`, and the score of each setting that was tried. What leaves: settings, in
batches, and the best of them. The first one is always the default, so no search ends below it.

Batches, because what evaluates them costs more to start than to run: settings of one batch are
asked for before any of them has a score. Optuna's tree-structured Parzen estimator is told of those
under way ("constant liar"), and draws others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna

from zsplg_ray.cluster.tune.quiet import quiet_optuna
from zsplg_ray.label.space import Dimension, Space

Method = Literal["tpe", "random", "grid"]

STARTUP_TRIALS = 40
"""Settings drawn by chance before the estimator takes over: with some ten settings to search over,
fewer show it too little of the space."""


@dataclass(frozen=True)
class Tried:
    """A setting that was evaluated."""

    number: int
    """Counts from 0, the default."""
    settings: Mapping[str, Any]
    """Dotted name -> value, all of them; `prompts.templates` is the name of a set."""
    metrics: Mapping[str, float]
    """`miou` on the tuning part, what the search goes by, and whatever else is known."""
    began_s: float
    ended_s: float


@dataclass
class Search:
    """A search on one run and one part of its labelled images."""

    run: int
    """Which run."""
    held_out: int | None
    """Group of images that it must not learn from; None: it is given all."""
    space: Space
    trials: int
    method: Method = "tpe"
    seed: int = 0
    tried: list[Tried] = field(default_factory=list)
    asked: int = 0
    """Settings that were given away, also those under way."""

    def __post_init__(self) -> None:
        with quiet_optuna():
            self._study = optuna.create_study(direction="maximize", sampler=self._sampler())
        self._grid = self.space.grid(self.trials - 1) if self.method == "grid" else None
        self._under_way: dict[int, tuple[optuna.Trial, dict[str, Any]]] = {}
        if self._grid is not None:
            self.trials = 1 + len(self._grid)

    def _sampler(self) -> optuna.samplers.BaseSampler:
        if self.method != "tpe":
            return optuna.samplers.RandomSampler(seed=self.seed)
        # group: settings that exist only for one kind of score are modelled with those beside them
        return optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, group=True, constant_liar=True, seed=self.seed
        )

    @property
    def left(self) -> int:
        """Settings that have not been given away."""
        return self.trials - self.asked

    def ask(self, most: int) -> list[tuple[int, dict[str, Any]]]:
        """Up to `most` further settings: number and all settings by dotted name."""
        batch = []
        with quiet_optuna():
            for _ in range(min(most, self.left)):
                if self.asked == 0:
                    self._study.enqueue_trial(self.space.default_params())
                elif self._grid is not None:
                    self._study.enqueue_trial(self._grid[self.asked - 1])
                trial = self._study.ask()
                params = _suggest(trial, self.space)
                # The default's own numbers, which may lie outside of the space.
                settings = self.space.settings(params) if trial.number else dict(self.space.default)
                self._under_way[trial.number] = trial, settings
                self.asked += 1
                batch.append((trial.number, settings))
        return batch

    def tell(
        self, number: int, metrics: Mapping[str, float], began_s: float, ended_s: float
    ) -> Tried:
        """What came of a setting; times are seconds since 1970."""
        trial, settings = self._under_way.pop(number)
        self._study.tell(trial, metrics["miou"])
        tried = Tried(number, settings, dict(metrics), began_s, ended_s)
        self.tried.append(tried)
        return tried

    @property
    def best(self) -> Tried:
        """The setting of the highest mIoU on the tuning part; of equal ones the first."""
        return max(self.tried, key=lambda t: (t.metrics["miou"], -t.number))


def _suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """What the sampler says for each dimension that exists."""
    always = [d for d in space.dimensions if d.score is None]
    found = {d.name: _draw(trial, d) for d in always}
    return found | {d.name: _draw(trial, d) for d in space.active(found) if d.score is not None}


def _draw(trial: optuna.Trial, dimension: Dimension) -> Any:
    if dimension.options:
        return trial.suggest_categorical(dimension.name, dimension.options)
    # Whole numbers too, the space rounds: the estimator takes twice as long over those it knows of.
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)


def draw_batch(searches: Sequence[Search], most: int) -> tuple[int, list[tuple[int, dict]]] | None:
    """Settings of the search that is furthest behind: its index and a batch; None if all is asked.

    All searches keep step, so that none is left alone at the end with a batch at a time.
    """
    waiting = [i for i, search in enumerate(searches) if search.left]
    if not waiting:
        return None
    index = min(waiting, key=lambda i: (searches[i].asked / searches[i].trials, i))
    return index, searches[index].ask(most)
