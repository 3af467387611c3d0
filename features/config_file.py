"""Load a typed config from YAML, and write the resolved one back.

Beyond plain YAML a config file may

- build on others: ``extends: base.yaml`` (or a list of files; paths relative to the file that names them). Mappings
  merge key by key, anything else is replaced, and so is a block that becomes one of another ``type``;
- use the environment in strings: ``${RANKER_DATA}/ebnerd``; ``$${`` stands for a literal ``${``;
- be changed from the command line: ``--set model.short.length=50``, ``--set model.long[0].dim=32``.

Nothing is guessed: every key is checked against the model, and all that is wrong is told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from features.config_report import explain
from features.config_types import branch, child, is_model, is_union, plain
from features.config_yaml import KeyPath, Problem, Tree, format_path, read_yaml, write_yaml
from features.errors import UserError

T = TypeVar("T", bound=BaseModel)

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


class ConfigError(UserError):
    """A config that cannot be used; the message names each problem's place, key path, value, and what is allowed."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in problems]
        heading = f"{path}: {len(lines)} problems\n  " if len(lines) > 1 else ""
        super().__init__(heading + "\n  ".join(lines))


def load_config(path: Path | str | None, model: type[T], overrides: Sequence[str] = ()) -> T:
    """Read `path` as a `model`, with `overrides` of the form ``a.b[0].c=VALUE`` (VALUE is YAML) on top; without a path,
    the defaults with overrides.

    Raises:
        ConfigError: with everything that is wrong.
    """
    problems = list[Problem]()
    tree = Tree({}) if path is None else _read(Path(path), model, (), problems)
    path = Path("--set" if path is None else path)
    if problems and not isinstance(tree.value, dict):
        raise ConfigError(path, problems)
    for override in overrides:
        _override(tree, model, override, problems)
    tree.value = _expand(tree.value, (), tree, problems)
    told = {problem.path for problem in problems if problem.path}
    config: T | None = None
    try:
        config = model.model_validate(tree.value)
    except ValidationError as error:
        problems += [problem for problem in explain(error, model, tree) if problem.path not in told]
    if problems or config is None:
        raise ConfigError(path, problems)
    return config


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, every default spelled out; :func:`load_config` reads it back as an equal one."""
    return write_yaml(
        _map_strings(config.model_dump(mode="json", by_alias=True), lambda text: text.replace("${", "$${"))
    )


def _read(path: Path, model: type[BaseModel], chain: tuple[Path, ...], problems: list[Problem]) -> Tree:
    """One file over all that it extends; `chain` are the files that led here."""
    if path.resolve() in [file.resolve() for file in chain]:
        cycle = " → ".join(str(file) for file in (*chain, path))
        problems.append(Problem(str(chain[-1]), ("extends",), f"files extend each other in a circle: {cycle}"))
        return Tree({})
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        by = f" (named by extends in {chain[-1]})" if chain else ""
        problems.append(Problem(str(path), (), f"cannot read the config: {reason}{by}"))
        return Tree(None)
    tree = read_yaml(text, str(path), problems)
    if tree.value is None:
        tree.value = {}
    if not isinstance(tree.value, dict):
        problems.append(Problem(str(path), (), f"a config is a mapping of keys, got {tree.value!r}"))
        return Tree(None)
    extends = _expand(cast("dict[str, Any]", tree.value).pop("extends", None), ("extends",), tree, problems)
    names: list[Any] = extends if isinstance(extends, list) else [] if extends is None else [extends]
    base = Tree({})
    for name in names:
        if isinstance(name, str) and name:
            base = _merge(base, _read(path.parent / name, model, (*chain, path), problems), model)
        else:
            message = f"got {name!r}; must be the path of a config file, or a list of them"
            problems.append(Problem(tree.place(("extends",)), ("extends",), message))
    return _merge(base, tree, model)


def _merge(base: Tree, top: Tree, model: type[BaseModel]) -> Tree:
    """`top` over `base`, with the place of each value kept."""
    return Tree(_merge_values(base.value, top.value, model), {**base.places, **top.places})


def _merge_values(base: Any, top: Any, annotation: object) -> Any:
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    merged, changes = cast("dict[Any, Any]", dict(base)), cast("dict[Any, Any]", top)
    annotation = plain(annotation)
    if is_union(annotation):
        kind = changes.get("type", merged.get("type"))
        if kind != merged.get("type"):
            return changes  # another kind of block: its keys have nothing in common with the one below
        annotation = branch(annotation, str(kind))
    for key, value in changes.items():
        merged[key] = _merge_values(merged[key], value, child(annotation, key)) if key in merged else value
    return merged


def _expand(value: Any, path: KeyPath, tree: Tree, problems: list[Problem]) -> Any:
    """`value` with the environment's variables in its strings."""
    if isinstance(value, dict):
        mapping = cast("dict[str | int, Any]", value)
        return {key: _expand(inner, (*path, key), tree, problems) for key, inner in mapping.items()}
    if isinstance(value, list):
        return [_expand(inner, (*path, i), tree, problems) for i, inner in enumerate(cast("list[Any]", value))]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name: str | None = match.group(1)
        if name is None:  # $${
            return "${"
        if not match.group().endswith("}") or not name.isidentifier():
            message = (
                f"got {value!r}; ${{NAME}} needs a variable's name in closed braces (write $${{ for a literal ${{)"
            )
            problems.append(Problem(tree.place(path), path, message))
        elif name not in os.environ:
            message = f"got {value!r}, but the environment variable {name} is not set; set it: export {name}=…"
            problems.append(Problem(tree.place(path), path, message))
        return os.environ.get(name, match.group())

    return _VARIABLE.sub(replace, value)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(inner, change) for key, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_map_strings(inner, change) for inner in cast("list[Any]", value)]
    return change(value) if isinstance(value, str) else value


def _override(tree: Tree, model: type[BaseModel], override: str, problems: list[Problem]) -> None:
    """Set one value in `tree`. A block that only the defaults hold is written out first, then one key of it changed."""
    where = f"--set {override}"
    spelled, equals, text = override.partition("=")
    path = parse_path(spelled)
    if not equals or path is None:
        problems.append(Problem(where, (), "must have the form a.b[0].c=VALUE"))
        return
    value_problems: list[Problem] = []
    value = read_yaml(text, where, value_problems).value
    if value_problems:
        message = f"VALUE is not valid YAML ({value_problems[0].message}); quote it: {spelled}='\"…\"'"
        problems.append(Problem(where, path, message))
        return
    block: Any = tree.value
    annotation: object = model
    for depth, key in enumerate(path, 1):
        last = depth == len(path)
        if (message := _no_such_key(block, key, path[: depth - 1])) is not None:
            problems.append(Problem(where, path[:depth], message))
            return
        if not last and isinstance(block, dict) and cast("dict[Any, Any]", block).get(key) is None:
            block[key] = _default(annotation, key)
        tree.places[path[:depth]] = where if last else tree.places.get(path[:depth], where)
        if last:
            block[key] = value
        block, annotation = block[key], child(annotation, key)


def _no_such_key(block: object, key: str | int, path: KeyPath) -> str | None:
    """Why the block at `path` cannot hold `key`, whatever its model says."""
    if isinstance(block, list):
        length = len(cast("list[Any]", block))
        fits = isinstance(key, int) and key < length
        return None if fits else f"no such element; {format_path(path)} is a list of {length}, counted from 0"
    return None if isinstance(block, dict) else f"{format_path(path)} is {block!r}, which has no keys"


def parse_path(text: str) -> KeyPath | None:
    """Keys of ``a.b[0].c``, equally ``a.b.0.c``; None if it is no path."""
    if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*", text.strip()):
        return None
    return tuple(int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", text.strip()))


def _default(annotation: object, key: str | int) -> Any:
    """The default of one key as plain values; an empty mapping where there is none."""
    if is_model(annotation):
        field = annotation.model_fields.get(str(key))
        value = field.get_default(call_default_factory=True) if field and not field.is_required() else None
        if value is not None:
            return TypeAdapter[Any](type(value)).dump_python(value, mode="json")
    return {}
