"""Unreadable images of a run: each rank lists its own in a file, and too many of them end the run."""

import logging
import re
from pathlib import Path

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


class UnreadableImages:
    """The images that could not be read. Each is listed once, in a file of the rank that tried to read it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"unreadable-{rank}.txt"
        content = self.path.read_bytes() if self.path.exists() else b""
        self.listed = {int(sample) for sample in re.findall(rb"^(\d+)\t", content, re.MULTILINE)}  # indices of samples
        self.encountered: set[int] = set()  # since this start; includes those of other ranks after `check_limit`
        self.shared = 0  # the size of `encountered` when the ranks last exchanged it

    def add(self, bad: list[tuple[int, str]]) -> None:
        """Record the unreadable images of a batch, given as (sample index, reason)."""
        for sample, reason in bad:
            self.encountered.add(sample)
            if sample not in self.listed:
                self.listed.add(sample)
                log.warning("image %d cannot be read, another image replaces it: %s", sample, reason)
                try:
                    with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.write(f"{sample}\t{reason}\n")
                except OSError as error:
                    log.warning("cannot write %s: %s", self.path, error)

    def total(self) -> int:
        """Return the number of listed images, summed over all ranks. Called by all ranks."""
        count = torch.tensor(len(self.listed))
        dist.all_reduce(count)
        return int(count)

    def check_limit(self, seen: int, max_share: float) -> None:
        """Raise ValueError, on all ranks, if too many images were unreadable since this start. Called by all ranks.

        Args:
            seen: Number of images that all ranks have read since this start.
            max_share: Largest accepted share of unreadable images. It is applied to at least 1,000 images, so that
                a few unreadable ones at the beginning do not end the run.
        """
        news = torch.tensor(len(self.encountered) - self.shared)
        dist.all_reduce(news)
        if news > 0:
            of_ranks: list[set[int]] = [set()] * dist.get_world_size()
            dist.all_gather_object(of_ranks, self.encountered)
            self.encountered.update(*of_ranks)
            self.shared = len(self.encountered)
        if len(self.encountered) > max_share * max(seen, 1000):
            raise ValueError(
                f"{len(self.encountered):,} of {seen:,} images cannot be read, more than "
                f"data.max_unreadable={max_share:g} allows; they are listed in {self.path.parent}/unreadable-*.txt"
            )
