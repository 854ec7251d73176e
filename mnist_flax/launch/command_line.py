"""The experiment scripts' command line: options from a dataclass, errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from mnist_flax import hosts
from mnist_flax.errors import DivergedError, InputError
from mnist_flax.launch import runtime
from mnist_flax.recipe import (
    KINDS,
    PlateauConfig,
    Recipe,
    StoppingConfig,
    from_dict,
    kind_class,
    run_file,
)
from mnist_flax.recipes import OF_DATASET, RECIPES
from mnist_flax.workdir import RECIPE_FILE, local_path

T = TypeVar("T")


def named_recipe(name: str) -> Recipe:
    """Returns a recipe by its name, or the one that a Python file has: `path/to/file.py:NAME`.

    Raises:
      InputError: there is none of that name; or the file cannot be run.
    """
    path, colon, own = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _recipe_of_file(Path(path).expanduser(), own)
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"recipe {name!r} is unknown; choose from {', '.join(RECIPES)}{meant}")
    return RECIPES[name]


def _recipe_of_file(path: Path, name: str) -> Recipe:
    if not path.is_file():
        raise InputError(f"recipe {path}:{name}: there is no file {path}")
    try:
        found = vars(run_file(path))
    except Exception as error:
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"recipe {path}:{name}: {path} cannot be run ({line})") from error
    if not isinstance(found.get(name), Recipe):
        own = ", ".join(key for key, value in found.items() if isinstance(value, Recipe)) or "none"
        raise InputError(f"recipe {path}:{name}: {path} has no Recipe {name!r}; its own are: {own}")
    return found[name]


def recipe_label(name: str) -> str:
    """Returns what to call a recipe in the names of files."""
    return name.rpartition(":")[2]


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--recipe NAME` out of the arguments: the other options' defaults depend on it.

    Returns:
      The name, and the other arguments. Where none is given it is that of `--dataset` in
      `recipes.OF_DATASET`, or "default".

    Raises:
      InputError: `--recipe` is the last argument.
    """
    name, rest = None, []
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
    if name is None:
        name = OF_DATASET.get(_value(rest, "--dataset"), "default")
    return name, rest


def _value(words: Sequence[str], option: str) -> str:
    """Returns the value of an option, the last one's where it is there twice; "" for none."""
    found = ""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word == option or word.startswith(f"{option}="):
            found = following if word == option else word.partition("=")[2]
    return found


OPTIONAL = {"plateau": PlateauConfig, "stopping": StoppingConfig}
RECIPE_HELP = f"""

--recipe NAME, of {", ".join(RECIPES)}, sets the recipe's fields. --model KIND, of
{", ".join(KINDS["model"])}, --optimizer KIND, of {", ".join(KINDS["optimizer"])}, and --schedule
KIND, of {", ".join(KINDS["schedule"])}, choose whose fields there are, at first their defaults; so
do --plateau.FIELD and --stopping.FIELD where the recipe has none. --plateau None and --stopping
None take them away."""


def choose_kinds(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Takes `--optimizer adamw` and its like out of the words: they decide what options there are.

    Returns:
      The recipe with what was chosen, its fields at their defaults, and the other words.

    Raises:
      InputError: a kind is unknown, or missing, or needs fields that have no defaults.
    """
    chosen: dict[str, Any] = {}
    rest = []
    left = iter(words)
    for word in left:
        option, equals, value = word.removeprefix("--").partition("=")
        section = option.partition(".")[0]
        if word.startswith("--") and option in (*KINDS, *OPTIONAL):
            chosen[option] = _chosen(recipe, option, value if equals else next(left, ""))
            continue
        if word.startswith("--") and section in OPTIONAL and not getattr(recipe, section):
            chosen.setdefault(section, OPTIONAL[section]())
        rest.append(word)
    return dataclasses.replace(recipe, **chosen), rest


def _chosen(recipe: Recipe, name: str, kind: str) -> Any:
    """Returns a kind's dataclass: the recipe's own where it is of that kind, or the default."""
    if name in OPTIONAL:
        if kind != "None":
            raise InputError(f"{name} {kind!r} is unknown; give None, or --{name}.FIELD")
        return None
    cls = kind_class(name, kind.replace("-", "_"))
    own = getattr(recipe, name)
    try:
        return own if type(own) is cls else cls()
    except TypeError as error:
        raise InputError(f"{name} {kind!r} cannot be made without fields: {error}") from None


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

    Options may stand between positional words, of which a field `tuple[Path, ...]` takes all.
    Paths have their `~` expanded.

    Raises:
      InputError: an option is unknown, or its value unreadable or impossible.
    """
    words, after = _cut(arguments)
    if isinstance(default, Recipe):
        default, words = choose_kinds(default, words)
    elif isinstance(recipe := getattr(default, "recipe", None), Recipe):
        recipe, words = choose_kinds(recipe, words)
        default = dataclasses.replace(default, recipe=recipe)  # type: ignore
        description += RECIPE_HELP
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            command, rest = tyro.cli(
                kind,
                args=words,
                default=default,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            print(printed.getvalue(), end="")
            raise
        reason = _refusal(stop) or _one_line(errors.getvalue() + printed.getvalue())
        raise InputError(reason) from None
    return _with_paths(_with_words(command, [*rest, *after], options=len(rest)))


def _cut(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before `--` and those after it, which are no options."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def _with_words(command: Any, rest: list[str], *, options: int) -> Any:
    """Adds to the positional field what tyro left over: it takes the first words alone.

    Raises:
      InputError: one of the first `options` is an option, or there is no positional field.
    """
    unknown = [word for word in rest[:options] if word.startswith("-") and word != "-"]
    field = next((f for f in dataclasses.fields(command) if _is_positional(f)), None)
    if unknown or (rest and field is None):
        word = (unknown or rest)[0]
        close = difflib.get_close_matches(word.partition("=")[0], _options(command), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        what = "is not an option" if unknown else "is a word too many"
        raise InputError(f"{word!r} {what}{meant}; see --help")
    if not rest or field is None:
        return command
    value = (*getattr(command, field.name), *map(Path, rest))
    return dataclasses.replace(command, **{field.name: value})


def _is_positional(field: dataclasses.Field) -> bool:
    """Whether a field is annotated as positional."""
    return tyro.conf.Positional in getattr(field.type, "__metadata__", ())


def _options(value: Any, prefix: str = "--") -> list[str]:
    """Returns the options that fields become; a recipe's have no prefix of their own."""
    names = []
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            names += _options(inner, prefix if isinstance(inner, Recipe) else f"{prefix}{name}.")
        elif not _is_positional(field):
            names.append(prefix + name)
    return names


def _with_paths(command: T) -> T:
    """Returns a command whose paths are of this machine, with `~` expanded.

    Raises:
      InputError: one is an address.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        value, name = getattr(command, field.name), field.name
        if isinstance(value, Path):
            changed[name] = local_path(value, name)
        elif isinstance(value, tuple) and value and isinstance(value[0], Path):
            changed[name] = tuple(local_path(path, name) for path in value)
    return dataclasses.replace(command, **changed) if changed else command  # pyright: ignore


def _refusal(error: BaseException | None) -> str:
    """Returns the message of the InputError that led to an error; "" where none did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return str(error or "")


def _one_line(message: str) -> str:
    """Returns what tyro printed as one line, without its frame and its hints about the help."""
    text = re.sub(r"[\u2500-\u257f]{5,}|-{5,}", ":", message)
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", text).split()).replace(" :", ":")
    text = re.split(r"Argument helptext:|For full helptext", text)[0].strip(" :.")
    return f"{text}; see --help"


def program() -> list[str]:
    """Returns the words that started this script: `python PATH`, or `mnist-flax NAME`."""
    return sys.argv[0].split() if sys.argv[0].startswith("mnist-flax ") else ["python", sys.argv[0]]


def begin(*, cpu_devices: int | None = None) -> None:
    """Sets JAX up, starts it, and says on stderr which devices it has.

    Args:
      cpu_devices: how many JAX devices the CPU becomes; None leaves it one.

    Raises:
      InputError: the platform that was asked for is not there.
    """
    runtime.configure(cpu_devices=cpu_devices)
    show_devices()


def show_devices() -> None:
    """Starts JAX, once it is set up, and says on stderr which devices it has.

    Of several processes the first says so.

    Raises:
      InputError: the platform that was asked for is not there.
    """
    runtime.start()
    if hosts.is_primary():
        print(runtime.describe_devices(), file=sys.stderr)


def backend_of_children() -> str:
    """Returns the name of the backend that processes of this one will have, and says its devices.

    A process that ends is asked: this one would hold a GPU's memory.

    Raises:
      InputError: the platform that was asked for is not there.
    """
    code = (
        "import jax; from mnist_flax.launch import command_line as c; "
        "c.run(lambda _: c.begin() or print(jax.default_backend()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *_, last = run.stderr.strip().splitlines() or ["it said nothing"]
    if run.returncode:
        raise InputError(last.removeprefix("error: "))
    print(last, file=sys.stderr)
    return run.stdout.strip()


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _terminate(_number, _frame):
    raise _Terminated


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a script's main function on the command line and exits with its status.

    A bad input is one line on stderr and status 2; a run that diverged, status 1. So is Ctrl-C,
    with status 130, and SIGTERM, with 143, where the script does not listen to them itself.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print("interrupted; nothing was under way that could be saved", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"error: {what}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
