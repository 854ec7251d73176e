"""Damaged checkpoints, full disks, and what is kept: on real Orbax directories."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RECIPE
from hypothesis import given, settings
from test_fit import after, assert_same_run, bits, timeless

from mnist_flax import checkpoint
from mnist_flax.errors import CheckpointError, InputError, Interrupted
from mnist_flax.fit import data_mesh, fit, fresh_progress
from mnist_flax.recipes import PlateauConfig, to_dict

# Orbax abandons the other reads of a damaged checkpoint, and their event loop with them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def like(small):
    return fresh_progress(RECIPE, small.info, steps=24, mesh=data_mesh())


@pytest.fixture(scope="module")
def run(small):
    return checkpoint.identity(to_dict(RECIPE), small.info)


@pytest.fixture(scope="module")
def sound(whole, run, like):
    """The bits of the newest checkpoint's state."""
    with checkpoint.open_checkpoints(whole[1]) as manager:
        return bits(checkpoint.restore(manager, run, like, step=72).state)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the run's directory, to be damaged."""
    return shutil.copytree(whole[1], tmp_path / "run")


def latest(workdir):
    directories = (workdir / "checkpoints").iterdir()
    return max((d for d in directories if d.name.isdecimal()), key=lambda d: int(d.name))


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def assert_recovers(whole, copy, small, caplog):
    """The run goes back to the checkpoint before, says so, and ends with the same bits."""
    caplog.clear()
    damaged = int(latest(copy).name)
    assert_same_run(whole[0], fit(RECIPE, small, workdir=copy, resume=True, progress=False))
    said = warnings(caplog)
    assert [message.count("\n") for message in said] == [0]
    assert f"step {damaged}" in said[0]
    assert int(latest(copy).name) == damaged
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    assert [timeless(json.loads(row)) for row in rows] == list(map(timeless, whole[0].history))


def warnings(caplog):
    """What the package said; Orbax has its own say."""
    return [r.message for r in caplog.records if r.name.startswith("mnist_flax")]


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["empty directory", "no data", "cut short", "no record"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage, whole, copy, small, caplog
):
    directory = latest(copy)
    if damage == "empty directory":
        shutil.rmtree(directory)
        directory.mkdir()
    elif damage == "no data":
        for path in files(directory):
            path.write_bytes(b"")
    elif damage == "cut short":
        for path in files(directory):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        shutil.rmtree(next(path for path in directory.iterdir() if path.is_dir()))
    assert_recovers(whole, copy, small, caplog)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(choice=st.integers(0, 10**6), where=st.floats(0, 0.999999))
def test_a_flipped_byte_is_noticed_or_changes_nothing(whole, run, like, sound, choice, where):
    """Nothing that is restored differs from what was saved, wherever the byte lies."""
    workdir = whole[1].parent / "flipped"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(whole[1], workdir)
    paths = [path for path in files(latest(workdir)) if path.stat().st_size]
    flip(paths[choice % len(paths)], where)
    with checkpoint.open_checkpoints(workdir) as manager:
        try:
            restored = checkpoint.restore(manager, run, like, step=72)
        except CheckpointError as error:
            message = str(error)
        else:
            assert restored.history == whole[0].history
            jax.tree.map(np.testing.assert_array_equal, bits(restored.state), sound)
            return
    assert "step 72" in message
    assert "\n" not in message


def test_strict_refuses_a_damaged_checkpoint(copy, small):
    for path in files(latest(copy)):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step 72 .* is damaged"):
        fit(RECIPE, small, workdir=copy, resume=True, strict=True, progress=False)


def test_with_no_sound_checkpoint_the_run_begins_anew(whole, copy, small, caplog):
    for path in files(copy / "checkpoints"):
        path.write_bytes(b"")
    assert_same_run(whole[0], fit(RECIPE, small, workdir=copy, resume=True, progress=False))
    assert len(warnings(caplog)) >= 2


def test_torn_metrics_are_mended(whole, small, tmp_path):
    with pytest.raises(Interrupted):
        fit(RECIPE, small, workdir=tmp_path, progress=False, interrupted=after(9))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 2, "step"')
    assert_same_run(whole[0], fit(RECIPE, small, workdir=tmp_path, resume=True, progress=False))
    assert metrics.read_text().count("\n") == 3


def test_a_checkpoint_of_another_recipe_is_refused(whole, small, like):
    other = checkpoint.identity(to_dict(RECIPE) | {"epochs": 4}, small.info)
    with (
        checkpoint.open_checkpoints(whole[1]) as manager,
        pytest.raises(InputError, match="epochs: 3 -> 4"),
    ):
        checkpoint.restore(manager, other, like, step=72)


def test_a_run_does_not_continue_on_another_dataset(copy, small):
    info = dataclasses.replace(small.info, fingerprint="0123456789abcdef")
    other = dataclasses.replace(small, info=info)
    kept = sorted(os.listdir(copy / "checkpoints"))
    with pytest.raises(InputError, match=r"fingerprint: [0-9a-f]{16} -> 0123456789abcdef"):
        fit(RECIPE, other, workdir=copy, resume=True, progress=False)
    assert sorted(os.listdir(copy / "checkpoints")) == kept


def save_epoch(manager, run, like, *, epoch, best):
    """Saves a run whose best epoch is `best` after epoch `epoch`."""
    history = tuple({"epoch": number, "step": 24 * number} for number in range(1, epoch + 1))
    progress = dataclasses.replace(
        like,
        state=dataclasses.replace(like.state, step=jnp.full_like(like.state.step, 24 * epoch)),
        stopping=dataclasses.replace(like.stopping, best_epoch=best),
        history=history,
    )
    checkpoint.save(manager, run, progress)


@pytest.mark.parametrize("restarted", [False, True])
def test_where_the_newest_was_the_best_and_is_damaged_the_one_before_is_used(
    restarted, run, like, tmp_path
):
    """The third epoch needs the first, which was the best until the fourth."""
    with contextlib.ExitStack() as opened:
        manager = opened.enter_context(checkpoint.open_checkpoints(tmp_path))
        for epoch, best in ((1, 1), (2, 1), (3, 1)):
            save_epoch(manager, run, like, epoch=epoch, best=best)
        if restarted:
            opened.close()
            manager = opened.enter_context(checkpoint.open_checkpoints(tmp_path))
        save_epoch(manager, run, like, epoch=4, best=4)
    for path in files(latest(tmp_path)):
        path.write_bytes(b"")

    def restore(step):
        return checkpoint.restore_with_best(manager, run, like, step=step)

    with checkpoint.open_checkpoints(tmp_path) as manager:
        restored = checkpoint.newest_sound(manager, restore, strict=False)
        assert restored is not None
        assert (int(restored.state.step), restored.best_step) == (72, 24)
        for epoch in (4, 5):
            save_epoch(manager, run, like, epoch=epoch, best=4)
        checkpoint.wait(manager)
        assert sorted(manager.all_steps()) == [96, 120]


@pytest.fixture
def little_disk(tmp_path):
    """A real file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_run_resumes_once_there_is_room(whole, small, little_disk):
    workdir = little_disk / "run"
    recipe = dataclasses.replace(RECIPE, plateau=PlateauConfig(patience=1))
    with pytest.raises(Interrupted):
        fit(recipe, small, workdir=workdir, progress=False, interrupted=after(9))
    ballast = little_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = latest(workdir)
    with pytest.raises(OSError, match=r"(?i)no space") as failure:
        fit(recipe, small, workdir=workdir, resume=True, progress=False)
    assert "\n" not in str(failure.value)
    assert before.exists()
    ballast.unlink()
    assert_same_run(whole[0], fit(recipe, small, workdir=workdir, resume=True, progress=False))
