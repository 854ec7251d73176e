"""The process of a script: its cores, where it keeps compiled programs, signals."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import first

from mnist_flax.launch import runtime

SCRIPT = """
import jax
from mnist_flax.launch import runtime
runtime.configure()
print(jax.jit(lambda x: 2 * x)(21))
"""


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"XDG_CACHE_HOME": "cache"}, "cache/mnist_flax/jax"),
        pytest.param({"HOME": "home"}, "home/.cache/mnist_flax/jax", marks=pytest.mark.slow),
        pytest.param(
            {"XDG_CACHE_HOME": "cache", "JAX_COMPILATION_CACHE_DIR": "own"},
            "own",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compiled_programs_are_kept_where_the_user_said(variables, directory, tmp_path):
    ours = {name: str(tmp_path / place) for name, place in variables.items()}
    others = {"XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in others}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=environment | ours,
    )
    assert run.stdout == "42\n"
    assert list((tmp_path / directory).iterdir())
    assert len(list(tmp_path.iterdir())) == 1


def run_alone(*words, cwd, **variables):
    """Runs Python where no variable but those given says where the user's files lie."""
    named = {"HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR"}
    environment = {name: value for name, value in os.environ.items() if name not in named}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment | variables,
    )


@pytest.mark.parametrize("variable", first(["HOME", "XDG_CACHE_HOME"]))
def test_a_home_that_cannot_be_written_is_no_matter(variable, tmp_path):
    """Nor does Matplotlib complain."""
    code = SCRIPT + "import matplotlib.font_manager\n"
    places = {"HOME": str(tmp_path / "home"), variable: "/proc/none"}
    run = run_alone("-W", "error", "-c", code, cwd=tmp_path, **places)
    assert (run.returncode, run.stdout, run.stderr) == (0, "42\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_a_name_and_a_home_needs_none(tmp_path):
    """Such as a container's, whose id is in no passwd: nobody knows where `~` is."""
    begin, middle, end = SCRIPT.partition("runtime.configure()")
    run = run_alone(
        "-W", "error", "-c", f"{begin}import os\nos.setuid(54321)\n{middle}{end}", cwd="/"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "42\n", "")


def test_the_cache_keeps_what_was_used_last(tmp_path):
    for age, name in enumerate(["newest", "new", "old", "oldest"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (10_000 - age, 10_000 - age))
    runtime.prune(tmp_path, limit=400)
    assert len(list(tmp_path.iterdir())) == 4
    runtime.prune(tmp_path, limit=299)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "new"}


GROUPS_2 = "0::/user.slice/job\n"
GROUPS_1 = "9:name=systemd:/x\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (GROUPS_2, {}, math.inf),
        (GROUPS_2, {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        # A group has no more than each of those that it lies in.
        (GROUPS_2, {"user.slice/cpu.max": "150000 50000\n", "cpu.max": "800000 100000"}, 3.0),
        (GROUPS_2, {"user.slice/job/cpu.max": "50000 100000\n"}, 0.5),
        (GROUPS_1, {"cpu/job/cpu.cfs_quota_us": "-1\n"}, math.inf),
        (GROUPS_1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "200000\n"}, 2.0),
    ],
)
def test_the_quota_of_control_groups(groups, files, expected, tmp_path):
    (tmp_path / "membership").write_text(groups)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert runtime.cpu_quota(tmp_path / "root", tmp_path / "membership") == expected
    assert runtime.cpu_quota(tmp_path / "root", tmp_path / "none") == math.inf


def test_the_processors_devices_divide_a_batch_and_are_few(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(runtime, "cpu_quota", lambda: math.inf)
    assert [runtime.share_cores(size) for size in (128, 100, 64, 7, 31)] == [16, 10, 16, 7, 1]
    monkeypatch.setattr(runtime, "cpu_quota", lambda: 4.7)
    assert [runtime.share_cores(size) for size in (128, 100, 9)] == [4, 4, 3]
    monkeypatch.setattr(runtime, "cpu_quota", lambda: 0.5)
    assert runtime.share_cores(128) == 1


@pytest.mark.parametrize(
    ("platform", "why"),
    [("cuda", ""), pytest.param("martian", "Unable to initialize", marks=pytest.mark.slow)],
)
def test_a_platform_that_is_not_there_is_one_line(platform, why, tmp_path):
    code = "from mnist_flax.launch import command_line as c; c.run(lambda _: c.begin())"
    run = run_alone("-c", code, cwd=tmp_path, JAX_PLATFORMS=platform, HOME=str(tmp_path))
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: JAX_PLATFORMS is {platform}, but")
    assert why in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_script_says_on_stderr_what_it_runs_on(tmp_path):
    code = "from mnist_flax.launch import command_line as c\n"
    code += "c.run(lambda _: c.begin(cpu_devices=3))"
    run = run_alone("-c", code, cwd=tmp_path, JAX_PLATFORMS="cpu", HOME=str(tmp_path))
    assert (run.returncode, run.stdout) == (0, "")
    assert len(run.stderr.splitlines()) == 1
    assert "3" in run.stderr


def test_sigterm_is_one_line_and_its_own_status(tmp_path):
    code = (
        "import os, signal, time; from mnist_flax.launch import command_line as c\n"
        "c.run(lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))"
    )
    run = run_alone("-c", code, cwd=tmp_path)
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stderr == "interrupted; nothing was under way that could be saved\n"


def test_the_first_signal_is_noted_and_the_second_has_its_default_action():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        interrupts = runtime.Interrupts()
        interrupts.install()
        assert not interrupts()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts()
        assert interrupts.exit_status == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class TestDescribeDevices:
    @pytest.mark.parametrize(
        ("variables", "words"),
        [
            (
                {"COLAB_GPU": "1"},
                "A GPU is attached, but JAX does not use it: look at JAX_PLATFORMS",
            ),
            ({"TPU_ACCELERATOR_TYPE": "v5litepod-1"}, "A TPU is attached"),
            ({}, ""),
            ({"COLAB_GPU": "0"}, ""),
            ({"COLAB_GPU": ""}, ""),
        ],
    )
    @pytest.mark.skipif(
        any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev").glob("accel[0-9]*")),
        reason="this machine has an accelerator",
    )
    def test_says_in_words_that_an_attached_accelerator_is_not_used(
        self, monkeypatch, variables, words
    ):
        for name in ("COLAB_GPU", "TPU_NAME", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        described = runtime.describe_devices()
        assert described.startswith("cpu: 1 device (cpu)")
        assert words in described
        assert ("attached" in described) == bool(words)
