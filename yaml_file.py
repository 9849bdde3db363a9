"""YAML as people mean it: no octal 012, no 1:30 that is ninety, no `on` that is true, no key that silently wins over its twin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shown

DEEPEST, MOST_NODES = 50, 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, and duplicate keys as errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            text = key.value if isinstance(key.value, str) else repr(key.value)
            if key.tag != "tag:yaml.org,2002:merge" and text in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {text!r} stands twice", key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)


_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}  # none of SafeLoader's own, which are those of YAML 1.1
for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Decimal whatever its leading zeros, or 0x..."""
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16 if text.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> Any:
    """The content of a YAML text: None, bool, int, float, str, and lists and mappings of them.

    `UserError` with line and column where it is not YAML; also for other types (a date, bytes), and for content nested or
    multiplied by aliases beyond any use.
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        # Beside its own errors, PyYAML lets Python's through where a tag does not fit its value: `!!bool 3`, `!!timestamp x`.
        raise UserError(f"{where}: not valid YAML: {error}") from error
    _check_tree(content, where)
    return content


def _check_tree(content: Any, where: str) -> None:
    """Every node counted as often as aliases repeat it: a few lines cannot stand for gigabytes, nor an alias for itself."""
    pending, count = [(content, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if depth > DEEPEST:
            raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
        if count > MOST_NODES:
            raise UserError(f"{where}: more than {MOST_NODES} values, aliases counted")
        if isinstance(node, dict):
            pending += [(inner, depth + 1) for pair in node.items() for inner in pair]
        elif isinstance(node, list):
            pending += [(inner, depth + 1) for inner in node]
        elif node is not None and not isinstance(node, (bool, int, float, str)):
            raise UserError(f"{where}: {shown(node)} is a {type(node).__name__}; expected a text, a number, true, false or null")


def read(file: Path, where: str = "") -> Any:
    """The content of a YAML file."""
    prefix = f"{where}: " if where else ""
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{str(file)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{prefix}cannot read {shown(str(file))}: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a NUL in the name; `~nobody`
        raise UserError(f"{prefix}cannot read {shown(str(file))}: {error}") from error
    return parse(text, f"{prefix}{file}")
