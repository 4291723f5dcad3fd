"""YAML as configs and site profiles have it: keys are text and stand once, values are plain, and what cannot be read is a
`ConfigError`, whatever PyYAML raises.

YAML 1.1 takes unquoted text for other things: `24:00:00` for 86400, `010` for 8, `2024-01-01` for a date. None is ever meant
in a config, so these are read as `Guessed`, which no setting takes. `1e-4`, which YAML 1.1 takes for text, is a
number.

What is read is bounded, before it takes long: the bytes of a config and all that it extends, their values with aliases written
out (ten lines of aliases of aliases, or of merges of merges, are 10^10), and how deep they stand inside each other.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import read_regular

MOST_BYTES = 4 << 20  # the longest config we ship has 12 kB, and one may list the files of a corpus
MOST_VALUES = 50_000  # PyYAML takes a second for them
MOST_LEVELS = 50
SHOWN, LONGEST = 200, 1000  # characters of a value in an error, and of an error
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


@dataclass
class Room:
    """How much may still be read, of files that make up one config."""

    bytes: int = MOST_BYTES
    values: int = MOST_VALUES


def read_yaml_file(path: Path, room: Room | None = None) -> Any:
    """Read a file.

    Args:
        room: what those that are read for the same config share.

    Raises:
        ConfigError: it cannot be read, is no regular file, is too large, or is not UTF-8 or YAML.
        FileNotFoundError: it is missing.
    """
    room = room or Room()
    text = read_text(path, most_bytes=room.bytes)
    room.bytes -= len(text.encode())
    return read_yaml(text, where=str(path), room=room)


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> str:
    """The text of a config, or of another file that a config or a profile names. Raises as `read_yaml_file` does."""
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
        ConfigError: it is not YAML, or none that a config can be: see the module.
    """
    try:
        return _unshared(_Loader(text, room or Room()).get_single_data())
    except Exception as error:  # what constructors raise for a bad value: ValueError, KeyError, IndexError ...
        raise ConfigError(f"{where}: not valid YAML: {str(error)[:LONGEST]}") from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """As the module says."""

    def __init__(self, text: str, room: Room) -> None:
        super().__init__(text)
        self._room, self._level = room, 0
        self._values: dict[yaml.Node, int] = {}  # in each whole node, with its aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count before anything is built: an alias is as many values as what it stands for."""
        left, start = self._room.values, self.peek_event()
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _problem(f"values stand too deep inside each other, more than {MOST_LEVELS} levels", start)
        node = super().compose_node(parent, index)
        self._level -= 1
        assert node is not None
        if isinstance(start, yaml.AliasEvent):
            if node not in self._values:
                raise _problem("an anchor stands inside itself: write out what is meant", start)
            self._room.values -= self._values[node]
        else:
            self._room.values -= 1
            self._values[node] = left - self._room.values
        if self._room.values < 0:
            raise _problem(f"more than {MOST_VALUES:,} values, with all aliases written out", start)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor` may stand beside keys that it would set, and they win
        known: set[str] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge):
            if not isinstance(key, str):
                raise _problem(
                    str(key) if isinstance(key, Guessed) else f"key {shorten(key)} is not text: quote it", node
                )
            if key in known:
                raise _problem(f"key {shorten(key)} stands twice", node)
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


def _problem(what: str, node: Any) -> yaml.YAMLError:
    """An error at a node or an event."""
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _unshared(value: Any) -> Any:
    """A copy in which each mapping stands once: YAML's aliases are one object, and an override of one stage would change
    all that were merged from its anchor."""
    if isinstance(value, dict):
        return {name: _unshared(part) for name, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def shorten(value: Any) -> str:
    """A value as an error names it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"
