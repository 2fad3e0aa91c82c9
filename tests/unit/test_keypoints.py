"""Keypoints: every file form gives the same fractions, mirroring keeps every number's meaning."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn import drawn_points
from PIL import Image

from builders import tiny_pipeline
from likeness.conditions.keypoints import FLIPS, KEYPOINTS, STROKES, flip, part_points, read, render
from likeness.types import InputError

POINTS = drawn_points()
SIZE = (200, 100)


def mesh() -> np.ndarray:
    """478 points whose contours follow the 68: only what is drawn matters."""
    points = np.full((478, 2), 0.5)
    for _, closed, ibug, mediapipe in STROKES.values():
        path = POINTS[list(ibug) + (list(ibug[:1]) if closed else [])]
        at = np.linspace(0, len(path) - 1, len(mediapipe) + closed)[: len(mediapipe)]
        for axis in (0, 1):
            points[list(mediapipe), axis] = np.interp(at, np.arange(len(path)), path[:, axis])
    return points


@pytest.mark.parametrize("form", ["json", "list.json", "npy", "txt", "csv", "pts", "array"])
def test_formats(tmp_path, form):
    path, pixels = tmp_path / f"points.{form}", POINTS * SIZE
    if form == "json":
        path.write_text(json.dumps({"points": pixels.tolist(), "size": SIZE}))
    elif form == "list.json":
        path.write_text(json.dumps(POINTS.tolist()))
    elif form == "npy":
        np.save(path, POINTS)
    elif form == "txt":
        np.savetxt(path, POINTS)
    elif form == "csv":
        np.savetxt(path, POINTS, delimiter=",", header="x,y", comments="")
    elif form == "pts":
        rows = "\n".join(f"{x:.8f} {y:.8f}" for x, y in POINTS + 1)
        path.write_text(f"version: 1\nn_points: 68\n{{\n{rows}\n}}\n")
    reading = read(POINTS if form == "array" else path)
    assert reading.raw.dtype == np.float32
    np.testing.assert_allclose(reading.raw, POINTS, atol=1e-6)
    assert "68 iBUG" in reading.scheme


def test_pts_reads_its_size_from_the_image(tmp_path):
    """iBUG's files have pixels, counted from 1, and no size."""
    rows = "\n".join(f"{x:.8f}\t{y:.8f}" for x, y in POINTS * SIZE + 1)
    (tmp_path / "face.pts").write_text(f"version: 1\nn_points: 68\n{{\n{rows}\n}}\n")
    with pytest.raises(InputError, match="place the image next to"):
        read(tmp_path / "face.pts")
    Image.new("RGB", SIZE).save(tmp_path / "face.jpg")
    reading = read(tmp_path / "face.pts")
    np.testing.assert_allclose(reading.raw, POINTS, atol=1e-6)
    assert reading.size == SIZE


def test_points_keep_the_aspect_ratio_of_their_image():
    wide = {"points": (POINTS * SIZE).tolist(), "size": SIZE}
    with pytest.raises(InputError, match="image of the keypoints is 200x100, but the image is 32x32"):
        tiny_pipeline()("", control_image={"keypoints": wide}, height=32, width=32)


def openpose(points: np.ndarray, *, people: int = 1, **fields) -> dict:
    """Output of OpenPose: triples with a confidence and two pupils."""
    pupils = [points[36:42].mean(axis=0), points[42:48].mean(axis=0)]
    flat = [value for x, y in [*points, *pupils] for value in (float(x), float(y), 0.9)]
    return {"version": 1.3, "people": [{"face_keypoints_2d": flat}] * people, **fields}


def test_openpose(tmp_path):
    canvas = {"canvas_width": SIZE[0], "canvas_height": SIZE[1]}
    for document in (openpose(POINTS * SIZE, **canvas), [openpose(POINTS * SIZE, **canvas)]):
        (tmp_path / "pose.json").write_text(json.dumps(document))
        reading = read(tmp_path / "pose.json")
        np.testing.assert_allclose(reading.raw, POINTS, atol=1e-6)
        assert "OpenPose" in reading.scheme
    with pytest.raises(InputError, match="the faces of 2 people"):
        read(openpose(POINTS * SIZE, people=2, **canvas))
    with pytest.raises(InputError, match="unknown size"):
        read(openpose(POINTS * 512))
    huge = 10**400  # too large for a float
    for document in (
        openpose(POINTS * SIZE, canvas_width=huge, canvas_height=huge),
        {"points": [[huge, 1]] * 68},
        {"points": POINTS.tolist(), "size": [huge, 5]},
    ):
        with pytest.raises(InputError, match=r"must be \[width, height\] in pixels|are not plain numbers"):
            read(document)
    missing = openpose(POINTS * SIZE, **canvas)
    missing["people"][0]["face_keypoints_2d"][2] = 0.0  # the confidence of the first point
    with pytest.raises(InputError, match=r"1 of the 68 points .* are \(0, 0\)"):
        read(missing)


def test_mesh_without_irises():
    whole, part = read(mesh()), read(mesh()[:468])
    np.testing.assert_array_equal(part.raw, whole.raw[:468])
    np.testing.assert_array_equal(render(part.raw, 64, 64), render(whole.raw, 64, 64))
    np.testing.assert_allclose(flip(part.raw), flip(whole.raw)[:468])


def test_undetected_points_are_rejected():
    points = POINTS * 512
    points[:5] = 0
    with pytest.raises(InputError, match=r"5 of the 68 points .* are \(0, 0\)") as caught:
        read({"points": points.tolist(), "size": [512, 512]})
    assert caught.value.kind == "undetected-points"


def test_exchanged_axes_are_noted():
    assert [note.kind for note in read(POINTS[:, ::-1].copy()).notes] == ["axis-order"]


def test_rejected_sources(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "none.json").write_text('{"landmarks": []}')
    (tmp_path / "text.txt").write_text("1 2\nleft right\n")
    holes = POINTS.copy()
    holes[3] = np.nan
    cases = {
        "of unknown size": POINTS * 512,
        "not finite": holes,
        "has 5 points": POINTS[:5],
        "within the image": POINTS + 0.6,
        "one spot": POINTS * 0.001 + 0.5,
        "valid JSON": tmp_path / "broken.json",
        'has no "points"': tmp_path / "none.json",
        "the line 'left right'": tmp_path / "text.txt",
        "does not exist": tmp_path / "nothing.npy",
        "shape": POINTS.ravel(),
    }
    for message, source in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read(source)
        assert caught.value.kind == ("missing-file" if message == "does not exist" else "corrupt-file")


@pytest.mark.parametrize("points", [POINTS, mesh()], ids=["68", "478"])
def test_flip_mirrors_and_renumbers(points):
    raw = read(points).raw
    raw = raw + np.float32([0.03, 0])  # off center, so that a missing mirror shows
    mirrored = flip(raw)
    np.testing.assert_allclose(flip(mirrored), raw, atol=1e-6)
    assert not read(mirrored).notes  # the person's left eye is still on the viewer's right
    grey = render(raw, 128, 128).max(axis=2) > 60
    assert (grey[:, ::-1] == (render(mirrored, 128, 128).max(axis=2) > 60)).mean() > 0.98
    part, other = (part_points(name, len(raw)) for name in ("l_eye", "r_eye"))
    np.testing.assert_allclose(mirrored[part, 0].mean(), 1 - raw[other, 0].mean(), atol=1e-6)


def test_permutations_are_involutions_that_map_parts_onto_parts():
    for count, order in FLIPS.items():
        assert sorted(order) == list(range(count))
        np.testing.assert_array_equal(order[order], np.arange(count))
    counterpart = {"l_eye": "r_eye", "l_brow": "r_brow", "r_eye": "l_eye", "r_brow": "l_brow"}
    for name, (_, _, ibug, mediapipe) in STROKES.items():
        other = STROKES[counterpart.get(name, name)]
        assert {int(FLIPS[68][i]) for i in ibug} == set(other[2])
        assert {int(FLIPS[478][i]) for i in mediapipe} == set(other[3])


def test_both_conventions_render_alike():
    small, large = render(POINTS, 128, 128), render(mesh(), 128, 128)
    agree = (np.abs(small.astype(int) - large).max(axis=2) < 64).mean()
    assert agree > 0.97
    assert (small.max(axis=2) > 60).mean() > 0.03
    assert small[0, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(small, render(POINTS, 128, 128))


def test_swapped_sides_are_noted_and_resize_changes_nothing():
    crossed = POINTS.copy()
    crossed[:, 0] = 1 - crossed[:, 0]
    assert [note.kind for note in read(crossed).notes] == ["swapped-sides"]
    assert KEYPOINTS.resize(POINTS, 64, 32) is POINTS
    assert render(POINTS, 64, 96).shape == (64, 96, 3)
