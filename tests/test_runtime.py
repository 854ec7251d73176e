"""Where a script keeps its compiled programs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_flax import runtime

SCRIPT = """
import jax
from mnist_flax import runtime
runtime.configure()
print(jax.jit(lambda x: 2 * x)(21))
"""


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"XDG_CACHE_HOME": "cache"}, "cache/mnist_flax/jax"),
        ({"HOME": "home"}, "home/.cache/mnist_flax/jax"),
        ({"XDG_CACHE_HOME": "cache", "JAX_COMPILATION_CACHE_DIR": "own"}, "own"),
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
