"""What several verbs share: actors, the Ray cluster, MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from tyro.conf import arg

from zsplg_ray.settings import Range, Section, complain


@dataclass(frozen=True, kw_only=True)
class ActorsConfig(Section):
    """How the work is spread. An actor is one process that holds SAM and CLIP."""

    PREFIX: ClassVar[str] = "actors."

    min: Annotated[int, Range(1, 100_000)] = 1
    """Actors that are always up, [1, 100000]."""
    max: Annotated[int | None, Range(1, 100_000)] = None
    """Most actors, [1, 100000]. None: one for each GPU that the cluster has or, where that can be
    learnt, may come to have, at least min."""
    gpus: Annotated[float | None, Range(0, 64)] = None
    """GPUs an actor takes, [0, 64]; 0.5 puts two on one. None: 1 where there are GPUs, else 0."""
    cpus: Annotated[float | None, Range(0, 1024)] = None
    """CPUs an actor takes, [0, 1024]. None: 0 with a GPU; without one, all but one, shared."""
    decode_cpus: Annotated[float, Range(0.01, 64)] = 1.0
    """CPUs that one image-reading task takes, [0.01, 64]."""
    in_flight: Annotated[int, Range(1, 64)] = 16
    """Images an actor takes and writes at a time, [1, 64]: what a crash makes it do again."""
    flush_s: Annotated[float, Range(0)] = 60.0
    """Seconds after which finished images are written even if fewer, >= 0."""
    resources: Annotated[dict[str, float], Range(1e-4, 1e6)] = field(default_factory=dict)
    """Custom resources of the nodes that an actor may stand on, amount by name (`label_node
    0.001`), each in [0.0001, 1e+06]; this is how `cluster.yaml` sends it to its own nodes."""

    def extra_checks(self) -> None:
        """At least as many actors may run as must run, on whole GPUs or parts of one."""
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            rule = "a whole number where it is over 1"
            raise ValueError(complain("actors.gpus", rule, self.gpus, "give an actor whole GPUs"))
        if self.max is not None and self.max < self.min:
            raise ValueError(
                complain(
                    "actors.max",
                    f">= actors.min ({self.min})",
                    self.max,
                    "raise it or lower min",
                )
            )


@dataclass(frozen=True, kw_only=True)
class RayConfig(Section):
    """The Ray cluster."""

    PREFIX: ClassVar[str] = "ray."

    address: str | None = None
    """Cluster to use, such as `auto`. None: RAY_ADDRESS if it is set, else Ray starts here."""
    num_cpus: Annotated[int | None, Range(1, 4096)] = None
    """CPUs that a Ray started here offers, [1, 4096]. None: those of this machine."""
    object_store_gib: Annotated[float | None, Range(0.08, 4096)] = None
    """Shared memory of a Ray started here, GiB in [0.08, 4096]. None: Ray's choice."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig(Section):
    """Where runs are tracked. MLflow that is down or slow never stops or fails a run."""

    PREFIX: ClassVar[str] = "mlflow."

    uri: str | None = None
    """MLflow server or store. None: MLFLOW_TRACKING_URI if it is set, else `mlflow.db` in the run's
    folder. `off`: no tracking."""
    experiment: str = "zsplg_ray"
    """Name of the experiment: one for each project, so that its runs stand together."""
    run_name: str | None = None
    """Name of the run. None: the name of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class ModelMlflowConfig(MlflowConfig):
    """Where runs that make a model are tracked, and what becomes of the model."""

    log_model: bool = True
    """Put the best model into the run as a pyfunc that `mlflow models serve` can serve."""
    register: Annotated[str | None, arg(aliases=["--register"])] = None
    """Register the best model under this name, as a new version. None: do not."""
    alias: str = "champion"
    """Alias that the registered version gets, so that `models:/NAME@champion` is the newest."""

    def extra_checks(self) -> None:
        """What is registered is a model that is logged, under a name that MLflow takes."""
        if self.register is None:
            return
        if not self.log_model:
            fix = "leave out --mlflow.no-log-model"
            raise ValueError(complain("mlflow.log_model", "on with register", "off", fix))
        if not self.register.strip() or set("/:@") & set(self.register):
            fix = "choose another name"
            raise ValueError(
                complain("mlflow.register", "a name without / : @", self.register, fix)
            )
