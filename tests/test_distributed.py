"""Two real processes on loopback: the bits of one, who reads and writes what, losses, refusals."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ALL
from test_archives import write_subset

from mnist_flax import checkpoint
from mnist_flax.datasets import load_splits
from mnist_flax.errors import InputError
from mnist_flax.hosts import HEARTBEAT_SECONDS, initialize
from mnist_flax.reports.results import digest
from mnist_flax.reports.runs import load_run

TRAIN = str(Path(__file__).parents[1] / "experiments" / "train.py")
# What `make test-all` kills needs 100 steps an epoch, which take longer than writing a checkpoint.
STEPS = 100 if ALL else 10
SMALL = "--val-size 200 --epochs 3 --batch-size 50 --model.widths 4 8 --model.padding SAME VALID"
SMALL += " --model.pool True True --model.hidden 16 --model.dropout 0.2"
if not ALL:  # less to compile, in each process
    SMALL += " --model.patch 2 --model.pool False True --augment.rotate 0 --augment.zoom 0"
    SMALL += " --augment.shift 0"
    SMALL += " --optimizer sgd"
# As many threads in XLA, whatever the machine, in one process and in two; in `make test-all`
# compiled as a user's are.
SAME_BITS = {"NPROC": "2"} | ({"XLA_FLAGS": ""} if ALL else {})

# train.py, which also notes the records that it reads: their indices, in a file a process.
NOTING = """
import runpy, sys
import numpy as np
from mnist_flax.data import Records

take, noted = Records.take, []

def note(self, indices_B):
    noted.append(np.asarray(indices_B))
    return take(self, indices_B)

Records.take = note
file, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    np.save(file, np.array(noted))
"""

# Reads the newest sound checkpoint of each run, and says of which step it is.
READING = """
from pathlib import Path
import jax, numpy as np
from mnist_flax import hosts
from mnist_flax.checkpoint import newest
from mnist_flax.replicas import make_mesh

hosts.initialize()
everywhere = jax.NamedSharding(make_mesh(), jax.P())
zeros = jax.make_array_from_callback((4,), everywhere, lambda index: np.zeros(4, np.float32)[index])
for run in ("damaged", "unreadable"):
    try:
        saved = newest(Path(run), lambda _: dict(a=zeros), strict=False, set_aside=True)
        print(saved.step, np.asarray(saved.arrays["a"]).tolist())
    except (OSError, ValueError) as error:
        print(error)
"""


# Trains two replicas, interrupted within the first epoch and resumed; prints what they came to.
STUDY = """
import json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from mnist_flax import errors, fit, hosts, load_splits, replicas
from mnist_flax.evaluation import evaluate_replicas
from mnist_flax.model import CNNConfig
from mnist_flax.optimizer import SGD
from mnist_flax.recipe import Recipe

if "JAX_COORDINATOR_ADDRESS" in os.environ:
    hosts.initialize()
data_dir, archives, workdir, form = sys.argv[2:6]
splits = load_splits(
    "mnist", val_size=200, data_dir=data_dir, archives=archives, stream=form == "streamed"
)
model = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), patch=2, hidden=(16,))
recipe = Recipe(
    val_size=200, epochs=2, batch_size=50, model=model, optimizer=SGD(0.05)
)
run = dict(seeds=(3, 0), workdir=workdir, progress=False)
try:
    fit(recipe, splits, should_stop=lambda: True, **run)
except errors.Interrupted as stop:
    assert stop.step == 1
result = fit(recipe, splits, resume=True, **run)
names = ("train_loss", "val_loss")
print(json.dumps([[[row[name] for name in names] for row in h] for h in result.histories]))
tests = evaluate_replicas(result.states, splits.test, mesh=replicas.make_mesh(replicas=2))
print([test.correct for test in tests])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """Where a test's processes find their data and write, and with what options they start."""

    directory: Path
    options: tuple[str, ...]

    def start(self, *words: str, program=(TRAIN,), other=".") -> list[subprocess.Popen]:
        """Starts two processes that are one job; what the second one writes has another mode.

        It works in the directory `other`.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
        }
        arguments = [*self.options, "--distributed", *words]
        return [
            subprocess.Popen(
                [
                    sys.executable,
                    *(word.replace("{0}", str(index)) for word in program),
                    *arguments,
                ],
                env=os.environ | SAME_BITS | job | {"JAX_PROCESS_ID": str(index)},
                umask=0o077 if index else 0o022,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self.directory / (other if index else "."),
            )
            for index in range(2)
        ]

    def alone(self, *words: str) -> None:
        """Runs the job to its end as one process."""
        subprocess.run(
            [sys.executable, TRAIN, *self.options, *words],
            env=os.environ | SAME_BITS,
            capture_output=True,
            cwd=self.directory,
            check=True,
        )


def ends(processes, seconds=120):
    """Waits for the processes' ends; returns their statuses and what they wrote on stderr."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], errors


def wait_for(condition, processes, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """STEPS batches of training, 200 validation and 200 test examples, prepared."""
    directory = tmp_path_factory.mktemp("job")
    archives = write_subset(directory / "archives", num_train=200 + 50 * STEPS, num_test=200)
    load_splits("mnist", val_size=200, data_dir=directory / "data", archives=archives)
    places = ("--data-dir", str(directory / "data"), "--archives", str(archives))
    return Job(directory, (*SMALL.split(), *places))


@pytest.fixture(scope="module")
def alone(job):
    """The result of one process with two devices."""
    job.alone("--devices", "2", "--workdir", "alone")
    return result(job.directory / "alone")


@pytest.fixture(scope="module")
def streamed(job):
    """The directory of a streamed run of two processes, and what each of them read."""
    workdir = job.directory / "streamed"
    note = ("-c", NOTING, "read-{0}.npy", TRAIN)
    processes = job.start("--stream", "--workdir", "streamed", program=note)
    statuses, errors = ends(processes)
    assert statuses == [0, 0], errors
    assert "lost" not in "".join(errors)
    return workdir, [np.load(job.directory / f"read-{index}.npy") for index in range(2)]


@pytest.mark.slow
def test_the_bits_are_those_of_one_process(streamed, alone):
    """One process in memory with two devices, two that stream with one each."""
    workdir, _ = streamed
    together = result(workdir)
    assert together.pop("seconds")
    assert together == {name: value for name, value in alone.items() if name != "seconds"}
    assert digest(load_run(workdir).state) == together["digest"]


@pytest.mark.slow
def test_each_process_reads_only_its_shard_of_the_stream(streamed):
    _, read = streamed
    assert [indices.shape for indices in read] == [(3 * STEPS, 25)] * 2
    both_SB = np.concatenate(read, axis=1)
    epochs = both_SB.reshape(3, STEPS, 50)
    assert not np.array_equal(epochs[0], epochs[1])
    for epoch_SB in epochs:
        assert np.array_equal(np.sort(epoch_SB, axis=None), np.arange(50 * STEPS))


@pytest.mark.slow
def test_process_0_alone_writes_but_for_checkpoints(streamed):
    workdir, _ = streamed
    files = [path for path in workdir.rglob("*") if path.is_file()]
    others = [path for path in files if not path.stat().st_mode & 0o044]
    assert {path.relative_to(workdir).parts[0] for path in others} <= {"checkpoints"}
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert {"result.json", "metrics.jsonl", "curves.png"} < {path.name for path in files}


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_resuming_ends_with_the_same_bits(job, alone):
    workdir = job.directory / "lost"
    processes = job.start("--workdir", "lost")
    wait_for((workdir / "checkpoints" / "100").exists, processes)
    time.sleep(0.1)  # all know that it is written, and train
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    statuses, errors = ends(processes)
    assert time.monotonic() - began < HEARTBEAT_SECONDS
    assert statuses == [1, -signal.SIGKILL]
    last = errors[0].splitlines()[-1]
    assert last.startswith("error: a process of this job of 2 was lost (")
    assert "--resume" in last

    processes = job.start("--workdir", "lost", "--resume")
    wait_for(lambda: rows(workdir) == 2, processes)
    processes[1].send_signal(signal.SIGTERM)  # to one of them: both stop, after the same step
    statuses, errors = ends(processes)
    assert statuses == [128 + signal.SIGTERM] * 2
    lines = [error.splitlines()[-1] for error in errors]
    assert lines[0] == lines[1]
    words = shlex.split(lines[0].partition("continue with: ")[2])
    places = job.options[-4:]
    assert words[2:] == ["--resume", "--workdir", "lost", *places, "--distributed"]

    statuses, errors = ends(job.start("--workdir", "lost", "--resume"))
    assert statuses == [0, 0], errors
    assert result(workdir)["digest"] == alone["digest"]


@pytest.mark.slow
def test_a_study_of_two_processes_is_that_of_one(job):
    """A replica each, streamed, against one process that has two devices and holds the data."""
    places = job.options[-3], job.options[-1]

    def words(devices, workdir, form):
        return ("-c", STUDY, str(devices), *places, str(job.directory / workdir), form)

    alone = subprocess.run(
        [sys.executable, *words(2, "study-alone", "resident")],
        env=os.environ | SAME_BITS,
        capture_output=True,
        text=True,
        check=True,
    )
    together = Job(job.directory, ()).start(program=words(1, "study", "streamed"))
    outs = [process.communicate(timeout=300) for process in together]
    said = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in outs]
    assert said == [alone.stdout.splitlines()] * 2, outs
    (first, second), correct = json.loads(said[0][0]), json.loads(said[0][1])
    assert first[-1][0] < first[0][0]
    assert first != second
    assert len(correct) == 2


def test_processes_agree_on_the_checkpoint_that_they_read(tmp_path):
    """The second process sees other files, as of a network's disk that fails for it alone."""
    identity = {"recipe": {}, "dataset": {"fingerprint": ""}}
    for run in ("damaged", "unreadable"):
        with checkpoint.open_checkpoints(tmp_path / run) as manager:
            for step in (1, 2):
                arrays = {"a": jnp.full(4, step, jnp.float32)}
                checkpoint.write(manager, identity, step=step, arrays=arrays, record={})
    other = tmp_path / "other"
    for run in ("damaged", "unreadable"):
        shutil.copytree(tmp_path / run, other / run)
        path = next((other / run / "checkpoints" / "2" / "progress" / "d").iterdir())
        path.unlink()
        if run == "unreadable":
            path.symlink_to("/proc/self/mem")  # which cannot be read from its start
    processes = Job(tmp_path, ()).start(program=("-c", READING), other="other")
    outs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    said = [[line for line in lines if "[Gloo]" not in line] for lines in outs]
    assert [lines[0] for lines in said] == ["1 [1.0, 1.0, 1.0, 1.0]"] * 2
    assert said[0][1].startswith("another process of the job refused")
    assert "step 2" in said[1][1]
    assert "cannot be read" in said[1][1]
    # Process 0 alone sets aside, and only what is damaged.
    kept = {
        run.relative_to(tmp_path): sorted(path.name for path in (run / "checkpoints").iterdir())
        for run in (*tmp_path.glob("*ed"), *other.iterdir(), tmp_path / "unreadable")
    }
    assert kept[Path("damaged")] == ["1", "damaged-2"]
    assert [kept[Path(run)] for run in ("unreadable", "other/damaged", "other/unreadable")] == [
        ["1", "2"]
    ] * 3


@pytest.mark.slow
def test_all_processes_end_where_one_refuses(job, alone):
    del alone  # its directory is taken, which process 0 finds
    statuses, errors = ends(job.start("--workdir", "alone"))
    assert statuses == [2, 2]
    lines = [error.splitlines()[-1] for error in errors]
    assert "holds a run" in lines[0]
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("error: another process of the job refused")


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(job, tmp_path):
    statuses, errors = ends(job.start("--workdir", "unshared", other=tmp_path))
    assert statuses == [2, 2]
    assert "on a file system that all processes share" in errors[1].splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert os.listdir(job.directory / "unshared") == [".lock"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --workdir"),
        pytest.param(["--workdir", "run"], "set JAX_COORDINATOR_ADDRESS", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_not_there_is_one_line(words, message, tmp_path):
    run = subprocess.run(
        [sys.executable, TRAIN, "--distributed", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert message in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "index", "message"),
    [
        ("localhost", "1", "give HOST:PORT"),
        ("localhost:http", "1", "give HOST:PORT"),
        ("127.0.0.1:TAKEN", "one", "JAX_PROCESS_ID is 'one'"),
        ("127.0.0.1:TAKEN", "1", "did not answer at 127.0.0.1:"),
        ("127.0.0.1:TAKEN", "0", "cannot listen on port"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_time(address, index, message, monkeypatch):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address.replace("TAKEN", port))
        monkeypatch.setenv("JAX_PROCESS_ID", index)
        began = time.monotonic()
        with pytest.raises(InputError) as refusal:
            initialize(start_seconds=1)
    assert message in str(refusal.value)
    assert time.monotonic() - began < 10
