"""Chunks of a batch, small enough to stay in cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_BYTES = 512 * 1024  # of a chunk's patches; with input and output, one core's L2


def chunk_rows(batch: int, *, row_bytes: int, chunk_bytes: int) -> int:
    """Returns how many of `batch` examples to work on at a time: as many as fit, at least one.

    The largest number that divides the batch, unless more than twice as many fit: then chunks are
    as even as can be, and `chunked` fills up the last.
    """
    most = min(max(chunk_bytes // row_bytes, 1), batch)
    rows = next(rows for rows in range(most, 0, -1) if batch % rows == 0)
    return rows if 2 * rows >= most else -(-batch // -(-batch // most))


def chunked(x: jax.Array, rows: int) -> jax.Array:
    """Splits [B, ...] into [chunks, rows, ...], the last filled up with zeros."""
    if missing := -len(x) % rows:
        config = ((0, missing, 0), *((0, 0, 0),) * (x.ndim - 1))
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
    return x.reshape(-1, rows, *x.shape[1:])


def joined(x: jax.Array, batch: int) -> jax.Array:
    """Returns [chunks, rows, ...] as [B, ...], without what the last was filled up with."""
    return x.reshape(-1, *x.shape[2:])[:batch]
