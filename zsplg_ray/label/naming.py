"""What turns stored segments into labels, without SAM, CLIP and torch.

What enters: segments with embeddings. What leaves: their label map. It travels to every worker that
labels or relabels, and whoever only relabels should not have to load the models for it: that takes
seconds in each process.
"""

from __future__ import annotations

from dataclasses import dataclass

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.compose import Composed, compose
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.vocab import ClassList


@dataclass(frozen=True)
class Naming:
    """Everything that turns stored segments into labels: class texts and thresholds. No torch."""

    classes: ClassList
    bank: TextBank
    config: ComposeConfig

    def compose(self, segments: Segments) -> Composed:
        """Label map and score map of one image from its stored (float16) embeddings."""
        assert segments.embedding_RD is not None, "embedded before they are named"
        sim_RK = self.bank.similarity(segments.embedding_RD)
        return compose(segments, sim_RK, self.config, self.classes)
