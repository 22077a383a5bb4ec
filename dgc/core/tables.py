"""Short tables that are made once for the same arguments, and kept by what was recorded with them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_here = threading.local()


class Table(Generic[P, T]):
    """Decorator: remembers what a function returned for the last 1024 different arguments.

    Recorded work reads tensors where they were, without this function: a step of it must not find
    other tensors there, so within `keeping` they are kept beyond that.

    Example:
        >>> @Table
        ... def squares(count: int) -> list[int]:
        ...     return [i * i for i in range(count)]
        >>> with keeping() as kept:
        ...     same = squares(3) is squares(3)
        >>> same, kept
        (True, [[0, 1, 4], [0, 1, 4]])
    """

    def __init__(self, function: Callable[P, T]) -> None:
        cached = lru_cache(maxsize=1024)(function)
        self._cached: Callable[P, T] = cached
        self.cache_clear = cached.cache_clear
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        found = self._cached(*args, **kwargs)
        kept: list[object] | None = getattr(_here, "kept", None)
        if kept is not None:
            kept.append(found)
        return found


@contextmanager
def keeping() -> Iterator[list[object]]:
    """The tables that this thread looks up meanwhile, as a list that grows."""
    kept: list[object] = []
    _here.kept = kept
    try:
        yield kept
    finally:
        _here.kept = None
