"""The YAML of configs and site profiles: keys are text and unique, values are plain, and every error is a `ConfigError`.

YAML 1.1 converts some unquoted text: `24:00:00` to 86400, `010` to 8, `2024-01-01` to a date. In a config that is never meant,
so these are read as `Guessed`, which no setting accepts. `1e-4`, which is text in YAML 1.1, is a number here.

Sizes are limited before reading takes long: the bytes of a config and all that it extends, the number of values with aliases
expanded (ten lines of aliases of aliases, or of merges of merges, are 10^10), and how deep values are nested.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import read_regular

MAX_BYTES = 4 << 20  # the longest shipped config has 12 kB, but a config may list the files of a corpus
MAX_VALUES = 50_000  # PyYAML takes a second for them
MAX_LEVELS = 50
SHOWN, LONGEST = 200, 1000  # characters shown of a value in an error, and of a whole error
INTEGERS = range(-(2**63), 2**63)


@dataclass(frozen=True, repr=False)
class Guessed:
    """An unquoted scalar that YAML 1.1 would convert: its text, what YAML reads it as, and another fix than quotes. No setting
    has this type."""

    text: str
    guess: str
    otherwise: str = ""

    def __repr__(self) -> str:
        """The text as written."""
        return self.text

    def __str__(self) -> str:
        """The problem and the fix."""
        fixes = ", or ".join(filter(None, (f'quote it, as "{self.text}"', self.otherwise)))
        return f"{self.text} without quotes is {self.guess} to YAML: {fixes}"


@dataclass
class Room:
    """How much may still be read of the files that make up one config."""

    bytes: int = MAX_BYTES
    values: int = MAX_VALUES


def read_yaml_file(path: Path, room: Room | None = None) -> Any:
    """Read a file.

    Args:
        room: of all files of the config together; it is reduced by what is read.

    Raises:
        ConfigError: it cannot be read, is no regular file, is too large, or is not UTF-8 or YAML.
        FileNotFoundError: it is missing.
    """
    room = room or Room()
    text = read_text(path, most_bytes=room.bytes)
    room.bytes -= len(text.encode())
    return read_yaml(text, where=str(path), room=room)


def read_text(path: Path, *, most_bytes: int = MAX_BYTES) -> str:
    """The text of a config, or of another file that a config or a profile names. Raises like `read_yaml_file`."""
    try:
        return read_regular(path, most_bytes=most_bytes).decode()
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_yaml(text: str, *, where: str, room: Room | None = None) -> Any:
    """Read one document.

    Raises:
        ConfigError: it is not YAML, or not as this module's docstring says.
    """
    try:
        return _unshared(_Loader(text, room or Room()).get_single_data())
    except Exception as error:  # constructors raise ValueError, KeyError, IndexError ... for bad values
        raise ConfigError(f"{where}: not valid YAML: {str(error)[:LONGEST]}") from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML, which `read_yaml` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads YAML as this module's docstring says."""

    def __init__(self, text: str, room: Room) -> None:
        super().__init__(text)
        self._room, self._level = room, 0
        self._values: dict[yaml.Node, int] = {}  # per composed node, with its aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count before anything is built: an alias counts as many values as the node that it refers to."""
        left, start = self._room.values, self.peek_event()
        self._level += 1
        if self._level > MAX_LEVELS:
            raise _problem(f"values are nested too deep, more than {MAX_LEVELS} levels", start)
        node = super().compose_node(parent, index)
        self._level -= 1
        assert node is not None
        if isinstance(start, yaml.AliasEvent):
            if node not in self._values:
                raise _problem("an anchor contains itself: write out what is meant", start)
            self._room.values -= self._values[node]
        else:
            self._room.values -= 1
            self._values[node] = left - self._room.values
        if self._room.values < 0:
            raise _problem(f"more than {MAX_VALUES:,} values, with all aliases expanded", start)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor` may stand beside keys that it would set; those win
        known: set[str] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge):
            if not isinstance(key, str):
                raise _problem(
                    str(key) if isinstance(key, Guessed) else f"key {shorten(key)} is not text: quote it", node
                )
            if key in known:
                raise _problem(f"key {shorten(key)} is there twice", node)
            known.add(key)
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
    """Quotes text that `_Loader` would not read as text."""


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


def _problem(what: str, node: Any) -> yaml.YAMLError:
    """An error with the position of a node or an event."""
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _unshared(value: Any) -> Any:
    """A copy without shared mappings: YAML's aliases are one object, so an override of one stage would change all that were
    merged from its anchor."""
    if isinstance(value, dict):
        return {name: _unshared(part) for name, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def shorten(value: Any) -> str:
    """A value for an error message, cut to `SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"
