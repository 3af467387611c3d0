"""What pydantic found wrong, told in the terms of the YAML file: place, key path, value, what is allowed.

Pydantic's locations also name the branch of a union it tried; these are not keys of the file, so the location is walked
along the model's annotations. Of a union's branches only the one the author seems to have meant is reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from features.config_types import branch, child, is_model, is_union, plain, tags
from features.config_yaml import KeyPath, Problem, Tree

_Branch = tuple[KeyPath, str]
_MISMATCHES = ("_type", "_parsing", "_from_float", "literal_error", "enum", "none_required", "is_instance_of")
"""endings of the error types that say: this value is of another kind altogether"""


@dataclass
class _Finding:
    """One pydantic error: its path in the file, the model that owns its last key, the union branches it lies in."""

    error: ErrorDetails
    path: KeyPath
    owner: type[BaseModel] | None
    annotation: object
    branches: list[_Branch]


def explain(error: ValidationError, model: type[BaseModel], tree: Tree) -> list[Problem]:
    """Problems in the order of the model's keys; `tree` is what was validated."""
    findings = [_locate(details, model) for details in error.errors(include_url=False)]
    return [_problem(finding, tree) for finding in _meant(findings)]


def valid_keys(model: type[BaseModel]) -> dict[str, str]:
    """Keys a block takes, and the description of each."""
    return {field.alias or name: field.description or "" for name, field in model.model_fields.items()}


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` is most likely a slip for, if any is near.

    >>> nearest("lenght", ["dim", "length"])
    'length'
    """
    words = list(words)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return matches[0] if matches else next((w for w in words if w.startswith(word) or word.startswith(w)), None)


def _locate(error: ErrorDetails, model: type[BaseModel]) -> _Finding:
    annotation: object = model
    finding = _Finding(error, (), None, model, [])
    for element in error["loc"]:
        annotation = plain(annotation)
        if is_union(annotation):
            finding.branches.append((finding.path, str(element)))
            annotation = branch(annotation, str(element))
        elif element != "[key]":
            finding.path = (*finding.path, element)
            finding.owner = annotation if is_model(annotation) else None
            annotation = child(annotation, element)
    finding.annotation = plain(annotation)
    return finding


def _meant(findings: list[_Finding]) -> list[_Finding]:
    """Drop the errors of union branches that the value was hardly meant to be."""
    unions: dict[KeyPath, dict[str, list[_Finding]]] = {}
    for finding in findings:
        for path, label in finding.branches:
            unions.setdefault(path, {}).setdefault(label, []).append(finding)
    dropped: set[int] = set()
    for path, branches in unions.items():
        kinds = {label: _is_mismatch(group, path) for label, group in branches.items()}
        fitting = [label for label, mismatch in kinds.items() if not mismatch]
        if fitting:
            keep = min(fitting, key=lambda label: len(branches[label]))
            dropped |= {id(f) for label, group in branches.items() if label != keep for f in group}
        elif len(branches) > 1:  # no branch fits: one error that lists them all
            first, *rest = (group[0] for group in branches.values())
            allowed = " or ".join(dict.fromkeys(_allowed(f.error) for f in (first, *rest)))
            first.error = {**first.error, "msg": f"must be {allowed}", "type": "union"}
            dropped |= {id(f) for group in branches.values() for f in group if f is not first}
    return [finding for finding in findings if id(finding) not in dropped]


def _is_mismatch(group: Sequence[_Finding], path: KeyPath) -> bool:
    return any(f.path == path and f.error["type"].endswith(_MISMATCHES) for f in group)


def _allowed(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return message.split(", unable to parse")[0]


def _problem(finding: _Finding, tree: Tree) -> Problem:
    error, path = finding.error, finding.path
    context: dict[str, Any] = error.get("ctx", {})
    place = tree.place(path)
    match error["type"]:
        case "extra_forbidden":
            keys = list(valid_keys(finding.owner)) if finding.owner else []
            message = f"unknown key; {_hint(path[-1], keys)}valid keys here: {', '.join(keys) or 'none'}"
        case "missing":
            description = valid_keys(finding.owner).get(str(path[-1]), "") if finding.owner else ""
            message = "this key is missing" + (f" ({description})" if description else "")
        case "union_tag_invalid" | "union_tag_not_found":
            key = str(context["discriminator"]).strip("'")
            path, tag = (*path, key), context.get("tag")
            place = tree.place(path)
            allowed = [value for member in get_args(finding.annotation) for value in tags(plain(member), key)]
            message = "this key is missing; " if tag is None else f"got {tag!r}; {_hint(tag, allowed)}"
            message += f"allowed: {', '.join(map(repr, allowed))}"
        case "literal_error" | "enum":
            allowed = [str(value) for value in get_args(finding.annotation)]
            message = f"{_got(error['input'])}{_hint(error['input'], allowed)}allowed: {context['expected']}"
        case "value_error" | "assertion_error":
            message = _got(error["input"]) + str(context["error"])
        case "union":
            message = _got(error["input"]) + error["msg"]
        case _:
            message = _got(error["input"]) + _spoken(error["msg"])
    return Problem(place, path, message)


def _got(value: object) -> str:
    return "" if isinstance(value, dict | BaseModel) else f"got {_show(value)}; "


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(word: object, words: Sequence[str]) -> str:
    near = nearest(str(word), words)
    return f"did you mean {near!r}? " if near else ""


def _spoken(message: str) -> str:
    """pydantic's sentence, shorter: it follows the value it speaks of."""
    message = re.sub(r"^(Input|\w+) should ", "must ", message)
    return message.replace("Input ", "value ").replace(" after validation", "")
