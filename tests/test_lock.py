"""The lock files agree with pyproject.toml and with each other, and pin every package by hash except torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"


def pinned(name: str) -> dict[str, set[str]]:
    """Package -> its versions (several if they depend on the version of Python)."""
    found: dict[str, set[str]] = {}
    for entry in (LOCKS / name).read_text().replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        assert len(hashes) == len(re.findall(r"sha256:[0-9a-f]{64}", entry)) > 0, entry[:80]
        line = Requirement(requirement.strip())
        (specifier,) = line.specifier
        assert specifier.operator == "==", requirement
        found.setdefault(line.name, set()).add(specifier.version)
    return found


def test_locked_versions_satisfy_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = Requirement((LOCKS / "torch.txt").read_text().strip())
    core, dev = pinned("core.txt"), pinned("dev.txt")
    extras = [line for name, lines in project["optional-dependencies"].items() for line in lines]
    for lines, locked in ((project["dependencies"], core), ([*project["dependencies"], *extras], dev)):
        for requirement in map(Requirement, lines):
            if requirement.name == "torch":
                assert next(iter(torch.specifier)).version in requirement.specifier
            elif requirement.name != "likeness":
                versions = locked[requirement.name]
                assert all(version in requirement.specifier for version in versions), requirement


def test_lock_files_agree():
    core, serve, dev = pinned("core.txt"), pinned("serve.txt"), pinned("dev.txt")
    assert core.items() <= serve.items() <= dev.items()
    assert not {name for name in dev if name == "torch" or name.startswith(("nvidia", "cuda", "triton", "torchvision"))}
    assert not any(re.search(r"https?://", file.read_text()) for file in LOCKS.iterdir())
