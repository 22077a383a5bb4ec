"""Bounded reading of untrusted bytes."""

from dgc.errors import FileError


class Reader:
    """Takes bytes from the front of `data`; asking for more than there are is a `FileError`."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            left = len(self._data) - self._at
            raise FileError(f"{count} bytes wanted where {left} are left: the file is damaged")
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        """An integer below 2^56, in the shortest form only."""
        value = 0
        for place in range(8):
            byte = self.byte()
            value |= (byte & 127) << 7 * place
            if byte < 128:
                if place and not byte:
                    break
                return value
        raise FileError("a number that is too long: the file is damaged")

    def finish(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            left = len(self._data) - self._at
            raise FileError(f"{left} bytes left over in a record: the file is damaged")
