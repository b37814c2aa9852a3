"""Ends a rank when another rank has ended early. Without this it would wait for that rank in a collective.

A rank that fails announces it in the store of the process group, which all ranks ask once a second.
"""

import json
import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

_KEY, _NOTICED_KEY = "ended-early", "noticed"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0  # for a rank that has the same error, so that it reports it itself
_NOTICE_SECONDS = 20.0  # in which all living ranks notice an announcement
_STORE_TIMEOUT = timedelta(seconds=10)

_monitor: "PeerMonitor | None" = None


class PeerMonitor:
    """Watches for the announcement of another rank from a thread. There is one in a process at a time.

    Args:
        store: The store of the process group; the monitor connects to it anew.
        rank: The rank of this process.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        global _monitor
        _monitor = self
        self.store, self.rank = store.clone(), rank
        self.store.set_timeout(_STORE_TIMEOUT)
        self.closed = threading.Event()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def announce(self, code: int, reason: str) -> None:
        """Make all other ranks exit with `code`, unless they are ending themselves."""
        self.close()
        with suppress(dist.DistError):  # the process with the store has ended, and the launcher ends the others
            self.store.set(_KEY, json.dumps({"rank": self.rank, "code": code, "reason": reason}))

    def notice(self) -> None:
        """Tell the other ranks that this one knows of an announcement."""
        self.store.set(f"{_NOTICED_KEY}-{self.rank}", "")

    def follow(self) -> None:
        """Exit as another rank has announced, if one has. Its end makes collectives fail in this rank."""
        with suppress(dist.DistError):
            if self.store.check([_KEY]):
                self._exit(self.store.get(_KEY))

    def close(self) -> None:
        """Stop watching."""
        global _monitor
        self.closed.set()
        _monitor = None

    def _watch(self) -> None:
        with suppress(dist.DistError):
            while not self.store.check([_KEY]):
                if self.closed.wait(_POLL_SECONDS):
                    return
            if self.closed.is_set():
                return
            announcement = self.store.get(_KEY)  # now, because the rank that announces may have the store
            self.notice()
            if not self.closed.wait(_GRACE_SECONDS):
                self._exit(announcement)

    def _exit(self, announcement: bytes) -> None:
        ended = json.loads(announcement)
        message = f"rank {ended['rank']} has ended, so this one ends as well: {ended['reason']}"
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(ended["code"])


def ending() -> None:
    """Say that this rank is ending by itself, so that the announcement of another rank does not interrupt it."""
    if _monitor:
        _monitor.close()


def stop_together(code: int, reason: str) -> bool:
    """Announce that this rank stops, and wait until all ranks have noticed it.

    Returns False if one does not: it has failed or was killed, and its launcher asks the others to stop as well.
    """
    monitor = _monitor
    if monitor is None:
        return True
    monitor.announce(code, reason)
    try:
        monitor.notice()
        ranks = range(dist.get_world_size())
        monitor.store.wait([f"{_NOTICED_KEY}-{rank}" for rank in ranks], timedelta(seconds=_NOTICE_SECONDS))
    except dist.DistNetworkError:
        pass  # the process with the store has ended, after all ranks had noticed
    except dist.DistStoreError:
        return False
    return True
