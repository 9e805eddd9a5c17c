"""A pickle read as data: nothing in it is imported, called or built.

Time and memory grow with the bytes of the pickle. Python's own unpickler cannot promise that, even
if it is given no classes: a few bytes make it allocate gigabytes (``LONG_BINPUT``) or hash nested
tuples for ever (a dict's key).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_NAME_LENGTH = 200
_Asked = Callable[[str], bool]


class ForbiddenError(ValueError):
    """A pickle names something that has no business there."""


@dataclass(eq=False, slots=True)
class Global:
    """What a pickle would import, such as ``"torch Size"``."""

    name: str


# Printed, one that is in another again and again never ends.
@dataclass(eq=False, repr=False, slots=True)
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


def parse(content: bytes, known: _Asked, stored: _Asked = lambda _: False) -> Any:
    """Return what a pickle describes, with :class:`Made` in the place of objects.

    Args:
        content: The pickle.
        known: Whether it may name a class or function, given as ``"module name"``.
        stored: Whether it may name another one as the class of an object, without a call.

    Raises:
        ForbiddenError: It names another one.
        ValueError: It is damaged, truncated, or uses what DCP and ``torch.save`` never use.
    """
    machine, stream = _Machine(known, stored), io.BytesIO(content)
    read, memo = stream.read, machine.memo
    try:
        while (code := read(1)) != _STOP:
            # Most of a large pickle is these, and what they do is done here for speed.
            if code == _MEMOIZE:
                memo[len(memo)] = machine.stack[-1]
            elif code in _GETS:
                machine.stack.append(memo[int.from_bytes(read(_GETS[code]), "little")])
            elif code not in _OPCODES:
                raise ValueError(f"found {code!r} at byte {stream.tell() - 1}, expected an opcode")
            else:
                _OPCODES[code](machine, (reader := _READERS[code]) and reader(stream))
        return machine.stack.pop()
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{error!r} before byte {stream.tell()}") from error


def typed(value: Any, kind: type) -> Any:
    """Return a value if it is of a kind.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"found {type(value).__name__}, expected {kind.__name__}")
    return value


class _Machine:
    def __init__(self, known: _Asked, stored: _Asked) -> None:
        self.known, self.stored = known, stored
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def mark(self) -> None:
        """Begin a stack of its own, so that nothing below is taken by what expects more values."""
        self.below_marks.append(self.stack)
        self.stack = []

    def pop(self, count: int) -> tuple[Any, ...]:
        """Take the last values from the stack."""
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def pop_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below_marks.pop()
        return values


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _extend(machine: _Machine, values: Sequence[Any]) -> None:
    typed(machine.stack[-1], list).extend(values)


def _update(machine: _Machine, values: Sequence[Any]) -> None:
    target = typed(machine.stack[-1], dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        # A tuple of tuples of tuples takes for ever to hash.
        if not isinstance(key, (str, int, Made)):
            raise ValueError(f"a {type(key).__name__} as a key")
        target[key] = value


def _import(machine: _Machine, module: Any, name: Any) -> None:
    # Before anything looks at it: a pickle can name one long name again and again.
    length = len(typed(module, str)) + len(typed(name, str))
    if length > _NAME_LENGTH:
        raise ForbiddenError(f"a name of {length} characters")
    if not (machine.known(f"{module} {name}") or machine.stored(f"{module} {name}")):
        raise ForbiddenError(f"{module:.60}.{name:.60}")
    machine.stack.append(Global(f"{module} {name}"))


def _make(machine: _Machine, is_call: bool) -> None:
    arguments, name = typed(machine.stack.pop(), tuple), typed(machine.stack.pop(), Global).name
    if is_call and not machine.known(name):
        raise ForbiddenError(name.replace(" ", ".")[:120])
    ordered_dict = name == "collections OrderedDict" and not arguments
    machine.stack.append({} if ordered_dict else Made(name, arguments))


def _set_state(machine: _Machine, _: None) -> None:
    state = machine.stack.pop()
    if not isinstance(machine.stack[-1], dict):  # a module's state dict has attributes
        typed(machine.stack[-1], Made).state = state


def _memoize(machine: _Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


_OPCODES: dict[bytes, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys([pickle.PROTO, pickle.FRAME], lambda m, _: None),
    pickle.MARK: lambda m, _: m.mark(),
    pickle.NONE: lambda m, _: m.stack.append(None),
    pickle.NEWTRUE: lambda m, _: m.stack.append(True),
    pickle.NEWFALSE: lambda m, _: m.stack.append(False),
    **dict.fromkeys([pickle.BININT1, pickle.BININT2, pickle.BININT, pickle.LONG1], _push),
    **dict.fromkeys([pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8], _push),
    **dict.fromkeys([pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINFLOAT], _push),
    pickle.EMPTY_TUPLE: lambda m, _: m.stack.append(()),
    pickle.TUPLE1: lambda m, _: m.stack.append((m.stack.pop(),)),
    pickle.TUPLE2: lambda m, _: m.stack.append(m.pop(2)),
    pickle.TUPLE3: lambda m, _: m.stack.append(m.pop(3)),
    pickle.TUPLE: lambda m, _: _push(m, tuple(m.pop_to_mark())),
    pickle.EMPTY_LIST: lambda m, _: m.stack.append([]),
    pickle.APPEND: lambda m, _: _extend(m, m.pop(1)),
    pickle.APPENDS: lambda m, _: _extend(m, m.pop_to_mark()),
    pickle.EMPTY_DICT: lambda m, _: m.stack.append({}),
    pickle.SETITEM: lambda m, _: _update(m, m.pop(2)),
    pickle.SETITEMS: lambda m, _: _update(m, m.pop_to_mark()),
    pickle.GLOBAL: lambda m, names: _import(m, *names.split(" ", 1)),
    pickle.STACK_GLOBAL: lambda m, _: _import(m, *m.pop(2)),
    pickle.NEWOBJ: lambda m, _: _make(m, is_call=False),
    pickle.REDUCE: lambda m, _: _make(m, is_call=True),
    pickle.BUILD: _set_state,
    pickle.BINPERSID: lambda m, _: m.stack.append(Made("", m.pop(1))),
    **dict.fromkeys([pickle.BINPUT, pickle.LONG_BINPUT], _memoize),
}
_READERS = {op.code.encode("latin-1"): op.arg and op.arg.reader for op in pickletools.opcodes}
"""What reads the argument that stands behind an opcode, if it has one."""
_STOP, _MEMOIZE, _GETS = pickle.STOP, pickle.MEMOIZE, {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
