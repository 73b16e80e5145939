"""`zsplg tune labels`: a run's segments and a few masks in, the settings that name them best out.

What enters: folders of `zsplg label` runs over the same images, and masks of some of these images.
What leaves: in each run's folder tuned.yaml (for `relabel --config` and `label --config`),
tune.json (what it is worth, and how that is known) and tuned/ (figures, a table of the trials).

    segments/ + masks -> regions (cached) -> Sweep in shared memory
    Optuna -> settings, in batches -> Ray Tune -> confusion counts -> Optuna
    the best of each search -> class thresholds -> held-out images decide -> tuned.yaml

SAM and CLIP's image side ran once, when the segments were made; here a setting costs about a
millisecond for a hundred images. With one fold, a part of the labelled images is held out and never
searched on. With k folds each part is held out once, by a search of its own; a last search on all
images gives the settings, and the folds tell what such a search is worth.

Shape suffixes: I images.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from zsplg_ray import __version__
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.session import last_line, ray_session
from zsplg_ray.cluster.track.store import PREFIX
from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.cluster.tune.candidates import (
    Candidate,
    Images,
    labelled_images,
    open_candidates,
    read_images,
    text_banks,
)
from zsplg_ray.cluster.tune.folds import split
from zsplg_ray.cluster.tune.judgement import Subject, Verdict, compose_config, judge
from zsplg_ray.cluster.tune.labels_report import Found, describe, summary, write_study
from zsplg_ray.cluster.tune.region_cache import Judged
from zsplg_ray.cluster.tune.search import Search, Tried
from zsplg_ray.cluster.tune.searcher import run_searches
from zsplg_ray.config import TuneLabelsConfig
from zsplg_ray.label.space import Limits, check_over, compose_space
from zsplg_ray.label.sweep import Sweep
from zsplg_ray.masks import open_truth
from zsplg_ray.runinfo import recorded
from zsplg_ray.safe_text import public_values, without_credentials
from zsplg_ray.settings import WorkError, complain

__all__ = ["summary", "tune_labels"]


FEW_IMAGES, FOLDS_OF_FEW = 100, 5
"""Under so many labelled images one held-out part would say too little: as many folds instead."""


def tune_labels(config: TuneLabelsConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Find the compose settings that name the segments best.

    Args:
        config: As the user gave it.
        progress: What shows how far it is; None: one of its own.

    Returns:
        `runs`: what each run's tune.json holds (see tune_report.describe), and `best`: the folder
        of the run whose labels are best on held-out images.

    Raises:
        ValueError: Bad input; nothing has been written but the cache of regions.
        WorkError: The work failed; run it again.
    """
    with progress or Progress("tune labels", show=not config.quiet) as progress:
        return _tune_labels(config, progress)


def _tune_labels(config: TuneLabelsConfig, progress: Progress) -> dict[str, Any]:
    """`tune_labels`, under way."""
    check_over(config.search.over, config.templates)
    progress.waits("looking at runs and masks")
    truth = open_truth(config.truth, root=config.root)
    candidates = open_candidates(config.run, truth)
    images = labelled_images(candidates, truth)
    _folds(config, len(images.ids))
    with contextlib.ExitStack() as held:
        for candidate in candidates:
            held.enter_context(only_run(candidate.folder))
        progress.waits("reading CLIP, for the class names")
        banks = [text_banks(candidate, config.templates) for candidate in candidates]
        progress.waits("starting Ray")
        held.enter_context(ray_session(config.ray))
        progress.plan(len(images.ids) * len(candidates), unit="masks and their segments read")
        progress.start()
        seen = [
            read_images(candidate, images, truth, texts, progress.add)
            for candidate, texts in zip(candidates, banks, strict=True)
        ]
        seen = [[one for one in mine if len(one.regions)] for mine in seen]  # else all of it is 255
        images = images.only([one.image_id for one in seen[0]])
        folds = _folds(config, len(images.ids))
        holds = [one.classes for one in seen[0]]
        group_I = split(holds, folds, config.holdout, _seed(config))
        progress.waits("preparing the search")
        study = _Study(config, candidates, images, folds, group_I, progress)
        return study.run(seen)


def _folds(config: TuneLabelsConfig, n_images: int) -> int:
    """How many folds. Raises: ValueError if there are fewer images."""
    if config.folds is None:
        return min(FOLDS_OF_FEW, n_images) if n_images < FEW_IMAGES else 1
    if config.folds > n_images:
        rule = f"<= {n_images}, the images with a mask"
        raise ValueError(complain("folds", rule, config.folds, "lower it, or label more"))
    return config.folds


def _seed(config: TuneLabelsConfig, *which: int) -> int:
    """A seed of its own for each search, and for the folds."""
    return int(np.random.SeedSequence([config.search.seed, *which]).generate_state(1)[0])


class _Study:
    """The searches over all runs and folds, and what becomes of them."""

    def __init__(
        self,
        config: TuneLabelsConfig,
        candidates: Sequence[Candidate],
        images: Images,
        folds: int,
        group_I: np.ndarray,
        progress: Progress,
    ) -> None:
        self.config, self.candidates, self.images = config, candidates, images
        self.progress = progress
        self.group_I, self.n_groups = group_I, max(folds, 2)
        self.held_out: list[int | None] = [1] if folds == 1 else [*range(folds), None]
        """For each search of a run the group that it does not see. The last search is the one whose
        settings are written."""
        self.ids = [uuid.uuid4().hex for _ in candidates]

    def run(self, seen: Sequence[Sequence[Judged]]) -> dict[str, Any]:
        """Search, judge, write.

        Args:
            seen: For each run its labelled images.

        Raises: ValueError, WorkError.
        """
        subjects = [self._subject(*both) for both in zip(self.candidates, seen, strict=True)]
        searches = [self._searches(*both) for both in enumerate(zip(subjects, seen, strict=True))]
        trackers = [self._tracker(*both) for both in zip(self.candidates, self.ids, strict=True)]
        subjects[0].confusion(self.candidates[0].default)  # compiled once, workers find it cached
        for tracker in trackers:
            tracker.start()
        state = "failed"
        try:
            began = time.monotonic()
            refs = [ray.put(subject) for subject in subjects]
            self._search([s for mine in searches for s in mine], refs, trackers)
            self.progress.waits("judging what was found")
            verdicts = self._judge(searches, refs)
            seconds = time.monotonic() - began
            studies = [
                self._finish(r, Found(subjects[r], searches[r], verdicts[r], seconds), trackers[r])
                for r in range(len(subjects))
            ]
            state = "complete"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            if state != "complete":
                for tracker in trackers:
                    tracker.finish({"state": state}, {}, {})
        best = max(studies, key=lambda s: s["result"][s["chosen"]]["held_out"]["miou"])
        return {"verb": "tune labels", "best": best["folder"], "runs": studies}

    def _subject(self, candidate: Candidate, seen: Sequence[Judged]) -> Subject:
        sims = {name: [one.sims[name] for one in seen] for name in seen[0].sims}
        regions = [one.regions for one in seen]
        sweep = Sweep(regions, seen, sims, candidate.classes)
        return Subject(sweep, self.group_I, self.n_groups, candidate.classes)

    def _searches(self, r: int, of_run: tuple[Subject, Sequence[Judged]]) -> list[Search]:
        """A search for each fold of run `r`, and the final one.

        Raises: ValueError if nothing can be searched, or the grid does not fit.
        """
        subject, seen = of_run
        config, default = self.config, self.candidates[r].default
        image_px = float(np.median([np.prod(one.regions.size_hw) for one in seen]))
        # Of all images: a part may have no segments, and no mask has a say in it.
        ranges = [subject.sweep.ranges(name, compose_config(default)) for name in config.templates]
        limits = Limits.of(ranges, image_px, len(subject.classes))
        space = compose_space(default, limits, config.templates, config.search.over)
        return [
            Search(r, held_out, space, config.trials, config.search.method, _seed(config, r, s))
            for s, held_out in enumerate(self.held_out)
        ]

    def _tracker(self, candidate: Candidate, study_id: str) -> StudyTracker:
        run = candidate.run
        links = {"truth": self.config.truth, "segments": run["fingerprint"]}
        links |= {"labels": run["labels_fingerprint"], "labels_folder": candidate.folder.uri}
        links = public_values(links)
        links["classes"] = ", ".join(candidate.classes.names)
        study = {
            "id": study_id,
            "verb": "tune labels",
            "config": recorded(self.config),
            "tags": {f"{PREFIX}{name}": value for name, value in links.items()},
        }
        return StudyTracker(self.config.mlflow, candidate.folder, study)

    def _search(
        self,
        searches: Sequence[Search],
        subjects: Sequence[ray.ObjectRef],
        trackers: Sequence[StudyTracker],
    ) -> None:
        """All settings of all searches; those of the final ones go to MLflow as they come."""
        progress = self.progress
        progress.plan(sum(search.trials for search in searches), unit="settings tried")
        progress.start()
        best = 0.0

        def tell(search: Search, tried: Tried) -> None:
            nonlocal best
            progress.add(1)
            if search.held_out != self.held_out[-1]:
                return
            if tried.metrics["miou"] > best:
                best = tried.metrics["miou"]
                progress.more = (f"best mIoU so far {best:.4f}",)
            trackers[search.run].trial(
                tried.number,
                tried.settings,
                tried.metrics,
                "complete",
                tried.began_s,
                tried.ended_s,
            )

        concurrent = self.config.search.concurrent
        run_searches(searches, subjects, concurrent=concurrent, told=tell)

    def _judge(
        self, searches: Sequence[Sequence[Search]], subjects: Sequence[ray.ObjectRef]
    ) -> list[list[Verdict]]:
        """For each run the verdict on each of its searches. Raises: WorkError."""
        task = ray.remote(num_cpus=1)(judge)
        per_class = self.config.per_class
        waiting = [
            [
                task.remote(subjects[r], candidate.default, s.best.settings, s.held_out, per_class)
                for s in searches[r]
            ]
            for r, candidate in enumerate(self.candidates)
        ]
        try:
            return [ray.get(mine) for mine in waiting]
        except RayError as e:
            raise WorkError(f"the settings found could not be judged: {last_line(e)}") from e

    def _finish(self, r: int, found: Found, tracker: StudyTracker) -> dict[str, Any]:
        """Describe, write and track what was found for a run."""
        candidate = self.candidates[r]
        known: Mapping[str, Any] = {
            "id": self.ids[r],
            "verb": "tune labels",
            "state": "complete",
            "version": __version__,
            "folder": without_credentials(candidate.folder.uri),
            "truth": without_credentials(self.config.truth),
            "config": recorded(self.config),
            "fingerprint": candidate.run["fingerprint"],
            "labels_fingerprint": candidate.run["labels_fingerprint"],
            "classes": list(candidate.classes.names),
            "images": {
                "labelled": len(self.images.ids),
                "without_truth": self.images.without_truth,
                "without_segments": self.images.without_segments,
                "groups": self._groups(),
            },
        }
        study = describe(known, found)
        write_study(candidate, study, found, tracker)
        return study

    def _groups(self) -> list[list[str]]:
        """Ids of the images of each group."""
        groups: list[list[str]] = [[] for _ in range(self.n_groups)]
        for image_id, group in zip(self.images.ids, self.group_I, strict=True):
            groups[group].append(image_id)
        return groups
