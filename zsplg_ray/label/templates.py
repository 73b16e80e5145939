"""Sets of prompt templates that are known by a name, to be compared on labelled images.

What enters: the name of a set, and the templates that the labels were made with. What leaves:
sentences for `prompts.templates`. Text embeddings cost nothing beside segments, so other sentences
need no SAM and no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

PHOTO = ("a photo of a {class}",)
"""The paper's prompt, one sentence."""

SEVEN = (
    "itap of a {class}.",
    "a bad photo of the {class}.",
    "a origami {class}.",
    "a photo of the large {class}.",
    "a {class} in a video game.",
    "art of the {class}.",
    "a photo of the small {class}.",
)
"""The seven that did best together on ImageNet.

Source: openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb (MIT)."""

SCENE = (
    "There is a {class} in the scene.",
    "There is the {class} in the scene.",
    "a photo of a {class} in the scene.",
    "a photo of the {class} in the scene.",
    "a photo of one {class} in the scene.",
)
"""A thing among others, as segments are, instead of a photograph of it alone.

Source: the last five of ViLD's templates, tensorflow/tpu, models/official/detection/projects/vild
(Apache-2.0)."""

_NAMED = {"photo": PHOTO, "seven": SEVEN, "scene": SCENE}


def template_set(name: str, of_the_run: Sequence[str]) -> tuple[str, ...]:
    """The sentences of a set.

    Args:
        name: One of `config.TemplateSet`; `run` stands for `of_the_run`.
        of_the_run: The templates that the labels were made with.
    """
    return tuple(of_the_run) if name == "run" else _NAMED[name]
