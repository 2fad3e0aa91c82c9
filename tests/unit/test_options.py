"""Malformed values of every option of every command: one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro

from builders import run, tiny_pipeline
from likeness.cli import COMMANDS, execute, main

VALUES = ("", "²", "-1", "nan", "1e999", "1000000000", "9" * 5000, "\udcff", "a\x1b[31m\nb")
"""Values that are malformed for most options."""


def commands(table: dict[str, Any] = COMMANDS, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], type]:
    """Words of each command -> its class."""
    found: dict[tuple[str, ...], type] = {}
    for name, command in table.items():
        words = (*prefix, name)
        found |= commands(command[1], words) if isinstance(command, tuple) else {words: command}
    return found


def is_positional(kind: Any) -> bool:
    """Return whether tyro reads a field from its position."""
    return "Positional" in str(typing.get_args(kind)) or "_Positional" in str(kind)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


def required(command: type, words: tuple[str, ...], name: str, model: Path) -> list[str]:
    """Options that a command requires, other than `name`, with files that do not exist."""
    found = []
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        if field.name == name or field.default is not dataclasses.MISSING:
            continue
        option = [] if is_positional(hints[field.name]) else [f"--{field.name.replace('_', '-')}"]
        found += [*option, "missing"]
    if words == ("prepare", "synthetic"):
        found += ["--count", "1"]  # of two, the last one applies
    if words[0] == "generate" and name != "model":
        found += ["--model", str(model)]
    if words in (("mask", "propose"), ("serve",), ("studio",)) and name != "model":
        found += ["--model", "missing"]
    return found


def outcome(command: type, arguments: list[str]) -> int:
    """Exit code of a command. Its own parser is much faster than that of all commands."""
    try:
        execute(lambda: tyro.cli(command, args=arguments)())
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.parametrize("command", ["", "edit", "train", "evaluate", "compare", "verify"])
def test_help_has_no_empty_defaults(command, capsys):
    """The text of an option without a value says what happens; tyro's "(default: None)" would contradict it."""
    with pytest.raises(SystemExit):
        main([command, "--help"] if command else [])
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert not [text for text in ("None", "(default: )", "(default: '')") if text in shown]
    assert command or "--version" in shown
    assert command not in ("evaluate", "compare", "verify") or shown.count("(required)") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--quantize", "int8", "--model", "mmface-mini"), "leave --quantize out"),
        (("convert", "mmface-release", "absent", "out"), "absent does not exist"),
    ],
)
def test_messages(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_malformed_values(words, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # names of models are not searched on the Hub
    command = commands()[words]
    hints = typing.get_type_hints(command, include_extras=True)
    inherited = {
        field.name for base in command.__bases__ if base in commands().values() for field in dataclasses.fields(base)
    }
    for field in dataclasses.fields(command):
        for value in VALUES if field.name not in inherited else ():
            if (words[-1], field.name, value) == ("synthetic", "count", "1000000000"):
                continue  # valid
            option = [] if is_positional(hints[field.name]) else [f"--{field.name.replace('_', '-')}"]
            code = outcome(command, [*required(command, words, field.name, model), *option, value])
            shown = capfd.readouterr()
            assert code in (0, 1, 2), (field.name, value)
            assert code == 0 or shown.err or shown.out, (field.name, value)
