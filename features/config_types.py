"""Walk along a model's annotations as a config file is walked along its keys."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel


def plain(annotation: Any) -> Any:
    """`annotation` without what does not change the shape of its value: Annotated, aliases, Optional."""
    while True:
        if hasattr(annotation, "__value__"):  # type X = ...
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif is_union(annotation) and type(None) in get_args(annotation):
            members = tuple(member for member in get_args(annotation) if member is not type(None))
            annotation = Union[members]  # noqa: UP007 - members known only at run time
        else:
            return annotation


def is_union(annotation: object) -> bool:
    """Whether a value of `annotation` is one of several kinds."""
    return get_origin(annotation) in (Union, types.UnionType)


def child(annotation: object, key: str | int) -> object:
    """The annotation below `key` in a value of `annotation`; None where it says nothing."""
    annotation = plain(annotation)
    if is_union(annotation):
        return None
    if is_model(annotation):
        fields = annotation.model_fields.items()
        return next((field.annotation for name, field in fields if key in (name, field.alias)), None)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(origin, type) or not arguments:
        return None
    if issubclass(origin, tuple):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[int(key)] if int(key) < len(arguments) else None
    return arguments[-1]  # element of a list, value of a mapping


def is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Whether `annotation` is a block with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def tags(model: object, key: str | None = None) -> list[str]:
    """Values that tell a block from its alternatives (``type: synthetic``): what `key`, or any key, is bound to."""
    if not is_model(model):
        return []
    fields = [field for name, field in model.model_fields.items() if key in (None, name, field.alias)]
    literals = [field.annotation for field in fields if get_origin(field.annotation) is Literal]
    return [str(value) for literal in literals for value in get_args(literal)]


def branch(union: object, label: str) -> object:
    """The member of `union` that pydantic calls `label`: by its tag, else by its class name."""
    members = [plain(member) for member in get_args(union)]
    tagged = [m for m in members if label in tags(m)]
    named = [m for m in members if getattr(m, "__name__", "") == label]
    return next(iter(tagged + named), None)
