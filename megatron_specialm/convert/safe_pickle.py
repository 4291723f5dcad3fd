"""Pickles read without executing anything.

A pickle is a program for a small stack machine, which may call any function that it can import. Here the program runs on a
machine that imports nothing: a table says which globals it may name, and what stands for each. Any other is refused.
"""

import contextlib
import functools
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import read_regular, reading

P = ParamSpec("P")
Opened = TypeVar("Opened")
_Open = Callable[Concatenate[Path, P], Opened]
MOST_BYTES = 2**30
COPY_AGAIN = "copy the checkpoint again from where it was written"
_MOST_STEPS = 2**25  # opcodes; each may make an object
_MOST_DEPTH = 100
_MOST_VALUES = 2**26  # counted as often as a reader that follows all references would meet them


@dataclass(frozen=True)
class Maker:
    """Stands for a class or a function: called with the arguments in the pickle, it returns plain data."""

    make: Callable[..., Any]


class Inert:
    """An object of a class that is not imported: the class's name, the constructor's arguments, and the state."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __repr__(self) -> str:
        return f"{self.name}{self.arguments}"

    @property
    def fields(self) -> dict[str, Any]:
        """The state of an object that has only attributes.

        Raises:
            TypeError: the state is of another kind.
        """
        if not isinstance(self.state, dict):
            raise TypeError(f"{self.name} has no attributes")
        return self.state


def inert(*names: str) -> dict[str, Maker]:
    """Table entries for classes whose objects become `Inert`."""

    def maker(name: str) -> Maker:
        return Maker(lambda *arguments: Inert(name, *arguments))

    return {name: maker(name) for name in names}


# Classes of the standard library and NumPy that settings and random states contain.
PLAIN: dict[str, Any] = {
    "builtins.set": Maker(lambda items=(): list(items)),
    "collections.OrderedDict": Maker(lambda: {}),  # pickle adds the items afterwards, where keys are checked
    "collections.defaultdict": Maker(lambda *_: {}),
    **inert(
        "builtins.bytearray", "builtins.complex", "builtins.dict", "builtins.frozenset", "builtins.int", "builtins.list",
        "builtins.slice", "datetime.timedelta", "signal.Signals",
        "_codecs.encode", "argparse.Namespace", "pathlib.PosixPath", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ),
}  # fmt: skip


def read_pickle(path: Path, allowed: Mapping[str, Any]) -> Any:
    """The content of a file that is a plain pickle; see `parse_pickle`."""
    with decoding(path, "a pickle"):
        return parse_pickle(read_regular(path, most_bytes=MOST_BYTES), path, allowed)


def parse_pickle(
    data: bytes, path: Path, allowed: Mapping[str, Any], *, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The content of a pickle of protocol 2 or later.

    Args:
        path: the file, for messages.
        allowed: what stands for each global that the pickle may name, by `module.name`, or by `package.*` for all of a
            package: a `Maker`, or a constant.
        persistent: turns a persistent id, which stands for data outside of the pickle, into a value.

    Raises:
        CheckpointError: it names another global, is damaged, refers to itself, or is nested too deep.
    """
    with decoding(path, "a pickle"):
        value = _Machine(path, allowed, persistent).run(data)
    _check_nesting(value, path)
    return value


@contextlib.contextmanager
def decoding(path: Path, form: str) -> Iterator[None]:
    """Raise any error of reading a file of another program as a `CheckpointError` that names it."""
    try:
        with reading(path, form=form, remedy=COPY_AGAIN):
            yield
    except CheckpointError:
        raise
    except ArtifactError as error:
        raise CheckpointError(str(error)) from None


def opens(form: str) -> Callable[[_Open[P, Opened]], _Open[P, Opened]]:
    """Decorate a function that opens a folder of another program, whose settings and names may be anything: its errors are
    raised as by `decoding`."""

    def decorate(function: _Open[P, Opened]) -> _Open[P, Opened]:
        @functools.wraps(function)
        def opening(path: Path, /, *args: P.args, **kwargs: P.kwargs) -> Opened:
            with decoding(path, form):
                return function(path, *args, **kwargs)

        return opening

    return decorate


class _Machine:
    """Runs a pickle's opcodes (the module `pickletools` describes each)."""

    def __init__(self, path: Path, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self._path, self._allowed, self._persistent = path, allowed, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        steps = {name[4:].upper(): getattr(self, name) for name in dir(self) if name.startswith("_do_")}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == _MOST_STEPS:
                raise ValueError(f"it has more than {_MOST_STEPS} steps, more than any checkpoint")
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in steps:
                steps[opcode.name](argument)
            else:
                raise ValueError(f"the opcode {opcode.name} is not used by checkpoints")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _do_proto(self, _: int) -> None: ...
    def _do_frame(self, _: int) -> None: ...
    def _do_stop(self, _: None) -> None: ...

    def _do_mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _do_pop(self, _: None) -> None:
        self._stack.pop()

    def _do_pop_mark(self, _: None) -> None:
        self._since_mark()

    def _do_dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _do_memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_binput(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    _do_long_binput = _do_binput

    def _do_binget(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _do_long_binget = _do_binget

    def _do_tuple(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _do_tuple1(self, _: None, count: int = 1) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _do_tuple2(self, _: None) -> None:
        self._do_tuple1(None, 2)

    def _do_tuple3(self, _: None) -> None:
        self._do_tuple1(None, 3)

    def _do_append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _do_appends(self, _: None) -> None:
        self._extend(self._since_mark())

    _do_additems = _do_appends

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _do_setitem(self, _: None) -> None:
        value = self._stack.pop()
        self._update([self._stack.pop(), value])

    def _do_setitems(self, _: None) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        for key in items[::2]:
            parts = key if isinstance(key, tuple) else (key,)
            if any(isinstance(part, tuple | list | dict) for part in parts):  # hashing could take for ever
                raise ValueError("the key of a dictionary is nested")
        self._top(dict).update(zip(items[::2], items[1::2], strict=True))

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"{type(self._stack[-1]).__name__} where a {kind.__name__} is expected")
        return self._stack[-1]

    def _do_global(self, name: str) -> None:
        self._push_global(*name.split(" ", 1))

    def _do_stack_global(self, _: None) -> None:
        name = self._stack.pop()
        self._push_global(self._stack.pop(), name)

    def _push_global(self, module: str, name: str) -> None:
        found = f"{'builtins' if module == '__builtin__' else module}.{name}"  # as protocol 2 calls it
        package = next((own for own in self._allowed if own.endswith(".*") and found.startswith(own[:-1])), None)
        if found in self._allowed:
            self._stack.append(self._allowed[found])
        elif package is not None:
            self._stack.append(inert(found)[found])
        else:
            raise CheckpointError(
                f"{self._path}: asks for {found}, which no checkpoint of this format needs. Nothing was executed. Do not load "
                "this file with torch.load or pickle unless you trust who wrote it"
            )

    def _do_reduce(self, _: None) -> None:
        arguments = self._stack.pop()
        maker = self._stack.pop()
        if not isinstance(maker, Maker):
            raise ValueError(f"calls {type(maker).__name__}, which is no global")
        self._stack.append(maker.make(*arguments))

    _do_newobj = _do_reduce

    def _do_build(self, _: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Inert):
            self._stack[-1].state = state
        # Attributes of dictionaries and tensors, as torch's `_metadata` of a state dict, are not used.

    def _do_binpersid(self, _: None) -> None:
        if self._persistent is None:
            raise ValueError("it refers to data outside of it")
        self._stack.append(self._persistent(self._stack.pop()))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _check_nesting(root: Any, path: Path) -> None:
    """Refuse what would take those that follow its references too long, or too deep."""
    sizes: dict[int, tuple[int, int]] = {}  # of containers: depth, number of values
    around: set[int] = set()
    pending = [(root, False)]
    while pending:
        value, done = pending.pop()
        if id(value) in sizes:
            continue
        inner = [child for child in _children(value) if isinstance(child, _CONTAINERS)]
        if done:
            depth = 1 + max((sizes[id(child)][0] for child in inner), default=0)
            count = 1 + len(_children(value)) + sum(sizes[id(child)][1] for child in inner)
            if depth > _MOST_DEPTH or count > _MOST_VALUES:
                raise CheckpointError(
                    f"{path}: nested {depth} deep with {count} values, more than any checkpoint ({_MOST_DEPTH}, "
                    f"{_MOST_VALUES}): it is damaged, or made to exhaust the reader"
                )
            sizes[id(value)] = depth, count
            around.discard(id(value))
        elif id(value) in around:
            raise CheckpointError(f"{path}: a value contains itself: it is damaged, or made to exhaust the reader")
        else:
            around.add(id(value))
            pending.append((value, True))
            pending += [(child, False) for child in inner]


_CONTAINERS = (list, tuple, dict, Inert)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Inert):
        return [*value.arguments, value.state]
    return list(value) if isinstance(value, list | tuple) else []
