"""Which training settings are searched, between which bounds, and which to try next.

What enters: the settings that were given, and the trials so far. What leaves: dotted names and
values of the next trial.

Why this way: nothing is kept from one question to the next. A proposal follows from the seed, the
trial's number and what has been tried, so a search that was killed goes on as if it had not been,
and there is no state of the search to save beside the trials themselves.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from zsplg_ray.cluster.tune.quiet import quiet_optuna
from zsplg_ray.config import FusionRule, SearchConfig, TuneTrainConfig
from zsplg_ray.settings import complain, flatten, nearest

Value = float | str
Params = dict[str, Value]

KNOWN = (
    *("fusion.rule", "unimatch.conf_thresh", "fusion.min_score", "fusion.warmup"),
    *("fusion.mix_end", "optim.lr"),
)
"""What can be searched. The rule comes first, for others depend on it."""

LR_FACTOR = 10.0
"""The learning rate is searched from the given one divided by this to it times this."""

_EFFECT = "settings with an effect"
_DIGITS = 4
_MOST_STARTUP = 10


@dataclass(frozen=True)
class Dim:
    """A setting that is searched: a number in [low, high], or one of some choices."""

    name: str
    given: Value
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    """It means something with these values of fusion.rule only; none: with all."""

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna wants it."""
        if self.choices:
            return CategoricalDistribution(self.choices)
        return FloatDistribution(self.low, self.high, log=self.log)

    def at(self, share: float) -> Value:
        """The value at a share, [0, 1], of the way through."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.log:
            return self.rounded(self.low * (self.high / self.low) ** share)
        return self.rounded(self.low + share * (self.high - self.low))

    def levels(self, n: int) -> list[Value]:
        """`n` values, evenly spread from end to end; one is the given."""
        if n == 1:
            return [self.given]
        return list(self.choices) or [self.at(i / (n - 1)) for i in range(n)]

    def rounded(self, value: float) -> float:
        """To digits that a person reads, within the bounds."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


def search_space(config: TuneTrainConfig) -> tuple[Dim, ...]:
    """The settings that `config` asks to search; trial 0, the given settings, lies within.

    Raises: ValueError for a name that is unknown or of no effect on such a run, or if there are too
        few trials for a grid.
    """
    flat, asked = flatten(config), config.search.over
    useful = [name for name in KNOWN if _has_effect(name, config)]
    if asked is not None:
        _check_asked(asked, useful, config)
    chosen = [d for d in _dims(flat) if d.name in (useful if asked is None else asked)]
    if all(dim.name != "fusion.rule" for dim in chosen):
        chosen = [d for d in chosen if not d.rules or flat["fusion.rule"] in d.rules]
    for dim in chosen:
        if dim.log and not dim.low:
            fix = f"give one, or leave {dim.name} out with --search.over"
            raise ValueError(complain(dim.name, "over 0 where it is searched", dim.given, fix))
    if not chosen:
        fix = f"with fusion.rule {flat['fusion.rule']} choose among {', '.join(useful)}"
        shown = " ".join(asked or ()) or "none"
        raise ValueError(complain("search.over", _EFFECT, shown, fix))
    if config.search.method == "grid":
        grid(chosen, config.trials - 1, flat["fusion.rule"])  # refuses too few trials
    return tuple(chosen)


def _dims(flat: Mapping[str, Any]) -> tuple[Dim, ...]:
    """All that can be searched, around the given settings."""
    rules: tuple[str, ...] = typing.get_args(FusionRule)
    using = tuple(r for r in rules if r != "unimatch")
    dims = (
        Dim("fusion.rule", flat["fusion.rule"], choices=rules),
        _number(flat, "unimatch.conf_thresh", 0.5, 0.99),
        _number(flat, "fusion.min_score", 0.0, 0.9, using),
        _number(flat, "fusion.warmup", 0.0, 0.5, tuple(r for r in using if r != "zeroshot")),
        _number(flat, "fusion.mix_end", 0.0, 1.0, ("mix",)),
        _learning_rate(flat["optim.lr"]),
    )
    assert tuple(dim.name for dim in dims) == KNOWN
    return dims


def given_params(space: Sequence[Dim], rule: str) -> Params:
    """What trial 0 has: the settings as they were given. `rule`: the given fusion.rule."""
    return draw(space, rule, lambda dim: dim.given)


def draw(space: Sequence[Dim], rule: str, pick: Callable[[Dim], Value]) -> Params:
    """A value of every setting that means something beside those before it."""
    params: Params = {}
    for dim in space:
        if not dim.rules or params.get("fusion.rule", rule) in dim.rules:
            params[dim.name] = pick(dim)
    return params


def propose(
    space: Sequence[Dim], search: SearchConfig, trials: int, told: Sequence[Told], rule: str
) -> Params | None:
    """The settings of the next trial; None if a grid has no point left.

    Args:
        space: What is searched.
        search: How.
        trials: How many there will be in all.
        told: All trials so far, in the order of their numbers.
        rule: The given fusion.rule.
    """
    number = len(told)
    if not number:
        return given_params(space, rule)
    if search.method == "grid":
        tried = [t.params for t in told]
        points = grid(space, trials - 1, rule)
        return next((point for point in points if point not in tried), None)
    if search.method == "random":
        rng = np.random.default_rng([search.seed, number])
        return draw(space, rule, lambda dim: dim.at(rng.random()))
    return _ask_tpe(space, search.seed, trials, told, rule)


# Grid --------------------------------------------------------------------------------------------


def grid(space: Sequence[Dim], most: int, rule: str) -> list[Params]:
    """All combinations of as many levels of each setting as `most` points have room for.

    Settings get their levels in turn, choices all of theirs at once.

    Raises: ValueError if not even one setting can have two.
    """
    counts = {dim.name: 1 for dim in space}
    growing = list(space)
    while growing:
        for dim in list(growing):
            more = len(dim.choices) or counts[dim.name] + 1
            larger = counts | {dim.name: more}
            if more > counts[dim.name] and _size(space, larger, rule, most) <= most:
                counts = larger
            else:
                growing.remove(dim)
    points = _points(space, counts, rule)
    if len(points) < 2:
        fix = "raise it, or search over fewer settings with --search.over"
        rule = "enough for two levels of a setting beside the given ones"
        raise ValueError(complain("trials", rule, most + 1, fix))
    return points


def _size(space: Sequence[Dim], counts: Mapping[str, int], rule: str, most: int) -> int:
    """Points of a grid; where there are far too many they are not counted one by one."""
    rules = max((len(dim.choices) for dim in space), default=1) or 1
    if math.prod(counts.values()) > 4 * rules * max(most, 1):
        return math.prod(counts.values())
    return len(_points(space, counts, rule))


def _points(space: Sequence[Dim], counts: Mapping[str, int], rule: str) -> list[Params]:
    points: dict[tuple[tuple[str, Value], ...], Params] = {}
    for values in itertools.product(*(dim.levels(counts[dim.name]) for dim in space)):
        by_name = dict(zip((dim.name for dim in space), values, strict=True))
        point = draw(space, rule, lambda dim, by_name=by_name: by_name[dim.name])
        points.setdefault(tuple(point.items()), point)
    return list(points.values())


# TPE ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A trial as the search sees it."""

    params: Params
    curve: tuple[tuple[int, float], ...]
    """Epoch and val mIoU of each validation."""
    state: str
    """running, complete, stopped, failed."""

    @property
    def best(self) -> float | None:
        """Highest val mIoU."""
        return max((miou for _, miou in self.curve), default=None)


def _ask_tpe(
    space: Sequence[Dim], seed: int, trials: int, told: Sequence[Told], rule: str
) -> Params:
    """Optuna's next proposal, from a study made anew of the trials that there are."""
    drawn = np.random.SeedSequence([seed, len(told)]).generate_state(1)[0]
    with quiet_optuna():
        sampler = optuna.samplers.TPESampler(
            seed=int(drawn),
            n_startup_trials=max(3, min(_MOST_STARTUP, trials // 3)),
            constant_liar=True,  # not the same again while others run
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in told:
            study.add_trial(_frozen(space, trial))
        asked = study.ask()

        def pick(dim: Dim) -> Value:
            if dim.choices:
                return asked.suggest_categorical(dim.name, dim.choices)
            return dim.rounded(asked.suggest_float(dim.name, dim.low, dim.high, log=dim.log))

        return draw(space, rule, pick)


def _frozen(space: Sequence[Dim], told: Told) -> optuna.trial.FrozenTrial:
    """A trial as Optuna wants it: one that was stopped early has no value, but a curve."""
    complete = told.state == "complete" and told.best is not None
    state = TrialState.COMPLETE if complete else TrialState.PRUNED
    if told.state == "running":
        state = TrialState.RUNNING
    elif not told.curve:
        state = TrialState.FAIL
    return create_trial(
        state=state,
        value=told.best if complete else None,
        params=told.params,
        distributions={dim.name: dim.distribution for dim in space if dim.name in told.params},
        intermediate_values=dict(told.curve),
    )


# Checks ------------------------------------------------------------------------------------------


def _number(
    flat: Mapping[str, Any], name: str, low: float, high: float, rules: tuple[str, ...] = ()
) -> Dim:
    """Between bounds that are moved to hold the given value too."""
    given = float(flat[name])
    return Dim(name, given, min(low, given), max(high, given), rules=rules)


def _learning_rate(given: float) -> Dim:
    high = max(given, min(given * LR_FACTOR, 100.0))
    return Dim("optim.lr", given, given / LR_FACTOR, high, log=True)


def _has_effect(name: str, config: TuneTrainConfig) -> bool:
    """Whether a setting matters to a run with such data."""
    if name.startswith("fusion."):
        return config.zeroshot is not None and config.unlabeled is not None
    return not name.startswith("unimatch.") or config.unlabeled is not None


def _check_asked(asked: Sequence[str], useful: Sequence[str], config: TuneTrainConfig) -> None:
    """Raises: ValueError for a name that nothing could be searched of."""
    for name in asked:
        if name not in KNOWN:
            near = nearest(name, KNOWN)
            fix = f"did you mean {near}? " if near else ""
            fix += f"known: {', '.join(KNOWN)}"
            raise ValueError(complain("search.over", "settings that can be searched", name, fix))
        if name not in useful:
            need = ["zeroshot"] if name.startswith("fusion.") else []
            missing = [f"--{n}" for n in (*need, "unlabeled") if getattr(config, n) is None]
            fix = f"add {' and '.join(missing)}, or choose among {', '.join(useful)}"
            raise ValueError(complain("search.over", _EFFECT, name, fix))
    if "fusion.rule" in asked:
        return
    rule = config.fusion.rule
    idle = [d.name for d in _dims(flatten(config)) if d.rules and rule not in d.rules]
    if wrong := [name for name in asked if name in idle]:
        fix = f"add fusion.rule, or leave it out: fusion.rule {rule} does not look at it"
        raise ValueError(complain("search.over", _EFFECT, " ".join(wrong), fix))
