"""A node of a pipeline: torchdata's `BaseNode`, with its types written down.

torchdata says nothing of them to a type checker, for which a node would yield anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

T_co = TypeVar("T_co", covariant=True)

if TYPE_CHECKING:

    class Node(Iterator[T_co]):
        """A node is an iterator with a state. A subclass has `reset`, `next` and `get_state`; who uses it calls `reset`, the
        built-in next() and `state_dict`."""

        def reset(self, initial_state: dict[str, Any] | None = None) -> None: ...
        def next(self) -> T_co: ...
        def get_state(self) -> dict[str, Any]: ...
        def state_dict(self) -> dict[str, Any]: ...
        def __next__(self) -> T_co: ...

else:
    from torchdata.nodes import BaseNode

    Node = BaseNode
