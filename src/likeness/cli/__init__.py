"""The command line. Heavy imports are inside the commands, so that `--help` is fast.

Invalid input (`InputError`) is one sentence on stderr and exit code 2, or 75 if the same command may simply be run
again. Other exceptions are bugs and keep their traceback.
"""

from __future__ import annotations

import errno
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import tyro

from likeness.cli import caption, evaluation, mask, portraits, prepare, study, training
from likeness.cli.terminal import print_error
from likeness.runtime import configure_process
from likeness.types import InputError, TryAgain


def mask_help() -> None:
    """Edit masks by class, interpolate, check against a caption (`likeness mask --help`)."""
    run(GROUPS["mask"], "likeness mask", ["--help"])


def prepare_help() -> None:
    """Prepare training data (`likeness prepare --help`)."""
    run(GROUPS["prepare"], "likeness prepare", ["--help"])


def study_help() -> None:
    """Measure keys over time, attention and gates, and positions in a network (`likeness study --help`)."""
    run(GROUPS["study"], "likeness study", ["--help"])


def convert_help() -> None:
    """Convert released weights (`likeness convert --help`)."""
    run(GROUPS["convert"], "likeness convert", ["--help"])


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": portraits.Generate,
    "replay": portraits.Replay,
    "inspect": portraits.Inspect,
    "mask": mask_help,
    "models": portraits.Models,
    "train": training.train,
    "average": training.average,
    "evaluate": evaluation.evaluate,
    "compare": evaluation.compare,
    "prepare": prepare_help,
    "study": study_help,
    "cost": study.Cost,
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
    "study": {"keys": study.Keys, "attention": study.Attention, "positions": study.Positions},
    "convert": {"mmface-release": training.mmface_release},
}
"""Groups of commands."""

WITH_SETTINGS = ("train", "evaluate", "compare")
"""Commands that accept any number of positional arguments, such as key=value settings."""

RESUMABLE = ("train", "evaluate", "compare", "prepare")
"""Commands that resume when they are run again."""


def run(commands: Mapping[str, Callable[..., Any]], program: str, arguments: list[str]) -> None:
    """Parse the arguments and call the command that they name: a function, or a dataclass of options."""
    command = tyro.extras.subcommand_cli_from_dict(
        dict(commands),
        prog=program,
        description="Generate face images from text, semantic masks, sketches and keypoints.",
        args=arguments,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )
    if command is not None:
        command()


def positionals_first(command: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Move the positional arguments of a command before its options: users mix them, but tyro reads them in one place.

    The values of an option that accepts several end at the first key=value setting.
    """
    options = {f"--{name}": parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    positionals, rest, expected = [], [], 0.0  # expected: values that the last option still accepts
    for argument in arguments:
        if argument.startswith("-"):
            rest.append(argument)
            default = options.get(argument)
            flag = isinstance(default, bool) or "=" in argument or not argument.startswith("--")
            expected = math.inf if isinstance(default, tuple) else 0 if flag else 1
        elif expected == 1 or (expected and "=" not in argument):
            rest.append(argument)
            expected -= 1
        else:
            positionals.append(argument)
    return [*positionals, *rest]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `likeness`."""
    words = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # started as a program
        configure_process()
        open_standard_streams()
    name = words[0] if words else ""
    try:
        if words == ["--version"]:
            print(f"likeness {version('likeness')}")
        elif name in GROUPS:
            run(GROUPS[name], f"likeness {name}", words[1:] or ["--help"])
        else:
            if name in WITH_SETTINGS:
                words = [name, *positionals_first(COMMANDS[name], words[1:])]
            run(COMMANDS, "likeness", words or ["--help"])
        sys.stdout.flush()
    except InputError as error:
        print_error(str(error))
        sys.exit(75 if isinstance(error, TryAgain) else 2)
    except KeyboardInterrupt:
        print_error("stopped" + ("; run the same command again to resume" if name in RESUMABLE else ""))
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered cannot be written either
        if error.errno == errno.ENOSPC:
            print_error(f"cannot write: {error.strerror}")
        sys.exit(1)


def open_standard_streams() -> None:
    """Replace closed standard streams, and write characters that the terminal's encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
