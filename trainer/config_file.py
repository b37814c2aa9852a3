"""Configuration files and command-line overrides: reading, merging, writing, and messages about mistakes.

A YAML file has the sections of `trainer.config.Config`. `extends: other.yaml` in it takes another file of the same
folder as the base, one level deep; `section.key=value` on the command line is applied last.
"""

import difflib
import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config import Config
from trainer.schema import Key, default_variant, walk_keys


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises:
        ValueError: The file is missing or not YAML, or a key is unknown or its value does not fit. One line of text.
    """
    values = _read(path)
    base = values.pop("extends", None)
    if base is not None:
        base_values = _read(path.parent / str(base))
        if "extends" in base_values:
            raise ValueError(f"{path}: extends {base}, which extends another file; only one level is allowed")
        values = _apply(base_values, values)
    values = _apply(values, functools.reduce(_merge, map(_parse_override, overrides or []), {}))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """Return the complete configuration as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def changed_keys(before: Config, now: Config) -> list[str]:
    """Describe each key that differs but must not differ when a run is resumed, such as `run.seed was 0, now 1`."""
    resumable = [key.name for key in walk_keys(Config) if key.resumable]
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    return [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in old | new
        if old.get(name) != new.get(name) and not any(f"{name}.".startswith(f"{key}.") for key in resumable)
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the file is not UTF-8 or has an impossible date
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: need sections such as 'run:' and 'data:', got {type(values).__name__}")
    return values


def _parse_override(text: str) -> dict[str, Any]:
    """Return `a.b=1` as {"a": {"b": 1}}."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"got {text!r}, need section.key=value")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: value {value!r} is not YAML: {' '.join(str(error).split())}") from error
    for key in reversed(name.split(".")):
        nested = {key: nested}
    return nested


def _apply(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`. A section that changes its method or kind starts empty."""
    base = dict(base)
    for name, field in Config.model_fields.items():
        before, after = base.get(name), changes.get(name)
        if field.discriminator and isinstance(before, dict) and isinstance(after, dict):
            key = str(field.discriminator)
            chosen = (default_variant(field) | before)[key]
            if after.get(key, chosen) != chosen:
                base[name] = {}
    return _merge(base, changes)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        # backbone_args belong to one backbone, so they are replaced as a whole.
        if isinstance(before, dict) and isinstance(value, dict) and key != "backbone_args":
            value = _merge(before, value)
        merged[key] = value
    return merged


def _describe(error: Any) -> str:
    """Return one of pydantic's errors in words, with the nearest valid name for an unknown key."""
    location, variant = list(error["loc"]), None
    section = Config.model_fields.get(str(location[0])) if location else None
    if section and section.discriminator and len(location) > 1:
        variant = (
            f"{location[0]}.{section.discriminator}={location.pop(1)}"  # pydantic adds the variant to the location
        )
    name = ".".join(map(str, location))
    if error["type"] == "union_tag_invalid":
        key = f"{name}.{section.discriminator}" if section else name
        return f"{key}: got {error['ctx']['tag']!r}, need one of {error['ctx']['expected_tags']}"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key" + _advice(name, variant)
    if error["type"] == "missing":
        return f"{name}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not name:  # a check across sections names the keys itself
        return str(message)
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # a check of a section starts with the key
        return f"{name}.{message}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _advice(name: str, chosen: str | None) -> str:
    """Return which variants have an unknown key, or the nearest valid names.

    Args:
        name: The unknown key.
        chosen: The variant that the configuration uses in this section, such as `engine.kind=ddp`.
    """
    keys = list(walk_keys(Config))
    owners = [str(key.variant) for key in keys if key.name == name]
    if chosen and owners:
        return f" for {chosen}, need {chosen.split('=')[0]}={' or '.join(owners)}"
    names: dict[str, dict[str, None]] = {}
    for key in keys:
        if chosen and key.variant and _variant(key) != chosen:
            continue
        if "." not in name:  # the name of a section, or of a key in any section
            names.setdefault(key.name.split(".")[-1], {})[key.name] = None
        elif "." in key.name:
            names[key.name] = {key.name: None}
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    return f", did you mean {' or '.join(names[nearest])}?"


def _variant(key: Key) -> str:
    """Return the choice that brings a union's key, such as `engine.kind=fsdp`."""
    section = key.name.split(".")[0]
    return f"{section}.{Config.model_fields[section].discriminator}={key.variant}"
