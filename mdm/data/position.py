"""Where a run is in its data: one state of all ranks together, from which any number of them goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torchdata.nodes as tn

from components.data.nodes import gathered


def whole_state(loader: tn.Loader, gather: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    """Where a loader is, of all ranks together: what any number of ranks goes on from. All ranks take part.

    gather: the values of a rank -> those of all ranks
    """
    state = copy.deepcopy(loader.state_dict())
    own = _position(state)
    own |= gathered(gather([dict(own)]))
    return state


def load_state(loader: tn.Loader, state: dict[str, Any]) -> bool:
    """Goes on from a whole state. False for one of an earlier version, whose rows came in another order: it begins at the same
    row of the mix."""
    own = _position(state)
    known = "lanes" in own
    if not known:
        row = own["mix"]["row"]
        own.clear()
        own |= {"row": row, "lanes": {}}
    loader.load_state_dict(state)
    return known


def _position(state: dict[str, Any]) -> dict[str, Any]:
    """The state of `MicroBatches` in that of the nodes around it."""
    while "lanes" not in state and "mix" not in state:
        state = next(value for value in state.values() if isinstance(value, dict))
    return state
