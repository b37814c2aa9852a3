"""Building blocks of the configuration's schema: the base class of sections, the mark `RESUMABLE`, a walk over keys."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

# Marks a field, or a section with all its fields, whose value may differ when a run is resumed and does not enter the
# result: Field(50, description="…", json_schema_extra=RESUMABLE).
RESUMABLE: dict[str, Any] = {"resumable": True}


class Section(BaseModel):
    """A section of the configuration: immutable, without unknown keys, infinities or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Key(NamedTuple):
    """One key of the configuration.

    Attributes:
        name: dotted name, such as `bank.lr`.
        field: the field that describes it.
        owner: the class that the field belongs to.
        variant: the kind or method whose settings have this key, such as `fsdp`; None outside of a union.
    """

    name: str
    field: FieldInfo
    owner: type[BaseModel]
    variant: str | None


def walk_keys(section: type[BaseModel], prefix: str = "", variant: str | None = None) -> Iterator[Key]:
    """Yield every key below a section, sections included. A key that several variants have comes once for each."""
    for name, field in section.model_fields.items():
        yield Key(prefix + name, field, section, variant)
        for model in nested_models(field):
            yield from walk_keys(model, f"{prefix}{name}.", variant_of(field, model) or variant)


def nested_models(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the settings classes in a field's type: one for a section, several for a union, none for a plain value."""
    return _models(field.annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def variant_of(field: FieldInfo, model: type[BaseModel]) -> str | None:
    """Return the value by which a union chooses `model`, such as `fsdp`; None if the field is not such a union."""
    return str(model.model_fields[str(field.discriminator)].default) if field.discriminator else None


def default_variant(field: FieldInfo) -> dict[str, str]:
    """Return the key and value that choose a union's default, such as {"kind": "ddp"}; {} for any other field."""
    key = str(field.discriminator)
    return {key: getattr(field.default, key)} if field.discriminator else {}


def is_resumable(field: FieldInfo) -> bool:
    """Return whether the field is marked with RESUMABLE."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("resumable"))
