"""The command line. Heavy imports are inside the commands, so that `--help` is fast.

Invalid input (`InputError`) is one sentence on stderr and exit code 2, or 75 if the same command may simply be run
again. Other exceptions are bugs and keep their traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import operator
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Any, get_type_hints

import tyro

from likeness.cli import caption, edit, evaluation, mask, portraits, prepare, serve, training
from likeness.cli.terminal import print_error
from likeness.runtime import configure_process
from likeness.types import InputError, TryAgain

COMMANDS: dict[str, Any] = {
    "generate": portraits.Generate,
    "edit": edit.Edit,
    "replay": portraits.Replay,
    "inspect": portraits.Inspect,
    "mask": (
        "Generate masks from text, edit them by class, check them.",
        {
            "propose": mask.Propose,
            "grow": mask.Grow,
            "shrink": mask.Shrink,
            "remove": mask.Remove,
            "mirror": mask.Mirror,
            "paste": mask.Paste,
            "fill": mask.Fill,
            "clean": mask.Clean,
            "rename": mask.Rename,
            "swap": mask.Swap,
            "interpolate": mask.Interpolate,
            "check": mask.Check,
        },
    ),
    "extract": prepare.Extract,
    "models": portraits.Models,
    "serve": serve.Serve,
    "studio": serve.Studio,
    "train": training.Train,
    "average": training.Average,
    "evaluate": evaluation.Evaluate,
    "compare": evaluation.Compare,
    "verify": evaluation.Verify,
    "prepare": (
        "Prepare training data.",
        {
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
    ),
    "cost": evaluation.Cost,
    "convert": ("Convert released weights.", {"mmface-release": training.ConvertMMFace}),
}
"""Commands: dataclasses whose fields are the options. Groups: their description and commands."""

RESUMABLE = ("train", "evaluate", "compare", "verify", "prepare")
"""Commands that resume when they are run again."""

LISTS = {"train": "overrides", "evaluate": "sources", "compare": "sources", "verify": "sources"}
"""Commands that accept any number of positional arguments, and their field for them."""


def default_text(default: str) -> str:
    """Return what follows a help text. A text says itself what happens without a value."""
    return "" if default in ("None", "''", "") else f"(default: {default})"


def with_defaults(command: type) -> type:
    """Set the text of the default of each field of a command."""
    for name, kind in get_type_hints(command, include_extras=True).items():
        hint = "(required)" if name == "sources" else default_text  # for tyro, lists are optional
        command.__annotations__[name] = Annotated[kind, tyro.conf.arg(help_behavior_hint=hint)]
    return command


def union(commands: Mapping[str, Any]) -> Any:
    """Return the union of types that tyro offers as subcommands."""
    members: list[Any] = [Annotated[None, tyro.conf.Suppress]]  # the union of a single type is no union
    for name, command in commands.items():
        description, command = command if isinstance(command, tuple) else (None, command)
        command = union(command) if isinstance(command, dict) else with_defaults(command)
        members.append(Annotated[command, tyro.conf.subcommand(name, description=description)])
    return functools.reduce(operator.or_, members)


SUBCOMMANDS = union(COMMANDS)


def parse(arguments: list[str]) -> Callable[[], None]:
    """Return the command with its options.

    Tyro reads positional arguments up to the next option only. Those that follow options are added here.
    """
    cli = functools.partial(
        tyro.cli,
        SUBCOMMANDS,
        prog="likeness",
        description="Generate face images from text, semantic masks, sketches and keypoints. `likeness --version` "
        "prints the version.",
        args=arguments,
        config=(
            tyro.conf.PositionalMetavarFromFieldName,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,  # files and models may have this name
        ),
    )
    if field := LISTS.get(arguments[0]):
        command, rest = cli(return_unknown_args=True)
        if not any(argument.startswith("-") for argument in rest):
            return dataclasses.replace(command, **{field: (*getattr(command, field), *rest)})
    return cli()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `likeness`."""
    words = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # started as a program
        configure_process()
        open_standard_streams()
    name = words[0] if words else ""
    if words == ["--version"]:
        print(f"likeness {version('likeness')}")
    elif not words or (len(words) == 1 and isinstance(COMMANDS.get(name), tuple)):
        parse([*words, "--help"])
    else:
        execute(lambda: parse(words)(), resumable=name in RESUMABLE)


def execute(command: Callable[[], None], *, resumable: bool = False) -> None:
    """Run a command. Exit if it fails, with one sentence on stderr."""
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        print_error(str(error))
        sys.exit(75 if isinstance(error, TryAgain) else 2)
    except KeyboardInterrupt:
        print_error("stopped" + ("; run the same command again to resume" if resumable else ""))
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print_error(f"{str(error.filename)[:80]}... is not a file: the name is too long")
            sys.exit(2)
        if error.errno in (errno.EACCES, errno.EPERM) and error.filename is not None:
            print_error(f"{error.filename} cannot be opened: {error.strerror}")
            sys.exit(2)
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered cannot be written either
        if error.errno == errno.ENOSPC:
            print_error(f"cannot write: {error.strerror}")
        sys.exit(1)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print_error(
            "the accelerator is out of memory: use a smaller size or batch, --offload or --quantize int8 if the "
            "command has them, or --device cpu"
        )
        sys.exit(2)


def open_standard_streams() -> None:
    """Replace closed standard streams, and write characters that the terminal's encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
