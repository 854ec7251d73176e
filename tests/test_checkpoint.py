"""Damaged checkpoints, read errors, full disks, other formats: on real Orbax directories."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess

import filelock
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import RECIPE
from hypothesis import given, settings
from test_loop import after, assert_same_run, bits, timeless

from mnist_flax import checkpoint
from mnist_flax.checkpoint import newest, progress_arrays, progress_of
from mnist_flax.errors import CheckpointError, InputError, Interrupted
from mnist_flax.loop import fit, initial_progress
from mnist_flax.recipe import to_dict
from mnist_flax.replicas import make_mesh
from mnist_flax.reports.runs import load_run
from mnist_flax.workdir import lock_workdir, write_text

# Orbax abandons the other reads of a damaged checkpoint, and their event loop with them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def like(small):
    return initial_progress([RECIPE], small.info, steps=24, mesh=make_mesh())


@pytest.fixture(scope="module")
def run(small):
    return checkpoint.identity(to_dict(RECIPE), small.info)


@pytest.fixture(scope="module")
def read(like):
    """Reads the newest sound checkpoint, and changes nothing."""

    def read(workdir, *, strict=True):
        return newest(workdir, lambda _: progress_arrays(like), strict=strict, set_aside=False)

    return read


@pytest.fixture(scope="module")
def sound(whole, read, like):
    """The bits of the newest checkpoint's state."""
    return bits(progress_of(read(whole[1]), like.state).state)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the run's directory, to be damaged."""
    return shutil.copytree(whole[1], tmp_path / "run")


def resume(small, workdir, **options):
    return fit(RECIPE, small, workdir=workdir, resume=True, progress=False, **options)


def contents(directory):
    """Every file below a directory, with what is in it; the lock is nobody's data."""
    return {
        path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def latest(workdir):
    directories = (workdir / "checkpoints").iterdir()
    return max((d for d in directories if d.name.isdecimal()), key=lambda d: int(d.name))


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def assert_recovers(whole, copy, small, caplog):
    """The run goes back to the checkpoint before, says so, and ends with the same bits.

    The damaged one is still there, byte by byte, under another name.
    """
    caplog.clear()
    damaged = latest(copy)
    held = contents(damaged)
    assert_same_run(whole[0], resume(small, copy))
    said = warnings(caplog)
    assert [message.count("\n") for message in said] == [0]
    assert f"step {damaged.name}" in said[0]
    assert latest(copy).name == damaged.name
    assert contents(damaged.with_name(f"damaged-{damaged.name}")) == held
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
def test_a_flipped_byte_is_noticed_or_changes_nothing(whole, read, like, sound, choice, where):
    """Nothing that is restored differs from what was saved, wherever the byte lies."""
    workdir = whole[1].parent / "flipped"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(whole[1], workdir)
    paths = [path for path in files(latest(workdir)) if path.stat().st_size]
    flip(paths[choice % len(paths)], where)
    try:
        restored = progress_of(read(workdir), like.state)
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
    before = contents(copy)
    with pytest.raises(CheckpointError, match=r"step 72 .* is damaged"):
        resume(small, copy, strict=True)
    assert contents(copy) == before


@pytest.mark.slow
def test_a_second_damaged_checkpoint_of_a_step_is_kept_beside_the_first(copy, small):
    for _ in range(2):
        for path in files(latest(copy)):
            path.write_bytes(b"")
        resume(small, copy)
    kept = {d.name for d in (copy / "checkpoints").iterdir() if d.is_dir()}
    assert kept == {"48", "72", "damaged-72", "damaged-72-2"}


def test_with_no_sound_checkpoint_nothing_is_begun_or_changed(copy, small):
    for path in files(copy / "checkpoints"):
        path.write_bytes(b"")
    before = contents(copy)
    with pytest.raises(CheckpointError, match=r"step 72 .* and so is every other") as refusal:
        resume(small, copy)
    assert "\n" not in str(refusal.value)
    assert contents(copy) == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(copy, small):
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    with pytest.raises(InputError, match="3 epochs and no checkpoint"):
        resume(small, copy)
    assert contents(copy) == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(whole, copy, small):
    shutil.rmtree(copy / "checkpoints")
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(rows[:2]))
    assert_same_run(whole[0], resume(small, copy))


def test_arrays_of_another_form_are_no_damage(whole, like):
    """As of an optax whose state has grown: the error names the step, the array and versions."""
    before = contents(whole[1])
    for more in (progress_arrays(like) | {"ema": jnp.zeros(3)}, progress_arrays(like)["states"]):
        with pytest.raises(InputError) as refusal:
            newest(whole[1], lambda _, more=more: more, strict=False, set_aside=True)
        message = str(refusal.value)
        assert "step 72" in message
        assert "is not in both" in message
        assert f"optax {checkpoint.versions()['optax']}" in message
        assert "\n" not in message
    assert contents(whole[1]) == before


def test_a_read_error_is_no_damage(copy, small):
    """Reading /proc/self/mem from its start is an input/output error for anyone."""
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("this system has no /proc/self/mem")
    path = next(p for p in files(latest(copy)) if p.parent.name == "d")
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"step 72 .* cannot be read .*(?i:input/output)"):
        resume(small, copy)
    assert path.is_symlink()
    assert {d.name for d in (copy / "checkpoints").iterdir() if d.is_dir()} == {"48", "72"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_lack_of_permission_is_no_damage(copy, small):
    path = next(p for p in files(latest(copy)) if p.parent.name == "d")
    path.chmod(0)
    with pytest.raises(CheckpointError, match=r"step 72 .* cannot be read .*(?i:permission)"):
        resume(small, copy)
    assert {d.name for d in (copy / "checkpoints").iterdir() if d.is_dir()} == {"48", "72"}


def test_a_lack_of_memory_is_no_damage(copy, small, monkeypatch):
    def restore(*_, **__):
        raise MemoryError

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    before = contents(copy)
    with pytest.raises(CheckpointError, match=r"step 72 .* cannot be read \(out of memory\)"):
        resume(small, copy)
    assert contents(copy) == before


def test_an_error_that_passes_is_no_damage(copy, whole, small, monkeypatch):
    """Of a network's disk, such as a stale handle: the second attempt reads it."""
    attempts = iter(range(10**6))
    restore = ocp.PyTreeCheckpointHandler.restore

    def at_first_an_error(*args, **kwargs):
        if next(attempts) == 0:
            raise ValueError("stale")
        return restore(*args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", at_first_an_error)
    assert_same_run(whole[0], resume(small, copy))
    assert not list((copy / "checkpoints").glob("damaged-*"))


def test_another_format_is_one_line(run, like, read, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, run, like)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"step 0 .* is of format 0, .* reads format 4"):
        read(tmp_path, strict=False)


def test_torn_metrics_are_mended(whole, small, tmp_path):
    with pytest.raises(Interrupted):
        fit(RECIPE, small, workdir=tmp_path, progress=False, should_stop=after(9))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 2, "step"')
    assert_same_run(whole[0], resume(small, tmp_path))
    assert metrics.read_text().count("\n") == 3


def test_another_recipe_is_refused_with_what_to_do(copy, small):
    """Be it that recipe.json tells, or the checkpoint alone."""
    other = dataclasses.replace(RECIPE, epochs=4)
    before = contents(copy)
    options = dict(workdir=copy, resume=True, progress=False)
    with pytest.raises(InputError, match=r"epochs: 3 -> 4\); leave these options out to continue"):
        fit(other, small, **options)
    assert contents(copy) == before
    write_text(copy / "recipe.json", json.dumps(to_dict(other)))
    with pytest.raises(InputError, match=r"epochs: 3 -> 4\); continue it with its own, or train"):
        fit(other, small, **options)


def test_a_run_does_not_continue_on_another_dataset(copy, small):
    info = dataclasses.replace(small.info, fingerprint="0123456789abcdef")
    other = dataclasses.replace(small, info=info)
    before = contents(copy)
    with pytest.raises(InputError, match=r"fingerprint: [0-9a-f]{16} -> 0123456789abcdef"):
        resume(other, copy)
    assert contents(copy) == before


def test_the_best_weights_outlive_the_checkpoint_that_first_held_them(run, like, read, tmp_path):
    """The fourth epoch was the best until its checkpoint was damaged; the third names the first."""
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for epoch, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
            save_epoch(manager, run, like, epoch=epoch, best=best)
    for path in files(latest(tmp_path)):
        path.write_bytes(b"")
    restored = progress_of(read(tmp_path, strict=False), like.states)
    (best_epoch,) = restored.best_epochs
    assert (restored.step, int(restored.best.step[0]), best_epoch) == (72, 24, 1)


def save_epoch(manager, run, like, *, epoch, best):
    """Saves a run whose best epoch is `best` after epoch `epoch`."""

    def at(epoch):
        step = jnp.full_like(like.states.step, 24 * epoch)
        return dataclasses.replace(like.states, step=step)

    history = tuple({"epoch": number, "step": 24 * number} for number in range(1, epoch + 1))
    stopping = dataclasses.replace(like.stopping[0], best_epoch=best)
    progress = dataclasses.replace(
        like,
        step=24 * epoch,
        states=at(epoch),
        best=at(best),
        stopping=(stopping,),
        histories=(history,),
    )
    checkpoint.save(manager, run, progress)


def test_a_run_is_read_before_its_end(whole, small, tmp_path):
    """With its best weights so far; before an epoch is done, with those it has come to."""
    with pytest.raises(Interrupted) as stop:
        fit(RECIPE, small, workdir=tmp_path, progress=False, should_stop=lambda: True)
    run = load_run(str(tmp_path))
    assert (run.best_epoch, run.epochs, int(run.state.step)) == (0, 0, 1)
    assert str(run) == f"{tmp_path}: weights from within epoch 1; 0 of 3 epochs done"
    jax.tree.map(np.testing.assert_array_equal, bits(run.state), bits(stop.value.progress.state))
    with pytest.raises(Interrupted):
        resume(small, tmp_path, should_stop=after(8))
    before = contents(tmp_path)
    run = load_run(tmp_path)
    assert (run.best_epoch, run.epochs, int(run.state.step)) == (1, 1, 24)
    assert contents(tmp_path) == before
    finished = load_run(whole[1])
    jax.tree.map(np.testing.assert_array_equal, bits(finished.state), bits(whole[0].state))
    assert (finished.best_epoch, finished.epochs) == (whole[0].best_epoch, 3)


def test_a_damaged_run_is_read_and_left_as_it_is(copy):
    for path in files(latest(copy)):
        path.write_bytes(b"")
    before = contents(copy)
    run = load_run(copy)
    assert run.epochs == 2
    assert contents(copy) == before


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match="there is no run in"):
        load_run(tmp_path)
    write_text(tmp_path / "recipe.json", json.dumps(to_dict(RECIPE)))
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load_run(tmp_path)
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_run_that_began_while_the_lock_was_awaited_is_seen(tmp_path, monkeypatch):
    """Another process trained in the directory, and ended, after the first look at it."""
    acquire = filelock.FileLock.acquire

    def late(self, *args, **kwargs):
        (tmp_path / "recipe.json").write_text("{}")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with pytest.raises(InputError, match="holds a run"), lock_workdir(tmp_path, resume=False):
        pass


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
    with pytest.raises(Interrupted):
        fit(RECIPE, small, workdir=workdir, progress=False, should_stop=after(9))
    ballast = little_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = latest(workdir)
    with pytest.raises(OSError, match=r"(?i)no space") as failure:
        resume(small, workdir)
    assert "\n" not in str(failure.value)
    assert before.exists()
    ballast.unlink()
    assert_same_run(whole[0], resume(small, workdir))
