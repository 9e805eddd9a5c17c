"""A pickle read as data: nothing in it is imported, called or built.

Time and memory grow with the bytes of the pickle. Python's own unpickler cannot promise that, even
if it is given no classes: a few bytes make it allocate gigabytes (``LONG_BINPUT``) or hash nested
tuples for ever (a dict's key).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NAME_LENGTH = 200


class ForbiddenError(ValueError):
    """A pickle names something that has no business there."""


@dataclass(eq=False)
class Global:
    """What a pickle would import, such as ``"torch Size"``."""

    name: str


@dataclass(eq=False)
class Made:
    """What a pickle would build.

    Attributes:
        name: The class or function, such as ``"torch Size"``; empty for a reference to something
            stored outside the pickle.
        arguments: What it would be called with.
        state: What it would be given afterwards.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def parse(content: bytes, known: Callable[[str], bool]) -> Any:
    """Return what a pickle describes, with :class:`Made` in the place of objects.

    Args:
        content: The pickle.
        known: Whether it may name a class or function, given as ``"module name"``.

    Raises:
        ForbiddenError: It names another one.
        ValueError: It is damaged, truncated, or uses what DCP and ``torch.save`` never use.
    """
    machine = _Machine(content, known)
    try:
        while (code := machine.byte()) != _STOP:
            if code not in _OPCODES:
                raise ValueError(f"the opcode {code:#04x} at byte {machine.at - 1}")
            _OPCODES[code](machine)
        return machine.stack.pop()
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{type(error).__name__} at byte {machine.at}") from error


class _Machine:
    def __init__(self, content: bytes, known: Callable[[str], bool]) -> None:
        self.content, self.known, self.at = content, known, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]

    def number(self, form: struct.Struct) -> int:
        self.at += form.size
        return int(form.unpack_from(self.content, self.at - form.size)[0])

    def bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self.content) - self.at:
            raise ValueError(f"it ends within a value of {count} bytes at byte {self.at}")
        self.at += count
        return self.content[self.at - count : self.at]

    def line(self) -> str:
        return self.bytes(self.content.index(b"\n", self.at) + 1 - self.at)[:-1].decode()

    def taken(self, count: int) -> list[Any]:
        """Take the last values from the stack."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise ValueError(f"a value is missing at byte {self.at}")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def taken_to_mark(self) -> list[Any]:
        first = self.marks.pop()
        values = self.stack[first:]
        del self.stack[first:]
        return values


def _text(machine: _Machine, form: struct.Struct) -> None:
    machine.stack.append(machine.bytes(machine.number(form)).decode())


def _tuple(machine: _Machine, count: int) -> None:
    machine.stack.append(tuple(machine.taken(count)))


def _extend(machine: _Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise ValueError(f"an append to a {type(target).__name__} at byte {machine.at}")
    target.extend(values)


def _update(machine: _Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(values) % 2:
        raise ValueError(f"an item for a {type(target).__name__} at byte {machine.at}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # A tuple of tuples of tuples takes for ever to hash.
        if not isinstance(key, (str, Made)):
            raise ValueError(f"a {type(key).__name__} as a key at byte {machine.at}")
        target[key] = value


def _import(machine: _Machine, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"an import without a name at byte {machine.at}")
    # Before anything looks at it: a pickle can name one long name again and again.
    if len(module) + len(name) > _NAME_LENGTH:
        raise ForbiddenError(f"a name of {len(module) + len(name)} characters")
    if not machine.known(f"{module} {name}"):
        raise ForbiddenError(f"{module:.60}.{name:.60}")
    machine.stack.append(Global(f"{module} {name}"))


def _make(machine: _Machine) -> None:
    what, arguments = machine.taken(2)
    if not isinstance(what, Global) or not isinstance(arguments, tuple):
        raise ValueError(f"a call of a {type(what).__name__} at byte {machine.at}")
    ordered_dict = what.name == "collections OrderedDict" and not arguments
    machine.stack.append({} if ordered_dict else Made(what.name, arguments))


def _set_state(machine: _Machine) -> None:
    (state,) = machine.taken(1)
    target = machine.stack[-1]
    if not isinstance(target, Made):
        raise ValueError(f"a state for a {type(target).__name__} at byte {machine.at}")
    target.state = state


def _memoize(machine: _Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


_U1, _U2, _U4, _U8, _I4 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i"))
_STOP = pickle.STOP[0]
_OPCODES: dict[int, Callable[[_Machine], object]] = {
    code[0]: action
    for code, action in {
        pickle.PROTO: lambda m: m.byte(),
        pickle.FRAME: lambda m: m.number(_U8),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT1: lambda m: m.stack.append(m.byte()),
        pickle.BININT2: lambda m: m.stack.append(m.number(_U2)),
        pickle.BININT: lambda m: m.stack.append(m.number(_I4)),
        pickle.LONG1: lambda m: m.stack.append(
            int.from_bytes(m.bytes(m.byte()), "little", signed=True)
        ),
        pickle.SHORT_BINUNICODE: lambda m: _text(m, _U1),
        pickle.BINUNICODE: lambda m: _text(m, _U4),
        pickle.BINUNICODE8: lambda m: _text(m, _U8),
        pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
        pickle.TUPLE1: lambda m: _tuple(m, 1),
        pickle.TUPLE2: lambda m: _tuple(m, 2),
        pickle.TUPLE3: lambda m: _tuple(m, 3),
        pickle.TUPLE: lambda m: m.stack.append(tuple(m.taken_to_mark())),
        pickle.EMPTY_LIST: lambda m: m.stack.append([]),
        pickle.APPEND: lambda m: _extend(m, m.taken(1)),
        pickle.APPENDS: lambda m: _extend(m, m.taken_to_mark()),
        pickle.EMPTY_DICT: lambda m: m.stack.append({}),
        pickle.SETITEM: lambda m: _update(m, m.taken(2)),
        pickle.SETITEMS: lambda m: _update(m, m.taken_to_mark()),
        pickle.GLOBAL: lambda m: _import(m, m.line(), m.line()),
        pickle.STACK_GLOBAL: lambda m: _import(m, *m.taken(2)),
        pickle.NEWOBJ: _make,
        pickle.REDUCE: _make,
        pickle.BUILD: _set_state,
        pickle.BINPERSID: lambda m: m.stack.append(Made("", (m.stack.pop(),))),
        pickle.MEMOIZE: lambda m: _memoize(m, len(m.memo)),
        pickle.BINPUT: lambda m: _memoize(m, m.byte()),
        pickle.LONG_BINPUT: lambda m: _memoize(m, m.number(_U4)),
        pickle.BINGET: lambda m: m.stack.append(m.memo[m.byte()]),
        pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number(_U4)]),
    }.items()
}
