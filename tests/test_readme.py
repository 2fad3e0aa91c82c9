"""Every command and every line of Python in the README works, in order; so do the mask tools, and all links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from likeness.cli import main
from likeness.prepare.synthetic import write_synthetic
from likeness.weights.catalog import DEFAULT, bundled_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks("sh", text) for line in block.splitlines() if line.strip()]


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
    lines = commands(README)
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


def test_mask_tools(workplace, capsys):
    text = (ROOT / "docs" / "masks.md").read_text()
    lines = commands(text)
    assert len(lines) >= 11
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        told, check = capsys.readouterr(), line.startswith("likeness mask check")
        count = re.search(r"--count (\d+)", line)
        assert len(told.out.splitlines()) == (2 if check else int(count[1]) if count else 1), line
        if line.startswith("likeness mask"):
            assert told.err.count(".png: ") == line.split("--out")[0].count(".png"), line
        if check:
            assert all(f"`{finding}`" in text for finding in told.out.splitlines())


def test_editing(workplace, capsys):
    text = (ROOT / "docs" / "editing.md").read_text()
    lines = commands(text)
    assert len(lines) >= 6
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        assert capsys.readouterr().out.rstrip().endswith(("pixels changed outside it: 0", "bit-identical")), line
    (python,) = blocks("python", text)
    names: dict = {}
    exec(compile(python, "editing.md", "exec"), names)
    assert [image.size for image in (*names["images"], names["changed"])] == [(128, 128)] * 3


def test_own_photos(workplace, capsys):
    """The way from photographs to a compared model, without alignment and with fewer steps."""
    text = (ROOT / "docs" / "own-photos.md").read_text()
    write_synthetic(workplace / "drawn", 16, 64)
    (workplace / "my").mkdir()
    (workplace / "drawn" / "train" / "images").rename(workplace / "my" / "photos")
    short = {
        "prepare": ("--align --landmarker face_landmarker.task --held-out 20", "--crop --held-out 10"),
        "train": ("mini.toml", "mini.toml optimizer.images=16 preview=[]"),
        "compare": ("--out", "steps=1 bootstrap_samples=100 --out"),
    }
    lines = commands(text)
    assert [line.split()[1] for line in lines] == ["prepare", "train", "compare", "generate"]
    for line in lines:
        long, replaced = short.get(line.split()[1], ("likeness", "likeness"))
        assert long in line
        assert run(shlex.split(line.replace(long, replaced))[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    assert all(
        (workplace / path).exists() for path in ("compared/comparison.html", "mine.png", "runs/finetune_mini/model")
    )
    printed = capsys.readouterr()
    assert "Set: KID on the text-image pair" in printed.out
    assert "captioning: " in printed.err


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links, and paths that are named from the root of the project."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:src|docs|tests|recipes|benchmarks|examples|launch)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_pages_do_not_get_in_one_anothers_way():
    """Who walks from the README through training and fine-tuning gives no folder two contents."""
    told: dict[str, list[str]] = {}
    for page in ("README.md", "docs/training.md", "docs/fine-tuning.md", "docs/own-photos.md"):
        for command in re.findall(r"likeness prepare ((?:synthetic|encode) data/[^`#\n]+)", (ROOT / page).read_text()):
            words = shlex.split(command)
            out = words[1 if words[0] == "synthetic" else 2]
            assert told.setdefault(out, words) == words, out
    assert len(told) >= 10
