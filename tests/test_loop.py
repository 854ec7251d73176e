"""The loop on real MNIST: determinism, resuming, streaming, stopping, divergence, the lock."""

import dataclasses
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ALL, MODEL, RECIPE, TINY, head
from flax import nnx
from tensorboardX.proto import event_pb2
from test_archives import write_subset

from mnist_flax.datasets import load_splits
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.evaluation import _logits, evaluate, predict
from mnist_flax.loop import epochs, fit, initial_state
from mnist_flax.model import CNN, CNNConfig
from mnist_flax.models.columns import ColumnsConfig
from mnist_flax.optimizer import SGD, AdamW, Constant, Muon, OneCycle
from mnist_flax.recipe import (
    AugmentConfig,
    PlateauConfig,
    StoppingConfig,
)
from mnist_flax.replicas import make_mesh
from mnist_flax.reports.results import digest, summarize
from mnist_flax.reports.runs import load_run
from mnist_flax.steps import Purpose, draw_key, eval_logits, prepared, to_float, to_model
from mnist_flax.views import recipe_views


def bits(state):
    return jax.tree.map(np.asarray, (state.params, state.batch_stats, state.opt_state, state.step))


def assert_same_run(one, other):
    jax.tree.map(np.testing.assert_array_equal, bits(one.state), bits(other.state))
    assert [timeless(row) for row in one.history] == [timeless(row) for row in other.history]


def timeless(row):
    return {name: value for name, value in row.items() if not name.endswith("seconds")}


def after(calls):
    """Returns a `should_stop` that becomes true at its `calls`-th call."""
    count = iter(range(1, 10**9))
    return lambda: next(count) >= calls


def test_it_learns_and_reports(whole):
    result, workdir = whole
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert [row["step"] for row in result.history] == [24, 48, 72]
    assert result.history[-1]["val_accuracy"] > 0.4  # chance is 0.1
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]
    schedule = OneCycle(warmup=0.2).make(0.05, steps_per_epoch=24, epochs=3)
    rates = [row["learning_rate"] for row in result.history]
    expected = np.array([schedule(step) for step in (23, 47, 71)])
    np.testing.assert_allclose(rates, expected, rtol=0, atol=0.05 * 2e-7)  # float32 of the peak
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.history)
    assert list(workdir.glob("events.out.tfevents.*"))


def test_every_seed_draws_its_own_parameters(small):
    for seed in (0, 1):
        recipe = dataclasses.replace(RECIPE, seed=seed)
        state = initial_state(recipe, small.info, steps=24, mesh=make_mesh())
        key = draw_key(jax.random.key(seed), Purpose.INIT, 0)
        own = nnx.to_pure_dict(nnx.state(CNN(RECIPE.model, rngs=nnx.Rngs(params=key)), nnx.Param))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, own
        )


def test_two_runs_are_the_same_bits_and_another_seed_is_not(whole, small):
    assert_same_run(whole[0], fit(RECIPE, small, progress=False))
    other = next(epochs(dataclasses.replace(RECIPE, seed=1), small))
    assert other.row["train_loss"] != whole[0].history[0]["train_loss"]


SHORT = 410 if ALL else 110  # examples, of which 10 are left over


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """MNIST's first SHORT + 500 training examples and some of its test."""
    directory = tmp_path_factory.mktemp("short") / "archives"
    return write_subset(directory, num_train=SHORT + 500, num_test=50)


@pytest.fixture(scope="module")
def short(archives):
    """A run of 3 epochs of 8 steps or of 2, resident."""
    splits = load_splits("mnist", val_size=500, archives=archives)
    return splits, fit(RECIPE, splits, progress=False)


@pytest.mark.bits
@pytest.mark.parametrize("form", ["resident", "streamed"])
def test_interrupted_after_every_step_and_resumed_is_the_same_bits(form, short, archives, tmp_path):
    splits, whole = short
    if form == "streamed":
        places = dict(data_dir=tmp_path / "data", archives=archives)
        splits = load_splits("mnist", val_size=500, stream=True, **places)
    for step in range(1, 3 * (SHORT // 50)):
        with pytest.raises(Interrupted, match=f"after step {step}$"):
            fit(
                RECIPE,
                splits,
                workdir=tmp_path / "run",
                resume=step > 1,
                progress=False,
                should_stop=lambda: True,
            )
    resumed = fit(RECIPE, splits, workdir=tmp_path / "run", resume=True, progress=False)
    assert_same_run(whole, resumed)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(map(timeless, rows)) == list(map(timeless, whole.history))


@pytest.mark.slow
def test_the_seconds_of_an_interrupted_epoch_count(small, tmp_path):
    stops = []
    for calls in (3, 3):
        with pytest.raises(Interrupted) as stop:
            fit(
                RECIPE,
                small,
                workdir=tmp_path,
                resume=bool(stops),
                progress=False,
                should_stop=after(calls),
            )
        stops.append(stop.value.progress.seconds)
    first = fit(RECIPE, small, workdir=tmp_path, resume=True, progress=False).history[0]
    for name in ("compile_seconds", "train_seconds"):
        assert 0 < stops[0][name] < stops[1][name] < first[name]


@pytest.mark.parametrize("calls", range(1, 9 if ALL else 8))
def test_to_be_interrupted_once_is_enough(calls, short):
    """Whichever call it is that is told so: an epoch's last one, too."""
    count = iter(range(1, 10**9))
    told = []

    def once():
        told.append(next(count) == calls)
        return told[-1]

    results = []
    with pytest.raises(Interrupted):
        results += epochs(RECIPE, short[0], should_stop=once)
    assert len(told) == calls


def test_resuming_a_finished_run_gives_its_result(whole, small):
    result, workdir = whole
    assert_same_run(result, fit(RECIPE, small, workdir=workdir, resume=True, progress=False))


@pytest.mark.slow
def test_streamed_is_the_same_bits(whole, data_dir):
    """The records of the same 1,230 examples, read by TFDS and Grain."""
    streamed = load_splits("mnist", val_size=5000, seed=0, data_dir=data_dir, stream=True)
    records = streamed.train
    records._indices_N = records._indices_N[:1230]
    streamed = dataclasses.replace(streamed, val=head(streamed.val, 500))
    assert_same_run(whole[0], fit(RECIPE, streamed, progress=False))


def test_an_epochs_division_into_calls_does_not_change_its_bits(small, monkeypatch):
    one_call = next(epochs(RECIPE, small))
    monkeypatch.setattr(sys.modules["mnist_flax.loop"], "CALL_SECONDS", 0.0)  # a call a step
    step_by_step = next(epochs(RECIPE, small))
    jax.tree.map(np.testing.assert_array_equal, bits(one_call.state), bits(step_by_step.state))


def test_early_stopping_restores_the_best_epoch(small, splits, tmp_path):
    """And what is written and read of the run is of that epoch too."""
    recipe = dataclasses.replace(
        RECIPE,
        epochs=30,
        model=TINY,
        augment=AugmentConfig(),
        optimizer=AdamW(learning_rate=0.1),
        schedule=Constant(),
        plateau=None,
        stopping=StoppingConfig(patience=2),
    )
    result = fit(recipe, small, workdir=tmp_path, progress=False)
    losses = [row["val_loss"] for row in result.history]
    assert result.stopped_early
    assert result.best_epoch == 1 + losses.index(min(losses)) == len(losses) - 2
    evaluation = evaluate(result.state, small.val)
    assert evaluation.loss == pytest.approx(min(losses), rel=1e-5)
    best = result.history[result.best_epoch - 1]
    assert best["val_accuracy"] == pytest.approx(evaluation.accuracy)
    test = evaluate(result.state, head(splits.test, 100))
    summary = summarize(recipe, small.info, result, test=test, data_seconds=0.0, test_seconds=0.0)
    assert summary["best_epoch"] == result.best_epoch
    assert (summary["val_loss"], summary["val_accuracy"]) == (min(losses), best["val_accuracy"])
    assert digest(load_run(tmp_path).state) == summary["digest"] == digest(result.state)
    events = scalars(tmp_path)
    assert sorted(events) == [row["step"] for row in result.history]
    assert [row["val_loss"] for row in events.values()] == pytest.approx(losses)


def scalars(workdir):
    """Reads a run's TensorBoard events: by step, the scalars by name.

    A record is its length in 8 bytes, 4 of checksum, an event, and 4 of checksum.
    """
    (path,) = workdir.glob("events.out.tfevents.*")
    data, place, found = path.read_bytes(), 0, {}
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
        place += size + 16
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_plateau_lowers_the_rate_and_the_row_says_so(small):
    recipe = dataclasses.replace(
        RECIPE,
        model=TINY,
        augment=AugmentConfig(),
        schedule=Constant(),
        plateau=PlateauConfig(patience=1, factor=0.5, min_delta=0.99),
    )
    rates = [result.row["learning_rate"] for result in epochs(recipe, small)]
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.025], rtol=1e-6)


def test_without_validation_the_last_state_is_kept(small):
    recipe = dataclasses.replace(
        RECIPE, val_size=0, epochs=2, model=TINY, augment=AugmentConfig(), plateau=None
    )
    everything = dataclasses.replace(small, val=head(small.val, 0))
    result = fit(recipe, everything, progress=False)
    assert (result.best_epoch, int(result.state.step)) == (2, 48)
    assert result.history[-1]["val_loss"] is None


@pytest.mark.slow
def test_a_state_goes_on_by_the_recipe_not_by_the_optimizer_it_had(small):
    """After one epoch of the recipe's rates, one of hardly any: the parameters stay."""
    slow = dataclasses.replace(RECIPE, schedule=Constant(), optimizer=SGD(learning_rate=1e-9))
    first = next(epochs(RECIPE, small))
    second = next(epochs(slow, small, start=first.state))
    assert second.row["learning_rate"] == pytest.approx(1e-9)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, rtol=0, atol=1e-6),
        *(jax.tree.map(np.asarray, result.state.params) for result in (second, first)),
    )
    other = dataclasses.replace(RECIPE, optimizer=AdamW())
    with pytest.raises(InputError, match="another kind of optimizer"):
        next(epochs(other, small, start=first.state))


@pytest.mark.slow
def test_the_last_share_of_a_run_is_not_augmented(small):
    """As if a recipe without augmentation had gone on from there."""
    ending = dataclasses.replace(RECIPE, epochs=2, model=TINY, no_augment_fraction=0.5)
    first = next(epochs(dataclasses.replace(ending, no_augment_fraction=0.0), small))
    plain = dataclasses.replace(ending, no_augment_fraction=0.0, augment=AugmentConfig())
    (second,) = epochs(plain, small, start=first.state)
    ends = [row["train_loss"] for row in list(epochs(ending, small))[-1].history]
    separate = [result.row["train_loss"] for result in (first, second)]
    np.testing.assert_allclose(ends, separate, rtol=1e-4)


@pytest.mark.slow
def test_each_column_learns(small):
    """From its own share of every batch; a study of one seed trains the same."""
    model = dataclasses.replace(MODEL, hidden=())
    recipe = dataclasses.replace(
        RECIPE,
        augment=AugmentConfig(),
        model=ColumnsConfig((model, dataclasses.replace(model, normalize=True))),
        optimizer=Muon(learning_rate=0.2, ns_steps=2, adam_ratio=0.1),
    )
    state = fit(recipe, small, progress=False).state
    network = to_model(state)
    seen = jnp.split(prepared(network, small.val.images), 2, axis=-1)
    for column, images_BHWC in zip(network.columns, seen, strict=True):
        accuracy = (column(images_BHWC).argmax(-1) == small.val.labels).mean()
        assert accuracy > 0.6
    member = fit(recipe, small, seeds=[recipe.seed], progress=False).replica(0)
    jax.tree.map(np.testing.assert_array_equal, bits(state), bits(member.state))


def test_divergence_stops_the_run(small, tmp_path):
    images = small.train.images
    recipe = dataclasses.replace(
        RECIPE, optimizer=SGD(learning_rate=1e30), model=MODEL, plateau=None
    )
    with pytest.raises(DivergedError, match="training diverged; lower the learning rate"):
        fit(recipe, small, workdir=tmp_path, progress=False)
    assert images is small.train.images


def test_parameters_that_are_not_finite_are_noticed_after_the_last_step(small):
    """One step, whose own loss is that of the parameters before it, and no validation."""
    recipe = dataclasses.replace(
        RECIPE,
        val_size=0,
        epochs=1,
        model=TINY,
        augment=AugmentConfig(),
        optimizer=SGD(learning_rate=1e30),
        schedule=Constant(),
        plateau=None,
    )
    batch = dataclasses.replace(small, train=head(small.train, 50), val=head(small.val, 0))
    with pytest.raises(DivergedError, match="norm of the parameters"):
        fit(recipe, batch, progress=False)
    if ALL:
        with pytest.raises(DivergedError, match="norm of the parameters"):
            fit(recipe, batch, seeds=[0, 1], progress=False)


def test_bad_input_is_refused_before_anything_is_written(small, whole, tmp_path):
    def refuse(match, recipe=RECIPE, workdir=tmp_path / "new", **options):
        with pytest.raises(InputError, match=match):
            fit(recipe, small, workdir=workdir, progress=False, **options)

    refuse("batch_size is 2000", dataclasses.replace(RECIPE, batch_size=2000))
    refuse("val_size is 400", dataclasses.replace(RECIPE, val_size=400))
    refuse("no run to resume", resume=True)
    refuse("need the workdir", workdir=None, resume=True)
    refuse("need the workdir", workdir=None, strict=True)
    refuse("holds a run", workdir=whole[1])
    deep = CNNConfig(widths=(4,) * 4, padding=("VALID",) * 4, pool=(True,) * 4)
    refuse("too small", dataclasses.replace(RECIPE, model=deep))
    other = dataclasses.replace(RECIPE, seed=3, label_smoothing=0.2)
    refuse(r"label_smoothing: 0.0 -> 0.2; seed: 0 -> 3", other, workdir=whole[1], resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="devices is 99"):
        make_mesh(devices=99)


def test_the_two_latest_checkpoints_are_kept(whole):
    assert sorted(path.name for path in (whole[1] / "checkpoints").iterdir()) == ["48", "72"]


def test_evaluation_against_numpy(whole, splits):
    """On every one of 1,111 examples, though they fill no whole number of batches."""
    examples = head(splits.test, 1111)
    state = whole[0].state
    evaluation = evaluate(state, examples)
    logits = np.asarray(eval_logits(state, examples.images), np.float64)
    np.testing.assert_allclose(evaluation.logits_NK, logits, rtol=1e-4, atol=1e-4)
    logits = evaluation.logits_NK.astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(evaluation.probabilities_NK, softmax, rtol=1e-9)
    chosen = softmax[np.arange(1111), examples.labels]
    assert evaluation.loss == pytest.approx(-np.log(chosen).mean())
    hits = logits.argmax(-1) == examples.labels
    assert (evaluation.correct, evaluation.total) == (hits.sum(), 1111)
    assert evaluation.confusion_KK.sum() == 1111
    assert np.trace(evaluation.confusion_KK) == hits.sum()
    row, column = examples.labels[~hits][0], logits.argmax(-1)[~hits][0]
    assert evaluation.confusion_KK[row, column] >= 1
    names = ("step", "params", "batch_stats")
    in_numpy = {name: jax.device_get(getattr(state, name)) for name in names}
    few = predict(dataclasses.replace(state, **in_numpy), examples.images[:3])
    np.testing.assert_allclose(few, evaluation.logits_NK[:3], rtol=1e-4, atol=1e-4)
    assert math.isclose(evaluation.accuracy, hits.mean())


@pytest.mark.slow
def test_a_view_is_of_augmented_images(whole, splits):
    """Of 700 examples: a batch of 500, and one that is not full, by a key each."""
    examples = head(splits.test, 700)
    state, images = whole[0].state, np.asarray(to_float(examples.images))
    views = recipe_views(RECIPE, count=2)
    answers = []
    for number, view in enumerate(views):
        key = draw_key(jax.random.key(0), Purpose.VIEW, number)
        keys = [jax.random.fold_in(key, batch) for batch in range(2)]
        padded = np.concatenate([images, np.zeros((300, 28, 28, 1), np.float32)])
        parts = zip(keys, np.split(padded, 2), strict=True)
        seen = np.concatenate([view.augment(key, part) for key, part in parts])[:700]
        answers.append(evaluate(state, examples, view=view).logits_NK)
        np.testing.assert_allclose(answers[-1], predict(state, seen), atol=1e-3)
    answers.append(evaluate(state, examples).logits_NK)
    for one, other in itertools.combinations(answers, 2):
        assert np.abs(one - other).max() > 0.1


def test_the_evaluation_of_a_second_run_compiles_nothing(whole, small):
    """Optimizers are functions, no two of them equal, and static in the state."""
    state = whole[0].state
    evaluate(state, small.val)
    (view,), (again,) = (recipe_views(RECIPE, count=1) for _ in range(2))
    seen = evaluate(state, small.val, view=view)
    other = dataclasses.replace(state, optimizer=optax.sgd(0.1))
    size = _logits._cache_size()
    np.testing.assert_array_equal(evaluate(other, small.val, view=again).logits_NK, seen.logits_NK)
    evaluate(other, small.val)
    assert _logits._cache_size() == size
