"""YAML text to plain values, each with the place it was written at.

The scalars are those of YAML 1.2: only ``true`` and ``false`` are booleans (``no`` and ``on`` are strings), ``1e-3`` is
a number, a date is a string. Two things YAML lets pass are refused: a key given twice, an alias that contains itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: `where` is ``file:line`` or the override that brought the value."""

    where: str
    path: KeyPath
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, format_path(self.path), self.message) if part)


@dataclass
class Tree:
    """A nested value of mappings, lists and scalars; `places` says for each of its paths where it was written."""

    value: Any
    places: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest block around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


def format_path(path: KeyPath) -> str:
    """Spell a path as it is written in ``--set``.

    >>> format_path(("model", "long", 0, "dim"))
    'model.long[0].dim'
    """
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def read_yaml(text: str, source: str, problems: list[Problem]) -> Tree:
    """Parse one document; what is wrong with it is appended to `problems`, and the rest is read all the same."""
    loader = _Loader(text)
    tree = Tree(None, {(): source})
    try:
        node = loader.get_single_node()
        if node is not None:
            tree.value = _construct(loader, node, (), source, tree.places, problems, ())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problems.append(Problem(f"{source}{line}", (), f"not valid YAML: {error.problem or error.context}"))
    except yaml.YAMLError as error:
        problems.append(Problem(source, (), f"not valid YAML: {error}"))
    finally:
        loader.dispose()
    return tree


def write_yaml(value: object) -> str:
    """The inverse of :func:`read_yaml`: strings that would read as something else are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def _construct(
    loader: _Loader,
    node: yaml.Node,
    path: KeyPath,
    source: str,
    places: dict[KeyPath, str],
    problems: list[Problem],
    parents: tuple[int, ...],
) -> object:
    places.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if id(node) in parents:
        raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
    parents = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, child, (*path, i), source, places, problems, parents)
            for i, child in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    written: dict[object, int] = {}
    for key_node, _ in node.value:
        key, line = _key(loader, key_node), key_node.start_mark.line + 1
        if key in written and key_node.tag != MERGE_TAG:
            message = f"this key is given twice, first in line {written[key]}; keep one"
            problems.append(Problem(f"{source}:{line}", (*path, key), message))
        written.setdefault(key, line)
    loader.flatten_mapping(node)  # resolves `<<`: merged keys come first, so that the mapping's own win
    result: dict[object, object] = {}
    for key_node, value_node in node.value:
        key = _key(loader, key_node)
        child = (*path, key)
        places[child] = f"{source}:{key_node.start_mark.line + 1}"
        result[key] = _construct(loader, value_node, child, source, places, problems, parents)
    return result


def _key(loader: _Loader, node: yaml.Node) -> str | int:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=node.start_mark)
    key = loader.construct_object(node)
    return key if isinstance(key, int) and not isinstance(key, bool) else str(node.value)


MERGE_TAG = "tag:yaml.org,2002:merge"
_SCALARS: Mapping[str, tuple[str, str]] = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and form


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if text.replace("\n", "").isprintable() else '"'  # PyYAML would write U+0085 bare: a line break
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = str(node.value).replace("_", "")
    return int(digits, {"0x": 16, "0o": 8}.get(digits[:2], 10))


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
