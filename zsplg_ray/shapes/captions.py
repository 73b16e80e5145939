"""What can be said about a region of a scene: the language that the tiny CLIP learns.

Enters: a random generator, and the colours and background words that a batch shows. Leaves: a bank
of captions, each with what must hold for it to be true. No torch here, and no images: only words.

Why a bank with truth conditions instead of one caption an image: "a circle" is true of every circle
in a batch, so a loss that takes all but one of them for wrong (plain CLIP) mostly learns from false
negatives. Here a caption is positive for every region it is true of.

Words that no caption uses still must be answered: a few captions name things that are in no scene.
Their tokens share one row of the token table, so that row comes to mean "something else", and every
unknown word is read as it.
"""

from dataclasses import dataclass

import numpy as np

from zsplg_ray.shapes.scenes import BACKGROUNDS, CLASSES, COLOURS

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid", "wedge"),
    "star": ("pentagram",),
    "ring": ("hoop", "donut", "annulus"),
    "cross": ("plus", "plus sign"),
    "heart": ("love heart", "valentine"),
    "crescent": ("moon", "crescent moon"),
}
"""Class name -> other names that captions use for it."""

TEMPLATES = (
    "a photo of a {}",
    "a photo of a {}.",
    "a photo of the {}",
    "a photo of one {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a bad photo of a {}",
    "a good photo of a {}",
    "a close-up photo of a {}",
    "a cropped photo of a {}",
    "a blurry photo of a {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a photo of my {}",
    "there is a {} in the scene",
    "itap of a {}",
    "a {}",
    "the {}",
    "{}",
    "{}s",
    "a photo of many {}s",
)
"""Sentences around a name; OpenAI's usual CLIP templates are among them."""

BACKGROUND_NAMES = (
    "background",
    "empty background",
    "plain background",
    "backdrop",
    "surface",
    "texture",
    "wall",
    "ground",
    "nothing",
)
"""Names for what is no object, true of any background."""

UNKNOWN_WORDS = (
    "car",
    "dog",
    "person",
    "bicycle",
    "potted plant",
    "dining table",
    "tv monitor",
    "giraffe",
    "building",
    "skateboard",
    "hair drier",
    "aeroplane",
)
"""Things that no scene shows; which ones does not matter: they all share one token row."""


@dataclass(frozen=True)
class Caption:
    """A sentence and its truth condition.

    `class_index` is 1..8, 0 for background, -1 for what is in no scene. `detail` narrows it to a
    colour word of an object or the word of a background; None is true of all of the class.
    """

    text: str
    class_index: int
    detail: str | None = None

    def is_true(self, class_index: int, detail: str) -> bool:
        """Whether it holds for a region of this class (0 background), colour or background word."""
        return self.class_index == class_index and self.detail in (None, detail)


def names(class_name: str) -> tuple[str, ...]:
    """The class name followed by its synonyms."""
    return (class_name, *SYNONYMS[class_name])


def all_texts() -> list[str]:
    """Sentences that together use every word of the captions, `UNKNOWN_WORDS` left out."""
    texts = [name for class_name in CLASSES for name in names(class_name)]
    texts += [f"{name}s" for name in texts]
    texts += [template.format("circle") for template in TEMPLATES]
    texts += [f"{colour} circle" for colour in COLOURS] + list(BACKGROUND_NAMES)
    return texts + [_background_phrase(word) for word in BACKGROUNDS]


def sample_bank(rng: np.random.Generator, details: list[tuple[int, str]]) -> list[Caption]:
    """Draw the captions of one training step.

    Args:
        rng: Random generator; it alone decides.
        details: (class_index, colour or background word) of regions in the batch: a caption with a
            detail takes its detail from here mostly, else at random, so that both true and false
            ones occur.

    Returns:
        For every class its plain name, a name or synonym, and one with a colour; background
        captions; two of things that no scene shows.
    """
    bank = []
    seen: dict[int, list[str]] = {}
    for class_index, detail in details:
        seen.setdefault(class_index, []).append(detail)
    for class_index, class_name in enumerate(CLASSES, start=1):
        bank.append(Caption(_fill(rng, class_name), class_index))
        bank.append(Caption(_fill(rng, str(rng.choice(names(class_name)))), class_index))
        colour = _pick(rng, seen.get(class_index, []), tuple(COLOURS))
        bank.append(Caption(_fill(rng, f"{colour} {class_name}"), class_index, colour))
    bank += [
        Caption(_fill(rng, str(name)), 0) for name in rng.choice(BACKGROUND_NAMES, 3, replace=False)
    ]
    for word in sorted(set(seen.get(0, []))):
        bank.append(Caption(_fill(rng, _background_phrase(word)), 0, word))
    bank += [
        Caption(_fill(rng, str(word)), -1) for word in rng.choice(UNKNOWN_WORDS, 2, replace=False)
    ]
    return bank


def _background_phrase(word: str) -> str:
    return f"{word} background"


def _fill(rng: np.random.Generator, name: str) -> str:
    """Often the usual "a photo of a ...", else any template."""
    return TEMPLATES[0 if rng.random() < 0.4 else rng.integers(len(TEMPLATES))].format(name)


def _pick(rng: np.random.Generator, seen: list[str], every: tuple[str, ...]) -> str:
    return str(rng.choice(seen if seen and rng.random() < 0.7 else every))
