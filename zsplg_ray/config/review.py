"""Settings of the review loop: which images a person corrects, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from zsplg_ray.settings import Range, Section, complain


@dataclass(frozen=True, kw_only=True)
class ReviewWeights(Section):
    """What counts when images are picked. Each part is divided by its largest value in the run
    before it is weighed; a part that the run has no numbers for counts nothing."""

    PREFIX: ClassVar[str] = "weights."

    confidence: Annotated[float, Range(0, 100)] = 1.0
    """Of pixels with low scores, those nearest to the threshold most, [0, 100]."""
    margin: Annotated[float, Range(0, 100)] = 1.0
    """Of segments whose embedding is nearly as near to another class, [0, 100]."""
    rejected: Annotated[float, Range(0, 100)] = 1.0
    """Of pixels of segments that were found and not named, [0, 100]."""
    unlabelled: Annotated[float, Range(0, 100)] = 1.0
    """Of pixels without a label (255), [0, 100]."""
    disagreement: Annotated[float, Range(0, 100)] = 1.0
    """Of pixels that --compare names differently, [0, 100]."""
    rare: Annotated[float, Range(0, 100)] = 0.5
    """Of the rarest class in the image, [0, 100]."""
    diversity: Annotated[float, Range(0, 100)] = 0.5
    """Of how unlike an image is to those picked before it, [0, 100]."""
    coverage: Annotated[float, Range(0, 100)] = 0.5
    """Of classes that few of those picked before it hold, [0, 100]."""

    def extra_checks(self) -> None:
        """Something has to count."""
        names = ("confidence", "margin", "rejected", "unlabelled", "disagreement", "rare")
        if not any(getattr(self, name) for name in (*names, "diversity", "coverage")):
            fix = "leave one above 0"
            raise ValueError(complain("weights", "above 0 for some part", "0 for all", fix))


@dataclass(frozen=True, kw_only=True)
class ReviewExportConfig(Section):
    """Pick the images of a run where a person's minute is worth most, and write them with their
    labels for correcting."""

    run: str
    """Folder of a `label` or `predict` run."""
    to: str
    """Folder to write to; made if missing, refused if it holds anything."""
    budget: Annotated[int, Range(1, 10_000_000)] = 50
    """How many images to pick, [1, 1e+07]; all if the run has fewer."""
    compare: str | None = None
    """Folder of another run over the same images and classes, best of `predict`: where both differ,
    one is wrong. None: no comparison."""
    corrected: tuple[str, ...] = ()
    """Folders of earlier `review import` runs: their images are not picked again, and what is like
    them counts less."""
    format: Literal["labelstudio", "voc", "coco"] = "labelstudio"
    """What to write for the tool that the labels are corrected in."""
    images: Literal["copy", "link", "none"] | None = None
    """What becomes of the images: copy puts them beside the labels, link puts links, none leaves
    them where they are. None: copy, but none with image_prefix."""
    image_prefix: str | None = None
    """For labelstudio: what stands before an image's path in the tasks, such as
    s3://bucket/photos/. None: /data/local-files/?d=, Label Studio's address of local files."""
    weights: ReviewWeights = field(default_factory=ReviewWeights)
    json: bool = False
    """A JSON object on stdout instead of lines."""


@dataclass(frozen=True, kw_only=True)
class ReviewImportConfig(Section):
    """Take corrected masks back as labels that `train --labeled` takes. The same command again
    replaces them, other masks are added."""

    masks: str
    """Label Studio's JSON export, a VOC folder, a folder of PNGs, a COCO json."""
    run: str
    """Folder of the run whose labels were corrected."""
    out: str
    """Folder for the corrected labels, made if missing; one of an earlier import is added to."""
    unchanged: Literal["keep", "skip"] = "keep"
    """Masks that are as the run labelled them: keep (a person found them right), skip."""
    merged: str | None = None
    """Folder to write all labels of the run to, the corrected ones in place of its own, for
    `evaluate`, `export`, `report` and `train --zeroshot`. None: none is written."""
    json: bool = False
    """A JSON object on stdout instead of lines."""
