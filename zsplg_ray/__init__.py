"""zsplg_ray: unlabelled images and class names in, a semantic segmentation model out, on Ray.

Importing this package imports nothing heavy; every room is imported where it is used.
"""

__version__ = "0.1.0"
