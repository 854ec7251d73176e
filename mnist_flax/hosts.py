"""The processes of one job, on one host or many: how they start, agree and end."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnist_flax.errors import DivergedError, InputError, Interrupted

# How long the processes wait for one another at the start.
START_SECONDS = 120
# A process that is silent for so long is lost, and JAX ends the others.
HEARTBEAT_SECONDS = 30
# What errors of JAX's collectives and coordination say when a process is gone.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "heartbeat", "coordination service", "Connection reset")


def initialize(*, start_seconds: int = START_SECONDS) -> None:
    """Joins this process to its job, before JAX's backend starts.

    Under SLURM and Open MPI and on a TPU pod JAX finds the job by itself. Elsewhere it is given by
    JAX_COORDINATOR_ADDRESS, process 0's HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      start_seconds: how long to wait for the other processes.

    Raises:
      InputError: there is no job to join, or process 0 cannot be reached.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    # JAX ends a process that cannot connect by a stack trace, which Python cannot catch.
    if address and index is not None:
        _check_coordinator(address, here=index == 0, seconds=start_seconds)
    # It would take SIGTERM, which is ours: see runtime.Interrupts.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=processes,
            process_id=index,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        raise InputError(
            f"cannot join a job of several processes ({line}); set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start under SLURM, Open MPI or on a TPU pod"
        ) from error


def _number(name: str) -> int | None:
    """Returns an environment variable as a number; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}; give a number")
    return int(text)


def _check_coordinator(address: str, *, here: bool, seconds: float) -> None:
    """Checks that process 0 can listen at `address`, or answers there in time.

    Raises:
      InputError: it cannot, or does not.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}; give HOST:PORT")
    if here:
        with contextlib.closing(socket.socket()) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise InputError(f"process 0 cannot listen on port {port}: {error}") from None
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not answer at {address} within {seconds:g} s ({error}); start "
                    "it, or correct JAX_COORDINATOR_ADDRESS"
                ) from None
        time.sleep(0.1)


def is_primary() -> bool:
    """Returns whether this is process 0, which alone writes results and draws progress."""
    return jax.process_index() == 0


def agree(*values: bool) -> tuple[bool, ...]:
    """Returns for each value whether it is true on any process.

    All processes call it as often as each other. It waits for the slowest, and for the device.
    """
    if jax.process_count() == 1:
        return values
    return tuple(map(bool, multihost_utils.process_allgather(np.array(values)).any(axis=0)))


def from_first(value: int) -> int:
    """Returns process 0's `value`, at least -2**31 and below 2**31; all processes call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of an array, whichever processes hold its parts; all processes call it."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Lets no process go on where another fails: the others would wait for it in a collective.

    Raises:
      Exception: the block raised it here.
      InputError: the block raised something in another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    (failed,) = agree(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise InputError("another process of the job refused to start; its own line says why")


@contextlib.contextmanager
def abort_on_failure() -> Iterator[None]:
    """Ends this process where the block fails, so that the others end too; alone it does nothing.

    JAX's own way out waits for all processes: what all of them raise alike takes that way. Who
    fails alone, because another was lost or for a reason of its own, must not wait for them.
    """
    try:
        yield
    except (InputError, DivergedError, Interrupted):
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        line = str(error).strip().partition("\n")[0]
        if any(sign in line for sign in SIGNS_OF_LOSS):
            line = (
                f"a process of this job of {jax.process_count()} was lost ({line}); start them "
                "all again with --resume"
            )
        elif not isinstance(error, OSError):
            traceback.print_exception(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)
