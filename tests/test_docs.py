"""Every example of README.md and docs/ runs as it stands, on a few of MNIST's images."""

import math
import re
import subprocess
import sys
from pathlib import Path

import frontier
import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
FEW = """
import dataclasses
import mnist_flax

whole = mnist_flax.load_splits

def few(*words, **options):
    splits = whole(*words, **options)
    return dataclasses.replace(splits, train=splits.train[:1024], test=splits.test[:500])

mnist_flax.load_splits = few
"""
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What is compiled for seconds.
SLOW = ("fit(", "load_run(", "train_step", "CNN(config, ops")


def examples():
    for path in FILES:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        for number, code in enumerate(blocks):
            if path.stem in ("optuna", "trackers") or '"model.' in code:
                continue  # test_trackers.py runs them, or they need files that others make
            if path.stem == "README" and "train_step" in code:
                continue  # test_api.py runs it, and looks at what it prints
            marks = [pytest.mark.slow] if any(word in code for word in SLOW) else []
            yield pytest.param(code, marks=marks, id=f"{path.stem}-{number}")


@pytest.mark.parametrize("code", list(examples()))
def test_an_example_runs(code, tmp_path):
    words = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", FEW + code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_example_is_at_most_twenty_lines_and_a_few():
    for path in FILES:
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            lines = [line for line in code.splitlines() if line and "import" not in line]
            assert len(lines) <= 20, (path.name, code)


def test_the_readmes_table_is_made_of_the_results():
    table = "\n".join(frontier.table(frontier.read()))
    assert table in (ROOT / "README.md").read_text()


def test_the_table_in_results_is_made_of_the_results():
    table = "\n".join(frontier.full_table(frontier.read()))
    assert table in (ROOT / "experiments" / "RESULTS.md").read_text()


def test_intervals_are_students_of_the_mean_and_the_deviation():
    """Within the rounding of both: the interval is of deviations that are not rounded."""
    results = frontier.read()
    for row in results["rows"] + results["views"]:
        scale = row["deviation"] / math.sqrt(row["n"])
        expected = stats.t.interval(0.95, row["n"] - 1, loc=row["mean"], scale=scale)
        np.testing.assert_allclose(row["interval"], expected, rtol=0, atol=0.001)


def test_links_lead_to_files():
    log = (ROOT / "experiments" / "log").glob("*.md")
    for path in [*FILES, ROOT / "experiments" / "RESULTS.md", *log]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), (path.name, target)
