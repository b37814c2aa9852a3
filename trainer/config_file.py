"""Configuration files and command-line overrides: reading, merging, writing, and messages about mistakes.

A YAML file has the sections of `trainer.config.Config`. `extends: other.yaml` in it takes another file of the same
folder as the base, one level deep; `section.key=value` on the command line is applied last.

On the command line the value of a text setting is taken as it is, so that a path may contain any character; an optional
text is null for `key=` and `key=null`. The values of other settings are YAML. In a file every value is YAML. Paths are
relative to the working directory, and `~` is expanded (`data.paths`).
"""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.paths import expand_user
from data.references import is_reference
from trainer.config import Config, settings_class
from trainer.external import CODE, short_name
from trainer.schema import Key, default_variant, entry_types, is_optional, is_text, nested_models, walk_keys
from trainer.yaml_file import dump_yaml, parse_yaml, read_yaml


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises:
        ValueError: The file is missing or not YAML, or a key is unknown or given twice or its value does not fit. One
            line of text.
    """
    values = _read(path)
    if path.name == "config.yaml":
        _use_copies(values, path.parent / CODE)
    base = values.pop("extends", None)
    if base is not None:
        base_values = _read(path.parent / expand_user(str(base)))
        if "extends" in base_values:
            raise ValueError(f"{path}: extends {base}, which extends another file; only one level is allowed")
        values = _apply(base_values, values)
    values = _override(values, overrides or [])
    # A section without keys, `engine:`, has its defaults.
    values = {name: value for name, value in values.items() if value is not None or name not in Config.model_fields}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """Return the complete configuration as YAML, which `load` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def changed_keys(before: Config, now: Config) -> list[str]:
    """Describe each key that differs but must not differ when a run is resumed, such as `run.seed was 0, now 1`."""
    keys = [*walk_keys(Config), *walk_keys(type(now.method), "method.")]
    resumable = [key.name for key in keys if key.resumable]
    earlier, later = (Path(config.model.weights or "") for config in (before, now))
    if earlier.name and earlier.name == later.name:  # may have moved to another folder; the first start has read them
        resumable.append("model.weights")
    old, new = (
        {name: short_name(value) for name, value in flatten(config.model_dump(mode="json")).items()}
        for config in (before, now)
    )
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
    values = read_yaml(path)
    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"{path}: need sections such as 'run:' and 'data:', got {got}")
    return values


def _use_copies(values: dict[str, Any], folder: Path) -> None:
    """Replace references to files by the copies that a run keeps of them."""
    for section, key in (("method", "name"), ("model", "backbone")):
        own = values.get(section)
        if isinstance(own, dict) and is_reference(own.get(key)):
            place, _, attribute = own[key].rpartition(":")
            if place.endswith(".py") and (copy := folder / Path(place).name).is_file():
                own[key] = f"{copy.absolute()}:{attribute}"


def _keys(overrides: list[str], values: dict[str, Any]) -> list[Key]:
    """Return all keys, with those of a method from outside."""
    method = values.get("method")
    name = str(method.get("name")) if isinstance(method, dict) else ""
    name = next((text.removeprefix("method.name=") for text in overrides if text.startswith("method.name=")), name)
    try:
        return [*walk_keys(Config), *(walk_keys(settings_class(name), "method.") if is_reference(name) else ())]
    except ValueError as error:
        raise ValueError(f"method.{error}") from error


def _override(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with `section.key=value` overrides. Raises ValueError if one is not that, or is given twice."""
    given: dict[str, Any] = {}
    keys = _keys(overrides, values)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"got {text!r}, need section.key=value")
        nested = _parse_value(name, value, keys)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        _insert(given, nested, "")
    if any(text.startswith("model.backbone_args.") for text in overrides):
        model, changes = values.get("model") or {}, given["model"]
        before = model.get("backbone_args")
        if isinstance(before, dict) and changes.get("backbone") in (None, model.get("backbone")):
            changes["backbone_args"] = before | changes["backbone_args"]
    return _apply(values, given)


def _parse_value(name: str, value: str, keys: list[Key]) -> Any:
    """Return the value of a setting as the command line gives it: a text as it is, anything else as YAML."""
    fields = [key.field for key in keys if key.name == name]
    types = [field.annotation for field in fields]
    types += [kind for key in keys if name.startswith(f"{key.name}.") for kind in entry_types(key.field.annotation)]
    if types and all(map(is_text, types)):
        optional = all(map(is_optional, types))
        return None if optional and value in ("", "null") else value
    try:
        return parse_yaml(value)
    except ValueError as error:
        if fields or any(name.startswith(f"{key.name}.") for key in keys if not nested_models(key.field)):
            reason = str(error).removeprefix("line 1: ")
            raise ValueError(f"{name}: value {value!r}{' is ' if 'not YAML' in reason else ': '}{reason}") from error
        return value  # of an unknown setting, which is refused by its name


def _insert(given: dict[str, Any], nested: dict[str, Any], section: str) -> None:
    """Add an override to the others. Raises ValueError if one of its keys is there already."""
    for key, value in nested.items():
        if key not in given:
            given[key] = value
        elif isinstance(given[key], dict) and isinstance(value, dict):
            _insert(given[key], value, f"{section}{key}.")
        else:
            raise ValueError(f"{section}{key} is given twice: as {given[key]!r} and as {value!r}")


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
    if error["type"] == "string_type":
        return f"{name}: need a text, got {error['input']!r}" + "; put it in quotes" * (error["input"] is not None)
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
