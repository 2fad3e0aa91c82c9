"""Promises about the whole: frozen module paths, complete conditions, a light bundle, a clean environment."""

from __future__ import annotations

import importlib.metadata
import pydoc
import re
from dataclasses import fields
from pathlib import Path

import likeness
from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES, FLIP_PAIRS
from likeness.evaluate.protocol import Protocol
from likeness.pipelines.load import PIPELINES

SOURCE = Path(likeness.__file__).parent


def test_published_module_paths():
    """`model_index.json` records these: moving them breaks every published checkpoint."""
    assert PIPELINES == {
        "MMFacePipeline": "likeness.pipelines.mmface",
        "MDiTFacePipeline": "likeness.pipelines.mditface",
    }
    assert likeness.MMFaceTransformer.__module__ == "likeness.models.mmface"
    assert likeness.MMFacePipeline.__module__ == "likeness.pipelines.mmface"
    assert likeness.MDiTFaceTransformer.__module__ == "likeness.models.mditface"
    assert likeness.MDiTFacePipeline.__module__ == "likeness.pipelines.mditface"


def test_public_names_exist():
    assert dir(likeness) == sorted(likeness.__all__)
    for name in likeness.__all__:
        assert getattr(likeness, name) is not None
    assert (SOURCE / "py.typed").is_file()
    assert "load(" in pydoc.render_doc(likeness)


def test_conditions_are_whole():
    assert list(CONDITIONS) == ["mask", "sketch", "keypoints"]
    assert [condition.raw for condition in CONDITIONS.values()] == ["labels", "lines", "points"]
    for name, condition in CONDITIONS.items():
        assert condition.name == name
    assert len(CLASSES) == 19
    assert FLIP_PAIRS == ((4, 5), (6, 7), (8, 9))


def test_bundle_is_light():
    assert sum(path.stat().st_size for path in (SOURCE / "bundled").rglob("*") if path.is_file()) < 45e6


def test_torchvision_stays_out():
    installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    assert not installed & {"torchvision", "torchaudio"}


def test_settings_of_a_protocol_are_documented():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page[page.index("| setting |") : page.index("## How it works")]
    documented = {name for line in table.strip().splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert documented == {field.name for field in fields(Protocol)}
