"""Settings of what stands beside the work: scenes, the demo, doctor, submit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from zsplg_ray.config.label import ClipConfig, SamConfig
from zsplg_ray.config.shared import MlflowConfig, RayConfig
from zsplg_ray.settings import Range, Section


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(Section):
    """Scenes of the embedded world in VOC layout: JPEGImages/, SegmentationClass/."""

    out: str
    """Folder to write to, made if missing; scenes of the same seeds are written over."""
    n: Annotated[int, Range(1, 1_000_000)] = 100
    """Scenes, [1, 1e+06]."""
    seed: Annotated[int, Range(0, 999_000_000)] = 0
    """Seed of the first scene, [0, 9.99e+08]; the next ones follow. All are held out."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Section):
    """The whole pipeline on scenes of the embedded world: make scenes, label, train, evaluate."""

    out: str = "zsplg_demo"
    """Folder to write to. The same command again does only what is missing."""
    n: Annotated[int, Range(2, 10_000)] = 100
    """Scenes, [2, 10000]."""
    embedder: Literal["gem", "crop", "both"] = "both"
    """Which way of naming segments to show."""
    epochs: Annotated[int, Range(0, 10_000)] = 45
    """Epochs for which each of two students is trained, [0, 10000]; 0: none."""
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Section):
    """What this machine can do, and what to mend: a line each for packages, GPUs, weights, Ray,
    storage, MLflow and more. Nothing is downloaded or left behind. Exit 1 if something that `label`
    needs is missing."""

    sam: SamConfig = field(default_factory=SamConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    address: str | None = None
    """The dashboard that `submit` would use, such as http://head:8265. None:
    RAY_API_SERVER_ADDRESS if it is set, else http://127.0.0.1:8265."""
    out: str = "."
    """Folder or URI whose storage is tried."""
    json: bool = False
    """A JSON list on stdout instead of lines."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Section):
    """Any verb as a job on a Ray cluster: `zsplg submit --address URL [--wait] -- VERB ...`. The
    verb's settings are checked here first; the cluster runs the code that is installed here."""

    address: str | None = None
    """The cluster's dashboard, such as http://head:8265. None: RAY_API_SERVER_ADDRESS if it is set,
    else http://127.0.0.1:8265."""
    wait: bool = False
    """Follow the job's log until it ends and exit with its code; Ctrl-C asks whether to stop it."""
    working_dir: str | None = "."
    """Folder that the job gets a copy of and runs in: config files, class lists, split files.
    Hidden files, virtual environments, run folders, weights and images stay here. None (`None`
    on the command line): no folder."""
    exclude: tuple[str, ...] = ()
    """Further files of the working directory that stay here, patterns as in .gitignore."""
    max_working_dir_mib: Annotated[float, Range(0.1, 100)] = 50.0
    """Most that the copy may hold, MiB in [0.1, 100]; a cluster takes 100 at most, packed."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, such as MLFLOW_TRACKING_URI or AWS_REGION."""
    job_id: str | None = None
    """The job's name on the cluster, unique there. None: the verb, the time and some letters."""
    json: bool = False
    """A JSON object on stdout instead of lines."""
