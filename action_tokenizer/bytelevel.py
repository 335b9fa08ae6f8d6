"""Byte-level BPE's alphabet, and UTF-8 as a small automaton over intervals.

FAST writes one character per coefficient and byte-level BPE splits characters into UTF-8 bytes, so an id may begin or end within a
character. What such an id means depends on the bytes before it: `Pending` is exactly that memory.

Source: GPT-2 `encoder.py` (bytes_to_unicode); RFC 3629 (UTF-8).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

MAX_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)
"""Code points that UTF-8 cannot write."""
# First code point, and number of continuation bytes, by the kind of lead byte.
_LEADS = ((0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xEF, 2), (0xF0, 0xF4, 3))
_FIRST_OF_LENGTH = (0x0, 0x80, 0x800, 0x10000)


@cache
def byte_to_char() -> dict[int, str]:
    """The printable character by which byte-level BPE files write each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def char_to_byte() -> dict[str, int]:
    """The inverse of `byte_to_char`."""
    return {char: byte for byte, char in byte_to_char().items()}


def token_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for, as the `tokenizers` ByteLevel decoder reads it.

    An entry with a character outside the byte alphabet (published FAST vocabularies hold some, which encoding never emits) stands
    for its own UTF-8 bytes.
    """
    table = char_to_byte()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode("utf-8")


class Pending(NamedTuple):
    """A character of which the first bytes have been read.

    left: continuation bytes still to come. low, high: what these bytes, read as one base-64 number, may be (inclusive): this is how
    overlong forms, surrogates and code points out of bounds are excluded.
    """

    left: int
    low: int
    high: int


START = Pending(0, 0, 0)
"""Between two characters."""


def step(pending: Pending, byte: int, lowest: int, highest: int) -> tuple[Pending, int] | None:
    """Read one byte. Returns (what is pending now, characters completed: 0 or 1), or None where no permitted character goes on so.

    lowest, highest: the code points that are permitted, inclusive.
    """
    if pending == START:
        return _lead(byte, lowest, highest)
    if byte & 0xC0 != 0x80:
        return None
    return _narrow(pending.left - 1, pending.low - ((byte & 0x3F) << 6 * (pending.left - 1)),
                   pending.high - ((byte & 0x3F) << 6 * (pending.left - 1)))


def _lead(byte: int, lowest: int, highest: int) -> tuple[Pending, int] | None:
    for first, last, left in _LEADS:
        if first <= byte <= last:
            base = (byte & (0x7F, 0x1F, 0x0F, 0x07)[left]) << 6 * left
            low = max(lowest, _FIRST_OF_LENGTH[left])
            # 0xED leads D000..DFFF, of which the upper half are surrogates.
            high = min(highest, SURROGATES.start - 1 if byte == 0xED else MAX_CODE_POINT)
            return _narrow(left, low - base, high - base)
    return None


def _narrow(left: int, low: int, high: int) -> tuple[Pending, int] | None:
    """The state in which `left` continuation bytes must spell a number in [low, high]."""
    low, high = max(low, 0), min(high, 64**left - 1)
    if low > high:
        return None
    return (START, 1) if left == 0 else (Pending(left, low, high), 0)
