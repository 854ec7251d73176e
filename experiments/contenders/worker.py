"""How `benchmark.py` talks to a contender: a process that works when it is told to, and waits."""

import json
import sys
import time
from collections.abc import Callable


def serve(work: Callable[[int], object], *, began: float) -> None:
    """Answers each line of stdin, a number of batches, with the seconds that they took.

    The first answer is how long the contender took to be ready, `began` being when it started.

    Args:
      work: does that many batches and returns once they are done.
      began: `time.perf_counter()` at the start of the process.
    """
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        work_began = time.perf_counter()
        work(int(line))
        print(json.dumps({"seconds": time.perf_counter() - work_began}), flush=True)
