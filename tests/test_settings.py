"""How settings work, on a small config of its own: types, ranges, names, YAML, fingerprints."""

from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplg_ray.settings import (
    Range,
    Section,
    complain,
    fingerprint,
    flatten,
    from_mapping,
    nearest,
    nest,
    override,
    read_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Inner(Section):
    """A section."""

    PREFIX: ClassVar[str] = "inner."

    model: Literal["small", "large"] = "small"
    share: Annotated[float, Range(0, 1)] = 0.5
    count: Annotated[int, Range(1)] = 3
    limit: Annotated[float | dict[str, float] | None, Range(-1, 1)] = None
    words: tuple[str, ...] | None = None
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer(Section):
    """A config."""

    name: str
    root: str | None = None
    inner: Inner = field(default_factory=Inner)


def outer(**values: Any) -> Outer:
    return from_mapping(
        Outer, {"name": "n", **{k.replace("__", "."): v for k, v in values.items()}}
    )


def refusal(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        outer(**values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"inner__share": "x"}, "inner.share must be a number, got x"),
        ({"inner__share": True}, "inner.share must be a number, got True"),
        ({"inner__share": None}, "inner.share must be a number, got None"),
        ({"inner__share": 1.01}, "inner.share must be in [0, 1], got 1.01"),
        ({"inner__share": -1e-9}, "inner.share must be in [0, 1], got -1e-09"),
        ({"inner__share": float("nan")}, "inner.share must be in [0, 1], got nan"),
        ({"inner__count": 0}, "inner.count must be >= 1, got 0"),
        ({"inner__count": 2.0}, "inner.count must be a whole number, got 2.0"),
        ({"inner__count": True}, "inner.count must be a whole number, got True"),
        ({"inner__count": "4"}, "inner.count must be a whole number, got 4"),
        ({"inner__on": 1}, "inner.on must be true or false, got 1"),
        ({"inner__on": "yes"}, "inner.on must be true or false, got yes"),
        ({"inner__model": "larg"}, "inner.model must be one of small, large, got larg"),
        ({"inner__limit": {"cat": 2}}, "inner.limit must be in [-1, 1], got {'cat': 2.0}"),
        ({"inner__limit": {"cat": float("nan")}}, "inner.limit must be in [-1, 1]"),
        ({"inner__limit": {"cat": "x"}}, "inner.limit must be a number or a mapping"),
        ({"inner__limit": {"cat": None}}, "inner.limit must be a number or a mapping"),
        ({"inner__limit": {1: 0.5}}, "inner.limit must be a number or a mapping"),
        ({"inner__words": 3}, "inner.words must be a list of texts or none, got 3"),
        ({"inner__words": ["a", 1]}, "inner.words must be a list of texts or none"),
        ({"inner": 3}, "inner must be a section, got 3"),
        ({"inner": ["model"]}, "inner must be a section"),
        ({"root": 3}, "root must be a text or none, got 3"),
        ({"inner__shar": 0.1}, "inner.shar must be a known setting"),
        ({"nam": "x"}, "nam must be a known setting"),
    ],
)
def test_a_bad_value_is_refused_with_name_rule_and_value(values, rule):
    message = refusal(**values)
    assert message.startswith(rule)
    assert "; " in message, "no fix"


def test_the_ends_of_a_range_belong_to_it_and_infinity_does_not():
    assert outer(inner__share=0, inner__limit={"a": -1, "b": 1}).inner.share == 0
    assert outer(inner__share=1).inner.share == 1
    assert not Range(0).holds(float("inf"))
    assert not Range(-1, 1).holds({"a": 0.5, "b": 1.5})
    assert not Range().holds(float("nan"))


def test_sections_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"inner\.share must be in \[0, 1\], got 2"):
        Inner(share=2)


def test_slips_are_told_the_nearest_name():
    assert "did you mean `inner.share`?" in refusal(inner__shar=0.1)
    assert "did you mean `name`?" in refusal(nam="x")
    assert "did you mean large?" in refusal(inner__model="Larg")
    assert "known: name, root, inner" in refusal(zzzzzzz=1)
    assert nearest("vit-b-16", ["RN50", "ViT-B-16"]) == "ViT-B-16"
    assert nearest("qqq", ["RN50"]) == ""


def test_a_missing_setting_is_asked_for():
    with pytest.raises(ValueError, match="name must be given, got nothing; add --name"):
        from_mapping(Outer, {})


def test_yaml_and_json_values_are_taken_as_what_the_setting_is():
    config = outer(
        inner__words=["a", "b"],
        inner__share=1,
        inner__limit={"cat": 1},
        root="none",
    )
    assert config.inner.words == ("a", "b")
    assert type(config.inner.share) is float
    assert isinstance(config.inner.limit, dict) and type(config.inner.limit["cat"]) is float
    assert config.root is None
    assert outer(inner__share="1e-2").inner.share == 0.01  # PyYAML reads 1e-2 as a text
    assert type(outer(inner__limit=1).inner.limit) is float
    assert type(outer(inner__count=4).inner.count) is int


def test_a_section_may_be_given_by_its_model_alone():
    assert outer(inner="large").inner == Inner(model="large")
    assert "inner.model must be one of small, large, got x" in refusal(inner="x")


def test_nested_and_dotted_names_mix_but_nothing_is_given_twice():
    assert outer(inner={"share": 0.1}, inner__count=5).inner == Inner(share=0.1, count=5)
    assert outer(inner__count=5, inner={"share": 0.1}).inner == Inner(share=0.1, count=5)
    assert "given once" in refusal(inner={"share": 0.1}, inner__share=0.2)
    for given_values in (
        {"inner": "large", "inner__share": 0.1},
        {"inner__share": 0.1, "inner": "large"},
    ):
        assert outer(**given_values).inner == Inner(model="large", share=0.1)
    assert "given once" in refusal(inner="large", inner__model="small")
    assert "given once" in refusal(inner__model="small", inner="large")
    given_values = {"inner": {"share": 0.1}, "inner.count": 5}
    nest(given_values)
    assert given_values == {"inner": {"share": 0.1}, "inner.count": 5}, "the input was changed"


configs = st.builds(
    Outer,
    name=st.text(min_size=1).filter(lambda t: t.lower() not in ("none", "null")),
    root=st.none() | st.just("folder"),
    inner=st.builds(
        Inner,
        model=st.sampled_from(["small", "large"]),
        share=st.floats(0, 1) | st.sampled_from([0, 1]),
        count=st.integers(1, 10),
        limit=st.none()
        | st.floats(-1, 1)
        | st.dictionaries(st.text(max_size=3), st.floats(-1, 1) | st.sampled_from([0, 1])),
        words=st.none() | st.lists(st.text(max_size=3)).map(tuple),
        on=st.booleans(),
    ),
)


@given(configs)
def test_what_is_flattened_comes_back(config):
    flat = flatten(config)
    assert set(flat) == {"name", "root"} | {f"inner.{f.name}" for f in fields(Inner)}
    back = from_mapping(Outer, flat)
    assert back == config
    assert fingerprint(flatten(back)) == fingerprint(flat)
    assert override(config, {}) == config


def test_override_changes_what_it_is_told_and_checks_it():
    old = outer(inner__share=0.25, root="r")
    new = override(old, {"inner.count": 7, "inner.words": ["x"]})
    assert (new.inner.count, new.inner.words) == (7, ("x",))
    assert override(old, {"inner.words": "x"}) == override(old, {"inner.words": ["x"]})
    assert (new.inner.share, new.root, old.inner.count) == (0.25, "r", 3)
    with pytest.raises(ValueError, match=r"inner\.count must be >= 1"):
        override(old, {"inner.count": 0})
    with pytest.raises(ValueError, match=r"did you mean `inner\.count`"):
        override(old, {"inner.coun": 1})


def test_fingerprints_know_values_but_not_the_order_of_keys():
    values = {"a": 1.0, "b": {"x": [1, 2], "y": None}}
    turned = {"b": {"y": None, "x": [1, 2]}, "a": 1.0}
    assert fingerprint(values) == fingerprint(turned)
    text = b'{"a":1.0,"b":{"x":[1,2],"y":null}}'
    assert fingerprint(values) == sha256(text).hexdigest()[:16], "old runs would be refused"
    others = [
        {**values, "a": 1.1},
        {**values, "c": None},
        {"a": 1.0, "b": {"x": [2, 1], "y": None}},
    ]
    assert len({fingerprint(v) for v in (values, *others)}) == 4
    assert fingerprint(flatten(Inner(share=1))) == fingerprint(flatten(Inner(share=1.0)))


def test_complaints_are_one_printable_line():
    text = complain("name", "good", "a\nb\r\u2028c\x1b[31m", "mend\nit")
    assert text == "name must be good, got a\\nb\\r\\u2028c\\x1b[31m; mend\\nit"
    assert complain("name", "good", "", "mend it") == "name must be good, got ''; mend it"
    assert complain("name", "good", "é 漢", "x").endswith("got é 漢; x")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1", "config must be valid YAML"),
        (b"a: b: c", "mend line 1"),
        (b"- a\n- b", "config must be a mapping of settings"),
        (b"1: 2", "config must be a mapping of settings"),
        (b"just text", "config must be a mapping of settings"),
        (b"a: \xff\xfe", "write it as UTF-8 YAML"),
        (b"a: !!python/object/apply:os.system ['true']", "config must be valid YAML"),
    ],
)
def test_bad_yaml_is_told_in_one_line(tmp_path, content, told):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_yaml(str(file))
    assert told in str(caught.value) and str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ValueError, match=r"readable YAML file, got .*none\.yaml; No such file"):
        read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="readable YAML file"):
        read_yaml(str(tmp_path))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(str(tmp_path / "empty.yaml")) == {}
