"""GPT-2's alphabet of byte-level BPE: one printable character for each of the 256 bytes.

Files of byte-level BPE write tokens in this alphabet. A byte that is printable in Latin-1 stands
for itself. The other bytes have the characters from U+0100 on, in order.
"""

from __future__ import annotations


def _byte_symbols() -> dict[str, int]:
    """Character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


SYMBOL_TO_BYTE = _byte_symbols()
BYTE_TO_SYMBOL = {byte: symbol for symbol, byte in SYMBOL_TO_BYTE.items()}
NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""The 13 bytes that no UTF-8 text contains. The vocabulary of DeepSeek-V2 has no token for them."""


def to_symbols(token: bytes) -> str:
    """The bytes of a token, written in the alphabet."""
    return "".join(BYTE_TO_SYMBOL[byte] for byte in token)


def from_symbols(token: str) -> bytes:
    """The bytes of a token that is written in the alphabet.

    If it contains any other character, it stands for its own UTF-8 bytes, as in the library.
    """
    try:
        return bytes(SYMBOL_TO_BYTE[symbol] for symbol in token)
    except KeyError:
        return token.encode()
