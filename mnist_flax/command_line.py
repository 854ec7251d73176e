"""The experiment scripts' command line: options from a dataclass, errors as one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from mnist_flax.errors import DivergedError, InputError
from mnist_flax.recipes import RECIPES, Recipe, from_dict
from mnist_flax.workdir import RECIPE_FILE

T = TypeVar("T")


def named_recipe(name: str) -> Recipe:
    """Returns a recipe by its name.

    Raises:
      InputError: there is none of that name.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"recipe {name!r} is unknown; choose from {', '.join(RECIPES)}{meant}")
    return RECIPES[name]


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--recipe NAME` out of the arguments: the other options' defaults depend on it.

    Returns:
      The name, "default" if it is not given, and the other arguments.

    Raises:
      InputError: `--recipe` is the last argument.
    """
    name, rest = "default", []
    words = iter(arguments)
    for word in words:
        if word == "--recipe":
            name = next(words, "")
            if not name:
                raise InputError(f"--recipe needs a name; choose from {', '.join(RECIPES)}")
        elif word.startswith("--recipe="):
            name = word.removeprefix("--recipe=")
        else:
            rest.append(word)
    return name, rest


def recipe_of_run(workdir: Path) -> Recipe:
    """Returns the recipe of the run in `workdir`.

    Raises:
      InputError: there is none, or its recipe cannot be read.
    """
    path = workdir / RECIPE_FILE
    try:
        return from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"there is no run to resume in {workdir}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def parse(kind: type[T], arguments: Sequence[str], *, default: T, description: str) -> T:
    """Parses options generated from a frozen dataclass; prints the help and exits for --help.

    Raises:
      InputError: an option is unknown, or its value unreadable or impossible.
    """
    if isinstance(getattr(default, "recipe", None), Recipe):
        description += f"\n\n--recipe NAME, of {', '.join(RECIPES)}, sets the recipe's fields."
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                args=list(arguments),
                default=default,
                description=description,
            )
    except SystemExit as stop:
        if not stop.code:
            print(printed.getvalue(), end="")
            raise
        raise InputError(_one_line(errors.getvalue() + printed.getvalue())) from None


def _one_line(message: str) -> str:
    """Returns the text between the first two rules of tyro's error box, as one line."""
    parts = re.split(r"-{5,}|─{5,}", re.sub("[│╭╮╰╯]", " ", message))
    return " ".join((parts[1] if len(parts) > 1 else message).split()) + "; see --help"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a script's main function on the command line and exits with its status.

    A bad input is one line on stderr and status 2; a run that diverged, status 1.
    """
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; nothing was under way that could be saved", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"error: {what}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
