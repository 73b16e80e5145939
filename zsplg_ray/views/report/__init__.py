"""One HTML page about a run, whole in itself, for people to look at."""

from zsplg_ray.views.report.build import report

__all__ = ["report"]
