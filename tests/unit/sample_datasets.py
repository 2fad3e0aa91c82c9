"""Small datasets in every format that can be ingested. All synthetic faces have the same mask and sketch."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from drawn import drawn_mask, drawn_points, drawn_sketch
from PIL import Image

from likeness.conditions.mask import mask_image
from likeness.conditions.mask.classes import CLASSES, PALETTE
from likeness.prepare.caption.grammar import ATTRIBUTES

SIDE = 64
FILES = {"ear_r": "earring", "neck_l": "necklace"}


def image(index: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A synthetic face in the colors of its classes; the lighting depends on the index."""
    light = Image.fromarray(np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    face = Image.fromarray(PALETTE[drawn_mask(SIDE)])
    return Image.blend(face, light.resize(face.size, Image.Resampling.BILINEAR), 0.6).resize(size)


def mask() -> Image.Image:
    return mask_image(drawn_mask(SIDE))


def sketch() -> Image.Image:
    return Image.fromarray(drawn_sketch(SIDE))


def points() -> dict[str, object]:
    return {"points": (drawn_points() * SIDE).round(2).tolist(), "size": [SIDE, SIDE]}


def content(source: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, format)
    return buffer.getvalue()


def put(root: Path, name: str, what: Image.Image | str | bytes | dict) -> None:
    """Write a file below `root`."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, Image.Image):
        what.save(path)
    elif isinstance(what, bytes):
        path.write_bytes(what)
    else:
        path.write_text(what if isinstance(what, str) else json.dumps(what))


def attribute_list(names: list[str]) -> str:
    rng = np.random.default_rng(0)
    rows = [f"{name} " + " ".join(rng.choice(["1", "-1"], len(ATTRIBUTES))) for name in names]
    return "\n".join([str(len(names)), " ".join(ATTRIBUTES), *rows]) + "\n"


def celeba(root: Path, count: int = 12) -> None:
    """Two faces per identity."""
    names = [f"{index + 1:06d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        put(root, f"img_align_celeba/{name}", image(index, (178, 218)))
    put(root, "list_attr_celeba.txt", attribute_list(names))
    put(root, "identity_CelebA.txt", "".join(f"{name} {index // 2}\n" for index, name in enumerate(names)))


def celeba_hq(root: Path, count: int = 4) -> None:
    """CelebAMask-HQ: images, part files, attributes, the mapping to CelebA."""
    parts = dict(enumerate(CLASSES))
    parts |= {CLASSES.index(ours): theirs for theirs, ours in FILES.items()}
    labels = drawn_mask(SIDE)
    for index in range(count):
        put(root, f"CelebA-HQ-img/{index}.jpg", image(index, (2 * SIDE, 2 * SIDE)))
        for label in np.unique(labels)[1:]:
            part = Image.fromarray(np.where(labels == label, 255, 0).astype(np.uint8)).convert("RGB")
            put(root, f"CelebAMask-HQ-mask-anno/{index % 2}/{index:05d}_{parts[int(label)]}.png", part)
    put(root, "CelebAMask-HQ-attribute-anno.txt", attribute_list([f"{index}.jpg" for index in range(count)]))
    originals = [100, 162771, 182637, 182638]
    lines = [f"{index} {originals[index] - 1} {originals[index]:06d}.jpg" for index in range(count)]
    put(root, "CelebA-HQ-to-CelebA-mapping.txt", "\n".join(["idx orig_idx orig_file", *lines]))


def celebamask(root: Path, count: int = 4) -> None:
    """CelebAMask-HQ with palette masks."""
    for index in range(count):
        put(root, f"images/{index}.jpg", image(index))
        put(root, f"masks/{index}.png", mask())


def mm_celeba(root: Path, count: int = 4) -> None:
    for index in range(count):
        put(root, f"image/images/{index}.jpg", image(index))
        put(root, f"label/{index}.png", mask())
        put(root, f"sketch/sketch/{index:05d}.png", sketch())
        put(root, f"text/celeba-caption/{index}.txt", f"This is face {index}.\n She smiles. \n\n")
    put(root, "train/filenames.pickle", pickle.dumps([str(index) for index in range(count - 2)], protocol=0))
    put(root, "test/filenames.pickle", pickle.dumps([f"{count - 2}.jpg"], protocol=2))


def ffhq(root: Path, count: int = 3) -> None:
    metadata = {}
    for index in range(count):
        put(root, f"images1024x1024/{index // 2 * 1000:05d}/{index:05d}.png", image(index))
        metadata[str(index)] = {
            "category": "training" if index < 2 else "validation",
            "metadata": {"photo_url": f"photo {index}", "author": "A. Nobody", "license": "CC BY 2.0", "country": ""},
            "image": {"pixel_size": [1024, 1024], "face_landmarks": (drawn_points() * 1024).tolist()},
        }
    put(root, "ffhq-dataset-v2.json", json.dumps(metadata, indent=1))


def face_mogle(root: Path) -> None:
    """Unpacked release: numbers on both sides of the split."""
    texts = {}
    for index in (0, 1, 26999, 27000):
        put(root, f"face/{index}.jpg", image(index))
        put(root, f"mask/{index}.png", mask())
        put(root, f"text/{index}.txt", f"face {index}\nsmiling\n")
        texts[f"{index}.jpg"] = [f"face {index}", "smiling"]
    put(root, "text.json", texts)


def mmface_dit(root: Path) -> None:
    for split, index in (("train", 0), ("train", 1), ("test", 2)):
        put(root, f"Celeb_Dataset/Celeb_Final/{split}/images/{index}.jpg", image(index))
        put(root, f"Celeb_Dataset/Celeb_Final/{split}/masks/{index}.png", Image.fromarray(PALETTE[drawn_mask(SIDE)]))
        put(root, f"Celeb_Dataset/Celeb_Final/{split}/sketches/{index}.png", sketch())
        put(root, f"Celeb_Captions_Final/{index}.txt", f"face {index}\n")
    put(root, "FFHQ/images1024x1024/00000/00000.png", image(9))
    put(root, "FFHQ/Masks_Colored_1024/00000.png", Image.fromarray(PALETTE[drawn_mask(SIDE)]))
    put(root, "FFHQ/sketches/00000.png", sketch())
    put(root, "FFHQ_Captions_Final/00000.txt", "a face of FFHQ\n")


def folder(root: Path) -> None:
    for index in range(3):
        put(root, f"{index}.jpg", image(index))
    put(root, "0.txt", "the first face\n")


def imagefolder(root: Path) -> None:
    rows = {"train": [], "test": []}
    for split, index in (("train", 0), ("train", 1), ("test", 2)):
        put(root, f"{split}/images/{index}.png", image(index))
        put(root, f"{split}/masks/{index}.png", mask())
        put(root, f"{split}/sketches/{index}.png", sketch())
        put(root, f"{split}/keypoints/{index}.json", points())
        row = {"file_name": f"images/{index}.png", "mask_file_name": f"masks/{index}.png"}
        row |= {"sketch_file_name": f"sketches/{index}.png", "keypoints_file_name": f"keypoints/{index}.json"}
        row |= {"text": [f"face {index}", "smiling"], "attributes": {"Smiling": True}, "identity": str(index)}
        rows[split].append({**row, "camera": "drawn", "year": 2020 + index})
    rows["train"][1] |= {"text": "a single caption"}
    del rows["train"][0]["sketch_file_name"], rows["test"][0]["keypoints_file_name"]
    for split, found in rows.items():
        put(root, f"{split}/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def parquet(root: Path) -> None:
    """Parquet files as `datasets` writes them."""
    import pyarrow
    import pyarrow.parquet

    for split, numbers in (("train", range(20)), ("test", range(20, 22))):
        table = pyarrow.Table.from_pylist(
            [
                {
                    "image": {"bytes": content(image(index)), "path": None if index == 1 else f"{index}.png"},
                    "mask": {"bytes": content(mask()), "path": None} if index else None,
                    "text": f"face {index}",
                }
                for index in numbers
            ]
        )
        (root / "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet", row_group_size=7)


def webdataset(root: Path) -> None:
    """Shards as img2dataset writes them, with masks."""
    root.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(3)), ("test", range(3, 4))):
        with tarfile.open(root / f"{split}-000000.tar", "w") as archive:
            for index in numbers:
                files = {"jpg": content(image(index), "JPEG"), "txt": f"face {index}".encode()}
                files |= {"json": json.dumps({"caption": f"face {index}", "url": "drawn"}).encode()}
                files |= {"mask.png": content(mask())}
                for kind, data in files.items():
                    info = tarfile.TarInfo(f"{index:09d}.{kind}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def pack(folder: Path, archive: Path, prefix: str = "") -> Path:
    """A zip archive of a folder's files."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, prefix + path.relative_to(folder).as_posix())
    return archive
