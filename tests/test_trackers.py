"""Where rows go beside the run directory: a function, Weights & Biases, a search by Optuna."""

import ast
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE
from test_archives import refusal, write_subset
from test_loop import assert_same_run
from test_study import PLAIN

from mnist_flax.errors import Interrupted
from mnist_flax.launch.trackers import WandB
from mnist_flax.loop import fit
from mnist_flax.workdir import scalars

ROOT = Path(__file__).parents[1]
SMALL = ["--val-size", "2000", "--batch-size", "100", "--epochs", "2", "--optimizer", "sgd"]
SMALL += ["--model.widths", "4", "--model.padding", "SAME", "--model.pool", "True"]
SMALL += ["--stopping", "None"]
# What W&B wrote, in LevelDB's log format: blocks of 32 KiB, of parts with a header of 7 bytes. The
# file's own header has as many.
READ = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

data, place, record, found = open(sys.argv[1], "rb").read(), 7, b"", []
while place + 7 <= len(data):
    if 2**15 - place % 2**15 < 7:  # no room for a header
        place += 2**15 - place % 2**15
    _, length, kind = struct.unpack("<IHB", data[place : place + 7])
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # whole, or its last part
        found.append(Record.FromString(record))
        record = b""

def values(items):
    return {each.key or each.nested_key[0]: json.loads(each.value_json) for each in items}

runs = [each.run for each in found if each.HasField("run")]
history = [values(each.history.item) for each in found if each.HasField("history")]
summary = {}
for each in found:
    summary |= values(each.summary.update)
about = {"id": runs[0].run_id, "project": runs[0].project, "name": runs[0].display_name}
print(json.dumps(about | {"config": values(runs[0].config.update), "history": history,
    "summary": summary}))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return write_subset(tmp_path_factory.mktemp("few") / "own", num_train=4000, num_test=500)


def needs(package):
    """Marks a test that is skipped where an optional package is not installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: make test-all installs it")


def snippet(name):
    """Returns the first Python example of a page."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_a_tracker_is_given_every_row(small):
    rows = []
    result = fit(RECIPE, small, progress=False, track=rows.append)
    assert len(rows) == 3
    assert rows == list(result.history)


def test_rows_of_before_a_resumption_are_not_given_again(whole, small, tmp_path):
    rows, looks = [], itertools.count(1)
    options = {"workdir": tmp_path / "run", "progress": False, "track": rows.append}
    with pytest.raises(Interrupted) as stop:  # the second look is within the second epoch
        fit(RECIPE, small, should_stop=lambda: bool(rows) and next(looks) == 2, **options)
    assert 24 < stop.value.step < 48
    assert [row["epoch"] for row in rows] == [1]
    resumed = fit(RECIPE, small, resume=True, **options)
    assert rows == list(resumed.history)
    assert_same_run(resumed, whole[0])
    fit(RECIPE, small, resume=True, **options)
    assert len(rows) == 3


def test_a_tracker_that_fails_ends_the_run_and_loses_no_epoch(whole, small, tmp_path):
    def fail(row):
        if row["epoch"] == 2:
            raise ConnectionError("the tracker is gone")

    rows = []
    with pytest.raises(ConnectionError, match="the tracker is gone"):
        fit(RECIPE, small, workdir=tmp_path / "run", progress=False, track=fail)
    options = {"workdir": tmp_path / "run", "progress": False, "track": rows.append}
    resumed = fit(RECIPE, small, resume=True, **options)
    assert [row["epoch"] for row in rows] == [3]
    assert_same_run(resumed, whole[0])


@pytest.mark.slow
def test_the_rows_of_a_study_name_their_replica(small):
    rows = []
    study = fit(PLAIN, small, seeds=[3, 4], progress=False, track=rows.append)
    named = [(row.pop("epoch"), row.pop("replica")) for row in map(dict, rows)]
    assert named == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    for i, history in enumerate(study.histories):
        own = [row for row in rows if row["replica"] == i]
        assert own == [{"replica": i, **row} for row in history]


def test_the_scalars_of_a_row():
    row = {"epoch": 2, "step": 48, "train_loss": 0.5, "val_loss": None}
    assert scalars(row) == {"train_loss": 0.5}
    assert scalars({"replica": 3, **row}) == {"train_loss/replica3": 0.5}


def test_the_pages_own_tracker_writes_its_table(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = snippet("trackers.md").replace('RECIPES["default"]', "RECIPE")
    code = code.replace('load_splits("mnist", val_size=recipe.val_size)', "small")
    exec(code, values := {"RECIPE": RECIPE, "small": small})
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3"]
    assert values["recipe"] is RECIPE


def test_without_its_package_wandb_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refusal(WandB, tmp_path / "run", RECIPE)
    assert message == "W&B needs its package: pip install -e '.[wandb]'"
    assert not list(tmp_path.iterdir())


def train(*words, cwd, before="", **environment):
    """Runs train.py as a process of its own, after some lines of code."""
    path = ROOT / "experiments" / "train.py"
    code = f"{before}\nimport runpy, sys; sys.argv = {['train.py', *map(str, words)]!r}\n"
    code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_SILENT": "true", "HOME": str(cwd), "NETRC": str(cwd / "netrc"), **environment}
    words = [sys.executable, "-c", code]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_train_refuses_wandb_without_its_package_and_writes_nothing(archives, tmp_path):
    words = [*SMALL, "--archives", archives, "--wandb"]
    run = train(*words, cwd=tmp_path, before="import sys; sys.modules['wandb'] = None")
    assert run.returncode == 2
    _device, line = run.stderr.splitlines()
    assert line == "error: W&B needs its package: pip install -e '.[wandb]'"
    assert not (tmp_path / "runs").exists()


@needs("wandb")
@pytest.mark.slow
def test_train_refuses_wandb_without_a_key_and_writes_nothing(archives, tmp_path):
    run = train(*SMALL, "--archives", archives, "--wandb", cwd=tmp_path)
    assert run.returncode == 2
    line = run.stderr.splitlines()[-1]
    assert line.startswith("error: W&B: ")
    assert line.endswith("; WANDB_MODE=offline does without its server")
    assert not (tmp_path / "runs").exists()


@needs("wandb")
@pytest.mark.slow
def test_wandb_has_each_epoch_and_the_test_accuracy_in_one_resumed_run(archives, tmp_path):
    workdir = tmp_path / "run"

    def logged(*words):
        """Returns what W&B has written of a run, and of no other since."""
        places = ["--archives", archives, "--workdir", workdir, "--devices", 1, "--wandb"]
        run = train(*words, *places, cwd=tmp_path, WANDB_MODE="offline", WANDB_PROJECT="own")
        assert run.returncode == 0, run.stderr
        (path,) = workdir.glob("wandb/offline-run-*/*.wandb")
        read = [sys.executable, "-c", READ, str(path)]
        found = json.loads(subprocess.run(read, capture_output=True, check=True).stdout)
        path.unlink()
        return found

    first = logged(*SMALL)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["_step"] for row in first["history"]] == [1, 2]
    for sent, row in zip(first["history"], rows, strict=True):
        del row["step"]
        assert {name: sent[name] for name in row} == row
    assert (first["project"], first["name"]) == ("own", "run")
    config = json.loads((workdir / "recipe.json").read_text())
    assert {name: first["config"][name] for name in config} == config
    test = json.loads((workdir / "result.json").read_text())["test_accuracy"]
    assert first["summary"]["test_accuracy"] == test
    shutil.rmtree(workdir / "checkpoints" / "40")  # as a kill before its end leaves it
    second = logged("--resume")
    assert second["id"] == first["id"] == (workdir / "wandb_id.txt").read_text()
    assert [row["_step"] for row in second["history"]] == [2]
    assert second["history"][0]["val_loss"] == first["history"][1]["val_loss"]
    assert second["summary"]["test_accuracy"] == test


@needs("optuna")
@pytest.mark.slow
def test_optuna_prunes_a_trial_that_learns_little(archives, tmp_path):
    """The page's own search, on few images: a good rate, then one that is far too low."""
    changes = {
        '"val_size": 5000': '"val_size": 2000',
        "val_size=recipe.val_size": f"val_size=recipe.val_size, archives={str(archives)!r}",
        "MedianPruner()": "MedianPruner(n_startup_trials=1)",
        "n_trials=30": "n_trials=2",
        "study.optimize": """
for rate in (0.5, 0.02):
    study.enqueue_trial({"optimizer.learning_rate": rate, "optimizer.weight_decay": 1e-3})
study.optimize""",
    }
    code = snippet("optuna.md")
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code += "\nprint([(trial.state.name, trial.intermediate_values) for trial in study.trials])"
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    best, trials = run.stdout.splitlines()
    (full, values), (pruned, few) = ast.literal_eval(trials)
    assert (full, list(values)) == ("COMPLETE", [1, 2, 3, 4])
    assert (pruned, list(few)) == ("PRUNED", [1])
    assert few[1] < values[1]
    assert "learning_rate=0.5" in best
    assert "weight_decay=0.001" in best
