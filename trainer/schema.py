"""Building blocks of the configuration's schema: the base class of sections, and a walk over all keys."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from data.settings import RESUMABLE


class Section(BaseModel):
    """A section of the configuration: immutable, without unknown keys, infinities or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Key(NamedTuple):
    """One key of the configuration.

    Attributes:
        name: Dotted name, such as `bank.lr`.
        field: The field that describes it.
        variant: The kind or method whose settings have this key, such as `fsdp`; None outside of a union.
        resumable: Whether its value may differ when a run is resumed: it, or a section around it, has that mark.
    """

    name: str
    field: FieldInfo
    variant: str | None
    resumable: bool


def walk_keys(
    section: type[BaseModel], prefix: str = "", variant: str | None = None, resumable: bool = False
) -> Iterator[Key]:
    """Yield every key below a section, sections included. A key that several variants have comes once for each."""
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        marked = resumable or (isinstance(extra, dict) and RESUMABLE.items() <= extra.items())
        yield Key(prefix + name, field, variant, marked)
        for model in nested_models(field):
            yield from walk_keys(model, f"{prefix}{name}.", variant_of(field, model) or variant, marked)


def nested_models(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the settings classes in a field's type: one for a section, several for a union, none for a plain value."""
    return _models(field.annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def is_text(annotation: Any) -> bool:
    """Return whether all values of a type are texts or null: a str, a Path, a Literal of texts, or a union of them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_text(arguments[0])
    if origin is Literal:
        return all(isinstance(value, str) for value in arguments)
    if origin in (Union, UnionType):
        return all(argument is NoneType or is_text(argument) for argument in arguments)
    return annotation in (str, Path)


def entry_types(annotation: Any) -> list[Any]:
    """Return the types of the values of a mapping, or of the mappings in a union; [] for other types."""
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return [arguments[1]]
    return [found for argument in arguments for found in entry_types(argument)]


def is_optional(annotation: Any) -> bool:
    """Return whether null is a value of a type."""
    return NoneType in get_args(annotation)


def variant_of(field: FieldInfo, model: type[BaseModel]) -> str | None:
    """Return the value by which a union chooses `model`, such as `fsdp`; None if the field is not such a union."""
    return str(model.model_fields[str(field.discriminator)].default) if field.discriminator else None


def default_variant(field: FieldInfo) -> dict[str, str]:
    """Return the key and value that choose a union's default, such as {"kind": "ddp"}; {} for any other field."""
    key = str(field.discriminator)
    return {key: getattr(field.default, key)} if field.discriminator else {}
