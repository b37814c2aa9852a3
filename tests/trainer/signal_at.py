"""Training that sends a signal to itself after some steps: one that a test sends could come after the run's end.

Usage: python -m tests.trainer.signal_at STEPS SIGNAL VERB [ARGUMENTS OF THE VERB]
"""

import itertools
import os
import signal
import sys

from trainer.__main__ import main
from trainer.ops.stop import StopHandler


def signal_at(steps: int, number: signal.Signals) -> None:
    """Have rank 0 signal itself after that many steps of this process; a stop follows after the next one."""
    should_stop, done = StopHandler.should_stop, itertools.count(1)

    def wrapped(handler: StopHandler) -> bool:
        handler.vote_seconds = 0  # a vote after every step
        if next(done) == steps and handler.is_rank_0:
            os.kill(os.getpid(), number)
        return should_stop(handler)

    StopHandler.should_stop = wrapped  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    signal_at(int(sys.argv[1]), signal.Signals[sys.argv[2]])
    del sys.argv[1:3]
    main()
