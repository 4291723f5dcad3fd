"""YAML as pages and site profiles have it: keys are text and stand once, values are plain, and what cannot be read is a
`ConfigError`, whatever PyYAML raises.

YAML 1.1 takes unquoted text for other things: `24:00:00` for 86400, `010` for 8, `2024-01-01` for a date. None is ever meant
in a page, so these are read as `Guessed`, which no setting takes. `1e-4`, which YAML 1.1 takes for text, is a
number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_specialm.base.errors import ConfigError

MOST_BYTES = 4 << 20  # of a file; the longest page we ship has 12 kB
MOST_VALUES = 200_000  # of a page with its aliases written out: ten lines of aliases of aliases are 10^10
INTEGERS = range(-(2**63), 2**63)


@dataclass(frozen=True, repr=False)
class Guessed:
    """An unquoted scalar as it was written, what YAML takes it for, and what may be meant instead of that text. It is of no
    type that a setting has."""

    text: str
    guess: str
    otherwise: str = ""

    def __repr__(self) -> str:
        """As it was written."""
        return self.text

    def __str__(self) -> str:
        """What to do about it."""
        fixes = ", or ".join(filter(None, (f'quote it, as "{self.text}"', self.otherwise)))
        return f"{self.text} without quotes is {self.guess} to YAML: {fixes}"


def read_yaml_file(path: Path) -> Any:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not UTF-8 or YAML. A file that is missing is not looked at here.
        FileNotFoundError: it is missing.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path}: more than {MOST_BYTES >> 20} MiB: this is no page")
        text = content.decode()
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return read_yaml(text, where=str(path))


def read_yaml(text: str, *, where: str) -> Any:
    """Read one document.

    Raises:
        ConfigError: it is not YAML, or none that a page can be: see the module.
    """
    try:
        return _unshared(yaml.load(text, _Loader), iter(range(MOST_VALUES)))
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: values stand too deep inside each other") from None
    except Exception as error:  # what constructors raise for a bad value: ValueError, KeyError, IndexError ...
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """As the module says."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor` may stand beside keys that it would set, and they win
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for index, key in enumerate(keys):
            if not isinstance(key, str):
                raise _problem(str(key) if isinstance(key, Guessed) else f"key {key!r} is not text: quote it", node)
            if key in keys[:index]:
                raise _problem(f"key {key!r} stands twice", node)
        return super().construct_mapping(node, deep=deep)

    def construct_integer(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if ":" in text:
            return Guessed(text, "a number in base 60")
        if re.fullmatch(r"[-+]?0[0-7_]+", text):
            return Guessed(text, "a number in base 8", "write a number without the 0 before it")
        if len(text) > 100 or (value := self.construct_yaml_int(node)) not in INTEGERS:
            raise _problem(f"{text:.30} takes more than 64 bits", node)
        return value

    def construct_float(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        return Guessed(text, "a number in base 60") if ":" in text else self.construct_yaml_float(node)

    def construct_date(self, node: yaml.ScalarNode) -> Any:
        return Guessed(self.construct_scalar(node), "a date")


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not take for text."""


for _tag, _construct in (
    ("int", _Loader.construct_integer), ("float", _Loader.construct_float), ("timestamp", _Loader.construct_date)
):  # fmt: skip
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _problem(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _unshared(value: Any, left: Iterator[int], key: str = "", inside: tuple[int, ...] = ()) -> Any:
    """A copy in which each mapping stands once: YAML's aliases are one object, and an override of one stage would change
    all that were merged from its anchor."""
    if next(left, None) is None:
        raise ValueError(f"more than {MOST_VALUES:,} values, with all aliases written out")
    if id(value) in inside:
        raise ValueError(f"{key.removeprefix('.')}: an anchor stands inside itself: write out what is meant")
    if isinstance(value, dict):
        return {name: _unshared(part, left, f"{key}.{name}", (*inside, id(value))) for name, part in value.items()}
    if isinstance(value, list):
        return [_unshared(part, left, f"{key}.{index}", (*inside, id(value))) for index, part in enumerate(value)]
    return value
