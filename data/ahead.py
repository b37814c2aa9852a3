"""Makes items in a thread while the previous ones are in use."""

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

NAME = "batches"  # of the thread
_JOIN_SECONDS = 10.0


class _End:
    """Ends the items: with an error, or without."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def run_ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """Yield the items of a generator, which runs in a thread of its own: while an item is in use, it makes the next.

    The generator is closed in its thread when the iterator is. Its errors are raised here.
    """
    made: SimpleQueue[T | _End] = SimpleQueue()
    taken = threading.Semaphore(0)
    closed = threading.Event()

    def work() -> None:
        error = None
        try:
            for item in items:
                made.put(item)
                del item  # the user alone decides how long it lives
                taken.acquire()
                if closed.is_set():
                    break
            items.close()
        except BaseException as failure:  # of any type: it is raised in the other thread
            error = failure
        made.put(_End(error))

    thread = threading.Thread(target=work, name=NAME, daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            taken.release()
            yield item
            del item
    finally:
        closed.set()
        taken.release()
        thread.join(_JOIN_SECONDS)  # bounded, because storage that does not answer may block it
