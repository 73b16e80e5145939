"""Searches over compose settings on Ray Tune: all of them in one run of it, batches as trials.

What enters: searches (see search.py), and for each run its `Subject`: regions, and which image
belongs to which group. What leaves: the searches, with all that was tried.

A trial of Ray Tune costs 50 to 300 ms to start, a setting is judged in about one. So a trial is a
batch of settings, its actor is used again for the next one, and keeps what it has computed; the
regions lie once in shared memory. Optuna is asked in the driver, where all results come together.

Nothing is stored: a search takes a minute or two, and one that was killed is run again.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import Searcher

from zsplg_ray.cluster.session import last_line
from zsplg_ray.cluster.tune.judgement import Subject, marks
from zsplg_ray.cluster.tune.quiet import quiet_tune
from zsplg_ray.cluster.tune.search import Search, Tried, draw_batch
from zsplg_ray.settings import WorkError

log = logging.getLogger(__name__)

LEAST_AT_ONCE, MOST_AT_ONCE = 8, 50
"""Settings in a batch. They are all drawn without knowing of each other's scores; and fewer are
through before the next batch has started."""
LEAST_BATCHES = 16
"""Batches that a search is cut into, at least: how often it can learn."""
RETRIES = 3
"""How often a batch is evaluated again whose process has died."""


def run_searches(
    searches: Sequence[Search],
    subjects: Sequence[ray.ObjectRef],
    *,
    concurrent: int | None = None,
    told: Callable[[Search, Tried], None] = lambda search, tried: None,
) -> None:
    """Evaluate all settings of all searches; the results are in `Search.tried`.

    Args:
        searches: `run` is an index into `subjects`.
        subjects: A `Subject` for each run, in shared memory.
        concurrent: Batches at the same time. None: one for each CPU.
        told: Called, in the driver, for each setting that was judged.

    Raises:
        WorkError: A batch failed.
    """
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    concurrent = concurrent or cpus
    size = batch_size(max(s.trials for s in searches), concurrent)
    batches = sum(math.ceil(s.trials / size) for s in searches)
    searcher = BatchSearcher(searches, size, told)
    trainable = tune.with_parameters(Judge, subjects=list(subjects))
    scratch = tempfile.TemporaryDirectory(prefix="zsplg_tune_", ignore_cleanup_errors=True)
    with quiet_tune(), scratch as folder:  # Ray Tune insists on writing
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=batches,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
                trial_name_creator=_short_name,
                trial_dirname_creator=_short_name,
            ),
            run_config=tune.RunConfig(
                name="labels",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            results = tuner.fit()
        except (RayError, tune.TuneError) as e:
            raise WorkError(f"the search stopped: {last_line(e)}") from e
    if results.errors:
        raise WorkError(f"the search failed: {last_line(results.errors[0])}")
    assert all(len(s.tried) == s.trials for s in searches), "every setting was told"


def batch_size(trials: int, concurrent: int) -> int:
    """Settings of a trial of Ray Tune: as many as do not keep the search from learning."""
    even = math.ceil(trials / max(LEAST_BATCHES, 4 * concurrent))
    return min(max(even, LEAST_AT_ONCE), MOST_AT_ONCE)


class BatchSearcher(Searcher):
    """What Ray Tune asks for the next trial: a batch of one of the searches."""

    def __init__(
        self,
        searches: Sequence[Search],
        size: int,
        told: Callable[[Search, Tried], None] = lambda search, tried: None,
    ) -> None:
        super().__init__(metric="best", mode="max")
        self.searches, self.size, self.told = list(searches), size, told
        self._index: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The config of a trial: run, what is held out, and numbers and settings of a batch;
        FINISHED if there are no more.
        """
        drawn = draw_batch(self.searches, self.size)
        if drawn is None:
            return Searcher.FINISHED
        index, batch = drawn
        self._index[trial_id] = index
        search = self.searches[index]
        return {"run": search.run, "held_out": search.held_out, "batch": batch}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the search what came of a batch; one that failed ends the whole anyway."""
        search = self.searches[self._index.pop(trial_id)]
        if error or not result or "judged" not in result:
            return
        for number, metrics, began_s, ended_s in result["judged"]:
            self.told(search, search.tell(number, metrics, began_s, ended_s))

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune keeps a copy of everything, to resume from; there is nothing to resume."""
        return {"searches": [], "size": self.size}

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune wants a file; nothing goes on from it."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Not possible."""
        raise NotImplementedError("a search over labels is run again, not resumed")


class Judge(tune.Trainable):
    """An actor that evaluates batches; the config is what `BatchSearcher.suggest` gives."""

    def setup(self, config: dict[str, Any], subjects: Sequence[ray.ObjectRef] = ()) -> None:
        """Look at what lies in shared memory, once."""
        self.subjects: list[Subject] = ray.get(list(subjects))
        self.batch = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next batch."""
        self.batch = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Judge the batch: number, metrics and start of each setting."""
        subject, held_out = self.subjects[self.batch["run"]], self.batch["held_out"]
        judged = []
        for number, settings in self.batch["batch"]:
            began_s = time.time()
            metrics = metrics_of(subject, settings, held_out)
            judged.append((number, metrics, began_s, time.time()))
        best = max(metrics["miou"] for _, metrics, *_ in judged)
        return {"judged": judged, "best": best, "done": True}


def metrics_of(
    subject: Subject, settings: Mapping[str, Any], held_out: int | None
) -> dict[str, float]:
    """Marks of a setting on the tuning part, and `held_out_miou` where a group is held out."""
    confusion_GKL = subject.confusion(settings)
    if held_out is None:
        return marks(confusion_GKL.sum(axis=0))
    held_KL = confusion_GKL[held_out]
    found = marks(confusion_GKL.sum(axis=0) - held_KL)
    return found | {"held_out_miou": marks(held_KL)["miou"]}


def _short_name(trial: Any) -> str:
    """Ray Tune would put all settings into the name of a folder."""
    return f"batch_{trial.trial_id}"
