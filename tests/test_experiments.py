"""experiments/train.py as its user runs it: real processes, real signals, real files."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import benchmark
import folds
import gpu_study
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import predict
import pytest
import report
import seeds
import sweep
import tensorflow_datasets as tfds
from conftest import ALL, RECIPE, TINY, head
from flax import nnx
from hypothesis import given, settings
from PIL import Image
from scipy import stats
from test_archives import write_subset
from test_study import PLAIN, SEEDS, STOPPING

from mnist_flax.data import take
from mnist_flax.datasets import load_splits
from mnist_flax.datasets.archives import MNIST_FINGERPRINT, disputed_test_labels
from mnist_flax.errors import DivergedError, InputError
from mnist_flax.evaluation import Evaluation, evaluate
from mnist_flax.launch import command_line
from mnist_flax.loop import fit, never
from mnist_flax.model import CNN, CNNConfig, space_to_depth
from mnist_flax.models.columns import Columns, ColumnsConfig
from mnist_flax.optimizer import SGD, AdamW, Staircase
from mnist_flax.progress import FitResult
from mnist_flax.recipe import AugmentConfig, PlateauConfig, Recipe, differences, from_dict, to_dict
from mnist_flax.recipes import RECIPES
from mnist_flax.reports.calibration import fit_temperature
from mnist_flax.reports.results import digest, write_results
from mnist_flax.reports.runs import load_run
from mnist_flax.steps import create_state
from mnist_flax.studies import robustness
from mnist_flax.studies.seeds import over_views, summarize
from mnist_flax.studies.statistics import compare, describe, estimate, spread, survivors
from mnist_flax.workdir import lock_workdir, write_json

ROOT = Path(__file__).parents[1]
SMALL = ["--val-size", "59000", "--epochs", "2", "--batch-size", "100"]
SMALL += ["--model.widths", "4", "8", "--model.padding", "SAME", "VALID"]
SMALL += ["--model.pool", "True", "True", "--optimizer.learning-rate", "0.01"]
SMALL += ["--stopping", "None"]
FEW = [*SMALL, "--val-size", "2000"]  # of `few_archives`: 100 steps an epoch
NUM_TRAIN, NUM_TEST = (12_000, 2000) if ALL else (4000, 500)


def script(name, *arguments):
    return [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *map(str, arguments)]


def command(*arguments, **places):
    options = {f"--{name.replace('_', '-')}": path for name, path in places.items()}
    words = [word for option in options.items() for word in option]
    return script("train", *arguments, *words, "--devices", 1)


def run_words(words, *, cwd, env=None):
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def experiment(name, *arguments, cwd):
    return run_words(script(name, *arguments), cwd=cwd)


def train(*arguments, cwd, **places):
    return run_words(command(*arguments, **places), cwd=cwd)


@pytest.fixture(scope="module")
def few_archives(tmp_path_factory):
    """The first training and test examples of MNIST, as archives."""
    directory = tmp_path_factory.mktemp("few") / "own"
    return write_subset(directory, num_train=NUM_TRAIN, num_test=NUM_TEST)


@pytest.fixture(scope="module")
def finished(few_archives, tmp_path_factory):
    """The directory of a finished run of two epochs, in a process that checks what it imported."""
    better = ["--optimizer.learning-rate", "0.2"]
    if not ALL:  # less to compile
        better += ["--optimizer", "sgd", "--model.patch", "2", "--model.pool", "False", "True"]
        better += [f"--augment.{name}=0" for name in ("rotate", "shift", "zoom")]
    code = f"""
import runpy, sys
sys.argv = {["train.py", *FEW, *better, "--archives", str(few_archives), "--devices", "1"]!r}
try:
    runpy.run_path({str(ROOT / "experiments" / "train.py")!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
assert "tensorflow" not in sys.modules
assert "tensorflow_datasets" not in sys.modules
"""
    directory = tmp_path_factory.mktemp("finished")
    run = run_words([sys.executable, "-c", code], cwd=directory)
    assert run.returncode == 0, run.stderr
    (directory / "stdout.txt").write_text(run.stdout)
    return directory / "runs" / "default-seed0"


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "result.json").read_text())
    last = (finished.parents[1] / "stdout.txt").read_text().splitlines()[-1]
    correct, accuracy = result["test_correct"], result["test_accuracy"]
    assert last == f"test accuracy {accuracy:.2%} ({correct}/{NUM_TEST})"
    assert accuracy == correct / result["test_total"]
    assert set(result["seconds"]) == {"data", "compile", "train", "eval"}
    assert len(result["digest"]) == 64
    assert from_dict(result["recipe"]).epochs == 2
    for name in ("curves", "predictions", "mistakes", "confusion"):
        with Image.open(finished / f"{name}.png") as picture:
            assert min(picture.size) > 300


@pytest.mark.slow
def test_report_is_one_page_with_the_runs_numbers(finished, few_archives, tmp_path):
    run = experiment(
        "report", finished, "--archives", few_archives, "--out", tmp_path / "report", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    (numbers,) = json.loads((tmp_path / "report" / "report.json").read_text())
    result = json.loads((finished / "result.json").read_text())
    assert numbers["correct"] == result["test_correct"]
    assert sum(map(sum, numbers["confusion"])) == NUM_TEST
    assert "label_noise" not in numbers  # the audit is of all of MNIST's own test images
    loaded = load_run(finished)
    splits = load_splits("mnist", val_size=loaded.recipe.val_size, archives=few_archives)
    own = fit_temperature(evaluate(loaded.state, splits.val))
    assert numbers["temperature"] == pytest.approx(own, rel=1e-3)
    for name, values in numbers["robustness"].items():
        assert max(values["accuracies"]) <= numbers["accuracy"] + 0.02, name
    assert numbers["worst_case"] < numbers["accuracy"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{result['test_accuracy']:.2%}" in page
    assert page.count("<img") == page.count("data:image/png;base64,") > 10
    assert "http://" not in page
    assert "https://" not in page


def test_the_audit_of_labels_is_of_mnists_own_test_images():
    """A network that is wrong on the first disputed image and on one that is not, index 0."""
    disputed = disputed_test_labels(fingerprint=MNIST_FINGERPRINT)
    assert len(disputed) == 15
    assert 0 not in disputed
    labels = np.zeros(10_000, np.int32)
    logits = np.tile([1.0, 0.0], (10_000, 1))
    logits[[0, disputed[0]]] = [0.0, 1.0]
    found = report.label_noise(Evaluation(logits, labels), fingerprint=MNIST_FINGERPRINT)
    assert found == {
        "disputed": 15,
        "accuracy_undisputed": 9984 / 9985,
        "errors_undisputed": 1,
        "ceiling": 0.9985,
    }
    assert report.label_noise(Evaluation(logits, labels), fingerprint="0" * 16) is None


def prepare_colours(data_dir):
    """Prepares a dataset of 8x8x3 images: the bright channel is the class; no test image's is 2."""

    class Colours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3, 90), "test": self._generate_examples(2, 40)}

        def _generate_examples(self, num_classes, count):
            rng = np.random.default_rng(num_classes)
            for i in range(count):
                image = rng.integers(0, 100, (8, 8, 3), np.uint8)
                image[..., i % num_classes] += 120
                yield i, {"image": Image.fromarray(image), "label": i % num_classes}

    Colours(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.mark.slow
def test_report_of_other_images_and_of_a_class_that_is_not_tested(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a script sets
    prepare_colours(tmp_path / "data")
    splits = load_splits("colours", val_size=15, data_dir=tmp_path / "data")
    model = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(8,))
    recipe = Recipe(
        dataset="colours",
        val_size=15,
        epochs=2,
        batch_size=15,
        model=model,
        augment=AugmentConfig(),
        optimizer=SGD(learning_rate=0.05),
    )
    run = tmp_path / "run"
    result = fit(recipe, splits, workdir=run, progress=False)
    write_results(
        run,
        recipe,
        splits.info,
        result,
        test_examples=splits.test,
        test=evaluate(result.state, splits.test),
        data_seconds=0.0,
        test_seconds=0.0,
    )
    if not ALL:  # each corruption and each map compiles programs of its own
        few = {"robustness": {"corruptions": robustness.CORRUPTIONS[-2:]}}
        few["worst_case"] = {"grid": robustness.GRID[:2]}
        for name, options in few.items():
            function = functools.partial(getattr(robustness, name), **options)
            monkeypatch.setattr(robustness, name, function)
    assert not report.main([str(run), "--data-dir", str(tmp_path / "data")])
    (numbers,) = json.loads(
        (run / "report" / "report.json").read_text(), parse_constant=pytest.fail
    )
    assert numbers["recall"][2] is None  # there is no blue image to be found
    confusion = np.array(numbers["confusion"])
    assert confusion.sum(axis=1).tolist() == [20, 20, 0]
    assert numbers["recall"][:2] == (np.diag(confusion)[:2] / 20).tolist()
    page = (run / "report" / "index.html").read_text()
    assert "<td>blue</td><td>" in page
    assert "nan" not in re.sub('base64,[^"]*', "", page).lower()
    assert "<p></p>" not in page
    assert "the classifier sees of 40 test images" in page
    assert f"{numbers['accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
def test_predict_reads_pictures_and_refuses_what_is_none(finished, splits, tmp_path):
    chosen = [int(i) for i in (splits.test.labels == 1).nonzero()[0][:1]]
    for index in chosen:
        digit = Image.fromarray(255 - splits.test.images[index, :, :, 0])
        digit.resize((280, 280)).save(tmp_path / "digit.png")
    Image.new("L", (200, 200), 255).save(tmp_path / "blank.png")
    words = [finished, tmp_path / "digit.png", "--json", "--show", tmp_path / "shown.png"]
    run = experiment("predict", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    ((answer,),) = [entry["digits"] for entry in json.loads(run.stdout)]
    assert 0.1 <= answer["probability"] <= 1
    assert answer["label"] != answer["runner_up"]
    assert (tmp_path / "shown.png").exists()
    run = experiment("predict", finished, tmp_path / "blank.png", cwd=tmp_path)
    assert run.returncode == 1
    assert "blank" in run.stderr
    assert run.stdout == ""


@pytest.mark.slow
def test_export_checks_each_file_on_the_whole_test_split(finished, few_archives, tmp_path):
    words = [finished, "--archives", few_archives, "--out", tmp_path / "export"]
    run = experiment("export", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"on {NUM_TEST:,} images, predictions the same") == 3
    result = json.loads((finished / "result.json").read_text())
    assert (tmp_path / "export" / "model.stablehlo").stat().st_size > 4 * result["parameters"]
    assert (tmp_path / "export" / "model.onnx").stat().st_size > 4 * result["parameters"]
    weights = load_run(tmp_path / "export" / "weights.safetensors")
    assert digest(weights.state) == result["digest"]


def no_model(_data, _images):
    raise RuntimeError("Could not find an implementation\nat line 3")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda _data, images: images + 0.01, "largest difference of a logit 1.0e-02 on 2 images"),
        (lambda _data, images: images * np.nan, "largest difference of a logit nan"),
        (no_model, "RuntimeError: Could not find an implementation\n"),
    ],
)
def test_a_file_that_fails_its_check_is_not_left_behind(run, message, tmp_path, capsys):
    images = np.eye(2)
    options = {"images_NHWC": images, "expected_NK": images, "tolerance": 1e-3}
    write_checked = importlib.import_module("export").write_checked
    path = tmp_path / "export" / "model.onnx"
    assert not write_checked(path, lambda: b"data", run, **options)
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {path} is not written: {message.strip()}")
    assert len(printed.err.splitlines()) == 1
    assert write_checked(path, lambda: b"data", lambda _data, images: images, **options)
    assert path.read_bytes() == b"data"
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    "name",
    [
        "report",
        pytest.param("predict", marks=pytest.mark.slow),
        pytest.param("export", marks=pytest.mark.slow),
    ],
)
def test_a_directory_without_a_run_is_one_line(name, tmp_path):
    run = experiment(name, tmp_path, *(["x.png"] if name == "predict" else []), cwd=tmp_path)
    assert run.returncode == 2
    device, refusal = run.stderr.splitlines()
    assert "cpu" in device.lower()
    assert refusal.startswith("error: there is no ")


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_the_run_resumes(few_archives, tmp_path):
    long = [*FEW, "--epochs", "400", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command(*long, archives=few_archives), stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in errors.splitlines()[-1]
    again = train(*long, archives=few_archives, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ")
    assert "--resume" in again.stderr
    words = shlex.split(errors.splitlines()[-1].partition("continue with: ")[2])
    assert words[-4:] == ["--archives", str(few_archives), "--devices", "1"]
    done = len(metrics.read_text().splitlines())
    # Its own recipe is read from the directory; 400 epochs are too many to wait for.
    process = subprocess.Popen(
        [sys.executable, *words[1:]],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    wait_for(lambda: len(metrics.read_text().splitlines()) >= done + 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_run_is_not_resumed_by_another_recipe(finished, few_archives):
    """Which was ignored, though it was asked for."""
    words = ["--resume", "--workdir", str(finished), "--recipe", "quick"]
    again = train(*words, archives=few_archives, cwd=finished.parent)
    assert again.returncode == 2
    assert "has another recipe (" in again.stderr.splitlines()[-1]
    assert "leave these options out to continue it" in again.stderr.splitlines()[-1]


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_one_process_holds_a_run_until_it_is_killed(few_archives, tmp_path):
    long = [*FEW, "--epochs", "400", "--workdir", str(tmp_path / "run")]
    words = command(*long, archives=few_archives)
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), first)
    refused = train(*long, "--resume", archives=few_archives, cwd=tmp_path)
    assert refused.returncode == 2
    assert "another process is using" in refused.stderr
    first.kill()
    first.wait()
    with lock_workdir(tmp_path / "run", resume=True):
        pass


def from_archives(archives, directory):
    """Options that read archives, with a directory of datasets in which there is none."""
    return ["--archives", str(archives), "--data-dir", str(directory / "data"), "--devices", "1"]


INTERRUPTED = pytest.mark.parametrize("interrupted", [False, True])


def interrupt_and_resume(words, rows, *, cwd):
    """Runs a study that is told to end once `rows` has a row; returns how its continuation ends."""
    victim = subprocess.Popen(words, cwd=cwd, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: rows.exists() and rows.read_text(), victim)
    victim.send_signal(signal.SIGTERM)
    assert "continue with the same command and --resume" in victim.communicate()[1]
    assert victim.returncode == 128 + signal.SIGTERM
    again = run_words(words, cwd=cwd)
    assert again.returncode == 2
    assert "holds a run; give --resume" in again.stderr
    return run_words([*words, "--resume"], cwd=cwd)


@INTERRUPTED
@pytest.mark.slow
def test_a_study_reports_the_mean_of_what_it_trained(interrupted, few_archives, tmp_path):
    """Also where it was interrupted."""
    words = script("seeds", *FEW, "--epochs", "4", "--seeds", "3", "--views", "2")
    words += from_archives(few_archives, tmp_path)
    workdir = tmp_path / "runs" / "seeds-default"
    rows = workdir / "replicas-0" / "metrics.jsonl"
    if interrupted:
        victim = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: rows.exists() and rows.read_text(), victim)
        victim.send_signal(signal.SIGTERM)
        assert "continue with the same command and --resume" in victim.communicate()[1]
        assert victim.returncode == 128 + signal.SIGTERM
        assert 0 < len(rows.read_text().splitlines()) < 12
        words = [*words, "--resume"]
    run = run_words(words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(rows.read_text().splitlines()) == 12
    study = json.loads((workdir / "study.json").read_text())["studies"]["default"]
    assert [replica["seed"] for replica in study["replicas"]] == [100, 101, 102]
    accuracies = [replica["test_accuracy"] for replica in study["replicas"]]
    assert study["mean"] == pytest.approx(statistics.mean(accuracies))
    assert study["deviation"] == pytest.approx(statistics.stdev(accuracies))
    # Student's t for two degrees of freedom: 4.303.
    half = 4.302653 * statistics.stdev(accuracies) / 3**0.5
    assert study["interval"] == pytest.approx([study["mean"] - half, study["mean"] + half])
    assert f"| `default` | {study['mean']:.3%} | {study['deviation']:.3%} | " in run.stdout
    assert f" | 3 | {study['ensemble_accuracy']:.2%} | " in run.stdout
    views = study["views"]
    assert f"| `default`, the mean of 2 views | {views['mean']:.3%} | " in run.stdout
    assert 0 < abs(views["mean"] - study["mean"]) < 0.1


def certain(*classes):
    """An evaluation of two examples of label 0, by the probability that each gives label 1."""
    probabilities_NK = np.array([[1 - p, p] for p in classes])
    return Evaluation(np.log(probabilities_NK), np.zeros(2, np.int32))


def test_views_are_averaged_for_each_member_apart():
    """Two views, seen by three replicas."""
    seen = [
        [certain(0.9, 0.1), certain(0.2, 0.2), certain(0.4, 0.6)],
        [certain(0.3, 0.1), certain(0.4, 0.9), certain(0.4, 0.8)],
    ]
    expected = [[0.6, 0.1], [0.3, 0.55], [0.4, 0.7]]
    found = [replica.probabilities_NK[:, 1] for replica in over_views(seen)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_recipes_are_compared_seed_by_seed():
    """Differences of 0.1, 0.2 and 0.3: t is 0.2 / (0.1 / sqrt 3), with two degrees of freedom."""
    theirs = np.array([0.4, 0.4, 0.5, 0.1, np.nan])
    found = compare(np.array([0.5, 0.6, 0.8, np.nan, 0.9]), theirs)
    assert (found["pairs"], found["difference"]) == (3, pytest.approx(0.2))
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2))


def test_a_sweep_chooses_by_the_epoch_that_the_winner_will_end_with():
    rows = tuple({"train_accuracy": 0.9, "val_accuracy": value} for value in (0.3, 0.2))
    result = FitResult(
        recipes=(RECIPE, RECIPE),
        states=None,
        histories=(rows, ()),
        best_epochs=(1, 0),
        stopped=(False, False),
        diverged=(None, "its loss was not finite"),
    )
    assert sweep.val_accuracy(result, 0, best=True) == 0.3
    assert sweep.val_accuracy(result, 0, best=False) == 0.2
    assert math.isnan(sweep.val_accuracy(result, 1, best=True))


@pytest.mark.bits
@pytest.mark.parametrize("name", ["quick", "tiny700"])
@pytest.mark.slow
def test_the_reports_filters_are_the_first_kernels_in_pixels(name):
    """An image of one bright pixel is answered by the kernel, upside down."""
    config = RECIPES[name].model
    patch = config.patch
    lost = 1 if config.padding[0] == "VALID" else 0
    model = CNN(config, rngs=nnx.Rngs(0))
    state = create_state(jax.random.key(0), lambda _: model, optax.sgd(0.1))
    filters_OHW = report.first_filters(state)
    assert filters_OHW.shape == (config.widths[0], 3 * patch, 3 * patch)
    columns = Columns([model, CNN(config, rngs=nnx.Rngs(1))])
    beside = create_state(jax.random.key(0), lambda _: columns, optax.sgd(0.1))
    np.testing.assert_array_equal(report.first_filters(beside), filters_OHW)
    bright = [(14, 14), (15, 14), (14, 15)]  # of different places in a patch
    images = np.zeros((3, 28, 28, 1), np.float32)
    images[np.arange(3), *np.transpose(bright)] = 1
    answers_BHWO = np.asarray(model.convs[0](space_to_depth(jnp.asarray(images), patch=patch)))
    for (row, column), answers_HWO in zip(bright, answers_BHWO, strict=True):
        for up, left in np.ndindex(3, 3):
            seen = answers_HWO[row // patch + 1 - lost - up, column // patch + 1 - lost - left]
            pixel = up * patch + row % patch, left * patch + column % patch
            np.testing.assert_allclose(filters_OHW[:, *pixel], seen, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "no study to resume"),
        (["--views", "-1"], "views is -1"),
        (["--recipe", "quick", "--views", "2"], "no augmentation"),
        (["--recipe", "fast", "--versus", "quick", "--views", "2"], "no augmentation"),
    ],
)
def test_an_impossible_study_is_refused_before_any_work(arguments, message, tmp_path):
    jax.devices()  # the backend has started: whatever sets JAX up now would fail
    with pytest.raises(InputError, match=message):
        seeds.main([*arguments, "--workdir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@INTERRUPTED
def test_folds_tests_every_training_image_once(interrupted, few_archives, tmp_path):
    """Also where it was interrupted."""
    words = script("folds", *SMALL, "--val-size", "0")
    words += ["--epochs", "2", "--optimizer.learning-rate", "0.4", "--folds", "2"]
    words += ["--views", "2", *from_archives(few_archives, tmp_path)]
    rows = tmp_path / "runs" / "folds-default" / "fold-1" / "metrics.jsonl"
    run = (
        interrupt_and_resume(words, rows, cwd=tmp_path)
        if interrupted
        else run_words(words, cwd=tmp_path)
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "runs" / "folds-default" / "folds.json").read_text())
    assert sum(found["sizes"]) == 12000
    assert max(found["sizes"]) - min(found["sizes"]) <= 10  # one a class
    assert list(found["accuracy"]) == ["default", "default, the mean of 2 views"]
    for name, accuracy in found["accuracy"].items():
        assert accuracy == sum(found["correct"][name]) / 12000 > 0.7
        assert f"{name}: {accuracy:.3%} of 12000 training images" in run.stdout
    assert len(set(found["accuracy"].values())) == 2


@pytest.mark.slow
def test_a_fold_is_not_trained_on(small):
    """Its labels are wrong, by one; whoever had trained on them would be right at times."""
    held_out = np.arange(200, 800)
    labels = small.train.labels.copy()
    labels[held_out] = (labels[held_out] + 1) % 10
    train = dataclasses.replace(small.train, labels=labels)
    wrong = dataclasses.replace(small, train=train, val=head(small.val, 0))
    recipe = dataclasses.replace(folds.without_validation(PLAIN), epochs=20, batch_size=30)
    rest = folds.without(wrong, held_out)
    assert rest.info.fingerprint != folds.without(wrong, held_out[1:]).info.fingerprint
    found = evaluate(fit(recipe, rest, progress=False).state, take(wrong.train, held_out))
    np.testing.assert_array_equal(found.labels_N, labels[held_out])
    assert np.mean((found.predictions_N + 1) % 10 == found.labels_N) > 0.85
    assert found.accuracy < 0.05


def test_the_mean_of_folds_is_over_those_that_did_not_diverge():
    """Of folds of 10, 20 and 30 images the second diverged: 9 + 24 of 40, and 8 + 28."""
    found = folds.summarize(["plain", "views"], [[9, 8], None, [24, 28]], sizes=[10, 20, 30])
    assert found["accuracy"] == {"plain": 33 / 40, "views": 36 / 40}
    assert (found["diverged"], found["total"]) == ([2], 40)
    assert found["correct"] == {"plain": [9, None, 24], "views": [8, None, 28]}
    with pytest.raises(DivergedError, match="every fold diverged"):
        folds.summarize(["plain"], [None, None], sizes=[1, 1])


@pytest.mark.slow
def test_a_seed_that_diverges_is_named_and_the_mean_is_the_others(small, splits, data_dir):
    """The second of four: its numbers are infinite from the first step on."""
    result = fit(
        dataclasses.replace(PLAIN, epochs=1, model=TINY),
        small,
        seeds=range(4),
        vary={"optimizer.learning_rate": [0.05, 1e30, 0.05, 0.05]},
        progress=False,
    )
    assert survivors(result.diverged) == [0, 2, 3]
    tests = [evaluate(result.replica(i).state, head(splits.test, 500)) for i in (0, 2, 3)]
    study = summarize(result, seeds=range(10, 14), tests=[tests[0], tests[0], *tests[1:]])
    assert study["diverged"] == [11]
    assert study["mean"] == pytest.approx(np.mean([test.accuracy for test in tests]))
    assert study["deviation"] == pytest.approx(np.std([t.accuracy for t in tests], ddof=1))
    assert study["replicas"][1] == {"seed": 11, "diverged": result.diverged[1]}
    assert [replica["seed"] for replica in study["replicas"]] == [10, 11, 12, 13]
    seconds = {"fit_seconds": 1.0, "train_seconds_mean": 0.1}
    assert "3 seeds (1 more diverged: 11); " in describe("name", study | seconds)


def test_where_one_seed_is_left_there_is_no_spread():
    found = estimate(np.array([0.5]))
    assert found == {"mean": 0.5, "deviation": None, "interval": None}
    assert spread(found) == ["50.000%", "-", "-"]
    with pytest.raises(DivergedError, match="all 2 networks diverged; the first: too fast"):
        survivors(["too fast", "too far"])


def test_a_sweep_chooses_among_points_of_which_the_fewest_seeds_diverged():
    accuracies = np.array([[0.5, np.nan], [0.3, 0.4], [0.4, 0.5], [np.nan, np.nan]])
    assert sweep.winner(accuracies) == 2
    assert sweep.winner(accuracies[[3, 0]]) == 1
    line = sweep.describe({"rate": 0.5}, accuracies[0], first_seed=7)
    assert line == "rate 0.5: validation accuracy 50.000% (1 seeds; 1 more diverged: 8)"
    with pytest.raises(DivergedError, match="all 2 networks diverged"):
        sweep.winner(accuracies[3:])


@pytest.mark.slow
@pytest.mark.usefixtures("splits")
def test_scaling_measures_every_size(data_dir, tmp_path):
    words = script("scaling", "--replicas", "2")
    words += ["--batches", "256", "--turns", "2", "--images", "256", "--data-dir", data_dir]
    if taskset := shutil.which("taskset"):  # on one core there is less to compile
        words = [taskset, "--cpu-list", "0", *words]
    run = run_words(words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "runs" / "scaling" / "scaling.json").read_text())
    sizes = {(row["panel"], row["line"], row["size"]) for row in rows}
    assert {("replicas", form, 2) for form in ("one after another", "vmap")} < sizes
    assert ("images in a batch", "1 device", 256) in sizes
    assert all(len(row["images_per_second"]) == 2 for row in rows)
    assert (tmp_path / "runs" / "scaling" / "scaling.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("splits")
def test_a_rehearsal_of_the_gpu_study(data_dir, tmp_path):
    """One recipe, cut to seconds, on the CPU: every part is there, and what is late says so."""
    words = script("gpu_study", "--recipes", "tiny700", "--single-recipes", "tiny700")
    words += ["--precisions", "float32", "--singles", "1", "--seeds", "2", "--sizes", "1"]
    words += ["--epochs", "1", "--minutes", "0.05", "--data-dir", data_dir]
    run = run_words(words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "runs" / "gpu_study.json").read_text())
    late = {"unfinished": "stopped when the time was over"}
    assert found["singles"] == {"tiny700 float32": late}
    assert found["speeds"] == {"unfinished": "no time was left"}
    assert found["studies"] == {"tiny700": {"unfinished": "no time was left"}}
    assert [row["goal"] for row in found["times"]] == [0.9917, 0.994, 0.996]
    assert "to 99.17%: not reached" in run.stdout


def test_a_gpu_study_of_no_recipe_is_refused():
    with pytest.raises(InputError, match="give one at least"):
        gpu_study.Command(recipes=(), single_recipes=())
    gpu_study.Command(single_recipes=())


@pytest.mark.slow
def test_the_parts_of_the_gpu_study(small):
    """Of a recipe and as many seeds as test_study.py compiles too."""
    single = gpu_study.single(STOPPING, small, seeds=SEEDS[:2], late=never)
    together = gpu_study.study(STOPPING, small, seeds=SEEDS, late=never)
    for part in (single, together):
        accuracies = part["test_accuracies"]
        assert min(accuracies) > 0.3
        assert len(set(accuracies)) == len(accuracies)
        assert part["mean"] == pytest.approx(statistics.mean(accuracies))
    assert together["deviation"] == pytest.approx(statistics.stdev(together["test_accuracies"]))
    assert len(single["train_seconds"]) == 2
    assert single["images_per_second"] > 0
    N = small.train.num_examples
    assert gpu_study.images(STOPPING, small, epochs=3) == 3 * (N // 50) * 50
    seconds = together["train_seconds"]
    assert together["images_per_second"] * seconds <= 3 * 12 * N  # some stop earlier
    assert together["replicas"] == len(together["test_accuracies"]) == 3
    assert together["diverged"] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_is_every_columns(precision):
    before = jax.config.jax_default_matmul_precision
    try:
        recipe = gpu_study.at_precision(RECIPES["accurate"], precision)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert [config.precision for config in recipe.model.columns] == [precision] * 2


def test_the_time_to_an_accuracy_is_the_quickest_networks():
    singles = {
        "slow": {"train_seconds": [9.0, 8.0], "mean": 0.997},
        "quick": {"train_seconds": [1.0, 2.0], "mean": 0.993},
        "late": {"unfinished": "no time was left"},
    }
    times = gpu_study.times_to((0.99, 0.995, 0.999), singles)
    assert [row.get("part") for row in times] == ["quick", "slow", None]
    assert [row.get("seconds") for row in times] == [1.5, 8.5, None]


@pytest.mark.slow
@INTERRUPTED
def test_sweep_chooses_on_validation_and_trains_the_winner_anew(
    interrupted, few_archives, tmp_path
):
    """Also where it was interrupted.

    At a learning rate of 1e-9 nothing is learnt, so the choice is known beforehand.
    """
    words = script("sweep", *FEW, "--epochs", "2")
    words += ["--vary", "optimizer.learning-rate=1e-9,0.4", "--search-val-size", "500"]
    words += ["--seeds", "1", "--fresh-seeds", "2", *from_archives(few_archives, tmp_path)]
    workdir = tmp_path / "runs" / "sweep-default"
    rows = workdir / "search-0" / "metrics.jsonl"
    run = (
        interrupt_and_resume(words, rows, cwd=tmp_path)
        if interrupted
        else run_words(words, cwd=tmp_path)
    )
    assert run.returncode == 0, run.stderr
    sweep = json.loads((workdir / "sweep.json").read_text())
    rates = [1e-9, 0.4]
    assert sweep["points"] == [{"optimizer.learning_rate": rate} for rate in rates]
    (worse,), (better,) = sweep["val_accuracies"]
    assert worse < 0.3 < better
    assert sweep["best"] == {"optimizer.learning_rate": 0.4}
    assert [replica["seed"] for replica in sweep["winner"]["replicas"]] == [1000, 1001]
    assert sweep["winner"]["recipe"]["optimizer"]["learning_rate"] == 0.4
    assert sweep["winner"]["recipe"]["val_size"] == 2000
    assert (workdir / "response.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "vary is empty"),
        (["--vary", "epochs"], "'epochs' is not NAME="),
        (["--vary", "epochs=1:2:3", "--draws", "1"], "is not NAME="),
        (["--vary", "epochs=2:1", "--draws", "1"], "is not NAME="),
        (["--vary", "epochs=1", "epochs=2"], "each once"),
        (["--vary", "augment.zoom=0:0.1"], "augment.zoom has a range; give --draws"),
        (["--vary", "epoch=1"], "no number 'epoch'"),
        (["--vary", "optimizer.nesterov=1"], "no number 'optimizer.nesterov'"),
        (["--vary", "epochs=1.5"], "whole number"),
        (["--vary", "model.dropout=1.5"], "dropout is 1.5"),
        (["--vary", "epochs=1", "--search-val-size", "0"], "search_val_size is 0"),
        (["--vary", "seed=1,2"], "vary names seed"),
        (["--vary", "val-size=1,300"], "vary names val_size"),
    ],
)
def test_sweep_refuses_in_one_line_before_it_writes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        sweep.main(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("splits")
def test_killed_runs_end_with_the_same_bits(data_dir, tmp_path):
    """The short form; experiments/crash_test.py alone kills a hundred, during preparation too."""
    words = script("crash_test", "--kills", "2")
    words += ["--data-dir", data_dir, "--scenarios", "early stopping", "--no-prepare"]
    run = run_words(words, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "2/2 recovered"


CONTENDER = """
import json, sys
print("ready", flush=True)
for turn, line in enumerate(sys.stdin):
    print("of no interest " * 20000, file=sys.stderr)
    if turn == {dies_in}:
        sys.exit("out of memory")
    print(json.dumps({{"seconds": int(line) / 4}}), flush=True)
"""


def test_a_race_goes_on_without_a_contender_that_dies(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PAUSE_SECONDS", 0)
    codes = {"sound": CONTENDER.format(dies_in=9), "broken": "import nonexistent"}
    codes["mortal"] = CONTENDER.format(dies_in=1)
    words = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    assert benchmark.race(words, batches=6, rounds=3) == {"sound": [1.5, 1.5, 1.5]}
    broken, mortal = capsys.readouterr().err.splitlines()
    assert broken == "broken is left out: ModuleNotFoundError: No module named 'nonexistent'"
    assert mortal == "mortal is left out: out of memory"


@pytest.mark.slow
@pytest.mark.usefixtures("splits")
def test_benchmark_times_our_steps_without_peers(data_dir, tmp_path):
    words = script("benchmark", "--sections", "steps", "--rounds", "1", "--batch-size", "16")
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)}
    run = run_words(words, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "runs" / "benchmark.json").read_text())
    names = [row["contender"] for row in result["steps"]["rows"]]
    assert names[1:] == ["mnist_flax, 1 device", "Flax, plain layers"]
    assert all(row["images_per_second"] > 0 for row in result["steps"]["rows"])


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="needs mnist_flax[fuzz]")
@pytest.mark.parametrize("target", ["archive", "recipe", "command", "picture"])
def test_fuzzing_finds_nothing(target, tmp_path):
    """The short form, of 300 inputs; a finding ends the process with status 77."""
    # By a shell: libFuzzer reads its peak memory, in which Linux counts that of the process that
    # started it, and this one's is large.
    words = ["sh", "-c", '"$@"; exit $?', "sh", *script("fuzz", target, "-runs=300")]
    run = run_words(words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Done 300 runs" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "defualt"], "did you mean default"),
        pytest.param(["--dataset", "mnits"], "mnist", marks=pytest.mark.slow),
        pytest.param(["--batch-size", "70000"], "batch_size is 70000", marks=pytest.mark.slow),
        pytest.param(
            ["--resume", "--workdir", "nowhere"], "no run to resume", marks=pytest.mark.slow
        ),
        pytest.param(["--resume"], "give --workdir", marks=pytest.mark.slow),
        pytest.param(["--archives", "nowhere"], "nowhere", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("splits")
def test_bad_input_is_one_line_and_status_2(arguments, message, data_dir, tmp_path):
    run = train(*arguments, data_dir=data_dir, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    *before, refusal = run.stderr.strip().splitlines()
    assert len(before) <= 1  # the device
    assert refusal.startswith("error: ")
    assert message in refusal
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-option", "3"], "'--no-such-option' is not an option"),
        (["--epohs=3"], "did you mean --epochs?"),
        (["--model.width", "3"], "did you mean --model.widths?"),
        (["3"], "'3' is a word too many"),
        (["--epochs"], "--epochs"),
        (["--optimizer", "adma"], "optimizer 'adma' is unknown"),
        (["--optimizer", "os:nothing"], "optimizer 'os:nothing' is unknown"),
        (["--optimizer", "os:path"], "or give a frozen dataclass as module:Class"),
        (["--optimizer"], "optimizer '' is unknown; choose from sgd, adamw, muon"),
        (["--model", "columns"], "columns is empty"),
        (["--plateau", "3"], "plateau '3' is unknown"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "0"], "epochs is 0"),
        (["--augment.rotate", "nan"], "augment.rotate is nan"),
        (["--model.widths", "4", "-4", "4", "4"], "-4"),
        (["--schedule.decay", "0.5"], "'--schedule.decay' is not an option"),
        (["--optimizer", "adamw", "--optimizer.momentum", "0.9"], "is not an option"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message):
    with pytest.raises(InputError) as refusal:
        command_line.parse(Recipe, arguments, default=RECIPES["default"], description="")
    assert message in str(refusal.value)
    # No frame, no title of one, no help.
    assert not re.search(r"[\n\u2500-\u257f]|--{3}|Argument helptext|For full", str(refusal.value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = sorted(to_dict(RECIPES["baseline"]))


@settings(deadline=None, max_examples=200)
@given(field=st.sampled_from(FIELDS), value=JSON, inner=st.text(max_size=12))
def test_any_recipe_file_is_a_recipe_or_an_input_error(field, value, inner):
    values = to_dict(RECIPES["baseline"])
    if isinstance(values[field], dict) and inner in values[field]:
        values[field] = values[field] | {inner: value}
    else:
        values[field] = value
    with contextlib.suppress(InputError):
        assert isinstance(from_dict(values), Recipe)


WORDS = st.sampled_from(
    ["--epochs", "--seed", "--model.widths", "--optimizer", "--recipe", "--augment.rotate"]
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, max_size=5))
def test_any_command_line_is_a_recipe_or_an_input_error(words):
    status, refusal = 0, ""
    try:
        name, rest = command_line.split_recipe(words)
        default = command_line.named_recipe(name)
        recipe = command_line.parse(Recipe, rest, default=default, description="")
    except InputError as error:
        refusal = str(error)
    except SystemExit as stop:
        status = stop.code
    else:
        assert isinstance(recipe, Recipe)
    assert not status
    assert "\n" not in refusal


def test_a_recipe_of_ones_own_is_named_by_its_file(tmp_path):
    """Its field is an option's default, as a named recipe's is."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\n"
        "from mnist_flax import RECIPES\n"
        "MINE = dataclasses.replace(RECIPES['quick'], epochs=7)\n"
    )
    name, rest = command_line.split_recipe(["--recipe", f"{path}:MINE", "--seed", "3"])
    assert command_line.recipe_label(name) == "MINE"
    default = command_line.named_recipe(name)
    recipe = command_line.parse(Recipe, rest, default=default, description="")
    assert recipe == dataclasses.replace(RECIPES["quick"], epochs=7, seed=3)
    for wrong, message in [
        (f"{path}:YOURS", "has no Recipe 'YOURS'; its own are: MINE"),
        (f"{tmp_path}/none.py:MINE", "there is no file"),
    ]:
        with pytest.raises(InputError, match=message):
            command_line.named_recipe(wrong)
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match=r"cannot be run \(ModuleNotFoundError: No module named"):
        command_line.named_recipe(f"{path}:MINE")


def test_options_override_the_named_recipe():
    name, rest = command_line.split_recipe(["--seed", "3", "--recipe", "baseline", "--epochs", "1"])
    assert (name, rest) == ("baseline", ["--seed", "3", "--epochs", "1"])
    recipe = command_line.parse(Recipe, rest, default=RECIPES[name], description="")
    expected = ["epochs: 5 -> 1", "seed: 0 -> 3"]
    assert differences(to_dict(RECIPES["baseline"]), to_dict(recipe)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "default"),
        (["--dataset", "kmnist"], "default"),
        (["--dataset", "fashion_mnist", "--seed", "1"], "fashion"),
        (["--dataset=fashion_mnist"], "fashion"),
        (["--dataset", "fashion_mnist", "--dataset", "mnist"], "default"),
        (["--dataset", "fashion_mnist", "--recipe", "quick"], "quick"),
        (["--recipe=", "--dataset", "fashion_mnist"], ""),
        (["--dataset"], "default"),
    ],
)
def test_a_dataset_may_have_a_recipe_of_its_own(words, expected):
    assert command_line.split_recipe(words)[0] == expected


def test_an_optimizer_is_one_step_on_the_command_line():
    """And so are schedules, and what a recipe has none of; in any order."""
    words = ["--optimizer.learning-rate", "1e-3", "--optimizer", "adamw", "--schedule=staircase"]
    words += ["--schedule.decay", "0.5", "--plateau.patience", "3", "--stopping", "None"]
    recipe = command_line.parse(Recipe, words, default=RECIPES["default"], description="")
    assert recipe.optimizer == AdamW(learning_rate=1e-3)
    assert recipe.schedule == Staircase(decay=0.5)
    assert (recipe.plateau, recipe.stopping) == (PlateauConfig(patience=3), None)
    words = ["--optimizer", "muon", "--optimizer.ns-steps", "2"]  # the recipe's own kind
    recipe = command_line.parse(Recipe, words, default=RECIPES["tiny700"], description="")
    assert recipe.optimizer == dataclasses.replace(RECIPES["tiny700"].optimizer, ns_steps=2)


@pytest.mark.parametrize(
    "words",
    [
        ["RUN", "--json", "a.png", "--show", "out.png", "b.png"],
        ["--show=out.png", "RUN", "a.png", "b.png", "--json"],
        ["--json", "RUN", "a.png", "--show", "out.png", "--", "b.png"],
    ],
)
def test_options_stand_between_positional_words(words):
    command = command_line.parse(predict.Command, words, default=predict.Command(), description="")
    assert command.paths == (Path("RUN"), Path("a.png"), Path("b.png"))
    assert (command.show, command.json, command.line) == (Path("out.png"), True, False)


def test_a_word_after_two_dashes_is_no_option():
    words = ["RUN", "--", "--json", "-1.png"]
    command = command_line.parse(predict.Command, words, default=predict.Command(), description="")
    assert command == predict.Command(paths=(Path("RUN"), Path("--json"), Path("-1.png")))


def test_every_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    default = folds.Command(recipe=folds.without_validation(RECIPES["default"]))
    words = ["--workdir=~/x", "--data-dir", "~/y", "--archives", "a~"]
    command = command_line.parse(folds.Command, words, default=default, description="")
    paths = command.workdir, command.data_dir, command.archives
    assert paths == (Path("/home/me/x"), Path("/home/me/y"), Path("a~"))
    words = ["~/run", "--line", "~/a.png"]
    command = command_line.parse(predict.Command, words, default=predict.Command(), description="")
    assert command.paths == (Path("/home/me/run"), Path("/home/me/a.png"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("predict", ["gs://bucket/run", "a.png"]),
        ("predict", ["run", "--show", "gs://bucket/a.png", "a.png"]),
        ("report", ["run", "--out=gs://bucket/a"]),
        ("export", ["run", "--data-dir", "gs://bucket/a"]),
        ("demo", ["gs://bucket/run"]),
        ("scaling", ["--workdir", "gs://bucket/run"]),
        ("determinism", ["--data-dir", "gs://bucket/run"]),
        ("folds", ["--archives", "gs://bucket/run"]),
        ("train", ["--workdir", "gs://bucket/run"]),
        ("train", ["--resume", "--workdir", "gs://bucket/run"]),
        ("seeds", ["--workdir", "gs://bucket/run"]),
        ("sweep", ["--vary", "epochs=1,2", "--workdir", "gs://bucket/run"]),
        ("gpu_study", ["--output", "gs://bucket/run"]),
        ("benchmark", ["--out", "gs://bucket/run"]),
    ],
)
def test_an_address_is_no_path(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is gs://bucket/\w+"):
        importlib.import_module(name).main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("predict", ["run", "a.png", "--show", "file/a.png"]),
        ("scaling", ["--workdir", "file/scaling"]),
        ("benchmark", ["--out", "file/a.json"]),
    ],
)
def test_where_nothing_can_be_written_is_said_before_any_work(
    name, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InputError, match="but file is not a directory"):
        importlib.import_module(name).main(arguments)


def test_json_has_null_for_what_is_no_number(tmp_path):
    """Of numpy, too, and deep within."""
    value = {"a": [1.5, float("nan"), (np.float64("inf"), 2)], "b": {"c": -math.inf}}
    write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": [1.5, None, [None, 2]], "b": {"c": None}}


def test_a_columns_options():
    words = ["--model.columns.1.no-normalize", "--model.columns.0.dropout", "0.2"]
    recipe = command_line.parse(Recipe, words, default=RECIPES["accurate"], description="")
    first, second = recipe.model.columns
    assert (first.dropout, second.normalize, second.dropout) == (0.2, False, 0.4)
    assert second.widths == RECIPES["accurate"].model.columns[1].widths


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_json(name):
    assert from_dict(json.loads(json.dumps(to_dict(RECIPES[name])))) == RECIPES[name]


def test_a_recipe_of_before_a_field_is_the_one_of_its_default():
    older = to_dict(RECIPES["quick"])
    del older["no_augment_fraction"], older["model"]["norm_epsilon"]
    assert from_dict(older) == RECIPES["quick"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ColumnsConfig((RECIPES["fast"].model,) * 2), "batch_size": 25},
            "25, which 2 columns cannot",
        ),
        ({"no_augment_fraction": 1.0}, "no_augment_fraction is 1.0"),
        ({"no_augment_fraction": 0.1, "augment": AugmentConfig()}, "images are never augmented"),
    ],
)
def test_impossible_columns_and_shares(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(RECIPES["fast"], **changes)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": {"learning_rate": 0.1}},
        {"optimizer": {"kind": "muon", "decay": 0.1}},
        {"optimizer": {"kind": 3}},
        {"model": {"kind": "columns", "columns": [{"kind": "cnn", "width": 3}]}},
        {"epoch": 3},
        {"epochs": "3"},
        {"model": 3},
        {"model": {"kind": "cnn", "widths": 3}},
        {"seed": None},
    ],
)
def test_a_damaged_recipe_is_an_input_error(values):
    with pytest.raises(InputError):
        from_dict(values)


def test_the_console_command_runs_the_scripts(tmp_path):
    """Installed beside Python, and its words are those of the script of that name."""
    command = Path(sys.executable).with_name("mnist-flax")
    run = run_words([command, "train", "--epohs", "3"], cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert "did you mean --epochs?" in run.stderr


def test_what_is_installed_is_every_package():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("mnist_flax/**/__init__.py")}
    mapped = set(table["package-dir"])
    assert set(table["packages"]) == {name.replace("/", ".") for name in found} | mapped
