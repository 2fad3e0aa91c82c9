"""The command line. Every heavy import is inside its command, so that `--help` answers at once.

What the user gave wrongly (`InputError`) is one sentence on stderr and exit code 2, or 75 where the same command may be
run again as it is; anything else is our fault and keeps its traceback.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import tyro

from likeness.cli import caption, evaluation, mask, portraits, prepare, study, training
from likeness.runtime import configure_process
from likeness.types import InputError, TryAgain


def mask_help() -> None:
    """Edit masks by class, mix two, check one against a caption; `likeness mask --help` lists its commands."""
    run(GROUPS["mask"], "likeness mask", ["--help"])


def prepare_help() -> None:
    """Make training data; `likeness prepare --help` lists its commands."""
    run(GROUPS["prepare"], "likeness prepare", ["--help"])


def study_help() -> None:
    """Look into a network while it works: keys over time, attention and gates, positions (`likeness study --help`)."""
    run(GROUPS["study"], "likeness study", ["--help"])


def convert_help() -> None:
    """Bring other people's weights in: mmface-release (with its own --help)."""
    run(GROUPS["convert"], "likeness convert", ["--help"])


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": portraits.generate,
    "replay": portraits.replay,
    "inspect": portraits.inspect,
    "mask": mask_help,
    "models": portraits.models,
    "train": training.train,
    "average": training.average,
    "evaluate": evaluation.evaluate,
    "compare": evaluation.compare,
    "prepare": prepare_help,
    "study": study_help,
    "cost": study.cost,
    "convert": convert_help,
}

GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    "mask": {
        "grow": mask.grow,
        "shrink": mask.shrink,
        "remove": mask.remove,
        "mirror": mask.mirror,
        "paste": mask.paste,
        "fill": mask.fill,
        "rename": mask.rename,
        "swap": mask.swap,
        "interpolate": mask.interpolate,
        "check": mask.check,
    },
    "prepare": {
        "synthetic": prepare.Synthetic,
        "ingest": prepare.Ingest,
        "export": prepare.Export,
        "align": prepare.Align,
        "paste": prepare.Paste,
        "annotate": prepare.Annotate,
        "caption": caption.Caption,
        "check": prepare.Check,
        "encode": prepare.Encode,
        "shards": prepare.Shards,
        "components": prepare.JoinComponents,
        "decoder": prepare.ReplaceDecoder,
        "pack": prepare.Pack,
    },
    "study": {"keys": study.keys, "attention": study.attention, "positions": study.positions},
    "convert": {"mmface-release": training.mmface_release},
}
"""Commands that have commands of their own."""

MANY_WORDS = ("train", "evaluate", "compare")
"""Commands that take any number of words."""

RESUMED = ("train", "evaluate", "compare", "prepare")
"""Commands that go on where they were stopped."""


def run(commands: Mapping[str, Callable[..., Any]], program: str, arguments: list[str]) -> None:
    """Parse the arguments and call the command that they name: a function, or a dataclass of options."""
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog=program,
        description="Portraits from words, semantic masks and sketches.",
        args=arguments,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )
    if command is not None:
        command()


def words_first(command: Callable[..., None], arguments: Sequence[str]) -> list[str]:
    """The arguments of a command that takes any number of words, these moved before the options: users mix them, tyro
    reads all words in one place.
    """
    options = {f"--{name}": parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    words, rest, takes = [], [], 0.0  # takes: how many values the last option still takes
    for word in arguments:
        if word.startswith("-"):
            rest.append(word)
            default = options.get(word)
            single = 0 if isinstance(default, bool) or "=" in word or not word.startswith("--") else 1
            takes = math.inf if isinstance(default, tuple) else single
        elif takes == 1 or (takes and "=" not in word):  # a list of values ends where a change begins
            rest.append(word)
            takes -= 1
        else:
            words.append(word)
    return [*words, *rest]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `likeness`."""
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # not called from Python
        configure_process()
    try:
        if given == ["--version"]:
            print(f"likeness {version('likeness')}")
        elif given and given[0] in GROUPS:
            run(GROUPS[given[0]], f"likeness {given[0]}", given[1:] or ["--help"])
        else:
            if given and given[0] in MANY_WORDS:
                given = [given[0], *words_first(COMMANDS[given[0]], given[1:])]
            run(COMMANDS, "likeness", given or ["--help"])
    except InputError as error:
        print(f"likeness: {error}", file=sys.stderr)
        sys.exit(75 if isinstance(error, TryAgain) else 2)
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if given[:1] and given[0] in RESUMED else ""
        print(f"likeness: stopped{again}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone: `likeness models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
