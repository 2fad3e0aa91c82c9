"""Every command and every line of Python in the README works, in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from likeness.cli import main
from likeness.pipelines.catalogue import DEFAULT, bundled_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(arguments: list[str]) -> int:
    """Exit code of a command."""
    try:
        main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_a_bundled_model():
    assert DEFAULT in bundled_models()


def test_commands(workplace, capsys):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 9
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "likeness"
        assert run(arguments) == 0, f"{line}: {capsys.readouterr().err}"
        if "--out" in arguments and "--count" not in arguments:
            assert Path(arguments[arguments.index("--out") + 1]).exists(), line
    assert sorted(path.name for path in workplace.glob("both-*.webp")) == ["both-1.webp", "both-2.webp"]


def test_python(workplace):
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (workplace / "smile.png").is_file()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
