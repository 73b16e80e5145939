"""What turns stored segments into labels, without SAM, CLIP and torch.

What enters: segments with embeddings. What leaves: their label map. A `Naming` travels to every
worker that labels or relabels, and whoever only relabels should not have to load the models for it:
that takes seconds in each process.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from zsplg_ray.config import ComposeConfig, LabelConfig
from zsplg_ray.label.compose import Composed, compose
from zsplg_ray.label.presets import unknown_names
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)


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


def prepare(resolved: LabelConfig, classes: ClassList) -> tuple[Naming, dict[str, str]]:
    """Class texts, and SHA-256 of the weights: what is to be known of SAM and CLIP before the work.

    Raises: ValueError if weights cannot be had or a setting does not fit them.
    """
    from zsplg_ray.label.clip import ClipEncoder
    from zsplg_ray.label.weights import check_sam, load_clip, sam_sha256, state_sha256

    check_sam(resolved.sam)
    if unknown := unknown_names(resolved.clip.model, classes):
        log.warning("the tiny CLIP knows only shapes, it cannot tell %s", ", ".join(unknown))
    model, tokenizer = load_clip(resolved.clip)
    encoder = ClipEncoder(model, tokenizer, resolved.clip)
    bank = encoder.encode_classes(classes, resolved.prompts)
    naming = Naming(classes, bank, resolved.compose)
    return naming, {"sam": sam_sha256(resolved.sam), "clip": state_sha256(model)}
