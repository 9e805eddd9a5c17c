"""What the library asks of every kind of generator."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class GeneratorAdapter(Protocol):
    """How one generator is read, written, stored and seeded. Nothing here communicates.

    A state has two forms: the generator's own, which only :meth:`get` makes and :meth:`set` takes,
    and bytes, which go into the checkpoint. :meth:`pack` and :meth:`unpack` turn one into the
    other and leave the generator alone.

    Attributes:
        kind: What is stored, such as ``"numpy.PCG64"`` or ``"torch.cuda"``. A checkpoint of one
            kind is not loaded into another.

    Example:
        >>> class Counter:  # a generator of one's own
        ...     kind = "counter"
        ...
        ...     def __init__(self) -> None:
        ...         self.drawn = 0
        ...
        ...     def get(self) -> int:
        ...         return self.drawn
        ...
        ...     def set(self, state: int) -> None:
        ...         self.drawn = state
        ...
        ...     def pack(self, state: int) -> bytes:
        ...         return state.to_bytes(8, "little")
        ...
        ...     def unpack(self, packed: bytes) -> int:
        ...         if len(packed) != 8:
        ...             raise ValueError(f"the state has {len(packed)} bytes, expected 8")
        ...         return int.from_bytes(packed, "little")
        ...
        ...     def seed(self, value: int) -> None:
        ...         self.drawn = value
        >>> isinstance(Counter(), GeneratorAdapter)
        True
    """

    kind: str

    def get(self) -> Any:
        """Return the state without moving the stream; later draws must not change it.

        Raises:
            ValueError: The generator is in a state that cannot be stored.
        """
        ...

    def set(self, state: Any) -> None:
        """Put the generator into a state that :meth:`get` or :meth:`unpack` returned.

        ``state`` stays the caller's: later draws must not change it.
        """
        ...

    def pack(self, state: Any) -> bytes:
        """Return a state as bytes, at least one and always as many, on every rank.

        Raises:
            ValueError: The state cannot be stored.
        """
        ...

    def unpack(self, packed: bytes) -> Any:
        """Return the state that :meth:`pack` was given; it is the caller's own.

        Raises:
            ValueError: :meth:`set` would not take it.
        """
        ...

    def seed(self, value: int) -> None:
        """Start a stream that depends on every bit of ``value``, ``0 <= value < 2**64``.

        Below 2**32 it is the stream that the generator's own library starts from that seed.
        """
        ...
