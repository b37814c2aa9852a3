"""YAML as configurations use it: version 1.2's plain scalars, unique keys, and errors of one line.

PyYAML reads version 1.1, in which 010 is 8, 1:30 is 90, `on` is true and 1e-3 is a text. Here they are 10, "1:30", "on"
and 0.001, by the core schema of version 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

import re
from pathlib import Path
from typing import Any

import yaml

NULL = re.compile("|null|Null|NULL|~")
CORE = {
    "null": (NULL, ["", "n", "N", "~"]),
    "bool": (re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
    "merge": (re.compile("<<"), ["<"]),
}
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Resolves scalars by CORE and refuses a key that a mapping has twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, whose keys are texts."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key must be a name")
            if key.tag != MERGE:
                key.tag = self.DEFAULT_SCALAR_TAG
            if key.value in lines:
                raise ValueError(f"line {line}: the key {key.value!r} is in line {lines[key.value]} already")
            lines[key.value] = line
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Read a decimal number, or a hexadecimal or octal one with 0x or 0o."""
        return int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}  # without those of version 1.1
for _name, (_pattern, _first) in CORE.items():
    # A resolver must match the whole scalar, but PyYAML calls `match`.
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str) -> Any:
    """Return the value that YAML text stands for. Raises ValueError with the line and the reason."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem, advice = str(error.problem or error.context), ""
        if "'\\t'" in problem:
            advice = "; indent with spaces, not with tabs"
        elif "alias" in problem or "cannot start" in problem:
            advice = "; put a text with special characters in quotes"
        raise ValueError(f"{line}not YAML: {problem}{advice}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises ValueError with the path, and the line where there is one."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    try:
        return parse_yaml(stored.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = stored.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: not YAML: line {line} is not UTF-8 text: save the file as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML text that `parse_yaml` and other programs read back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
