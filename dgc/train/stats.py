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
    density: float = 1.0
    """Of the last step."""
    compress_seconds: float = 0.0
    """In selection, coding and decoding, as seen by the host."""
    exchange_seconds: float = 0.0
    """Blocked, waiting for other ranks."""
    pattern: str = ""

    def as_dict(self) -> dict[str, float | int | str]:
        """A flat dict, with compression_ratio = dense_bytes / sent_bytes (1 if nothing was sent)."""
        ratio = self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0
        return {**asdict(self), "compression_ratio": ratio}
