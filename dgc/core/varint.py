"""Numbers in bytes: as many as they need."""


def varint(number: int) -> bytes:
    """LEB128, of 0 or more: seven bits a byte, lowest first, the top bit set on all but the last.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
