"""The keys of a config, documented by its model: what ``ranker schema`` prints."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from features.config_types import is_model, is_union, plain


def describe(model: type[BaseModel], indent: int = 0, seen: set[type[BaseModel]] | None = None) -> str:
    """One line a key, blocks indented below theirs, alternatives one after the other; a block is spelled out once.

    >>> from pydantic import Field
    >>> class Training(BaseModel):
    ...     epochs: int = Field(1, ge=1, description="passes over the data")
    >>> print(describe(Training))
    epochs: integer ≥ 1 = 1  # passes over the data
    """
    seen = set[type[BaseModel]]() if seen is None else seen
    lines: list[str] = []
    for name, field in model.model_fields.items():
        comment = f"  # {field.description}" if field.description else ""
        kind, default = _kind(field.annotation, field.metadata), _default(field)
        lines.append(f"{' ' * indent}{field.alias or name}: {kind}{default}{comment}")
        for block in _blocks(field.annotation):
            about = "as above" if block in seen else (block.__doc__ or "").strip().split("\n")[0]
            lines.append(f"{' ' * indent}  # {block.__name__}: {about}")
            if block not in seen:
                seen.add(block)
                lines.append(describe(block, indent + 4, seen))
    return "\n".join(line for line in lines if line)


def _blocks(annotation: object) -> list[type[BaseModel]]:
    annotation = plain(annotation)
    if is_model(annotation):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks(part)]


def _kind(annotation: object, metadata: list[Any] | None = None) -> str:
    optional = is_union(annotation) and type(None) in get_args(annotation)
    inner = plain(annotation)
    if is_model(inner):
        text = "block"
    elif get_origin(inner) is Literal:
        text = " | ".join(map(str, get_args(inner)))
    elif is_union(inner):
        kinds = dict.fromkeys(_kind(part) for part in get_args(inner))
        text = "one of the blocks" if list(kinds) == ["block"] else " | ".join(kinds)
    elif (origin := get_origin(inner)) is not None:
        parts = [_kind(part) for part in get_args(inner) if part is not Ellipsis]
        text = f"mapping of names to {parts[-1]}" if origin is dict else f"{origin.__name__} of {', '.join(parts)}"
    else:
        names = {"str": "string", "int": "integer", "float": "number", "bool": "true | false", "Path": "path"}
        name = getattr(inner, "__name__", str(inner))
        text = names.get(name, name)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of", "min_length": "length ≥"}
    for limit in metadata or ():
        text += "".join(f" {sign} {getattr(limit, key)}" for key, sign in signs.items() if hasattr(limit, key))
    return f"{text} | null" if optional else text


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    value = field.get_default(call_default_factory=True)
    if get_origin(field.annotation) is Literal and get_args(field.annotation) == (value,):
        return ""  # the tag of an alternative
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    return " = null" if value is None else f" = {value}"
