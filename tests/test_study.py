"""Many replicas in one program, against runs of their own: real MNIST, real checkpoints."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ALL, MODEL, RECIPE, TINY, head
from test_loop import after, bits, timeless

from mnist_flax.datasets import load_splits
from mnist_flax.errors import CheckpointError, DivergedError, InputError, Interrupted
from mnist_flax.evaluation import evaluate, evaluate_replicas
from mnist_flax.loop import Trainer, fit, initial_progress
from mnist_flax.models.columns import ColumnsConfig
from mnist_flax.optimizer import AdamW, Constant, Muon
from mnist_flax.recipe import (
    TRACEABLE,
    AugmentConfig,
    PlateauConfig,
    StoppingConfig,
    replica_recipes,
    with_fields,
)
from mnist_flax.replicas import make_mesh
from mnist_flax.studies.seeds import see
from mnist_flax.views import recipe_views

pytestmark = pytest.mark.bits
# Without augmentation, whose last bit XLA rounds otherwise in a loop within a loop.
PLAIN = dataclasses.replace(RECIPE, augment=AugmentConfig())
SEEDS = (3, 0, 8)
# Replicas that stop at different epochs.
STOPPING = dataclasses.replace(
    PLAIN,
    epochs=12,
    optimizer=AdamW(learning_rate=0.02),
    schedule=Constant(),
    plateau=PlateauConfig(patience=1, min_delta=0.05),
    stopping=StoppingConfig(patience=1),
)


def without_val(row):
    """The numbers of training alone: sums over validation are rounded in another order."""
    return {name: value for name, value in timeless(row).items() if not name.startswith("val")}


@pytest.fixture(scope="module")
def study(small, tmp_path_factory):
    """Three replicas, uninterrupted, and their directory, which is not to be changed."""
    workdir = tmp_path_factory.mktemp("study") / "run"
    return fit(STOPPING, small, seeds=SEEDS, workdir=workdir, progress=False), workdir


def assert_same_study(one, other):
    jax.tree.map(np.testing.assert_array_equal, bits(one.states), bits(other.states))
    assert [list(map(timeless, h)) for h in one.histories] == [
        list(map(timeless, h)) for h in other.histories
    ]
    assert one.best_epochs == other.best_epochs
    assert one.stopped == other.stopped


def test_replicas_are_their_own_runs(study, small):
    """Every bit of the state, though the replicas stop at different epochs."""
    result, _ = study
    assert len({len(history) for history in result.histories}) > 1
    for i, seed in enumerate(SEEDS):
        replica = result.replica(i)
        own = fit(dataclasses.replace(STOPPING, seed=seed), small, progress=False)
        jax.tree.map(np.testing.assert_array_equal, bits(own.state), bits(replica.state))
        assert list(map(without_val, own.history)) == list(map(without_val, replica.history))
        losses = [[row["val_loss"] for row in run.history] for run in (own, replica)]
        np.testing.assert_allclose(*losses, rtol=1e-6)
        assert (own.best_epoch, own.stopped_early) == (replica.best_epoch, replica.stopped_early)
        best = replica.history[replica.best_epoch - 1]
        assert best["val_accuracy"] == pytest.approx(evaluate(replica.state, small.val).accuracy)
        assert own.history[0].keys() == replica.history[0].keys()


@pytest.mark.slow
def test_a_varied_number_is_the_recipes_own(small):
    """Each traceable field: a replica with a value trains as a recipe that has it."""
    recipe = dataclasses.replace(
        PLAIN,
        epochs=1,
        model=TINY,
        no_augment_fraction=0.5,
        augment=AugmentConfig(rotate=5.0),
        optimizer=Muon(learning_rate=0.1, ns_steps=2, adam_ratio=0.1),
        plateau=None,
    )
    values = {
        "label_smoothing": (0.0, 0.2),
        "model.dropout": (0.0, 0.4),
        "augment.rotate": (5.0, 20.0),
        "augment.shift": (0.0, 0.1),
        "augment.zoom": (0.0, 0.2),
        "augment.shear": (0.0, 20.0),
        "augment.erase": (0.0, 0.5),
        "optimizer.learning_rate": (0.02, 0.2),
        "optimizer.adam_ratio": (0.02, 0.2),
        "optimizer.weight_decay": (0.0, 0.5),
    }
    assert set(values) == set(TRACEABLE)
    replicas = [{}] + [{name: 1} for name in values] + [dict.fromkeys(values, 1)]
    vary = {name: [values[name][m.get(name, 0)] for m in replicas] for name in values}
    result = fit(recipe, small, seeds=[5] * len(replicas), vary=vary, progress=False)
    losses = [history[0]["train_loss"] for history in result.histories]
    assert len(set(losses)) == len(losses)  # every field has an effect
    for i in (0, len(replicas) - 1) if ALL else (len(replicas) - 1,):
        own = with_fields(recipe, {"seed": 5} | {name: vary[name][i] for name in vary})
        assert result.recipes[i] == own
        (row,) = fit(own, small, progress=False).history
        np.testing.assert_allclose(losses[i], row["train_loss"], rtol=2e-4)


@pytest.mark.parametrize("calls", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_interrupted_anywhere_and_resumed_is_the_same_study(study, small, tmp_path, calls):
    run = dict(seeds=SEEDS, workdir=tmp_path, progress=False)
    with pytest.raises(Interrupted) as stop:
        fit(STOPPING, small, should_stop=after(calls), **run)
    newest = max(int(d.name) for d in (tmp_path / "checkpoints").iterdir())
    assert newest == stop.value.step
    assert_same_study(study[0], fit(STOPPING, small, resume=True, **run))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(row.pop("replica"), timeless(row)) for row in rows]
    written = [(i, timeless(r)) for i, h in enumerate(study[0].histories) for r in h]
    assert found == sorted(written, key=lambda row: (row[1]["epoch"], row[0]))


def test_a_finished_study_gives_its_result(study, small):
    again = fit(STOPPING, small, seeds=SEEDS, workdir=study[1], resume=True, progress=False)
    assert_same_study(study[0], again)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_passed_over(study, small, tmp_path):
    copy = shutil.copytree(study[1], tmp_path / "copy")
    steps = [d for d in (copy / "checkpoints").iterdir() if d.name.isdecimal()]
    newest = max(steps, key=lambda d: int(d.name))
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    run = dict(seeds=SEEDS, workdir=copy, resume=True, progress=False)
    with pytest.raises(CheckpointError, match=newest.name):
        fit(STOPPING, small, strict=True, **run)
    assert_same_study(study[0], fit(STOPPING, small, **run))


def test_a_replica_that_diverges_leaves_the_others_alone(small):
    vary = {"optimizer.learning_rate": [0.05, 1e30, 0.05]}
    result = fit(PLAIN, small, seeds=[0, 0, 1], vary=vary, progress=False)
    assert [reason is None for reason in result.diverged] == [True, False, True]
    with pytest.raises(DivergedError, match=r"replica 1 \(seed 0\): the training loss .*epoch 1:"):
        result.replica(1)
    assert result.histories[1] == ()
    assert [len(history) for history in result.histories] == [3, 0, 3]
    if ALL:
        own = fit(dataclasses.replace(PLAIN, seed=1), small, progress=False)
        losses = [[row["train_loss"] for row in run.history] for run in (own, result.replica(2))]
        np.testing.assert_allclose(*losses, rtol=1e-4)


def test_evaluation_of_many_is_that_of_each(study, splits):
    """On 1,111 examples, which fill no whole number of batches."""
    examples = head(splits.test, 1111)
    together = evaluate_replicas(study[0].states, examples)
    for i, evaluation in enumerate(together):
        alone = evaluate(study[0].replica(i).state, examples)
        np.testing.assert_allclose(evaluation.logits_NK, alone.logits_NK, rtol=1e-4, atol=1e-4)
        assert evaluation.total == 1111
    assert not np.allclose(together[0].logits_NK, together[1].logits_NK)


def test_views_end_between_two_of_them_when_interrupted(study, splits):
    states, views = study[0].states, recipe_views(RECIPE, count=3)
    options = dict(views=views, mesh=make_mesh(replicas=3))
    with pytest.raises(Interrupted):
        see(states, head(splits.test, 100), should_stop=after(3), **options)
    seen = see(states, head(splits.test, 100), should_stop=after(4), **options)
    assert [[replica.total for replica in view] for view in seen] == [[100] * 3] * 3


def test_all_replicas_see_the_same_view(study, splits):
    examples, states = head(splits.test, 700), study[0].states
    (view,), (again,) = (recipe_views(RECIPE, count=1) for _ in range(2))
    for i, evaluation in enumerate(evaluate_replicas(states, examples, view=view)):
        alone = evaluate(study[0].replica(i).state, examples, view=again)
        np.testing.assert_allclose(evaluation.logits_NK, alone.logits_NK, rtol=1e-3, atol=1e-3)


def test_bad_input_is_refused_before_anything_is_written(small, study, tmp_path):
    def refuse(match, seeds=(0, 1), splits=small, workdir=tmp_path / "new", **options):
        with pytest.raises(InputError, match=match):
            fit(STOPPING, splits, seeds=seeds, workdir=workdir, progress=False, **options)

    refuse("seeds is empty", seeds=())
    refuse("'epochs' cannot differ by replica", vary={"epochs": [1, 2]})
    refuse("has 3 values for 2 seeds", vary={"label_smoothing": [0.0, 0.1, 0.2]})
    beside = dataclasses.replace(STOPPING, model=ColumnsConfig((MODEL, MODEL)))
    with pytest.raises(InputError, match=r"has no number 'model\.dropout'"):
        fit(beside, small, seeds=(0, 1), vary={"model.dropout": [0.0, 0.1]})
    refuse("label_smoothing is 1.5", vary={"label_smoothing": [0.0, 1.5]})
    refuse("has no number 'optimizer.adam_ratio'", vary={"optimizer.adam_ratio": [0.1, 0.2]})
    refuse("no run to resume", resume=True)
    refuse("need the workdir", workdir=None, resume=True)
    refuse("holds a run", workdir=study[1])
    refuse("seeds: ", workdir=study[1], resume=True)
    info = dataclasses.replace(small.info, fingerprint="0123456789abcdef")
    other = dataclasses.replace(small, info=info)
    refuse("fingerprint: ", splits=other, seeds=SEEDS, workdir=study[1], resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="devices is 99"):
        make_mesh(devices=99, replicas=2)


@pytest.mark.slow
def test_vmapped_replicas_are_those_one_after_another(small):
    """The form of a GPU, on the CPU: five steps of two replicas; the third takes none."""
    mesh = make_mesh(devices=1, replicas=3)
    recipes = replica_recipes(PLAIN, seeds=SEEDS, vary={})
    trainer = Trainer(recipes, small, varied=(), mesh=mesh)
    fresh = initial_progress(recipes, small.info, steps=24, mesh=mesh)
    fresh = dataclasses.replace(fresh, diverged=(None, None, "given up"))
    chunk = trainer.feed(fresh, 1)(0, 5)
    ends = []
    for loop in (True, False):
        trainer.compile(fresh, chunk, loop=loop)
        states = jax.tree.map(jnp.copy, fresh.states)
        ends.append(trainer.train(fresh)(states, fresh.metrics, *chunk))
    for states, metrics in ends:
        assert np.asarray(states.step).tolist() == [5, 5, 0]
        assert np.asarray(metrics.count).tolist() == [250, 250, 0]
        jax.tree.map(
            lambda new, old: np.testing.assert_array_equal(new[2], old[2]),
            bits(states),
            bits(fresh.states),
        )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-5),
        bits(ends[0][0]),
        bits(ends[1][0]),
    )


@pytest.mark.slow
def test_a_streamed_study_is_the_same_bits(study, small, data_dir):
    """The records of the same 1,230 examples, in other orders for each replica."""
    streamed = load_splits("mnist", val_size=5000, seed=0, data_dir=data_dir, stream=True)
    streamed.train._indices_N = streamed.train._indices_N[:1230]
    streamed = dataclasses.replace(streamed, val=small.val)
    assert_same_study(study[0], fit(STOPPING, streamed, seeds=SEEDS, progress=False))


def test_a_study_is_no_run_of_fit(study, small):
    with pytest.raises(InputError):
        fit(STOPPING, small, workdir=study[1], resume=True, progress=False)
