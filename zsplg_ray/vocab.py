"""Class lists: which classes there are, the words that CLIP is asked for, the colours they get.

Enters: a SPEC as a user writes it (`voc`, `ade20k`, a text file, `cat,dog`). Leaves: a `ClassList`,
which travels as plain JSON inside every artefact, and the colour map of palette PNGs.

Why this way: a data set's own names (`tvmonitor`, `diningtable`) are not the words that CLIP has
read, so each class carries aliases besides its name; a class is as similar as its best alias.
Index 0 is "background" in every list, also for data sets that have no such class (Cityscapes,
ADE20K): a pixel that no class claims has to go somewhere, and the numbering must not depend on the
data set.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain

BACKGROUND = "background"
"""The name of class 0."""

MAX_NAME_CHARS = 100
_MAX_FILE_BYTES = 2**20

# `name: alias, alias; name; ...` without the background.
_LISTS = {
    "voc": """aeroplane: airplane, plane; bicycle: bike; bird; boat; bottle; bus; car; cat; chair;
        cow; diningtable: dining table; dog; horse; motorbike: motorcycle; person: people;
        pottedplant: potted plant, houseplant; sheep; sofa: couch; train;
        tvmonitor: tv monitor, television, computer monitor""",
    "coco": """person: people; bicycle: bike; car; motorcycle: motorbike;
        airplane: aeroplane, plane; bus; train; truck; boat; traffic light; fire hydrant;
        stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra;
        giraffe; backpack; umbrella; handbag: purse; tie: necktie; suitcase; frisbee;
        skis: pair of skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard;
        surfboard; tennis racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple;
        sandwich; orange: orange fruit; broccoli; carrot; hot dog; pizza; donut: doughnut; cake;
        chair; couch: sofa; potted plant: houseplant; bed; dining table; toilet; tv: television;
        laptop; mouse: computer mouse; remote: remote control; keyboard: computer keyboard;
        cell phone: mobile phone; microwave: microwave oven; oven; toaster; sink;
        refrigerator: fridge; book; clock; vase; scissors: pair of scissors; teddy bear;
        hair drier: hair dryer; toothbrush""",
    "cityscapes": """road: street; sidewalk: pavement; building; wall; fence; pole; traffic light;
        traffic sign: road sign; vegetation: tree, bush; terrain: grass, soil; sky;
        person: pedestrian; rider: cyclist, motorcyclist; car; truck; bus; train: tram;
        motorcycle: motorbike; bicycle: bike""",
    "ade20k": """wall; building: edifice; sky; floor: flooring; tree; ceiling; road: route; bed;
        windowpane: window; grass; cabinet; sidewalk: pavement; person: people; earth: ground; door;
        table; mountain; plant; curtain: drape; chair; car: automobile; water; painting: picture;
        sofa: couch; shelf; house; sea: ocean; mirror; rug: carpet; field; armchair; seat; fence;
        desk; rock: stone; wardrobe: closet; lamp; bathtub: bath; railing: rail; cushion;
        base: pedestal; box; column: pillar; signboard: sign; chest of drawers: dresser; counter;
        sand; sink; skyscraper; fireplace: hearth; refrigerator: fridge; grandstand; path;
        stairs: steps; runway; case: display case, showcase; pool table: billiard table; pillow;
        screen door; stairway: staircase; river; bridge; bookcase; blind: window blind;
        coffee table; toilet; flower; book; hill; bench; countertop; stove: kitchen stove;
        palm: palm tree; kitchen island; computer; swivel chair; boat; bar; arcade machine;
        hovel: hut; bus; towel; light: light source; truck: lorry; tower; chandelier;
        awning: sunshade; streetlight: street lamp; booth: kiosk; television receiver: television;
        airplane: aeroplane, plane; dirt track; apparel: clothes; pole; land: soil;
        bannister: handrail; escalator: moving staircase; ottoman: pouf; bottle; buffet: sideboard;
        poster; stage; van; ship; fountain; conveyer belt: conveyor belt; canopy;
        washer: washing machine; plaything: toy; swimming pool; stool; barrel; basket;
        waterfall; tent; bag; minibike: motorbike; cradle; oven; ball; food; step: stair;
        tank: storage tank; trade name: brand name; microwave: microwave oven; pot; animal;
        bicycle: bike; lake; dishwasher; screen: projection screen; blanket; sculpture;
        hood: exhaust hood; sconce; vase; traffic light; tray; ashcan: trash can; fan; pier: wharf;
        crt screen; plate; monitor; bulletin board: notice board; shower; radiator;
        glass: drinking glass; clock; flag""",
    "shapes": """circle: disc; square; triangle; star; ring; cross: plus sign; heart;
        crescent: crescent moon""",
}

SPECS = tuple(_LISTS)
"""The class lists that have a name of their own."""

_FILE_SUFFIXES = {".txt", ".names", ".csv", ".json", ".yaml", ".yml"}


@dataclass(frozen=True)
class ClassList:
    """Class names in index order, and the words that stand for each.

    `names[0]` is "background". `aliases[k]` starts with `names[k]`; `aliases[0]` is empty. No
    word stands for two classes, regardless of case and of how its characters are encoded.

    Raises:
        ValueError: a name or alias is empty, too long, not printable or given to two classes, or
            there are no classes or more than the 254 that 8-bit label maps can hold.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.names or self.names[0] != BACKGROUND:
            raise _error(f"led by {BACKGROUND!r}", self.names[:1], "put it at index 0")
        if len(self.names) == 1:
            raise _error("at least one class besides background", self.names, "name a class")
        if len(self.names) > IGNORE:
            fix = f"label maps have 8 bits and {IGNORE} means ignore; merge classes"
            raise _error(f"at most {IGNORE - 1}", f"{len(self.names) - 1} classes", fix)
        if len(self.aliases) != len(self.names) or self.aliases[0]:
            raise _error(
                "one tuple of aliases a class, empty for background", self.aliases, "align"
            )
        owner: dict[str, int] = {}
        for k, (name, aliases) in enumerate(zip(self.names, self.aliases, strict=True)):
            for word in (name, *aliases):
                _check_word(word)
                other = owner.setdefault(_folded(word), k)
                if other != k:
                    fix = f"classes {other} and {k} both have it: take one of them out"
                    raise _error("unique names and aliases", word, fix)
            if k and aliases[:1] != (name,):
                raise _error("aliases that start with the name", (name, aliases), "put it first")

    @classmethod
    def of(
        cls, names: Iterable[str], aliases: Mapping[str, Sequence[str]] | None = None
    ) -> ClassList:
        """A list from the names without background, and further words by name."""
        names = tuple(names)
        more = aliases or {}
        words = (tuple(dict.fromkeys((name, *more.get(name, ())))) for name in names)
        return cls((BACKGROUND, *names), ((), *words))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassList:
        """The inverse of `to_dict`; checks again, for the data may come from a file."""
        fix = "it has to hold names and aliases"
        try:
            names, aliases = tuple(data["names"]), tuple(tuple(words) for words in data["aliases"])
        except (KeyError, TypeError) as error:
            raise _error("a class list as to_dict writes it", data, fix) from error
        if not all(isinstance(word, str) for words in (names, *aliases) for word in words):
            raise _error("a class list as to_dict writes it", data, fix)
        return cls(names, aliases)

    def to_dict(self) -> dict[str, Any]:
        """Lists of strings only, so it survives JSON and YAML."""
        return {"names": list(self.names), "aliases": [list(words) for words in self.aliases]}

    def __len__(self) -> int:
        """The number of classes K, background included."""
        return len(self.names)

    def index(self, name: str) -> int:
        """The index of a class, by its name or an alias, regardless of case.

        Raises:
            ValueError: no class has this name.
        """
        wanted = _folded(name)
        for k, words in enumerate(((BACKGROUND,), *self.aliases[1:])):
            if any(_folded(word) == wanted for word in words):
                return k
        near = difflib.get_close_matches(name, self.names, n=1, cutoff=0)
        raise _error("a name in the class list", name, f"the nearest is {near[0]!r}")


def class_list(spec: str) -> ClassList:
    """The class list that a SPEC names.

    Args:
        spec: one of `SPECS`; the path of a text file with `name: alias, alias` a line (# starts a
            comment, a leading background line is optional); or names with commas between them. A
            name that could be a slip (`vox`) is taken literally behind an explicit background:
            `background,vox`.

    Raises:
        ValueError: the spec is none of these, or the names break `ClassList`'s rules.
    """
    known = spec.strip().lower()
    if known in _LISTS:
        entries = [entry.strip() for entry in _LISTS[known].replace("\n", " ").split(";")]
        return _parse([(entry, "") for entry in entries])
    path = Path(spec)
    if _is_file(path):
        return _read(path)
    if "," not in spec:
        _refuse_slip(spec, path)
    if ":" in spec:
        raise _error(
            "names without a colon", spec, "write aliases in a text file, one class a line"
        )
    return _parse([(name, "") for name in spec.split(",")])


def palette() -> list[int]:
    """The Pascal VOC colour map: 768 integers in [0, 255], R G B of index 0 to 255.

    Bits 0, 1 and 2 of the index go to the top bit of red, green and blue, bits 3, 4 and 5 to the
    next lower bit, and so on: neighbouring indices get colours that are far apart.

    Source: the colour map of the Pascal VOC development kit (its VOClabelcolormap function).
    """
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for index in range(256)
        for channel in range(3)
    ]


def _parse(entries: Iterable[tuple[str, str]]) -> ClassList:
    """A class list from pairs: `name: alias, alias`, and where that stood (for errors)."""
    names, aliases = [], {}
    for position, (entry, where) in enumerate(entries):
        name, colon, rest = (part.strip(" \t") for part in entry.partition(":"))
        if name.casefold() == BACKGROUND:
            if position or rest:
                fix = f"{where}it is index 0: name it first, without aliases, or not at all"
                raise _error("background first", entry, fix)
            continue
        if not name:
            raise _error("names that are not empty", entry, f"{where}give each class a name")
        names.append(name)
        aliases[name] = [word.strip(" \t") for word in rest.split(",")] if colon and rest else []
    return ClassList.of(names, aliases)


def _read(path: Path) -> ClassList:
    """The class list of a text file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            size = f"{path} (larger than {_MAX_FILE_BYTES // 2**10} KiB)"
            raise _error("a text file of class names", size, "check the path")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
    except UnicodeDecodeError as error:
        raise _error("a UTF-8 text file", path, "save it as UTF-8") from error
    except OSError as error:
        raise _error("a readable file", path, error.strerror or "check it") from error
    entries = (line.partition("#")[0].strip() for line in lines)
    places = (f"{path}, line {number}: " for number in range(1, len(lines) + 1))
    return _parse([pair for pair in zip(entries, places, strict=True) if pair[0]])


def _refuse_slip(spec: str, path: Path) -> None:
    """A single word is a one-class list, unless a file or one of `SPECS` was probably meant.

    Raises:
        ValueError: with the nearest name in it.
    """
    if path.suffix.lower() in _FILE_SUFFIXES or "/" in spec:
        there = sorted(p.name for p in path.parent.iterdir()) if _is_dir(path.parent) else []
        near = difflib.get_close_matches(path.name, there, n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise _error(f"{', '.join(SPECS)}, a file that exists or names", spec, fix)
    near = [s for s in SPECS if _alike(s, spec.strip().lower()) >= (0.66 if len(s) < 5 else 0.8)]
    if near:
        best = max(near, key=lambda s: _alike(s, spec.strip().lower()))
        fix = f"did you mean {best}? Write {BACKGROUND},{spec} if the class is really called that"
        raise _error(f"{', '.join(SPECS)}, a file or names", spec, fix)


def _alike(a: str, b: str) -> float:
    """How alike two words are, in [0, 1]."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def _check_word(word: str) -> None:
    """Raises a ValueError if a name or alias cannot be one."""
    if not word or word != word.strip():
        raise _error("names without blanks around, not empty", repr(word), "write a word there")
    if len(word) > MAX_NAME_CHARS:
        raise _error(
            f"names of at most {MAX_NAME_CHARS} characters", word[:40] + "...", "shorten it"
        )
    if not word.isprintable():
        raise _error("names of printable characters", repr(word), "take out what cannot be seen")


def _folded(word: str) -> str:
    """What is the same for words that look the same but for their case."""
    return unicodedata.normalize("NFKC", word).casefold()


def _is_file(path: Path) -> bool:
    """`Path.is_file`, False also for what cannot be a path at all (too long, a NUL in it)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_dir(path: Path) -> bool:
    """`Path.is_dir`, False also for what cannot be a path at all."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _error(rule: str, value: object, fix: str) -> ValueError:
    """What every refusal here looks like."""
    return ValueError(complain("classes", rule, str(value), fix))
