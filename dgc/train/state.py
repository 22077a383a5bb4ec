"""The head of a saved state: whose it is, and whether it can be loaded here."""

from collections.abc import Iterable, Mapping
from typing import Any

from dgc.comm.base import Communicator
from dgc.errors import StateError

STATE_VERSION = 3
BEFORE_STEP = "a state between backward() and step() lacks what is sent: step() first"
KEYS = ("unit", "local_momentum", "with_momentum", "second_moments", "updates", "step", "memory")


def header(comm: Communicator) -> dict[str, int]:
    """What a state says of itself."""
    return {"version": STATE_VERSION, "rank": comm.rank, "world_size": comm.world_size}


def check_header(state: Mapping[str, Any], comm: Communicator, keys: Iterable[str]) -> None:
    """Raise `StateError` unless `state` was written here, by this version, and is whole."""
    if "version" not in state:
        raise StateError(
            f"this is not a state of dgc: its keys are {sorted(map(str, state))[:8]}; give what "
            "state_dict() returned"
        )
    for key, value in header(comm).items():
        if state.get(key) != value:
            hints = {
                "rank": ": every rank saves its own state and loads its own",
                "world_size": ": dgc.train.checkpoint.resize makes the states of one fit another",
            }
            raise StateError(
                f"this state has {key} {state.get(key)}, here it is {value}" + hints.get(key, "")
            )
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise StateError(f"this state lacks {', '.join(missing)}: it is of something else")
