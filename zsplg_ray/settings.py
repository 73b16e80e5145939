"""How settings work: checks, names, YAML, overrides, fingerprints. The settings are in config/.

What enters: dataclasses derived from `Section`, mappings of plain values. What leaves: checked
objects, or a ValueError of one line that names the setting, its rule, the value and the fix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from tyro.conf import Positional
from yaml import YAMLError

from zsplg_ray.safe_text import masked, one_line, shortened
from zsplg_ray.safe_yaml import MAX_BYTES, load_yaml

S = TypeVar("S", bound="Section")


class WorkError(RuntimeError):
    """The input was good but the work failed; the command line exits with 1 and this message,
    which is one line without credentials."""

    def __str__(self) -> str:
        return one_line(masked(super().__str__()))


def complain(name: str, rule: str, value: object, fix: str) -> str:
    """The project's one form of an error: `NAME must be RULE, got VALUE; FIX`.

    One line of bounded length, without credentials, whatever the value is.
    """
    try:
        shown = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a bottomless list
        shown = f"a {type(value).__name__} too large to be shown"
    rule, shown, fix = map(shortened, (rule, shown or repr(""), fix))
    return one_line(masked(f"{name} must be {rule}, got {shown}; {fix}"))


@dataclass(frozen=True)
class Range:
    """Closed interval that a number (or each number of a mapping) must lie in."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]" if self.high < math.inf else f">= {self.low:g}"

    def holds(self, value: object) -> bool:
        """Whether every number in `value` lies in the interval; NaN and infinity never do."""
        if isinstance(value, Mapping):
            return all(self.holds(v) for v in value.values())
        return value is None or (
            isinstance(value, int | float)
            and (isinstance(value, int) or math.isfinite(value))  # an int may exceed any float
            and self.low <= value <= self.high
        )


class Section:
    """Base of all settings: types, choices and ranges are checked when an object is made."""

    PREFIX: ClassVar[str] = ""
    """What stands before a field's name in flags and errors: "compose." for the compose section."""

    def __post_init__(self) -> None:
        for name, hint in setting_types(type(self)).items():
            if not is_section(hint):
                _check_field(f"{self.PREFIX}{name}", hint, getattr(self, name))
        self.extra_checks()

    def extra_checks(self) -> None:
        """Rules that tie several fields together; overridden where there are any."""


def is_section(hint: Any) -> bool:
    """Whether an annotation is a section of settings rather than one setting."""
    return isinstance(hint, type) and issubclass(hint, Section)


def setting_types(cls: type) -> dict[str, Any]:
    """Field name -> its annotation, `Annotated` metadata kept, class variables left out."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_positional(hint: Any) -> bool:
    """Whether a setting is given by its place on the command line rather than by a flag."""
    return typing.get_args(Positional[str])[1] in getattr(hint, "__metadata__", ())


def required(cls: type) -> list[str]:
    """Names of the settings that have no default."""
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is none]


def flatten(config: Section) -> dict[str, Any]:
    """Dotted name -> JSON-able value: {"compose.min_similarity": 0.2, ...}."""
    flat: dict[str, Any] = {}
    for name, hint in setting_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, Section):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            value = _as_floats(_options(hint), value)  # 1 and 1.0 are the same setting
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def override(config: S, changes: Mapping[str, Any]) -> S:
    """A copy with dotted names set to new values; the result is checked.

    Raises: ValueError for an unknown name (the nearest one is named) or a bad value.
    """
    return typing.cast("S", _build(type(config), nest(changes), config))


def from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
    """A config from nested or dotted keys, as a YAML file or run.json holds them."""
    return typing.cast("S", _build(cls, nest(values), None))


def read_yaml(path: str, read: Callable[[str], bytes] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ValueError if it is missing or not a mapping.

    `read`: what reads it; None: from this machine's disk.
    """
    try:
        data = read(path) if read is not None else _beginning(path)
        loaded = load_yaml(data)
    except OSError as e:
        reason = e.strerror or str(e)
        raise ValueError(complain("config", "a readable YAML file", path, reason)) from e
    except (YAMLError, ValueError) as e:
        where = getattr(e, "problem_mark", None)
        problem = getattr(e, "problem", None)
        fix = "mend it" if problem else "write it as UTF-8 YAML"
        fix = f"mend line {where.line + 1}" if where else fix
        fix += f" ({problem})" if problem else ""
        raise ValueError(complain("config", "valid YAML", path, fix)) from e
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(k, str) for k in loaded):
        raise ValueError(complain("config", "a mapping of settings", path, "write `name: value`"))
    return loaded


def _beginning(path: str) -> bytes:
    """A file's bytes, or so many of them that it is refused: a pipe may have no end."""
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def fingerprint(values: Mapping[str, Any]) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-able mapping; the order of its keys is no matter."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flag_names(cls: type, prefix: str = "") -> dict[str, str]:
    """Every flag of a config class (aliases too) -> the dotted name of its setting."""
    flags: dict[str, str] = {}
    for name, hint in setting_types(cls).items():
        dotted = f"{prefix}{name}"
        if is_section(hint):
            flags |= flag_names(hint, f"{dotted}.")
            continue
        if is_positional(hint):
            continue
        flags[f"--{dotted.replace('_', '-')}"] = dotted
        if _base_type(hint) is bool:
            head, _, tail = dotted.rpartition(".")
            no = f"{head}.no-{tail}" if head else f"no-{tail}"
            flags[f"--{no.replace('_', '-')}"] = dotted
        for extra in getattr(hint, "__metadata__", ()):
            for alias in getattr(extra, "aliases", None) or ():
                flags[alias] = dotted
    return flags


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, whatever the case, or "" if none is near."""
    by_folded = {other.casefold(): other for other in known}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[found[0]] if found else ""


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys become nested mappings; beside those `sam: vit_b` is `sam: {model: vit_b}`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(complain("config", "settings by name", key, "write names as texts"))
        head, dot, tail = key.partition(".")
        if dot:
            value = {tail: value}
        before = nested.get(head)
        if isinstance(before, str) and isinstance(value, Mapping):
            nested[head] = before = {"model": before}
        elif isinstance(before, dict) and isinstance(value, str):
            value = {"model": value}
        if isinstance(before, dict) and isinstance(value, Mapping) and not before.keys() & value:
            before.update(value)
        elif head in nested:
            raise ValueError(complain(key, "given once", value, f"remove one of `{head}`"))
        else:
            nested[head] = dict(value) if isinstance(value, Mapping) else value
    return nested


def _build(cls: type, values: Mapping[str, Any], old: object | None) -> Section:
    hints = setting_types(cls)
    prefix = typing.cast("type[Section]", cls).PREFIX
    for key in values:
        if key not in hints:
            near = nearest(key, hints)
            fix = f"did you mean `{prefix}{near}`?" if near else f"known: {', '.join(hints)}"
            raise ValueError(complain(f"{prefix}{key}", "a known setting", key, fix))
    made: dict[str, Any] = {}
    for name, hint in hints.items():
        before = getattr(old, name) if old is not None else None
        if is_section(hint):
            made[name] = _build(hint, _section_values(name, hint, values.get(name)), before)
        elif name in values:
            made[name] = _coerce(hint, values[name])
        elif old is not None:
            made[name] = before
    for name in required(cls):
        if name not in made:
            flag = name.replace("_", "-")
            raise ValueError(complain(f"{prefix}{name}", "given", "nothing", f"add --{flag}"))
    return cls(**made)


def _section_values(name: str, hint: type, given: Any) -> dict[str, Any]:
    if isinstance(given, str) and "model" in setting_types(hint):
        given = {"model": given}  # `sam: vit_b` is short for `sam: {model: vit_b}`
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(complain(name, "a section", given, f"write `{name}.SETTING: VALUE`"))
    return nest(given or {})


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a setting of a few choices may have; of any other: none."""
    base = _base_type(hint)
    return typing.get_args(base) if typing.get_origin(base) is Literal else ()


def _base_type(hint: Any) -> Any:
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def _options(hint: Any) -> tuple[Any, ...]:
    base = _base_type(hint)
    union = isinstance(base, types.UnionType) or typing.get_origin(base) is typing.Union
    return typing.get_args(base) if union else (base,)


def _coerce(hint: Any, value: Any) -> Any:
    """YAML and JSON know no tuples, `1e-2` is a text to YAML, and 1 may stand for 1.0."""
    options = _options(hint)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and str not in options and any(map(_is_tuple, options)):
        return (value,)
    if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in options:
        return None
    if isinstance(value, str) and float in options:
        with contextlib.suppress(ValueError):
            return float(value)  # of a text never an OverflowError: it becomes infinity
    return _as_floats(options, value)


def _is_tuple(option: Any) -> bool:
    return typing.get_origin(option) is tuple


def _as_floats(options: tuple[Any, ...], value: Any) -> Any:
    """Whole numbers as floats where the setting is one, also inside a mapping."""
    if isinstance(value, dict) and dict[str, float] in options:
        return {k: _as_floats((float,), v) for k, v in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and int not in options:
        with contextlib.suppress(OverflowError):  # its range will refuse it
            return float(value) if float in options else value
    return value


def wrong_type(name: str, hint: Any, value: object) -> str:
    """The error text for a value that does not fit the annotation of its setting."""
    options = _options(hint)
    rule = " or ".join(_describe(option) for option in options)
    choices = [str(c) for o in options for c in typing.get_args(o) if isinstance(c, str)]
    near = nearest(str(value), choices)
    fix = f"did you mean {near}?" if near else f"choose {rule}"
    return complain(name, rule, value, fix)


def _check_field(name: str, hint: Any, value: Any) -> None:
    options = _options(hint)
    if not any(_fits(value, option) for option in options):
        raise ValueError(wrong_type(name, hint, value))
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Range) and not extra.holds(value):
            rule = f"in {extra}" if extra.high < math.inf else str(extra)
            raise ValueError(complain(name, rule, value, f"choose a value {rule}"))


def _fits(value: Any, option: Any) -> bool:
    origin, args = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _describe(option: Any) -> str:
    origin, args = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        choices = typing.get_args(args[0]) if typing.get_origin(args[0]) is Literal else ()
        return f"a list of {', '.join(choices)}" if choices else "a list of texts"
    if origin is dict:
        return f"a mapping of names to {'texts' if args[1] is str else 'numbers'}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(option, "none")
