"""The product's settings: help and checks cannot drift, values survive every way of writing."""

import ast
import dataclasses
import inspect
import json
import re
from collections import ChainMap
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from zsplg_ray import config
from zsplg_ray.settings import (
    Range,
    Section,
    choices,
    flatten,
    from_mapping,
    override,
    required,
    setting_types,
)

CONFIGS = [
    cls
    for _, cls in inspect.getmembers(config, inspect.isclass)
    if issubclass(cls, Section) and cls is not Section
]
TOP = [cls for cls in CONFIGS if not cls.PREFIX]

OTHER_VALUES = {
    "sam.model": "shapes",
    "sam.checkpoint": "s3://b/x.pth?a=b",
    "sam.points_per_side": 7,
    "sam.pred_iou_thresh": 0.25,
    "sam.random_weights": True,
    "clip.model": "RN50/openai",
    "clip.embedder": "crop",
    "prompts.templates": ["a {class}", "the {class}"],
    "prompts.background": [],
    "compose.score": "softmax",
    "compose.min_similarity": {"cat": 0.3, "*": 0.25},
    "compose.min_margin": 0.125,
    "compose.unsure": "ignore",
    "actors.max": 4,
    "actors.gpus": 0.5,
    "ray.address": "auto",
    "max_errors": 0,
    "quiet": True,
    "n": 3,
    "embedder": "crop",
    "json": True,
    "classes": "cat,dog",
    "root": "a b",
}
"""For every kind of setting a value that is not its default."""


def docstrings() -> dict[str, dict[str, str]]:
    """Class -> field -> the text under it, read from the source."""
    found: dict[str, dict[str, str]] = {}
    sources = (path.read_text() for path in sorted(Path(config.__file__).parent.glob("*.py")))
    for node in (node for source in sources for node in ast.parse(source).body):
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {})
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                texts[field.target.id] = ""
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[field.target.id] = str(text.value.value)
    return found


DOCS = docstrings()
FIELDS = [
    pytest.param(cls, name, hint, id=f"{cls.PREFIX or cls.__name__ + '.'}{name}")
    for cls in CONFIGS
    for name, hint in setting_types(cls).items()
    if not (isinstance(hint, type) and issubclass(hint, Section))
]


def example(cls: type[Section]) -> dict[str, object]:
    hints = setting_types(cls)
    return {name: next(iter(choices(hints[name])), "x") for name in required(cls)}


def bounds(hint: object) -> list[Range]:
    return [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]


def is_number(hint: object) -> bool:
    base = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    return bool({int, float} & set(get_args(base) or (base,)))


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_every_setting_is_documented_with_its_range(cls, name, hint):
    inherited = [DOCS.get(base.__name__, {}) for base in cls.__mro__]
    text = " ".join(ChainMap(*inherited).get(name, "").split())
    assert text, "no docstring under the field"
    if is_number(hint):
        assert len(bounds(hint)) == 1, "a number without a Range"
        assert str(bounds(hint)[0]) in text
    else:
        assert not bounds(hint)
    optional = type(None) in get_args(getattr(hint, "__origin__", hint)) or type(None) in get_args(
        hint
    )
    default = cls.__dataclass_fields__[name].default
    if optional and default is None and name not in ("root",):
        assert "None: " in text, "what None means is not told"


@pytest.mark.parametrize(("cls", "name", "hint"), [p for p in FIELDS if bounds(p.values[2])])
def test_ranges_hold_at_their_ends_and_not_beyond(cls, name, hint):
    low, high = bounds(hint)[0].low, bounds(hint)[0].high
    by_name = get_origin(hint.__origin__) is dict
    whole = float not in get_args(hint.__origin__) and hint.__origin__ is not float
    step = 1 if whole else 1e-6
    cast = int if whole else float

    pairs = {"max": {"min": 1}, "max_scale": {"min_scale": low}, "min_scale": {"max_scale": high}}
    others = {**example(cls), **pairs.get(name, {})}

    def setting(value):
        return {"one": cast(value)} if by_name else cast(value)

    def set_to(value):
        return from_mapping(cls, {**others, name: setting(value)})

    assert getattr(set_to(low), name) == setting(low)
    with pytest.raises(ValueError, match=rf"^{re.escape(cls.PREFIX + name)} must be "):
        set_to(low - step)
    if high != float("inf"):
        if name != "min":  # more actors than the cluster's share may be asked for
            assert getattr(set_to(high), name) == setting(high)
        with pytest.raises(ValueError, match=rf"^{re.escape(cls.PREFIX + name)} must be "):
            set_to(high + max(step, high * step))


def test_prefixes_are_the_names_under_which_sections_stand():
    for cls in TOP:
        for name, hint in setting_types(cls).items():
            if isinstance(hint, type) and issubclass(hint, Section):
                assert f"{name}." == hint.PREFIX


@pytest.mark.parametrize("cls", TOP)
def test_settings_survive_flattening_json_and_yaml(cls):
    plain = from_mapping(cls, example(cls))
    flat = flatten(plain)
    changed = override(plain, {k: v for k, v in OTHER_VALUES.items() if k in flat})
    assert changed != plain
    for config_ in (plain, changed):
        flat = flatten(config_)
        assert from_mapping(cls, flat) == config_
        assert from_mapping(cls, json.loads(json.dumps(flat))) == config_
        assert from_mapping(cls, yaml.safe_load(yaml.safe_dump(flat))) == config_
        assert from_mapping(cls, yaml.safe_load(yaml.safe_dump(flat, sort_keys=False))) == config_
        assert override(config_, flat) == config_


def test_configs_cannot_be_changed():
    made = config.LabelConfig(images="a", classes="b", out="c")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.quiet = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.SamConfig("vit_b")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompts.templates": ["a photo"]}, "sentences that contain {class}, got a photo"),
        ({"prompts.templates": ["a {class}", "b {klass}"]}, "got b {klass}"),
        ({"prompts.templates": []}, "at least one sentence"),
        ({"compose.min_similarity": {}}, "compose.min_similarity must be a threshold"),
        ({"actors.min": 3, "actors.max": 2}, "actors.max must be >= actors.min (3), got 2"),
        ({"sam": "vit_bb"}, "did you mean vit_b?"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got gpu"),
    ],
)
def test_rules_that_are_no_ranges(values, told):
    with pytest.raises(ValueError) as caught:
        from_mapping(config.LabelConfig, {"images": "a", "classes": "b", "out": "c", **values})
    assert told in str(caught.value)


def test_shorthands_for_the_two_models():
    made = from_mapping(
        config.LabelConfig,
        {"images": "a", "classes": "b", "out": "c", "sam": "vit_b", "clip": "RN50/openai"},
    )
    assert (made.sam, made.clip) == (
        config.SamConfig(model="vit_b"),
        config.ClipConfig(model="RN50/openai"),
    )


def test_the_contracts_names_and_defaults():
    """Flags, YAML files and run.json of others rest on these."""
    flat = flatten(config.LabelConfig(images="a", classes="b", out="c"))
    told = {k: flat[k] for k in ("sam.model", "clip.embedder", "compose.score", "compose.order")}
    assert told == {
        "sam.model": "vit_h",
        "clip.embedder": "gem",
        "compose.score": "cosine",
        "compose.order": "score",
    }
    assert flat["compose.unsure"] == "background"
    assert required(config.LabelConfig) == ["images", "classes", "out"]
    assert required(config.RelabelConfig) == ["run"]
    assert required(config.EvaluateConfig) == ["labels", "truth"]
