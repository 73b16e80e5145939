"""YAML of any origin -> plain values, in bounded time and memory.

What enters: the bytes of a YAML file. What leaves: mappings, lists, texts, numbers; or a YAMLError.

Why not `yaml.safe_load` alone: it runs no code, but a few lines of aliases of aliases stand for
more values than any memory holds, and of two equal keys it silently takes the last. So the document
is counted, with what its aliases stand for, before a value is made of it.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 2**10
"""Of a file. Settings of 254 classes are some ten KiB."""
MAX_VALUES = 50_000
"""Of a document, aliases counted as often as they stand there."""


MAX_DIGITS = 100
"""Of a number: those of base 60 take a time that grows with the square of their length."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _NoRecord(yaml.error.MarkedYAMLError):
    """The document is none that settings are written as."""


def load_yaml(data: bytes) -> Any:
    """The document in a YAML file; None if it is empty.

    Raises:
        yaml.YAMLError: it is no YAML, too large, too deep, has a key twice, or holds a number or
            date that is none.
        ValueError: it is no UTF-8.
    """
    if len(data) > MAX_BYTES:
        raise _NoRecord(problem=f"it is larger than {MAX_BYTES // 2**10} KiB")
    loader = yaml.SafeLoader(data.decode())
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return _constructed(loader, node)
    except RecursionError as e:
        raise _NoRecord(problem="it is nested too deeply") from e
    finally:
        loader.dispose()


def _constructed(loader: yaml.SafeLoader, node: Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, ValueError) as e:
        # A date like 2001-99-99, or a tag (`!!bool x`) on a text that is no such value.
        raise _NoRecord(problem=str(e) or "a value that is none of its type") from e


def _count(node: Node, known: dict[int, int]) -> int:
    """How many values a node stands for; `known` are those that are counted, 0 those under way."""
    if id(node) in known:
        if not known[id(node)]:
            raise _NoRecord(problem="an alias that holds itself", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, MappingNode):
        _refuse_twice(node)
        total += sum(_count(key, known) + _count(value, known) for key, value in node.value)
    elif isinstance(node, ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} characters"
            raise _NoRecord(problem=problem, problem_mark=node.start_mark)
    elif isinstance(node, SequenceNode):
        total += sum(_count(item, known) for item in node.value)
    if total > MAX_VALUES:
        problem = f"it stands for more than {MAX_VALUES} values"
        raise _NoRecord(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = total
    return total


def _refuse_twice(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode):
            if (key.tag, key.value) in seen:
                raise _NoRecord(problem=f"{key.value} again", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
