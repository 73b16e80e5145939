"""A run's labels as a torch data set: what `torch.utils.data.DataLoader` takes.

What enters: `Labels`. What leaves: tensors of one image at a time, read and decoded when asked for,
in whichever process asks.

Shapes: C = 3 channels (RGB), H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from zsplg_ray.labels import Labels

Item = dict[str, Any]
"""`image` uint8 [C, H, W], `label` int64 [H, W] with 255 = ignore, `score` float32 [H, W]
in [0, 1], `image_id`."""


class LabelDataset(Dataset[Item]):
    """The images and labels of a run, in the order of their ids.

    Args:
        labels: The run's labels.
        transform: What each item is sent through, such as cropping to one size; picklable where
            the loader has workers.
    """

    def __init__(self, labels: Labels, transform: Callable[[Item], Any] | None = None) -> None:
        self.labels, self.transform = labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        """An `Item`, or what the transform makes of it.

        Raises: OSError if the image is not there any more; ValueError if it is broken or of another
            size than its label.
        """
        row = self.labels[index]
        item: Item = {
            "image_id": row.image_id,
            "image": torch.from_numpy(row.image_HWC).permute(2, 0, 1),
            "label": torch.from_numpy(row.label_HW).long(),
            "score": torch.from_numpy(row.score_HW),
        }
        return self.transform(item) if self.transform else item
