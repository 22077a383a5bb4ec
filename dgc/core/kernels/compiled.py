"""How a loop is compiled: on first use, and kept on disk where that is possible."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

from dgc.errors import ConfigError

_Files: Any = FunctionCache


class _Disk(_Files):  # type: ignore[misc]
    """numba's files only save time: what cannot be read or written there is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # damaged bytes may raise anything
            self._forget()
            return None
        # Processes that keep different types at the same time may have given both one file.
        return found if found is not None and found.signature.args == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._forget()
            _warn(str(error))

    def _forget(self) -> None:
        # The index, which numba writes first: what it names may be damaged, or of an older source.
        with suppress(OSError):
            Path(self._cache_file._index_path).unlink()


def _warn(reason: str) -> None:
    warnings.warn(
        f"compiled loops cannot be kept on disk ({reason}), so each start compiles them again: "
        "let NUMBA_CACHE_DIR name a folder that can be written and has room",
        stacklevel=2,  # all from here, so that it is shown once
    )


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: numba compiles with `options`; the loop does not hold the interpreter's lock."""

    def decorate(function: Callable[..., Any]) -> Any:
        loop = njit(nogil=True, **options)(function)
        if loop is function:
            raise ConfigError(
                "NUMBA_DISABLE_JIT is set, but the loops find gradients by their addresses, which "
                "only compiled code can: unset it"
            )
        try:
            loop._cache = _Disk(function)
        except (OSError, RuntimeError):
            _warn("no folder can be written")
        return loop

    return decorate


kernel = compiled()
# A division by zero gives inf or nan, as everywhere else, and no exception: that cannot be vectorised.
dividing = compiled(error_model="numpy")
reassociating = compiled(fastmath={"reassoc"})
