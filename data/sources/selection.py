"""Selects the images that a listing takes from a folder or an archive, and counts what it leaves out."""

from collections import Counter

from data.names import to_text

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp")
# Folders of operating systems and file servers, which may hold thumbnails or be forbidden to read.
SYSTEM_FOLDERS = frozenset(
    {b"lost+found", b"__MACOSX", b"@eaDir", b"#recycle", b"#snapshot", b"$RECYCLE.BIN", b"System Volume Information"}
)

HIDDEN = "hidden or of the system"
OTHER = "other files"
SPECIAL = "neither files nor folders"
EMPTY = "folders without images"
LOOP = "links to a folder above them"


def is_hidden(part: bytes) -> bool:
    """Return whether a file or folder is hidden, such as ._1.jpg and .thumbnails, or a folder of the system."""
    return part.startswith(b".") or part in SYSTEM_FOLDERS


class LeftOut:
    """Counts what a listing leaves out, by reason, with an example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, name: bytes | str) -> None:
        """Count a file or folder."""
        self._counts[reason] += 1
        self._examples.setdefault(reason, to_text(name))

    def update(self, other: "LeftOut") -> None:
        """Add the counts of another part of the listing."""
        self._counts.update(other._counts)
        self._examples = other._examples | self._examples

    def __str__(self) -> str:
        if not self._counts:
            return "nothing"
        reasons = self._counts.items()
        return "; ".join(f"{reason}: {count:,} (such as {self._examples[reason]})" for reason, count in reasons)
