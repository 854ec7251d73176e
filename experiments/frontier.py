"""Draw docs/frontier.svg, accuracy against seconds; print the tables of README.md and RESULTS.md.

    python experiments/frontier.py

All are made of results/recipes.json; a test notices where README.md or experiments/RESULTS.md says
something else.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from mnist_flax.launch import command_line

ROOT = Path(__file__).parents[1]
HEADER = (
    "| recipe | parameters | test accuracy | trains in | looks |",
    "|---|---|---|---|---|",
)
FULL_HEADER = (
    "| recipe | mean | deviation | 95% interval | n | ensemble | NLL | s each | machine | looks |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      out: the picture.
    """

    out: Path = ROOT / "docs" / "frontier.svg"


def read() -> dict[str, Any]:
    """Returns the results."""
    return json.loads((ROOT / "results" / "recipes.json").read_text())


def in_words(seconds: float | None) -> str:
    """Returns how long it took."""
    if seconds is None:
        return ""
    return f"{seconds / 60:.0f} min" if seconds > 100 else f"{seconds:.3g} s"


def table(results: dict[str, Any]) -> list[str]:
    """Returns the table's lines."""
    return [
        *HEADER,
        *(
            f"| `{row['recipe']}` | {row['parameters']:,} | {row['mean']:.2f}% ± "
            f"{row['deviation']:.2f} | {in_words(row['seconds'])} | {row['looks']} |"
            for row in results["rows"]
        ),
    ]


def full_table(results: dict[str, Any]) -> list[str]:
    """Returns the lines of the table in RESULTS.md: seeds.py's columns, the machine and looks."""
    lines: list[str] = [*FULL_HEADER]
    views = {row["recipe"]: row for row in results["views"]}
    for row in results["rows"]:
        name = f"`{row['recipe']}`"
        lines.append(full_row(name, row, looks=str(row["looks"])))
        if row["recipe"] in views:
            tested = views[row["recipe"]]
            lines.append(full_row(f"{name}, {tested['views']} views", tested, looks=""))
    return lines


def full_row(label: str, row: dict[str, Any], *, looks: str) -> str:
    """Returns a row of `full_table`, accuracies in percent."""
    low, high = row["interval"]
    cells = [
        label,
        f"{row['mean']:.3f}%",
        f"{row['deviation']:.3f}%",
        f"{low:.3f}% to {high:.3f}%",
        str(row["n"]),
        f"{row['ensemble']:.2f}%",
        f"{row['ensemble_nll']:.4f}",
        f"{row['study_seconds']:.3g}",
        row["study_machine"],
        looks,
    ]
    return f"| {' | '.join(cells)} |"


def draw(results: dict[str, Any], out: Path) -> None:
    """Draws each recipe's mean with the 95% interval by Student's t, and public numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from scipy import stats

    mpl.rcParams.update({"svg.hashsalt": "frontier", "svg.fonttype": "path"})
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row in results["rows"]:
        if row["seconds"] is None:
            continue
        half = stats.t.ppf(0.975, row["n"] - 1) * row["deviation"] / math.sqrt(row["n"])
        axes.errorbar(row["seconds"], row["mean"], half, fmt="o", color="#0072b2", capsize=3)
        below = row["recipe"] == "default"  # its neighbour's name is above
        axes.annotate(
            f"{row['recipe']} {row['mean']:.2f}%",
            (row["seconds"], row["mean"] + (-half if below else half)),
            xytext=(0, -14 if below else 5), textcoords="offset points", ha="center",
        )  # fmt: skip
    for row in results["public"]:
        axes.plot(row["seconds"], row["mean"], "s", color="#d55e00")
        axes.annotate(
            row["name"], (row["seconds"], row["mean"]),
            xytext=(-8, 8), textcoords="offset points", ha="right",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(1, 6000)
    axes.set_ylim(99.1, 99.85)
    axes.set_xlabel(f"seconds of training, {results['machine']}")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None}, facecolor="white")


def main(arguments) -> None:
    """Runs the script."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    results = read()
    print("\n".join([*table(results), "", *full_table(results)]))
    draw(results, command.out)


if __name__ == "__main__":
    command_line.run(main)
