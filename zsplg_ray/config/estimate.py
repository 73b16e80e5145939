"""Settings of looking ahead: what a run of `label` will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zsplg_ray.config.label import LabellingConfig
from zsplg_ray.settings import Range


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(LabellingConfig):
    """What `label` will take with the same settings: hours, storage, money. It labels a sample of
    the images on this machine (with --ray.address, on a node of the cluster) and writes nothing.
    Settings of what is written or tracked go into the command that it shows."""

    out: str | None = None
    """The run's folder: images that are done there do not count. None: not chosen yet."""
    sample: Annotated[int, Range(1, 10_000)] = 20
    """Images to label, spread evenly over the source, [1, 10000]."""
    price: Annotated[float | None, Range(0, 1e6)] = None
    """Dollars an hour of a GPU, or of a CPU where there is no GPU, [0, 1e+06]. None: not told."""
    gpus: Annotated[int | None, Range(1, 100_000)] = None
    """GPUs that it will run on, each like the one here, [1, 100000]. None: those of this machine,
    or of the cluster."""
    json: bool = False
    """A JSON object on stdout instead of lines."""
