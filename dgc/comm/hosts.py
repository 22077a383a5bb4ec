"""Which ranks share a host."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from dgc.comm.base import Communicator
from dgc.errors import ConfigError


class Hosts(NamedTuple):
    """H hosts of L ranks each.

    Attributes:
        inside: the L ranks of this host.
        between: the H ranks that have the same place in their host as this one.
    """

    inside: Communicator
    between: Communicator

    @classmethod
    def of(cls, comm: Communicator) -> "Hosts":
        """Find them by the name of each rank's host, and when it was booted; every rank calls it.

        Raises:
            ConfigError: hosts have different numbers of ranks.
        """
        digest = hashlib.sha256(f"{comm.host} {_boot()}".encode()).digest()[:7]
        own = torch.tensor([int.from_bytes(digest, "little")], device=comm.device)
        names = comm.all_gather(own).wait().view(-1).tolist()
        sizes = {name: names.count(name) for name in names}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"hosts have {sorted(sizes.values())} ranks: pattern 'hierarchical' needs the same "
                "number on each; use another pattern"
            )
        name, place = names[comm.rank], names[: comm.rank].count(names[comm.rank])
        inside = comm.split(names.index(name))
        return cls(inside, comm.split(place))


def _boot() -> str:
    """Machines of one name, as copies of one image are, have been booted apart; "" if not known."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""
