"""Write a report card of finished runs: what a network knows, where it fails, what it looks at.

    python experiments/report.py runs/default-seed0 [RUN ...]

Writes report/index.html, one self-contained page, and report/report.json into the first run's
directory. Never trains; under a minute a run on 2 cores.
"""

import base64
import dataclasses
import html
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, options

EMBEDDED = 3000  # test images in the picture of their features
SHOWN_CLASSES = 20  # in the picture of gradients
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; break-inside: avoid; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: right; }
td:first-child, th:first-child { text-align: left; } figcaption { color: #555; }
.side { display: flex; flex-wrap: wrap; gap: 1rem; } .side figure { flex: 1 1 18rem; margin: 0; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.Dataset):
    """Options of the script.

    Attributes:
      runs: run directories, each with a result.json.
      out: where the report goes; by default report/ in the first run's directory.
      archives: the directory of IDX archives that the runs were trained on, if they were.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None

    def __post_init__(self):
        if len(set(self.runs)) < len(self.runs):
            raise InputError("a run is named twice")


class Page:
    """The parts of a page, in order."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Adds a heading."""
        self.parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def figures(self, *pairs: tuple[Any, str]) -> None:
        """Adds figures with captions, side by side where there is room."""
        cells = []
        for figure, caption in pairs:
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
            data = base64.b64encode(png.getvalue()).decode()
            caption = html.escape(caption)
            cells.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        self.parts.append(f'<div class="side">{"".join(cells)}</div>')

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Adds a table."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def render(self) -> str:
        """Returns the HTML."""
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style><h1>{title}</h1>{''.join(self.parts)}</html>\n"
        )


def calibration(evaluation) -> dict[str, float]:
    """Returns loss, Brier score and ECE."""
    from mnist_flax.reports.calibration import reliability

    ece = reliability(evaluation).ece
    return {"loss": evaluation.loss, "brier": evaluation.brier, "ece": ece}


def label_noise(test, *, fingerprint: str) -> dict[str, Any] | None:
    """Returns what an audit of the test labels leaves of the mistakes; None for other data."""
    from mnist_flax.datasets.archives import disputed_test_labels

    if not (indices := disputed_test_labels(fingerprint=fingerprint)):
        return None
    disputed = np.isin(np.arange(test.total), indices)
    clear = test.subset(~disputed)
    return {
        "disputed": int(disputed.sum()),
        "accuracy_undisputed": clear.accuracy,
        "errors_undisputed": clear.total - clear.correct,
        "ceiling": float(1 - disputed.sum() / test.total),
    }


def measure(run, splits, bar: tqdm) -> tuple[dict[str, Any], Any]:
    """Returns a run's numbers, as JSON, and its evaluation of the test split."""
    from mnist_flax.evaluation import evaluate
    from mnist_flax.reports.calibration import fit_temperature, risk_coverage, wilson_interval
    from mnist_flax.studies import robustness

    test = evaluate(run.state, splits.test)
    numbers: dict[str, Any] = {
        "run": str(run.workdir),
        "accuracy": test.accuracy,
        "correct": test.correct,
        "total": test.total,
        "interval": wilson_interval(test.correct, test.total),
        "precision": test.precision_K.tolist(),
        "recall": test.recall_K.tolist(),
        "confusion": test.confusion_KK.tolist(),
        "calibration": calibration(test),
        "error_free_coverage": risk_coverage(test).error_free,
    }
    bar.update()
    if noise := label_noise(test, fingerprint=splits.info.fingerprint):
        numbers["label_noise"] = noise
    if len(splits.val.labels):
        temperature = fit_temperature(evaluate(run.state, splits.val))
        numbers["temperature"] = temperature
        numbers["calibration_scaled"] = calibration(test.at_temperature(temperature))
    bar.update()
    numbers["robustness"] = {}
    for corruption, accuracies in robustness.robustness(run.state, splits.test):
        numbers["robustness"][corruption.name] = {
            "severities": list(corruption.severities),
            "accuracies": accuracies,
        }
        bar.update()
    numbers["worst_case"] = robustness.worst_case(run.state, splits.test)
    numbers["worst_case_maps"] = len(robustness.GRID)
    bar.update()
    return numbers, test


def saliency(state, images_BHWC, labels_B) -> np.ndarray:
    """Returns the gradient of each image's own label's logit by its pixels, [B, H, W]."""
    import jax

    from mnist_flax.steps import eval_logits, to_float

    def total(images):
        logits_BK = eval_logits(state, images)
        return logits_BK[np.arange(len(labels_B)), labels_B].sum()

    return np.asarray(jax.grad(total)(to_float(images_BHWC))).sum(axis=-1)


def first_filters(state) -> np.ndarray:
    """Returns the first convolution's kernels in pixels, [O, k * patch, k * patch].

    Of the first channel of the images, and of the first column; a patch's pixels lie in its
    channels.
    """
    from mnist_flax.models.columns import Columns
    from mnist_flax.steps import to_model

    model = to_model(state)
    first: Any = model.columns[0] if isinstance(model, Columns) else model
    patch = first.config.patch
    kernel = np.asarray(first.convs[0].kernel[...])
    k, _, inputs, outputs = kernel.shape
    blocks = kernel.reshape(k, k, patch, patch, inputs // patch**2, outputs)[:, :, :, :, 0]
    return blocks.transpose(4, 0, 2, 1, 3).reshape(outputs, k * patch, k * patch)


def embedding(state, images_NHWC) -> np.ndarray:
    """Returns the first two principal components of what the classifier sees, [N, 2]."""
    import jax

    from mnist_flax.steps import prepared, to_model

    model = to_model(state)
    features = jax.jit(lambda images: model.features(prepared(model, images)))
    features_NF = np.asarray(features(images_NHWC))
    centered_NF = features_NF - features_NF.mean(axis=0)
    _, _, components = np.linalg.svd(centered_NF, full_matrices=False)
    points = centered_NF @ components[:2].T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))  # of one example or one feature


def percent(share: float) -> str:
    """Returns a share as text; a dash for that of nothing, which is NaN."""
    return "\u2013" if np.isnan(share) else f"{share:.2%}"


def add_summary(page: Page, run, numbers: dict[str, Any], test) -> None:
    """Adds a run's heading, its accuracy and its classes."""
    from mnist_flax.reports import figures

    names = run.info.class_names
    low, high = numbers["interval"]
    page.heading(str(run.workdir))
    page.text(
        f"{test.correct:,} of {test.total:,} test images right: {test.accuracy:.2%}, 95% interval "
        f"(Wilson) {low:.2%} to {high:.2%}. {numbers['error_free_coverage']:.1%} of the images, "
        "the most confident, hold no error."
    )
    if noise := numbers.get("label_noise"):
        page.text(
            f"{noise['disputed']} test labels are disputed: fewer than three of five people "
            f"support them (audit by cleanlab, arXiv 2103.14749). On the others the accuracy is "
            f"{noise['accuracy_undisputed']:.2%}, {noise['errors_undisputed']} errors. A network "
            f"that agrees with the people would score {noise['ceiling']:.2%} on the given labels."
        )
    page.heading("Classes", 3)
    rows = [
        [name, percent(p), percent(r)]
        for name, p, r in zip(names, numbers["precision"], numbers["recall"], strict=True)
    ]
    page.table(["class", "precision", "recall"], rows)
    page.figures(
        (
            figures.plot_confusion(confusion_KK=test.confusion_KK, class_names=names),
            "Confusion: row true, column predicted",
        )
    )


def add_mistakes(page: Page, run, examples, test) -> None:
    """Adds the worst mistakes, and the hits that were nearly mistakes."""
    from mnist_flax.reports import figures

    names, labels = run.info.class_names, np.asarray(examples.labels)
    probabilities = test.probabilities_NK
    page.heading("Mistakes and near misses", 3)
    mistakes = figures.plot_mistakes(
        images_NHWC=examples.images,
        labels=labels,
        probabilities_NK=probabilities,
        class_names=names,
    )
    page.figures((mistakes, "The most confident mistakes; # is the test index"))
    right = np.flatnonzero(test.predictions_N == labels)
    least = right[np.argsort(probabilities.max(axis=-1)[right], kind="stable")][:24]
    if not len(least):
        return page.text("No image was classified rightly.")
    hits = figures.plot_predictions(
        images_NHWC=examples.images[least],
        labels=labels[least],
        probabilities_NK=probabilities[least],
        class_names=names,
    )
    page.figures((hits, "The least confident hits"))


def add_calibration(page: Page, numbers: dict[str, Any], test) -> None:
    """Adds loss, Brier score, ECE and the reliability, with the fitted temperature and without."""
    from mnist_flax.reports import figures
    from mnist_flax.reports.calibration import reliability

    page.heading("Calibration", 3)
    before = numbers["calibration"]
    rows = [["as trained", *(f"{before[key]:.4f}" for key in ("loss", "brier", "ece"))]]
    versions = {"as trained": test}
    if "temperature" in numbers:
        after, temperature = numbers["calibration_scaled"], numbers["temperature"]
        name = f"temperature {temperature:.3f}, fitted on validation"
        rows.append([name, *(f"{after[key]:.4f}" for key in ("loss", "brier", "ece"))])
        versions[f"temperature {temperature:.3f}"] = test.at_temperature(temperature)
    else:
        page.text("The run had no validation split, so no temperature was fitted.")
    pairs = []
    for name, evaluation in versions.items():
        curve = reliability(evaluation)
        figure = figures.plot_reliability(
            edges=curve.edges,
            confidence=curve.confidence,
            accuracy=curve.accuracy,
            counts=curve.counts,
            title=name,
        )
        pairs.append((figure, f"Reliability, {name}: ECE {curve.ece:.4f}"))
    page.table(["", "loss (nats)", "Brier score", "ECE, 15 equal bins"], rows)
    page.figures(*pairs)


def add_sight(page: Page, run, examples) -> None:
    """Adds what the network looks at: gradients, first kernels, and the features it ends with."""
    from mnist_flax.reports import figures

    names, labels = run.info.class_names, np.asarray(examples.labels)
    page.heading("What it sees", 3)
    # The first of each class that there is, of so many classes as are legible beside each other.
    classes, chosen = np.unique(labels, return_index=True)
    classes, chosen = classes[:SHOWN_CLASSES], chosen[:SHOWN_CLASSES]
    maps = saliency(run.state, examples.images[chosen], labels[chosen])
    titles = [names[label] for label in classes]
    gradients = figures.plot_maps(images_NHWC=examples.images[chosen], maps_NHW=maps, titles=titles)
    page.figures(
        (gradients, "Gradient of the label's logit by the pixels: blue raises it, red lowers it")
    )
    filters = first_filters(run.state)
    points = embedding(run.state, examples.images[:EMBEDDED])
    seen = figures.plot_embedding(points_N2=points, labels=labels[:EMBEDDED], class_names=names)
    page.figures(
        (
            figures.plot_filters(filters, title="First layer"),
            "The first layer's kernels, in pixels",
        ),
        (
            seen,
            f"What the classifier sees of {len(points):,} test images: two principal components",
        ),
    )


def add_run(page: Page, run, splits, numbers: dict[str, Any], test) -> None:
    """Adds a run's section to the page."""
    add_summary(page, run, numbers, test)
    add_mistakes(page, run, splits.test, test)
    add_calibration(page, numbers, test)
    add_sight(page, run, splits.test)


def add_comparison(page: Page, reports: list[dict[str, Any]], tests: list[Any]) -> None:
    """Adds what all runs have in common: one table, and curves of each."""
    from mnist_flax.reports import figures
    from mnist_flax.reports.calibration import risk_coverage

    rows = [
        [
            report["run"],
            f"{report['accuracy']:.2%}",
            f"{report['calibration']['loss']:.4f}",
            f"{report['calibration']['ece']:.4f}",
            f"{report['error_free_coverage']:.1%}",
            f"{report['worst_case']:.2%}",
        ]
        for report in reports
    ]
    maps = reports[0]["worst_case_maps"]
    header = ["run", "accuracy", "loss", "ECE", "error-free", f"worst of {maps} maps"]
    page.table(header, rows)
    curves = {}
    for report, test in zip(reports, tests, strict=True):
        curve = risk_coverage(test)
        curves[report["run"]] = curve.coverage, 100 * curve.risk
    figure = figures.plot_lines(curves, xlabel="coverage", ylabel="errors (%)")
    pairs = [(figure, "Selective prediction: errors among the most confident")]
    for name in reports[0]["robustness"]:
        lines = {}
        for report in reports:
            values = report["robustness"][name]
            lines[report["run"]] = values["severities"], 100 * np.array(values["accuracies"])
        figure = figures.plot_lines(lines, xlabel=name, ylabel="accuracy (%)")
        pairs.append((figure, f"Accuracy against {name}"))
    page.figures(*pairs)


def corrupted(runs, data_dir: Path | None) -> str:
    """Returns a line on TFDS's mnist_corrupted: the runs' accuracies, where it is prepared."""
    from mnist_flax.datasets import load_splits
    from mnist_flax.evaluation import evaluate

    try:
        splits = load_splits("mnist_corrupted", val_size=0, seed=0, data_dir=data_dir)
    except (InputError, OSError):
        return "mnist_corrupted is not prepared in the data directory, so it was not looked at."
    accuracies = [f"{evaluate(run.state, splits.test).accuracy:.2%}" for run in runs]
    return f"mnist_corrupted ({splits.info.name}): {', '.join(accuracies)}."


def main(arguments):
    """Evaluates the runs and writes the report."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if not command.runs:
        raise InputError("name at least one run directory; see --help")
    command_line.begin()

    from mnist_flax.reports.runs import load_run
    from mnist_flax.workdir import require_directory, write_json, write_text

    runs = [load_run(path) for path in command.runs]
    print(*runs, sep="\n", file=sys.stderr)
    if len({run.info.fingerprint for run in runs}) > 1:
        raise InputError("the runs are of different datasets; report on each alone")
    out = command.out or command.runs[0] / "report"
    require_directory(out, "out")
    reports, tests, sections = [], [], Page("")
    with tqdm(total=12 * len(runs), desc="report", file=sys.stderr) as bar:
        for run in runs:
            recipe = run.recipe
            splits = command.load(recipe)
            if splits.info.fingerprint != run.info.fingerprint:
                raise InputError(f"{run.workdir} was trained on other data than {recipe.dataset}")
            numbers, test = measure(run, splits, bar)
            add_run(sections, run, splits, numbers, test)
            reports.append(numbers)
            tests.append(test)
    page = Page(f"Report on {', '.join(str(run.workdir) for run in runs)}")
    add_comparison(page, reports, tests)
    if runs[0].info.name == "mnist":
        page.text(corrupted(runs, command.data_dir))
    page.parts += sections.parts
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", reports)
    write_text(out / "index.html", page.render())
    for numbers in reports:
        print(
            f"{numbers['run']}: {numbers['accuracy']:.2%}, ECE {numbers['calibration']['ece']:.4f}"
        )
    print(f"written to {out / 'index.html'}")


if __name__ == "__main__":
    command_line.run(main)
