"""What the exchange has cost so far."""

from dataclasses import asdict, dataclass


@dataclass
class Stats:
    """Totals since construction, of this rank.

    Bytes are what went to the communicator, padding included; a world of one sends none.
    """

    steps: int = 0
    skipped_steps: int = 0
    """Steps that all ranks skipped because one had a non-finite gradient."""
    dense_bytes: int = 0
    """What a dense fp32 exchange would have given to the communicator."""
    sent_bytes: int = 0
    received_bytes: int = 0
    """What reached this rank by the pattern's formula (a ring for a dense all-reduce)."""
    local_bytes: int = 0
    """Given to the communicator inside this host, by the hierarchical pattern; not in sent_bytes."""
    density: float = 1.0
    """Of the last step."""
    compress_seconds: float = 0.0
    """In selection, coding and decoding, as seen by the host."""
    exchange_seconds: float = 0.0
    """Blocked, waiting for other ranks."""
    under_way_seconds: float = 0.0
    """From the start of each exchange to its end, summed over buckets."""
    pattern: str = ""
    """Of the last step's first bucket."""

    def as_dict(self) -> dict[str, float | int | str]:
        """A flat dict, with what follows from the totals.

        compression_ratio = dense_bytes / sent_bytes, 1 if nothing was sent; overlap = 1 −
        exchange_seconds / under_way_seconds: the share of the exchanges' time in which this rank
        did something else, 0 without exchanges.
        """
        ratio = self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0
        blocked, total = self.exchange_seconds, self.under_way_seconds
        overlap = max(0.0, 1 - blocked / total) if total else 0.0
        return {**asdict(self), "compression_ratio": ratio, "overlap": overlap}
