"""Items that a thread makes while the previous ones are in use."""

import gc
import threading
import time
from collections.abc import Callable, Generator

import pytest

from data.ahead import NAME, run_ahead


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def no_thread() -> bool:
    return not any(thread.name == NAME for thread in threading.enumerate())


def test_one_item_is_made_while_another_is_used() -> None:
    made = []

    def numbers() -> Generator[int, None, None]:
        for i in range(5):
            made.append(i)
            yield i

    items = run_ahead(numbers())
    assert made == [], "nothing is made before it is asked for"
    assert next(items) == 0
    wait_for(lambda: made == [0, 1])
    time.sleep(0.05)
    assert made == [0, 1], "no more than one item ahead"
    assert list(items) == [1, 2, 3, 4]
    wait_for(no_thread)


def test_all_is_made_in_the_thread() -> None:
    threads = set()

    def names() -> Generator[str, None, None]:
        try:
            for _ in range(3):
                yield threading.current_thread().name
        finally:
            threads.add(threading.current_thread().name)

    assert list(run_ahead(names())) == [NAME] * 3
    items = run_ahead(names())
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert threads == {NAME}


@pytest.mark.parametrize("error", [ValueError("no data"), RuntimeError("no memory"), KeyboardInterrupt()])
def test_errors_are_raised_in_their_turn(error: BaseException) -> None:
    def fails() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise error

    items = run_ahead(fails())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(type(error)) as raised:
        next(items)
    assert raised.value is error
    wait_for(no_thread)


def test_the_thread_ends_with_an_iterator_that_nobody_uses() -> None:
    closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = run_ahead(endless())
    next(items)
    del items
    gc.collect()
    wait_for(no_thread)
    assert closed.is_set()


def test_items_are_not_kept() -> None:
    """A kept batch would hold memory of the GPU."""
    alive = set()

    class Item:
        def __init__(self, number: int) -> None:
            self.number = number
            alive.add(number)

        def __del__(self) -> None:
            alive.discard(self.number)

    def make() -> Generator[Item, None, None]:
        for i in range(4):
            item = Item(i)
            yield item
            del item

    items = run_ahead(make())
    for i in range(3):
        item = next(items)
        assert item.number == i
        wait_for(lambda i=i: alive == {i, i + 1})  # type: ignore[misc]
        del item
    items.close()  # type: ignore[attr-defined]
    assert alive == set()
