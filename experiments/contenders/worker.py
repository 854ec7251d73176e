"""How `benchmark.py` talks to a contender: a process that trains when it is told to, and waits."""

import json
import sys
import time
from collections.abc import Callable


def serve(train: Callable[[int], None], *, began: float) -> None:
    """Answers each line of stdin, a number of steps, with the seconds that they took.

    The first answer is how long the contender took to be ready, `began` being when it started.

    Args:
      train: takes that many training steps and returns once they are done.
      began: `time.perf_counter()` at the start of the process.
    """
    print(json.dumps({"ready": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        steps_began = time.perf_counter()
        train(int(line))
        print(json.dumps({"seconds": time.perf_counter() - steps_began}), flush=True)
