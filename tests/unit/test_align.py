"""Align and paste: pixels follow the transform, photos are unchanged elsewhere, interrupted runs resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hostile import bomb, full_disk, read_only, snapshot
from PIL import Image, ImageDraw
from scipy import ndimage

from builders import run
from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.annotators.landmarks import find_faces
from likeness.cli import main
from likeness.conditions import CONDITIONS
from likeness.conditions.framing import inverse, move, portrait_transform
from likeness.conditions.keypoints import STROKES
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.data.folder import read_folder, read_photo
from likeness.data.synthetic import draw_face
from likeness.pipelines.image_recipe import COMPOSITE
from likeness.prepare import paste
from likeness.prepare.align import JOURNAL, align_files, cut_portrait, photo_files
from likeness.prepare.annotate import annotate_folder
from likeness.prepare.paste import paste_file, paste_portrait
from likeness.types import InputError
from likeness.weights.hashes import file_hash

SHARED = Path(os.environ.get("LIKENESS_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "weights" / "face_landmarker" / "face_landmarker.task"
FACES = SHARED / "data" / "celebamask-hq" / "images"

DOTS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 200, 20)}
"""Right eye, left eye and mouth of the synthetic faces."""


def similarity(scale: float, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    """float64 [2, 3]."""
    angle = np.radians(degrees)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([rotation, np.array(shift, dtype=np.float64)[:, None]], axis=1)


def draw(photo: Image.Image, where: np.ndarray) -> None:
    """Draw a face of dots, 100 wide before `where` is applied."""
    drawing, scale = ImageDraw.Draw(photo), float(np.hypot(*where[:, 0]))
    for place, radius, color in (
        ((50, 50), 48, (205, 160, 130)),
        ((30, 40), 6, DOTS["red"]),
        ((70, 40), 6, DOTS["blue"]),
        ((50, 78), 6, DOTS["green"]),
    ):
        x, y = move(np.array(place), where)
        reach = radius * scale
        drawing.ellipse((x - reach, y - reach, x + reach, y + reach), fill=color)


def find_dots(image: np.ndarray) -> list[np.ndarray]:
    """Detect such faces from left to right; like a real detector it misses small ones."""
    spots = []
    for color in DOTS.values():
        near = np.abs(image.astype(np.int16) - np.array(color, np.int16)).max(axis=2) < 60
        labels, _ = ndimage.label(near)
        big = [i for i, area in enumerate(np.bincount(labels.ravel())) if i and area > 1e-4 * labels.size]
        spots.append(sorted(ndimage.center_of_mass(near, labels, big), key=lambda place: place[1]))
    faces = []
    if len({len(places) for places in spots}) > 1:
        return []
    for right_eye, left_eye, mouth in zip(*spots, strict=True):
        right_eye, left_eye, mouth = (np.array(place)[::-1] + 0.5 for place in (right_eye, left_eye, mouth))
        points = np.tile((right_eye + left_eye + mouth) / 3, (478, 1))
        points[list(STROKES["r_eye"][3])], points[list(STROKES["l_eye"][3])] = right_eye, left_eye
        points[[61, 291]] = mouth
        points[234], points[454] = points[4] + (right_eye - left_eye) / 2, points[4] + (left_eye - right_eye) / 2
        faces.append((points / image.shape[1::-1]).astype(np.float32))
    return faces


def settings(**changes) -> dict:
    return {"size": 96, "all_faces": False, "strict": False, "landmarker": "dots 1", **changes}


def align(photos: Path, out: Path, **changes):
    held_out = changes.pop("held_out", 0)
    return align_files(photo_files(photos, out), photos, out, find_dots, settings(**changes), held_out)


@pytest.fixture
def photos(tmp_path) -> Path:
    """One face, three faces in a folder below, none, and a file that is not an image."""
    root = tmp_path / "photos"
    (root / "trip").mkdir(parents=True)
    rng = np.random.default_rng(0)
    ground = ndimage.gaussian_filter(rng.uniform(60, 140, (400, 600, 3)), (8, 8, 0)).astype(np.uint8)
    one = Image.fromarray(ground)
    draw(one, similarity(1.5, 12, (200, 80)))
    one.save(root / "one.png")
    three = Image.fromarray(ground)
    for scale, place in ((0.8, (20, 40)), (1.4, (180, 150)), (1.0, (430, 90))):
        draw(three, similarity(scale, 0, place))
    three.save(root / "trip" / "one.png")
    Image.fromarray(ground).save(root / "field.jpg")
    (root / "broken.jpg").write_bytes(b"not an image")
    return root


# Cutting and pasting, as functions


@pytest.mark.parametrize("scale", [0.07, 0.3, 1.0, 2.7])
def test_pixels_come_from_where_the_transform_says(scale):
    """On a slope every resampling gives the value at the very place: half a pixel of offset would show."""
    y, x = np.mgrid[0:600, 0:800] + 0.5
    slope = np.stack([x / 4, y / 3, 60 + (x + y) / 10], axis=-1)  # values at pixel centers
    photo = np.rint(slope).astype(np.uint8)
    size = int(min(64, 250 * scale))
    center = np.array([400.0, 300.0])
    transform = similarity(scale, 17, (0, 0))
    transform[:, 2] = size / 2 - transform[:, :2] @ center
    portrait = cut_portrait(photo, transform, size)
    places = move(np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), axis=-1), inverse(transform))
    wanted = np.stack([places[..., 0] / 4, places[..., 1] / 3, 60 + places.sum(-1) / 10], axis=-1)
    assert np.abs(portrait - wanted).max() < 1.1  # rounded twice
    assert np.abs((portrait - wanted).mean(axis=(0, 1))).max() < 0.1


def test_borders_fade_outside_only():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    transform = np.array([[1.0, 0, 32], [0, 1.0, 32]])  # the photo is the center of a portrait of 128
    portrait = cut_portrait(photo, transform, 128)
    assert np.array_equal(portrait[32:96, 32:96], photo)
    assert portrait[:4, :4].std() < 0.2 * photo.std()  # far outside: uniform
    assert abs(portrait[28:31, 40:90].astype(float).mean() - photo.mean()) < 40  # near: reflected photo


def test_paste_changes_no_other_pixels():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (700, 500, 3), dtype=np.uint8)  # more rows than are blended at a time
    transform = similarity(0.3, 20, (10, -30))
    portrait = np.full((128, 128, 3), 90, np.uint8)
    result = paste_portrait(photo, portrait, transform, 128)
    y, x = np.mgrid[0:700, 0:500] + 0.5
    places = move(np.stack([x, y], axis=-1), transform)
    outside = ((places <= 0) | (places >= 128)).any(axis=-1)
    assert 0.2 < outside.mean() < 0.9
    assert np.array_equal(result[outside], photo[outside])
    middle = ((places > 13) & (places < 115)).all(axis=-1)
    assert np.abs(result[middle].astype(int) - 90).max() <= 1
    # the same at another size of the portrait
    larger = paste_portrait(photo, np.full((256, 256, 3), 90, np.uint8), transform, 128)
    assert np.abs(larger.astype(int) - result).max() <= 1


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_unedited_portrait_changes_little(scale):
    rng = np.random.default_rng(0)
    photo = ndimage.gaussian_filter(rng.uniform(0, 255, (500, 500, 3)), (4, 4, 0))
    photo = np.rint((photo - photo.min()) / np.ptp(photo) * 255).astype(np.uint8)
    size = int(300 * scale)
    transform = similarity(scale, -15, (0, 0))
    transform[:, 2] = size / 2 - transform[:, :2] @ [120, 250]  # partly outside the photo
    result = paste_portrait(photo, cut_portrait(photo, transform, size), transform, size)
    assert np.abs(result.astype(int) - photo).mean() < 1
    assert np.abs(result.astype(int) - photo).max() < 12


def test_rejected_portraits():
    photo = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="32x16: it must be square"):
        paste_portrait(photo, photo[:16, :32], similarity(1, 0, (0, 0)), 32)
    with pytest.raises(InputError, match="feather must be greater than 0"):
        paste_portrait(photo, photo, similarity(1, 0, (0, 0)), 64, feather=0)


# Folders


def test_folder_of_photos(photos, tmp_path):
    found = align(photos, tmp_path / "out")
    assert found.splits.total() == 2
    assert found.without == ["field.jpg"]
    assert list(found.unreadable) == ["broken.jpg"]
    rows = read_folder(tmp_path / "out")
    assert [row["aligned"]["photo"] for row in rows] == ["one.png", "trip/one.png"]
    assert len({row["file_name"].name for row in rows}) == 2  # although the photos have the same name
    for row in rows:
        portrait = read_photo(row["file_name"])
        assert portrait.shape == (96, 96, 3)
        (points,) = find_dots(portrait)
        # upright and framed by the recipe: half a side is 1.8 times the distance from eyes to mouth
        assert np.allclose(portrait_transform(points * 96.0, 96), [[1, 0, 0], [0, 1, 0]], atol=0.8)
        reading = CONDITIONS["keypoints"].read(row["keypoints_file_name"])
        assert np.abs(reading.raw - points).max() < 0.01
        assert row["keypoints_made_by"] == "dots 1"
    # of the three faces the largest, which begins at (180, 150) and is 140 wide
    eyes = move(np.array([180 + 42.0, 150 + 56.0]), np.array(rows[1]["aligned"]["transform"]))
    assert np.abs(eyes - find_dots(read_photo(rows[1]["file_name"]))[0][33] * 96).max() < 1


def test_all_faces_of_a_photo(photos, tmp_path):
    found = align(photos, tmp_path / "out", all_faces=True)
    assert found.splits.total() == 4
    widths = [1 / row["aligned"]["transform"][0][0] for row in read_folder(tmp_path / "out")][1:]
    assert widths == sorted(widths, reverse=True)


def test_small_faces_are_found_through_windows():
    photo = Image.new("RGB", (1200, 800), (90, 90, 90))
    draw(photo, similarity(0.65, 0, (750, 450)))
    image = np.array(photo)
    assert find_dots(image) == []
    (points,) = find_faces(find_dots, image)
    assert np.allclose(points[33], [750 + 19.5, 450 + 26], atol=1)


def test_faulty_geometry(photos, tmp_path):
    # all are more than 1.5 times smaller than their portraits
    found = align(photos, tmp_path / "noted", size=512)
    assert found.splits.total() == 2
    assert all("small" in {fault.kind for fault in faults} for faults in found.faults.values())
    found = align(photos, tmp_path / "strict", size=512, strict=True)
    assert found.splits.total() == 0
    assert len(found.skipped) == 2
    assert not (tmp_path / "strict" / "train" / "metadata.jsonl").exists()


def test_resumes_and_keeps_added_columns(photos, tmp_path):
    out = tmp_path / "out"
    calls = []

    def interrupted(done, total):
        calls.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align_files(photo_files(photos, out), photos, out, find_dots, settings(), 0, interrupted)
    with (out / JOURNAL).open("a") as journal:
        journal.write('\n{"photo": "trip/one.png", "sha')  # killed while writing
    first = read_journal(out)
    assert len(first) == 2
    written = {path: path.stat().st_mtime_ns for path in (out / "train" / "images").iterdir()}
    align(photos, out)
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    rows = [json.loads(line) for line in (out / "train" / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"] = ["a face"]
    (out / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (photos / "broken.jpg").unlink()
    Image.open(photos / "one.png").rotate(8).save(photos / "two.png")
    align(photos, out)
    rows = read_folder(out)
    assert [row["aligned"]["photo"] for row in rows] == ["one.png", "trip/one.png", "two.png"]
    assert rows[0]["text"] == ["a face"]
    with pytest.raises(InputError, match="was written with size 96, not 64: choose another folder"):
        align(photos, out, size=64)


def test_removed_rows_and_columns_stay_removed(photos, tmp_path):
    """A second run restores neither what `check --apply` or the user removed, nor leaves it out if it is only lost."""
    out = tmp_path / "out"
    (photos / "broken.jpg").unlink()
    for degrees in (3, 6):
        Image.open(photos / "one.png").rotate(degrees).save(photos / f"turned{degrees}.png")
    align(photos, out)
    metadata = out / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    assert len(rows) == 4
    (out / "train" / rows[0]["file_name"]).unlink()  # as a dropped row
    (out / "train" / rows[1].pop("keypoints_file_name")).unlink()
    lost = out / "train" / rows[3]["file_name"]
    content = lost.read_bytes()
    lost.unlink()
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    for _ in range(2):
        found = align(photos, out)
        assert found.splits == {"train": 3}
        assert [json.loads(line) for line in metadata.read_text().splitlines()] == rows[1:]
    assert lost.read_bytes() == content
    assert json.loads((out / "dataset.json").read_text())["faces"] == {"train": 3}


def test_splits(photos, tmp_path):
    """The first run chooses the held-out photos; later ones are for training."""
    out = tmp_path / "out"
    (photos / "broken.jpg").unlink()
    (photos / "field.jpg").unlink()
    found = align(photos, out, held_out=1)
    assert found.splits == {"train": 1, "test": 1}
    record = json.loads((out / "dataset.json").read_text())
    assert record["faces"] == {"train": 1, "test": 1}
    (held,) = record["test"]
    assert read_folder(out / "test")[0]["aligned"]["photo"] == held
    for degrees in range(1, 4):
        Image.open(photos / "one.png").rotate(degrees).save(photos / f"a{degrees}.png")
    for held_out in (None, 1):
        assert align(photos, out, held_out=held_out).splits == {"train": 4, "test": 1}
    assert json.loads((out / "dataset.json").read_text())["test"] == [held]
    for held_out, said in (
        (2, "was written with held_out 1, not 2"),
        (5, "cannot hold out 5 of 5 complete"),
        (-3, "must be at least 0, not -3"),
    ):
        with pytest.raises(InputError, match=said):
            align(photos, out if held_out == 2 else tmp_path / "new", held_out=held_out)
    edited, portrait = tmp_path / "edited.png", read_folder(out / "test")[0]["file_name"]
    assert paste_file(portrait, out, photos / held, edited) == f"images/{portrait.name}"


@pytest.mark.parametrize("held_out", [0, 2])
def test_copies_and_renamed_photos(photos, tmp_path, held_out):
    """A photo has one row in one split, whatever its name is in this run or the next."""
    out = tmp_path / "out"
    for name in ("broken.jpg", "field.jpg"):
        (photos / name).unlink()
    for name in ("copy.png", "trip/copy.png"):
        (photos / name).write_bytes((photos / "one.png").read_bytes())
    found = align(photos, out, held_out=held_out)
    assert found.splits.total() == 2
    assert found.copies == {"one.png": "copy.png", "trip/copy.png": "copy.png"}
    before = {split: [row["file_name"] for row in read_folder(out / split)] for split in found.splits}
    assert sorted(len(files) for files in before.values()) in ([2], [1, 1])
    for name in ("copy.png", "one.png"):
        (photos / name).unlink()
    (photos / "trip/copy.png").rename(photos / "renamed.png")
    assert align(photos, out, held_out=held_out).splits == found.splits
    assert {split: [row["file_name"] for row in read_folder(out / split)] for split in found.splits} == before
    paste_file(next(iter(before.values()))[0], out, photos / "renamed.png", tmp_path / "edited.png")


def test_photographs_are_never_reduced(photos, tmp_path, monkeypatch):
    """A JPEG of too many pixels would be read at a half of its size."""
    photo = photos / "large.jpg"
    Image.open(photos / "one.png").convert("RGB").save(photo)
    align(photos, tmp_path / "out")
    (portrait,) = [
        row["file_name"] for row in read_folder(tmp_path / "out/train") if row["aligned"]["photo"] == "large.jpg"
    ]
    monkeypatch.setattr(paste, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match=f"{photo} is .* which has too many pixels"):
        paste_file(portrait, tmp_path / "out", photo, tmp_path / "pasted.png")
    assert not (tmp_path / "pasted.png").exists()


def read_journal(out: Path) -> list[str]:
    """Return the photos that are done."""
    found = []
    for line in (out / JOURNAL).read_text().splitlines():
        try:
            found.append(json.loads(line)["photo"])
        except json.JSONDecodeError:
            continue
    return found


def test_full_disk_read_only_folder_and_decompression_bomb(photos, tmp_path):
    align(photos, tmp_path / "whole")
    (photos / "broken.jpg").write_bytes(bomb())
    out, edited = tmp_path / "out", tmp_path / "edited.png"
    out.mkdir()
    with read_only(out), pytest.raises(InputError, match="cannot write"):
        align(photos, out)
    wanted = snapshot(tmp_path / "whole")
    for most in (100, len(wanted["train/metadata.jsonl"]) - 1, max(map(len, wanted.values())) - 1):
        with full_disk(most), pytest.raises(InputError, match=f"cannot write {out}"):
            align(photos, out)
        assert not (out / "train" / "metadata.jsonl").exists()
    assert "too many pixels" in align(photos, out).unreadable["broken.jpg"]
    found = snapshot(out)
    assert {name: found[name] for name in wanted if name != JOURNAL} == {
        name: content for name, content in wanted.items() if name != JOURNAL
    }
    portrait = next(row["file_name"] for row in read_folder(out) if row["aligned"]["photo"] == "one.png")
    paste = lambda portrait: paste_file(portrait, out, photos / "one.png", edited)  # noqa: E731
    with full_disk(100), pytest.raises(InputError, match="cannot write"):
        paste(portrait)
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(InputError, match="too many pixels"):
        paste(tmp_path / "bomb.png")
    assert not edited.exists()


def test_no_photos(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        photo_files(tmp_path / "none", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no photos"):
        photo_files(tmp_path / "empty", tmp_path / "out")


def test_photos_are_listed_as_by_ingest(photos, tmp_path):
    (photos / "link").symlink_to(photos / "trip")
    (photos / "again").symlink_to(photos)
    (photos / "trip" / "._one.png").write_bytes(b"metadata of macOS")
    found = [path.relative_to(photos).as_posix() for path in photo_files(photos, photos / "ready")]
    assert found == ["broken.jpg", "field.jpg", "link/one.png", "one.png"]  # a folder once, also through links
    with pytest.raises(InputError, match="write to another folder"):
        photo_files(photos, photos)


def test_invalid_or_long_names(photos, tmp_path):
    latin = os.fsdecode(b"caf\xe9.png")
    (photos / "one.png").rename(photos / latin)
    (photos / "trip" / "one.png").rename(photos / ("脸" * 82 + ".png"))
    assert align(photos, tmp_path / "out").splits.total() == 2
    rows = {row["aligned"]["photo"]: row["file_name"].name for row in read_folder(tmp_path / "out")}
    assert rows[latin].startswith("caf_-")
    annotate_folder(tmp_path / "out")
    assert all("sketch_file_name" in row for row in read_folder(tmp_path / "out"))


def test_paste_classes_only(tmp_path, capsys):
    """Pixels of other classes stay; the edge is blended; skin brings what is on it."""
    face, other = (draw_face(0, index, 128) for index in (0, 1))
    photo, out = tmp_path / "photo.png", tmp_path / "aligned"
    Image.fromarray(np.pad(face.image, ((20, 20), (40, 40), (0, 0)), mode="edge")).save(photo)
    (out / "images").mkdir(parents=True)
    Image.fromarray(face.image).save(out / "images" / "a.png")
    aligned = {"photo": "photo.png", "sha256": file_hash(photo), "transform": [[1, 0, -40], [0, 1, -20]], "size": 128}
    (out / "metadata.jsonl").write_text(json.dumps({"file_name": "images/a.png", "aligned": aligned}))
    Image.fromarray(other.image).save(tmp_path / "edited.png")
    command = ["prepare", "paste", tmp_path / "edited.png", "--aligned", out, "--photo", photo]
    network, size = load_face_parser()
    (found,) = parse_faces(network, [other.image], size=size)
    names = ["hair", "skin", "nose", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip", "eye_g"]
    chosen = np.isin(found, [CLASS_INDEX[name] for name in names])
    assert run(*command, "--only", "Hair,skin", "--out", tmp_path / "pasted.png") == 0
    pasted = read_photo(tmp_path / "pasted.png")[20:148, 40:168]
    assert np.array_equal(pasted[~chosen], face.image[~chosen])
    deep = ndimage.binary_erosion(chosen, iterations=6)
    deep[:14], deep[-14:], deep[:, :14], deep[:, -14:] = False, False, False, False  # the border of the portrait
    assert deep.mean() > 0.1
    assert np.abs(pasted[deep].astype(int) - other.image[deep]).max() <= 1
    edge = chosen & ~ndimage.binary_erosion(chosen)
    steps = [np.abs(one[edge].astype(int) - face.image[edge]).mean() for one in (pasted, other.image)]
    assert steps[0] < steps[1] / 2
    capsys.readouterr()
    assert run(*command, "--only", "hear", "--out", tmp_path / "no.png") == 2
    assert "Unknown class 'hear'" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_paste_file(photos, tmp_path, capsys):
    out = tmp_path / "out"
    align(photos, out, all_faces=True)
    rows = read_folder(out)
    edited = tmp_path / "edited.png"
    Image.new("RGB", (192, 192), (10, 10, 10)).save(edited)
    # one face: the hash of the photo is enough
    main(["prepare", "paste", str(edited), "--aligned", str(out), "--photo", str(photos / "one.png"), "--out",
          str(tmp_path / "pasted.png")])  # fmt: skip
    assert f"images/{rows[0]['file_name'].name} pasted into" in capsys.readouterr().out
    before, after = read_photo(photos / "one.png"), read_photo(tmp_path / "pasted.png")
    y, x = np.mgrid[0:400, 0:600] + 0.5
    places = move(np.stack([x, y], axis=-1), np.array(rows[0]["aligned"]["transform"]))
    outside = ((places <= 0) | (places >= 96)).any(axis=-1)
    assert np.array_equal(before[outside], after[outside])
    assert (after[~outside] == 10).mean() > 0.5
    for given in (edited, photos / "one.png"):
        content = given.read_bytes()
        assert run("prepare", "paste", edited, "--aligned", out, "--photo", photos / "one.png", "--out", given) == 2
        assert "--out would overwrite the input" in capsys.readouterr().err
        assert given.read_bytes() == content
    # several: by the name of the portrait or by --face
    several = photos / "trip" / "one.png"
    with pytest.raises(InputError, match="has several faces: choose one with --face"):
        paste_file(edited, out, several, tmp_path / "no.png")
    named = tmp_path / rows[2]["file_name"].name
    Image.new("RGB", (96, 96)).save(named)
    assert paste_file(named, out, several, tmp_path / "a.png") == f"images/{named.name}"
    assert paste_file(edited, out, several, tmp_path / "b.png", face=named.name) == f"images/{named.name}"
    # another photo than the one that was aligned
    Image.open(several).rotate(1).save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"other\.png is not a photo of"):
        paste_file(edited, out, tmp_path / "other.png", tmp_path / "no.png")
    with pytest.raises(InputError, match="must end in"):
        paste_file(edited, out, several, tmp_path / "no.bmp")
    assert not (tmp_path / "no.png").exists()


def test_profile_transparency_and_mark_of_generated_media(photos, tmp_path):
    from likeness.pipelines.image_recipe import GENERATED, XMP_KEY

    source = Image.open(photos / "one.png").convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize(source.size).point(lambda value: min(255, 12 * value)))
    source.save(photos / "one.png", icc_profile=b"a profile")
    out = tmp_path / "out"
    align(photos, out)
    (row,) = (row for row in read_folder(out) if row["aligned"]["photo"] == "one.png")
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(XMP_KEY, f'<x:xmpmeta DigitalSourceType="{GENERATED}"/>')
    Image.open(row["file_name"]).save(tmp_path / "edited.png", pnginfo=info)
    for name, marked in (("edited.png", True), (str(row["file_name"]), False)):
        for form in ("png", "webp"):
            target = tmp_path / f"pasted.{form}"
            paste_file(tmp_path / name, out, photos / "one.png", target)
            pasted = Image.open(target)
            assert np.array_equal(np.array(pasted.getchannel("A")), np.array(source.getchannel("A")))
            assert "icc_profile" not in pasted.info  # the pixels are sRGB
            packet = pasted.info.get(XMP_KEY) or pasted.info.get("xmp") or b""
            text = packet.decode() if isinstance(packet, bytes) else packet
            assert (COMPOSITE in text) == marked


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_paste_keeps_transparent_pixels(photos, tmp_path, mode):
    """Outside the square every value stays, also of pixels that are partly transparent."""
    source = Image.open(photos / "one.png").convert("RGB")
    if mode == "RGBA":
        source.putalpha(Image.linear_gradient("L").resize(source.size).point(lambda value: min(255, 12 * value)))
        source.save(photos / "one.png")
    else:
        source.putpixel((0, 0), (1, 2, 3))
        source = source.quantize(dither=Image.Dither.NONE) if mode == "P" else source
        source.save(photos / "one.png", transparency=source.getpixel((0, 0)))
    out = tmp_path / "out"
    align(photos, out)
    (row,) = (row for row in read_folder(out) if row["aligned"]["photo"] == "one.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    paste_file(tmp_path / "red.png", out, photos / "one.png", tmp_path / "pasted.png", face=row["file_name"].name)
    before, after = (
        np.array(Image.open(path).convert("RGBA")) for path in (photos / "one.png", tmp_path / "pasted.png")
    )
    assert np.array_equal(before[..., 3], after[..., 3])
    changed = (before != after).any(axis=-1)
    assert changed.any()
    assert not changed[[0, -1]].any()
    assert not changed[:, [0, -1]].any()


def test_shards_reject_options_without_effect(photos, tmp_path, capsys):
    for option in (("--limit", 2), ("--split", "none"), ("--crop",), ("--format", "folder")):
        command = ("prepare", "shards", photos, tmp_path / "out", "--align", "--landmarker", photos / "one.png")
        assert run(*command, *option) == 2
        assert f"{option[0]} has no effect on photos that --align cuts" in capsys.readouterr().err


def test_extract(photos, tmp_path, capsys):
    """A photograph in place of a mask names the command that makes its conditions."""
    photo = photos / "square.png"
    face = draw_face(0, 0, 128).image.astype(np.int16) + np.random.default_rng(0).integers(-9, 9, (128, 128, 3))
    Image.fromarray(face.clip(0, 255).astype(np.uint8)).save(photo)
    assert run("inspect", photo) == 2
    assert f"`likeness extract {photo} --out DIR` makes its mask" in capsys.readouterr().err
    assert run("extract", photo, "--out", tmp_path / "made", "--size", 64) == 0
    made = [tmp_path / "made" / name for name in ("square.png", "square_mask.png", "square_sketch.png")]
    assert capsys.readouterr().out.split() == list(map(str, made))
    assert CONDITIONS["mask"].read(made[1]).raw.shape == (64, 64)
    for arguments, said in (
        ((photos / "one.png", "--out", tmp_path / "made"), "is 600x400, not a square portrait: pass --landmarker"),
        ((photo, "--out", photos), "is the photograph itself: choose another folder"),
        ((photos / "none.png", "--out", tmp_path), "none.png"),
        ((photo, "--out", tmp_path, "--size", 10**6), "size must be from 32 to 4096 pixels, not 1000000"),
    ):
        assert run("extract", *arguments) == 2
        assert said in capsys.readouterr().err


# MediaPipe, if its model is available


@pytest.mark.skipif(not MODEL.is_file() or not FACES.is_dir(), reason="LIKENESS_SHARED has no landmarker or no faces")
def test_photographs_with_the_command(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    names = sorted(FACES.iterdir())[:3]
    canvas = Image.new("RGB", (900, 700), (120, 120, 120))
    for number, path in enumerate(names):
        face = Image.open(path).convert("RGB").resize((260, 260)).rotate(15 * (number - 1), Image.Resampling.BICUBIC)
        one = canvas.copy()
        one.paste(face, (100 + 200 * number, 200))
        one.save(photos / f"{number}.png")
    canvas.save(photos / "empty.png")
    arguments = ["prepare", "align", str(photos), str(out), "--landmarker", str(MODEL), "--size", "128"]
    arguments += ["--held-out", "0"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "3 portraits" in printed.out
    assert printed.err == "1 photo without a face: empty.png\n"
    tilts = []
    for row in read_folder(out):
        transform = np.array(row["aligned"]["transform"])
        tilts.append(np.degrees(np.arctan2(transform[1, 0], transform[0, 0])))
        # CelebA-HQ has this framing: the square around the face is the pasted image
        assert 1 / np.hypot(*transform[:, 0]) * 128 == pytest.approx(260, rel=0.12)
    for name, way in (("0.png", ("--landmarker", MODEL)), ("face.png", ())):
        Image.open(names[0]).save(photos / "face.png")
        assert run("extract", photos / name, "--out", tmp_path / "made", "--size", 128, *way) == 0
        files = [Path(line) for line in capsys.readouterr().out.splitlines()]
        stem = name.removesuffix(".png")
        made = [f"{stem}.png", f"{stem}_mask.png", f"{stem}_sketch.png", f"{stem}_keypoints.json"]
        assert [file.name for file in files] == made[: 4 if way else 3]
        for condition, file in zip(("mask", "sketch", "keypoints"), files[1:], strict=False):
            assert CONDITIONS[condition].read(file) is not None
    assert (
        np.abs(np.array(tilts) - [15, 0, -15][: len(tilts)]).max() < 5
        or np.abs(np.array(tilts) - [-15, 0, 15][: len(tilts)]).max() < 5
    )
