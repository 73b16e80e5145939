"""Runs that are to be tuned, and those of their images that are labelled by hand.

What enters: folders of `zsplg label` runs, a `Truth`. What leaves: checked `Candidate`s, the images
that all of them hold and that have a mask, and these images as a search sees them. Whatever is
wrong with the input is said here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zsplg_ray.cluster.relabel import text_encoder
from zsplg_ray.cluster.tune.region_cache import Judged, read_judged
from zsplg_ray.config import PromptsConfig
from zsplg_ray.exactly_once import part_ids
from zsplg_ray.label.space import TEMPLATES
from zsplg_ray.label.templates import template_set
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.masks import Truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.views.evaluate import check_same
from zsplg_ray.vocab import ClassList

OF_THE_RUN = "run"
"""Name of the set of templates that the labels were made with."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A run that is tuned."""

    folder: RunFolder
    run: dict[str, Any]
    """run.json."""
    classes: ClassList
    parts: dict[str, list[str]]
    """Name of a segments part -> ids of its images; each id stands once."""

    @property
    def default(self) -> dict[str, Any]:
        """The compose settings that the labels were made with, and the set of templates."""
        compose = {k: v for k, v in self.run["resolved"].items() if k.startswith("compose.")}
        return {**compose, TEMPLATES: OF_THE_RUN}


@dataclass(frozen=True)
class Images:
    """Which images there are."""

    ids: list[str]
    """Those that are labelled by hand, and in all runs; sorted."""
    without_truth: int
    """Images of the first run that have no mask."""
    without_segments: int
    """Masks of images that are not in all runs."""

    def only(self, ids: list[str]) -> Images:
        """Those whose masks say something. Raises: ValueError if these are fewer than two."""
        if len(ids) < 2:
            rule, fix = "masks of at least 2 images with a pixel that is not 255", "label more"
            raise ValueError(complain("truth", rule, f"{len(ids)} of {len(self.ids)}", fix))
        without = self.without_truth + len(self.ids) - len(ids)
        return replace(self, ids=ids, without_truth=without)


def open_candidates(uris: Sequence[str], truth: Truth) -> list[Candidate]:
    """The runs in some folders, which have to agree on what their numbers mean.

    Raises: ValueError if nothing can be tuned there.
    """
    candidates = [_open_run(uri) for uri in uris]
    classes = candidates[0].classes
    for candidate in candidates[1:]:
        check_same(classes, candidate.classes, f"run {candidate.folder.uri}")
    check_same(classes, truth.classes, "truth")
    return candidates


def _open_run(uri: str) -> Candidate:
    """What is known of a run. Raises: ValueError if nothing can be tuned there."""
    folder = RunFolder(uri)
    folder.label_settings()  # says so if there is no run with segments
    run = folder.read_run() or {}
    if run["labels_state"] != "complete":
        fix = f"run `zsplg relabel --run {uri}` to finish it"
        raise ValueError(complain("run", "whole", f"{uri}, half relabelled", fix))
    parts: dict[str, list[str]] = {}
    done: set[str] = set()
    for name, ids in sorted(part_ids(folder, "segments").items()):
        parts[name] = [i for i in ids if i not in done]
        done.update(ids)
    if not done:
        raise ValueError(complain("run", "with segments", f"{uri} (none)", "label images first"))
    return Candidate(folder, run, ClassList.from_dict(run["classes"]), parts)


def labelled_images(candidates: Sequence[Candidate], truth: Truth) -> Images:
    """The images that all runs hold and that have a mask.

    Raises: ValueError if there are fewer than two.
    """
    ids = [{i for part in c.parts.values() for i in part} for c in candidates]
    everywhere = set.intersection(*ids)
    chosen = sorted(i for i in everywhere if truth.has(i))
    if len(chosen) < 2:
        got = f"{len(chosen)} such as {truth.ids[0]!r} for images such as {min(ids[0])!r}"
        fix = "label more by hand; a mask is called like its image"
        rule = "masks of at least 2 images" + (" that all runs hold" if len(ids) > 1 else "")
        raise ValueError(complain("truth", rule, got, fix))
    without_truth = sum(not truth.has(i) for i in ids[0])
    return Images(chosen, without_truth, len(truth) - len(chosen))


def text_banks(candidate: Candidate, sets: Sequence[str]) -> dict[str, TextBank]:
    """Name of a template set -> class texts; always those that the labels were made with.

    Raises: ValueError if the run's CLIP cannot be had.
    """
    encoder = text_encoder(candidate.run)
    resolved = candidate.run["resolved"]
    banks = {}
    for name in dict.fromkeys((OF_THE_RUN, *sets)):
        templates = template_set(name, resolved["prompts.templates"])
        prompts = PromptsConfig(
            templates=templates, background=tuple(resolved["prompts.background"])
        )
        banks[name] = encoder.encode_classes(candidate.classes, prompts)
    return banks


def read_images(
    candidate: Candidate,
    images: Images,
    truth: Truth,
    banks: Mapping[str, TextBank],
    told: Callable[[int], None],
) -> list[Judged]:
    """The labelled images of a run, in the order of `images.ids`; see `read_judged`."""
    chosen = set(images.ids)
    wanted = {name: [i for i in ids if i in chosen] for name, ids in candidate.parts.items()}
    judged = read_judged(candidate.folder, wanted, truth, banks, told)
    return sorted(judged, key=lambda one: one.image_id)
