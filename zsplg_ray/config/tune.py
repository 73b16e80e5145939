"""Settings of searches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from zsplg_ray.config.shared import MlflowConfig, RayConfig
from zsplg_ray.config.train import TrainConfig
from zsplg_ray.settings import Range, Section, complain


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Section):
    """How settings are searched for."""

    PREFIX: ClassVar[str] = "search."

    method: Annotated[Literal["tpe", "random", "grid"], arg(aliases=["--search"])] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator, which learns from trials before;
    random: drawn anew each time; grid: all combinations of as many levels as fit into `trials`."""
    over: tuple[str, ...] | None = None
    """Names of the settings to search over, such as compose.min_similarity. None: all that the verb
    knows how to search. The others stay as they are."""
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Seed of the search and of folds, [0, 2.14748e+09]."""
    concurrent: Annotated[int | None, Range(1, 4096)] = None
    """Trials at the same time, [1, 4096]. None: as many as the cluster has room for."""


TemplateSet = Literal["run", "photo", "seven", "scene"]


@dataclass(frozen=True, kw_only=True)
class TuneLabelsConfig(Section):
    """A run's segments and a few masks in, the compose settings that name them best out: no SAM, no
    GPU. Writes tuned.yaml into the run's folder, for `relabel --config` and `label --config`."""

    run: tuple[str, ...]
    """Folder of a `zsplg label` run. Several, over the same images (with another embedder, say),
    are tuned each and compared."""
    truth: str
    """Masks of the images that are labelled by hand: a folder of PNGs, VOC root, split file, COCO
    json. Never those of the test set."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    trials: Annotated[int, Range(1, 1_000_000)] = 500
    """Settings tried in a search, [1, 1e+06]."""
    folds: Annotated[int | None, Range(1, 100)] = None
    """Parts that the labelled images are cut into; each is held out once, [1, 100]. 1: a share of
    `holdout` is held out, once. None: 5 with under 100 images, else 1."""
    holdout: Annotated[float, Range(0.05, 0.9)] = 0.3
    """With one fold: share of the labelled images that the result is judged on, [0.05, 0.9]."""
    per_class: bool = True
    """After the search, look for a threshold of its own for each class; kept only if it wins on
    held-out images."""
    templates: tuple[TemplateSet, ...] = ("run",)
    """Sets of prompt templates to choose among: run (as the labels were made), photo (the paper's),
    seven (seven of CLIP's own), scene (sentences about scenes)."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """What each run's tune.json holds on stdout instead of a summary."""
    search: SearchConfig = field(default_factory=SearchConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def extra_checks(self) -> None:
        """There is a run, each once, and a set of templates."""
        for name, values in (("run", self.run), ("templates", self.templates)):
            if not values or len(set(values)) < len(values):
                fix = "name each once"
                raise ValueError(complain(name, "given, each once", " ".join(values), fix))


@dataclass(frozen=True, kw_only=True)
class AshaConfig(Section):
    """ASHA: trials that are behind others after as many epochs are stopped early."""

    PREFIX: ClassVar[str] = "asha."

    off: bool = False
    """All trials run to their end."""
    grace_epochs: Annotated[int | None, Range(1, 1_000_000)] = None
    """Epochs that every trial may run, [1, 1e+06]. None: a ninth of train.epochs, at least 1."""
    reduction: Annotated[int, Range(2, 100)] = 3
    """Of so many trials one goes on at each step, [2, 100]."""


@dataclass(frozen=True, kw_only=True)
class TuneTrainConfig(TrainConfig):
    """Training settings tried out by Ray Tune, each trial a `zsplg train` of its own. What is
    searched: unimatch.conf_thresh, fusion.rule, min_score, warmup and mix_end, optim.lr. Writes
    tuned.yaml, for `train --config`, and the best trial's best.pt."""

    out: str
    """The study's folder (made if missing), a path or URI; trials are in its trials/."""
    trials: Annotated[int, Range(1, 100_000)] = 20
    """Trials, [1, 100000]."""
    resume: bool = False
    """Go on with the study in `out`: finished trials stay, interrupted ones go on from their last
    checkpoint, failed ones are tried again."""
    search: SearchConfig = field(default_factory=SearchConfig)
    asha: AshaConfig = field(default_factory=AshaConfig)
