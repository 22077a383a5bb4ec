"""A progress bar where one was asked for."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar, cast

from dgc.errors import MissingPackageError

Item = TypeVar("Item")


def bar(items: Sequence[Item], what: str, show: bool) -> Iterable[Item]:
    """`items`, with a tqdm bar named `what` on standard error if `show`.

    Raises:
        MissingPackageError: if a bar was asked for and tqdm is not installed.

    Example:
        >>> list(bar([1, 2], "counting", show=False))
        [1, 2]
    """
    if not show:
        return items
    if find_spec("tqdm") is None:
        raise MissingPackageError("a progress bar needs tqdm: pip install tqdm")
    import tqdm

    return cast(Iterable[Item], tqdm.tqdm(items, desc=what, leave=False))
