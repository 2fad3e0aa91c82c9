"""The check of a prepared folder reports and fixes all injected faults and nothing else; contact sheets."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import builders
from likeness.conditions import CONDITIONS
from likeness.conditions.keypoints import FLIPS
from likeness.conditions.mask import swap_classes
from likeness.conditions.mask.classes import CLASSES, FLIP_PAIRS, PALETTE, order_table
from likeness.data.folder import ORIGINALS, read_folder
from likeness.data.synthetic import draw_face
from likeness.prepare.check import check_folder
from likeness.prepare.contact_sheet import COLUMNS
from likeness.prepare.fix import FIX_LIST, KINDS, apply_fixes, fix_captions
from likeness.prepare.near_duplicates import first_duplicates, image_hash
from likeness.types import InputError

SIZE, DRAWN = 64, 19
LONG = "a woman with " + ", ".join(f"thing {'abcdefghij'[n % 10]}" for n in range(40))
GOOD = "a woman with brown hair, smiling"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Synthetic faces and their mirror images, all with different identities: 6 in `test`, 32 in `train`."""
    root = tmp_path_factory.mktemp("check") / "faces"
    rows: dict[str, list[dict[str, Any]]] = {"test": [], "train": []}
    for index in range(2 * DRAWN):
        face, mirrored = draw_face(0, index // 2, SIZE), index % 2 == 1
        split = "test" if index < 6 else "train"
        raw = {"mask": face.mask, "sketch": face.sketch, "keypoints": face.keypoints}
        if mirrored:
            raw = {name: CONDITIONS[name].flip(values) for name, values in raw.items()}
        row = {"file_name": f"images/{index:03d}.png", "text": [GOOD, *face.captions[:2]], "identity": str(index)}
        row |= {f"{name}_file_name": f"{name}/{index:03d}.png" for name in ("mask", "sketch")}
        row["keypoints_file_name"] = f"keypoints/{index:03d}.json"
        for column in row:
            if column.endswith("file_name"):
                (root / split / row[column]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face.image[:, ::-1] if mirrored else face.image).save(root / split / row["file_name"])
        save_mask(root / split / row["mask_file_name"], raw["mask"])
        Image.fromarray(raw["sketch"]).save(root / split / row["sketch_file_name"])
        (root / split / row["keypoints_file_name"]).write_text(json.dumps({"points": raw["keypoints"].tolist()}))
        rows[split].append(row)
    for split, lines in rows.items():
        (root / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return root


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "faces"))


def save_mask(path: Path, labels: np.ndarray) -> None:
    image = Image.fromarray(labels)
    image.putpalette(PALETTE.tobytes())
    image.save(path)


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*arguments: object) -> int:
    return builders.run("prepare", "check", *arguments)


# Faults. An injection changes the file of its column.

Injection = Callable[[Path], Any]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path: Path) -> None:
    """Claim 60,000 x 60,000 pixels."""
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def pixels(change: Callable[[np.ndarray], np.ndarray]) -> Injection:
    """Change the array of an image, or the indices of a palette image."""
    return lambda path: Image.fromarray(np.ascontiguousarray(change(np.asarray(Image.open(path))))).save(path)


def smooth(image: Image.Image) -> Image.Image:
    return image.resize((3 * SIZE // 2, 3 * SIZE // 2), Image.Resampling.BILINEAR)


def points(change: Callable[[np.ndarray], np.ndarray]) -> Injection:
    def inject(path: Path) -> None:
        values = np.array(json.loads(path.read_text())["points"])
        path.write_text(json.dumps({"points": change(values).tolist()}))

    return inject


NUMBERS_OF_OTHERS = np.argsort(order_table("BiSeNet")).astype(np.uint8)
STRANGE = np.random.default_rng(0).integers(60, 200, (len(CLASSES), 3)).astype(np.uint8)

IMAGE_FAULTS: list[tuple[str, Injection]] = [
    ("missing-file", Path.unlink),
    ("corrupt-file", truncate),
    ("corrupt-file", bomb),
    ("corrupt-file", lambda path: path.write_bytes(b"")),
    ("blank", pixels(lambda rgb: np.full_like(rgb, 7))),
    ("wrong-size", pixels(lambda rgb: rgb[::2, ::2])),
]

FAULTS: dict[str, list[tuple[str, Injection]]] = {
    "mask_file_name": [
        ("missing-file", Path.unlink),
        ("corrupt-file", truncate),
        ("blank", pixels(np.zeros_like)),
        ("wrong-size", pixels(lambda labels: np.pad(labels, ((0, 0), (12, 12))))),
        ("color-order", pixels(lambda labels: PALETTE[labels][..., ::-1])),
        ("off-palette", pixels(lambda labels: STRANGE[labels])),
        ("off-palette", pixels(lambda labels: labels * 13)),
        ("class-order", pixels(lambda labels: NUMBERS_OF_OTHERS[labels])),
        ("blended-labels", lambda path: smooth(Image.open(path).convert("RGB")).save(path)),
        ("blended-labels", lambda path: smooth(Image.fromarray(labels_of(path))).save(path)),
        ("swapped-sides", lambda path: save_mask(path, swap_classes(labels_of(path), FLIP_PAIRS))),
    ],
    "sketch_file_name": [
        ("missing-file", Path.unlink),
        ("corrupt-file", lambda path: path.write_text("not an image")),
        ("blank", pixels(lambda lines: np.full_like(lines, 255))),
        ("wrong-size", pixels(lambda lines: lines[4:-4])),
        ("inverted-sketch", pixels(lambda lines: 255 - lines)),
        ("no-sketch", lambda path: shutil.copy(path.parents[1] / "images" / path.name, path)),
        ("no-sketch", lambda path: Image.open(path.parents[1] / "mask" / "029.png").convert("RGB").save(path)),
    ],
    "keypoints_file_name": [
        ("missing-file", Path.unlink),
        ("corrupt-file", lambda path: path.write_text('{"points": [[1, 2]')),
        ("corrupt-file", points(lambda p: p[:50])),
        ("swapped-sides", points(lambda p: p[FLIPS[68]])),
        ("misplaced-keypoints", points(lambda p: p * 0.5)),
        ("misplaced-keypoints", points(lambda p: p[:, ::-1])),
        ("shared-condition", lambda path: shutil.copy(path.with_name("006.json"), path)),
        ("undetected-points", points(lambda p: np.concatenate([0 * p[:1], p[1:]]))),
    ],
}  # fmt: skip
"""Column -> (kind, injection)."""

TEXTS: list[tuple[str, Any]] = [
    ("empty-caption", ""),
    ("empty-caption", []),
    ("empty-caption", [GOOD, " "]),
    ("long-caption", [LONG, GOOD]),
    ("garbled-caption", "a woman with a tiara, na\u00c3\u00afve smile"),
    ("garbled-caption", [GOOD, "a man with a gr\ufffdy beard"]),
    ("broken-row", [7, GOOD]),
    ("broken-row", {"caption": GOOD}),
]
"""(kind, `text`)."""

Place = tuple[str, int, str, str]


def inject_faults(folder: Path) -> set[Place]:
    """Inject every fault; returns (split, line, column, kind) of each."""
    root, injected = folder / "train", set()
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    starts = {"mask_file_name": 1, "sketch_file_name": 1, "keypoints_file_name": 24}
    for column, faults in FAULTS.items():
        for number, (kind, inject) in enumerate(faults, start=starts[column]):
            inject(root / rows[number][column])
            injected.add(("train", number + 1, column, kind))
    for number, (kind, text) in enumerate(TEXTS, start=1):
        rows[number]["text"] = text
        injected.add(("train", number + 1, "text", kind))
    for number, (kind, inject) in enumerate(IMAGE_FAULTS, start=12):
        inject(root / rows[number]["file_name"])
        injected.add(("train", number + 1, "file_name", kind))

    def row(number: int, column: str, kind: str, **changes: Any) -> None:
        rows[number] |= changes
        injected.add(("train", number + 1, column, kind))

    (root / rows[19].pop("sketch_file_name")).unlink()
    row(19, "sketch_file_name", "broken-row", sketch_file_name=7)
    (root / rows[23]["sketch_file_name"]).unlink()
    rows[23] |= {"sketch_file_name": None, "text": None}  # null counts as absent
    row(20, "identity", "leak", identity="2")
    for at, name in ((21, "file_name"), (22, "mask_file_name")):
        source = root / rows[at][name]
        source.rename(folder / source.name)
        row(at, name, "broken-row", **{name: f"../{source.name}"})

    shutil.copy(folder / "test" / "images" / "001.png", root / "images" / "leaking.png")
    Image.open(root / rows[0]["file_name"]).convert("RGB").resize((80, 80)).save(
        root / "images" / "near.jpg", quality=40
    )
    shutil.copy(root / rows[5]["file_name"], root / "images" / "same.png")
    added = [
        ("file_name", "leak", {"file_name": "images/leaking.png", "text": GOOD}),
        ("file_name", "duplicate", {"file_name": "images/near.jpg"}),
        ("file_name", "duplicate", {"file_name": "images/same.png"}),
        ("file_name", "duplicate", {"file_name": rows[6]["file_name"]}),
        ("", "broken-row", {"text": GOOD}),
        ("", "broken-row", ["images/000.png"]),
    ]
    for column, kind, values in added:
        rows.append(values)
        injected.add(("train", len(rows), column, kind))
    lines = [json.dumps(values) for values in rows]
    lines += ['{"file_name": "images/0', b"\xff\xfe\x00".decode("latin-1")]
    injected |= {("train", len(lines) - 1, "", "broken-row"), ("train", len(lines), "", "broken-row")}
    (root / "metadata.jsonl").write_bytes(b"\n".join(line.encode("latin-1") for line in lines))

    pixels(lambda rgb: rgb[8:-8])(folder / "test" / "images" / "004.png")
    injected.add(("test", 5, "file_name", "wrong-size"))
    injected |= {("test", 5, f"{name}_file_name", "wrong-size") for name in ("mask", "sketch")}
    shutil.copy(folder / "test" / "mask" / "003.png", folder / "test" / "mask" / "nobody.png")
    injected.add(("test", 0, "", "unlisted-file"))
    return injected


def places(findings) -> list[Place]:
    return sorted((found.split, found.line, found.column, found.kind) for found in findings)


def test_a_clean_folder_has_no_faults(clean, capsys):
    steps = []
    before = files(clean)
    checked = check_folder(clean, lambda done, total: steps.append((done, total)))
    assert (checked.rows, checked.findings) == (2 * DRAWN, [])
    assert steps[-1] == (2 * DRAWN, 2 * DRAWN)
    assert run(clean) == 0
    assert capsys.readouterr().out == f"rows: {2 * DRAWN}, no faults\n"
    assert run(clean / "train") == 0  # a single split
    assert files(clean) == before


def test_all_injected_faults_and_nothing_else(folder, capsys):
    injected = inject_faults(folder)
    assert {kind for *_, kind in injected} == set(KINDS)
    assert len(KINDS) == 21
    before = files(folder)
    checked = check_folder(folder)
    assert places(checked.findings) == sorted(injected)
    assert files(folder) == before

    # the command prints a table, writes the list and exits with 1
    assert run(folder) == 1
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
    listed = [json.loads(line) for line in (folder / FIX_LIST).read_text().splitlines()]
    assert [found["kind"] for found in listed] == [found.kind for found in checked.findings]
    assert files(folder).keys() - before.keys() == {FIX_LIST}

    # --apply fixes what it can, leaves the rest unchanged and keeps the originals
    left = sorted((found.file_name, found.column, found.kind) for found in checked.findings if found.fix is None)
    assert run(folder, "--apply") == 1
    again = check_folder(folder).findings
    assert sorted((found.file_name, found.column, found.kind) for found in again) == left
    assert all(found.fix is None for found in again)
    after = files(folder)
    for name, content in before.items():
        assert content in (after.get(name), after.get(f"{ORIGINALS}/{name}")), name
    assert len(read_folder(folder)) == 32 - 5 - 2  # 5 images missing, corrupt or blank, one outside, one known identity

    # --apply again changes nothing
    assert run(folder, "--apply") == 1
    assert files(folder) == after


@pytest.mark.parametrize(("swapped", "found"), [(1, 0), (2 * DRAWN, 1)])
def test_swapped_colors_of_most_images(folder, swapped, found):
    for path in sorted(folder.glob("*/images/*.png"))[:swapped]:
        pixels(lambda rgb: rgb[..., ::-1])(path)
    assert [(finding.kind, finding.fix) for finding in check_folder(folder).findings] == [("color-order", None)] * found


def test_fixed_files_are_correct(folder):
    clean = {name: labels_of(folder / "train" / "mask" / f"{name}.png") for name in ("006", "007", "008")}
    sketch = labels_of(folder / "train" / "sketch" / "009.png")
    root = folder / "train" / "mask"
    save_mask(root / "006.png", swap_classes(clean["006"], FLIP_PAIRS))
    Image.fromarray(PALETTE[clean["007"]][..., ::-1]).save(root / "007.png")
    Image.fromarray(NUMBERS_OF_OTHERS[clean["008"]]).save(root / "008.bmp")
    (root / "008.png").unlink()
    Image.fromarray(255 - sketch).save(folder / "train" / "sketch" / "009.png")
    metadata = folder / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("mask/008.png", "mask/008.bmp"))
    assert apply_fixes(folder, check_folder(folder).findings) == {"rewrite": 4}
    assert check_folder(folder).findings == []
    rows = read_folder(folder)
    for row in rows[:3]:
        np.testing.assert_array_equal(labels_of(row["mask_file_name"]), clean[row["file_name"].stem])
    assert rows[2]["mask_file_name"].name == "008.bmp.png"
    assert (folder / ORIGINALS / "train" / "mask" / "008.bmp").is_file()
    np.testing.assert_array_equal(labels_of(rows[3]["sketch_file_name"]), sketch)


def test_fix_list_can_be_edited_and_must_be_current(folder, capsys):
    metadata = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[0]["text"], rows[1]["text"] = LONG, ["", GOOD]
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder) == 1
    listed = (folder / FIX_LIST).read_text().splitlines()
    (folder / FIX_LIST).write_text(listed[1] + "\n\n")
    for arguments in ((), ("--apply",), (), ("--apply",)):  # the long caption was deleted from the list
        assert run(folder, *arguments) == 1
    assert "fixes.jsonl excludes 1 fixes: delete it" in capsys.readouterr().err
    now = [json.loads(line)["text"] for line in metadata.read_text().splitlines()]
    assert now[:2] == [LONG, [GOOD]]
    assert (folder / ORIGINALS / "train" / "metadata.jsonl").is_file()

    metadata.write_text(metadata.read_text() + "\n" + json.dumps(rows[2]) + "\n")
    before = files(folder)
    assert run(folder, "--apply") == 2
    assert "has changed since" in capsys.readouterr().err
    (folder / FIX_LIST).write_text("[1]\n")
    assert run(folder, "--apply") == 2
    assert "line 1 is not a line of a fix list" in capsys.readouterr().err
    (folder / FIX_LIST).unlink()
    assert run(folder, "--apply") == 0  # without a list, it checks first
    assert not (folder / FIX_LIST).exists()
    assert files(folder)["train/metadata.jsonl"] != before["train/metadata.jsonl"]


def test_fix_list_cannot_lead_outside(folder, tmp_path, capsys):
    """A data set may bring its own fix list, links and paths: nothing outside it is moved or changed."""
    root, other = folder / "train", Path(shutil.copytree(folder, tmp_path / "other"))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    metadata = root / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[0]["mask_file_name"], rows[1]["mask_file_name"] = str(secret), "../../secret.txt"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "images" / "012.png").write_bytes(b"broken")
    shutil.copytree(folder, tmp_path / "copy")
    listed = [asdict(found) for found in check_folder(folder).findings]
    before, state = files(other), check_folder(folder).state
    own = listed[0] | {"kind": "blank"}, listed[0] | {"split": "../other/train"}, listed[0] | {"fix": "drop-row"}
    invented = [*own, listed[-1] | {"line": 5, "file_name": rows[4]["file_name"]}]
    (folder / FIX_LIST).write_text("".join(json.dumps(found | {"metadata": state}) + "\n" for found in invented))
    assert run(folder, "--apply") == 1
    assert files(folder).keys() == files(tmp_path / "copy").keys() | {FIX_LIST}  # no finding was confirmed
    (folder / FIX_LIST).unlink()
    (folder / ORIGINALS).symlink_to(other)
    assert run(folder, "--apply") == 2
    assert "points outside the folder" in capsys.readouterr().err
    (folder / ORIGINALS).unlink()
    assert run(folder, "--apply") == 1  # masks that no row names any more
    assert (secret.read_text(), files(other)) == ("secret", before)
    assert not (root / "images" / "012.png").exists()
    assert sum("mask_file_name" in row for row in read_folder(folder)) == len(rows) - 3

    shutil.rmtree(root)
    root.symlink_to(other / "train")  # its metadata would be rewritten
    assert run(folder, "--apply") == 2
    assert "is a link that leads outside" in capsys.readouterr().err
    assert files(other) == before


def test_splits_that_are_links_inside_the_folder(folder):
    before = {(found.kind, found.file_name) for found in check_folder(folder).findings}
    shutil.move(folder / "train", folder / "versions" / "2")
    (folder / "train").symlink_to("versions/2")
    assert {(found.kind, found.file_name) for found in check_folder(folder).findings} == before


def test_interrupted_fix_can_be_completed(folder):
    root = folder / "train"
    (root / "images" / "010.png").write_bytes(b"broken")
    save_mask(root / "mask" / "011.png", swap_classes(labels_of(root / "mask" / "011.png"), FLIP_PAIRS))
    findings = check_folder(folder).findings
    metadata = (root / "metadata.jsonl").read_bytes()
    obstacle = folder / ORIGINALS / "train" / "metadata.jsonl"
    obstacle.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot fix"):
        apply_fixes(folder, findings)
    assert (root / "metadata.jsonl").read_bytes() == metadata  # written last
    obstacle.rmdir()
    assert apply_fixes(folder, findings) == {"drop-row": 1, "rewrite": 1}
    assert check_folder(folder).findings == []
    assert len(read_folder(folder)) == 31
    assert sorted(path.name for path in (folder / ORIGINALS).rglob("*.*")) == [
        "010.json", "010.png", "010.png", "010.png", "011.png", "metadata.jsonl",
    ]  # fmt: skip


def test_unusable_input(folder, tmp_path, capsys):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert run(tmp_path / "empty") == 2
    assert "has no metadata.jsonl" in capsys.readouterr().err
    (tmp_path / "empty" / "train" / "metadata.jsonl").write_text("\n")
    assert run(tmp_path / "empty") == 2
    assert "has no rows" in capsys.readouterr().err
    assert run(folder, "--sheet", tmp_path / "sheet.pdf") == 2
    assert "use the suffix .html" in capsys.readouterr().err
    assert run(folder, "--sheet", tmp_path / "sheet.html", "--count", 0) == 2
    (folder / "train" / "images" / "010.png").unlink()
    (folder / FIX_LIST).mkdir()  # the list cannot be written
    assert run(folder) == 2
    printed = capsys.readouterr()
    assert "cannot write" in printed.err
    assert "missing-file" in printed.out


def test_near_duplicates(clean):
    images = [Image.open(path).convert("RGB") for path in sorted(clean.glob("*/images/*.png"))]
    alone = b"".join(map(image_hash, images))
    np.testing.assert_array_equal(first_duplicates(alone), np.arange(len(images)))
    changes = {
        "half the size": lambda image: image.resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS),
        "lighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        "grey": lambda image: image.convert("L"),
        "itself": lambda image: image,
    }
    for name, change in changes.items():
        both = alone + b"".join(image_hash(change(image)) for image in images)
        np.testing.assert_array_equal(first_duplicates(both)[len(images) :], np.arange(len(images)), err_msg=name)
    assert first_duplicates(b"").tolist() == []


def test_bands_find_every_near_pair():
    """Search by bands against all pairs."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (40, 320), dtype=np.uint8)
    near = base.copy()
    for row in near:
        row[rng.choice(64, 6, replace=False)] ^= 1
        row[64 + rng.choice(256, 40, replace=False)] ^= 1
    far = base.copy()
    far[:, 64 + np.arange(41)] ^= 1
    bits = np.concatenate([base, near, far])
    wanted = [*range(40), *range(40), *range(80, 120)]
    assert first_duplicates(np.packbits(bits, axis=1).tobytes()).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "fixed", "kinds"),
    [
        (GOOD, GOOD, []),
        ([GOOD, "un caf\u00e9, s'il vous pla\u00eet"], [GOOD, "un caf\u00e9, s'il vous pla\u00eet"], []),
        ("\u4e00\u4f4d\u5973\u58eb", "\u4e00\u4f4d\u5973\u58eb", []),
        ("na\u00c3\u00afve", "na\u00efve", ["garbled-caption"]),
        ("half a surrogate pair \ud800", None, ["garbled-caption"]),
        (" ".join(["word"] * 75), " ".join(["word"] * 75), []),
        (" ".join(["word"] * 76), " ".join(["word"] * 75), ["long-caption"]),
        (" ".join(["word"] * 74) + " make-up", " ".join(["word"] * 74), ["long-caption"]),
        ("a." * 60, None, ["long-caption"]),
        (["", 3, GOOD], [GOOD], ["empty-caption", "broken-row"]),
    ],
)
def test_captions(text, fixed, kinds):
    result, faults = fix_captions(text, KINDS)
    assert result == fixed
    assert [kind for kind, _ in faults] == kinds
    assert fix_captions(text, ()) == (text, faults)
    if result is not None:
        assert fix_captions(result, KINDS) == (result, [])


class Links(HTMLParser):
    """Collects everything that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "style")]


def test_contact_sheets(folder, tmp_path, capsys):
    metadata = folder / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[3]["text"] = ["<script src='http://example.com'></script>", ""]
    rows[4]["mask_file_name"] = "../../secret.png"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train" / "sketch" / "012.png").write_bytes(b"broken")
    assert run(folder, "--sheet", tmp_path / "sheet.html", "--count", 6) == 1
    assert capsys.readouterr().out.endswith("sheet.html\n")
    page = (tmp_path / "sheet.html").read_text()
    found = Links()
    found.feed(page)
    assert len(found.sources) == 6 * len(COLUMNS) - 2  # without what cannot be read
    assert all(source.startswith("data:image/webp;base64,") for source in found.sources)
    assert found.tags.isdisjoint({"script", "link", "iframe"})
    assert "url(" not in page
    first = page.index("metadata.jsonl, line")
    assert page[first:].startswith("metadata.jsonl, line 4")  # faulty rows first
    assert page.count('class="fault"') == 3
