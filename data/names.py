r"""Names of images and classes as text, and the text files that hold one name per line.

A file name is any sequence of bytes: it may hold a line break, or not be UTF-8. In every list, table, page, log line
and message a name has one form, which is one line of valid Unicode: `\\` is a backslash; `\n`, `\r` and `\t` are what
they are in Python; `\xNN` is a byte of a control character, of a space at either end, or of text that is not UTF-8.
`to_text` writes this form and `from_text` recovers the bytes.
"""

import codecs
import re
from pathlib import Path

_SPECIAL = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]|\\A\\s|\\s\\Z")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([\\nrt]))")
_BYTES = {b"\\": b"\\", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def to_text(name: bytes | str) -> str:
    """Return a name, as bytes or decoded with surrogateescape, in the form above."""
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    return _SPECIAL.sub(_escape, name)


def from_text(text: str) -> bytes:
    """Return the bytes of a name that `to_text` wrote. Other backslashes in `text` stand for themselves."""
    encoded = text.encode("utf-8", "surrogateescape")
    return _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()) if match[1] else _BYTES[match[2]], encoded)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, decoded with surrogateescape.

    A byte order mark (UTF-8 or UTF-16), the line ends of Windows, blanks around a line, and empty lines at the end are
    not part of the result.

    Raises OSError if the file cannot be read.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Windows PowerShell's `>`
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char in _SHORT:
        return _SHORT[char]
    # A lone surrogate is a byte that surrogateescape kept, or comes from JSON.
    encoded = char.encode("utf-8", "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)
