"""Labels in the formats of other tools: a file a format, a registry, a driver."""

from zsplg_ray.views.export.driver import export, write_export
from zsplg_ray.views.export.formats import FORMATS

__all__ = ["FORMATS", "export", "write_export"]
