"""Pack prepared folders of faces into small zip archives, to carry them to a machine without a network.

    python tools/pack_faces.py OUT FOLDER... [--megabytes 14] [--limit 10000] [--size 128] [--quality 75]

Every archive is a prepared folder: WebP of SIZE px, masks as palette PNG, keypoints as float16, captions.
Sketches are left out: `likeness prepare annotate` extracts them again. A face takes about 5 kB.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, read_folder, read_photo
from likeness.files import write_whole


def files_of(row: dict, size: int, quality: int) -> dict[str, tuple[str, bytes]]:
    """Return column -> (name, content) of a row's files."""
    stem, photo = row["file_name"].stem, io.BytesIO()
    Image.fromarray(read_photo(row["file_name"], size)).save(photo, "WEBP", quality=quality, method=6)
    files = {"file_name": (f"images/{stem}.webp", photo.getvalue())}
    if (column := column_of("mask")) in row:
        mask = CONDITIONS["mask"]
        labels = mask.resize(mask.read(row[column]).raw, size, size)
        files[column] = (f"masks/{stem}.png", mask.encode(labels))
    if (column := column_of("keypoints")) in row:
        points = io.BytesIO()
        np.save(points, CONDITIONS["keypoints"].read(row[column]).raw.astype(np.float16))
        files[column] = (f"keypoints/{stem}.npy", points.getvalue())
    return files


def main() -> None:
    """Write the archives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=float, default=14)
    parser.add_argument("--limit", type=int, default=10_000, help="number of faces, evenly spaced")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--quality", type=int, default=75)
    options = parser.parse_args()
    rows = [row for folder in options.folders for row in read_folder(folder)]
    rows = rows[:: -(-len(rows) // options.limit)]
    archive, lines, buffer, number = None, [], io.BytesIO(), 0

    def close() -> None:
        nonlocal archive, number
        if archive is None:
            return
        archive.writestr("metadata.jsonl", "\n".join(lines) + "\n")
        archive.close()
        number += 1
        write_whole(options.out / f"faces-{number}.zip", buffer.getvalue())
        print(options.out / f"faces-{number}.zip", f"{len(lines)} faces, {buffer.tell() / 1e6:.1f} MB", flush=True)
        archive = None

    for row in rows:
        if archive is None:
            lines, buffer = [], io.BytesIO()
            archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9)
        files = files_of(row, options.size, options.quality)
        for name, content in files.values():
            archive.writestr(name, content)
        names = {column: name for column, (name, _) in files.items()}
        lines.append(json.dumps({**names, "text": captions_of(row)}))
        if buffer.tell() + 0.25 * sum(map(len, lines)) > 1e6 * options.megabytes - 2**16:
            close()
    close()


if __name__ == "__main__":
    main()
