"""Measure latent stores: images to shards in one command, stages, throughput of one and two processes, the cost of a
thousand changes of a prepared folder, the result of kills at random moments, and memory by number of rows.

python benchmarks/encode.py                       # all parts, in about ten minutes
python benchmarks/encode.py --parts whole --source CelebA --limit 300     # CelebA's official folder; without: all faces
python benchmarks/encode.py --parts mutations --faces 100 --mutations 1000
python benchmarks/encode.py --parts rows --rows 1000000

Without a source, faces are synthetic. Autoencoder, text encoder and face parser are the bundled ones. The reference of
an entry is the autoencoder's output for that file alone, with a tolerance of 0.02 (latents have a standard deviation of
about 1) for the rounding of batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, each_row, read_folder, read_photo, root_of
from likeness.data.store import IMAGE, Store
from likeness.encoders.components import load_components
from likeness.encoders.latent import LatentCodec, to_tensor
from likeness.prepare.encode import (
    EncodeSettings,
    each_block,
    encode_folder,
    finish,
    hash_files,
    image_of,
    missing_images,
)
from likeness.prepare.synthetic import write_synthetic
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON

SIZE = 64
"""Side length in pixels for correctness; speed is measured at 128."""
COLUMNS = {IMAGE: "file_name", **{name: column_of(name) for name in CONDITIONS}}
CHANGES = ("file_name", "mask_file_name", "sketch_file_name", "touch", "rename", "shuffle", "insert", "duplicate")
CHANGES += ("delete", "caption", "drop", "share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"whole": whole, "stages": stages, "throughput": throughput, "mutations": mutations, "kills": kills}
    parts |= {"rows": million}
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--faces", type=int, default=100)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="changes per update of the store")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--source", type=Path, help="dataset in a format of `likeness prepare ingest`")
    parser.add_argument("--limit", type=int, help="maximum number of faces")
    parser.add_argument("--landmarker", type=Path, help="MediaPipe's face_landmarker.task, for keypoints")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="output folder of the part whole; run again to resume")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            root = Path(folder) / name
            root.mkdir()
            print(f"\n{name}", flush=True)
            parts[name](root, options)


def whole(root: Path, options: argparse.Namespace) -> None:
    """`likeness prepare shards`: time of its stages and peak memory."""
    source = options.source
    if source is None:
        write_synthetic(root / "synthetic", options.faces, 128, seed=0)
        source = root_of(root / "synthetic") / "images"
    faces = options.limit or (options.faces if options.source is None else 10_000)
    held_out = min(1000, faces // 10)
    command = ["prepare", "shards", str(source), str(options.out or root / "out"), "--held-out", str(held_out)]
    for name in ("limit", "landmarker", "precision"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    measured("total", ["-m", "likeness.cli", *command])


def measured(name: str, arguments: list[str]) -> None:
    """Run Python and print wall time, processor time and peak memory."""
    started = time.monotonic()
    _, status, used = os.wait4(subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL).pid, 0)
    assert status == 0
    seconds, memory = time.monotonic() - started, used.ru_maxrss // 1024
    busy = used.ru_utime + used.ru_stime
    print(f"{name}: {seconds:.0f} s, {busy:.0f} s of processor time, peak memory {memory} MB", flush=True)


def stages(root: Path, options: argparse.Namespace) -> None:
    """Seconds of each stage on its own, with one thread."""
    write_synthetic(root / "faces", options.faces, 128, seed=0)
    parts, out, folder = load_components(BUNDLED / COMMON), root / "store", root_of(root / "faces")
    codec = LatentCodec(parts.vae.to(memory_format=torch.channels_last), batched=True)
    settings = EncodeSettings(
        codec=parts.codec_hash, moments=False, size=128, precision="fp32", augmentations=2, text=None
    )
    timed("hashing files", lambda: [hash_files(folder, block, {}) for block in each_block(folder)], options.faces)
    jobs = timed("finding missing entries", lambda: list(missing_images(folder, out, settings, (0, 1))))
    images = timed("reading and rendering", lambda: [image_of(job, 128) for job in jobs], len(jobs))
    for precision in ("fp32", "bf16"):

        def encode(precision: str = precision) -> None:
            for start in range(0, len(images), 64):
                batch = to_tensor(images[start : start + 64]).to(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    codec.moments(batch)

        timed(f"autoencoder, {precision}", encode, len(jobs))
    encode_folder(folder, out, parts, size=128, augmentations=2)
    timed("finishing", lambda: finish(folder, out, settings), options.faces)
    run = lambda: encode_folder(folder, out, parts, size=128, augmentations=2)  # noqa: E731
    timed("the command again, no changes", run, options.faces)


def throughput(root: Path, options: argparse.Namespace) -> None:
    """One process against two, with one thread each, from loaded models to a finished store, each twice in turn. The
    ratio of wall times needs two idle cores; that of processor times shows duplicated work under any load.
    """
    write_synthetic(root / "faces", 6 * options.faces, 128, seed=0)
    context = multiprocessing.get_context("fork")
    rates, busy = {}, {world: context.Value("d") for world in (1, 2)}
    for world in (1, 2, 1, 2):
        out = root / f"store_{world}"
        shutil.rmtree(out, ignore_errors=True)
        barrier = context.Barrier(world + 1)
        workers = [
            forked(encode_share, root / "faces", out, (rank, world), barrier, busy[world]) for rank in range(world)
        ]
        barrier.wait()
        started = time.monotonic()
        for worker in workers:
            worker.join()
        rates.setdefault(world, []).append(len(Store(out)) * 4 / (time.monotonic() - started))
    summary = {world: ", ".join(f"{rate:.1f}" for rate in found) for world, found in rates.items()}
    ratio = sum(rates[2]) / sum(rates[1])
    print(f"images per second, fp32: one process {summary[1]}; two {summary[2]}; ratio {ratio:.2f}", flush=True)
    print(f"processor time: two processes need {busy[2].value / busy[1].value:.3f} of one", flush=True)


def mutations(root: Path, options: argparse.Namespace) -> None:
    """Every kind of change of a folder: encodings made against encodings needed."""
    rng, parts = random.Random(0), load_components(BUNDLED / COMMON)
    faces, out = root / "faces", root / "store"
    write_synthetic(faces, options.faces, SIZE, seed=0)
    encode = lambda: encode_folder(faces, out, parts, size=SIZE, augmentations=2, shard_bytes=2**20)  # noqa: E731
    encode()
    before, wrong, needed, made, counts = contents(faces), 0, 0, 0, dict.fromkeys(CHANGES, 0)
    for start in range(0, options.mutations, options.batch):
        for number in range(start, min(start + options.batch, options.mutations)):
            change = rng.choice(CHANGES)
            counts[change] += 1
            mutate(faces, change, rng, number)
        after = contents(faces)
        found = encode()
        wrong += found["encoded"] != 2 * len(after - before) or found["missing"] != 0
        needed, made = needed + 2 * len(after - before), made + found["encoded"]
        before = after
    bad = wrong_records(faces, out)
    print(", ".join(f"{change} {count}" for change, count in counts.items()))
    print(f"{options.mutations} changes, {options.batch} at a time: {made} encodings, {needed} needed,")
    print(f"  runs with a different number: {wrong}; wrong records at the end: {bad} of {len(Store(out))}")


def kills(root: Path, options: argparse.Namespace) -> None:
    """SIGKILL at random moments of runs that encode a third of the faces again, with one and two processes in turn:
    afterwards the store is that of the last complete run or the new one.
    """
    rng, parts = random.Random(1), load_components(BUNDLED / COMMON)
    faces, out = root / "faces", root / "store"
    write_synthetic(faces, options.faces, SIZE, seed=0)
    folder = root_of(faces)
    encode = lambda process=(0, 1): encode_folder(faces, out, parts, size=SIZE, process=process, shard_bytes=2**16)  # noqa: E731
    encode()
    codec()  # loaded before the first fork
    old = files_of(folder)
    killed = new_ones = bad = 0
    for number in range(options.kills):
        for change in range(options.faces // 3):
            mutate(faces, rng.choice(["file_name", "mask_file_name", "shuffle", "insert"]), rng, 1000 * number + change)
        new = files_of(folder)
        shutil.copytree(out, root / "copy")  # duration of this run, measured on a copy, since the load changes
        started = time.monotonic()
        worker = forked(encode_folder, faces, root / "copy", parts, size=SIZE, shard_bytes=2**16)
        worker.join()
        duration = time.monotonic() - started
        shutil.rmtree(root / "copy")
        world, before = 1 + number % 2, killed
        for worker in [forked(encode, (rank, world)) for rank in range(world)]:
            worker.join(rng.uniform(0, 1.1 * duration))
            if worker.exitcode is None:
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join()
                killed = before + 1
        if wrong_records(faces, out):
            restore(old)
            bad += wrong_records(faces, out)
            restore(new)
        else:
            new_ones, old = new_ones + 1, new
    encode()
    bad += wrong_records(faces, out)
    entries = sum(count for _, count in Store(out).manifest["latents"])
    print(
        f"{killed} of {options.kills} runs of about {duration:.1f} s killed; afterwards {new_ones} were the new store"
    )
    print(
        f"  wrong or missing records: {bad}; at the end {entries} entries for {len(contents(faces))} files",
        flush=True,
    )


def million(root: Path, options: argparse.Namespace) -> None:
    """Peak memory of annotating, encoding and reading a folder of many rows with the files of 100 faces."""
    write_synthetic(root / "faces", 100, SIZE, seed=0)
    path = root_of(root / "faces") / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with path.open("w") as lines:
        for number in range(options.rows):
            row = dict(rows[number % 100])
            row["text"] = [f"{caption}, number {number}" for caption in row["text"]]
            lines.write(json.dumps(row) + "\n")
    size = path.stat().st_size / 2**20
    print(f"{options.rows} rows, metadata of {size:.0f} MB")
    command = ["-m", "likeness.cli", "prepare", "encode", str(root / "faces"), str(root / "store"), "--size", str(SIZE)]
    read = "from likeness.data.store import Store; s = Store({!r}); [s[i] for i in range(0, len(s), len(s) // 1000)]"
    measured("annotating, nothing missing", ["-m", "likeness.cli", "prepare", "annotate", str(root / "faces")])
    measured("encoding", command)
    measured("again", command)
    measured("1000 faces", ["-c", read.format(str(root / "store"))])


def encode_share(faces: Path, out: Path, process: tuple[int, int], barrier: Any, busy: Any) -> None:
    parts = load_components(BUNDLED / COMMON)
    barrier.wait()
    before = time.process_time()
    encode_folder(faces, out, parts, size=128, process=process)
    with busy.get_lock():
        busy.value += time.process_time() - before


def contents(faces: Path) -> set[tuple[str, bytes]]:
    """Return every (column, file hash) of a folder."""
    return {
        (name, sha256(row[name].read_bytes()).digest())
        for row in each_row(faces)
        for name in COLUMNS.values()
        if name in row
    }


def mutate(faces: Path, change: str, rng: random.Random, number: int) -> None:
    """Apply one change to a prepared folder."""
    root = root_of(faces)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    row = rng.choice(rows)
    if change in COLUMNS.values() and change in row:  # one pixel; the modification time is kept
        state, image = (root / row[change]).stat(), Image.open(root / row[change])
        value = number % 19 if image.mode in "LP" else (number % 256, number // 256, 9)
        while image.getpixel(place := (rng.randrange(SIZE), rng.randrange(SIZE))) == value:
            continue
        image.putpixel(place, value)
        image.save(root / row[change])
        os.utime(root / row[change], ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "touch":
        os.utime(root / row["file_name"])
    elif change == "rename":
        old, new = row["file_name"], f"images/renamed_{number}.png"
        (root / old).rename(root / new)
        for each in rows:
            each["file_name"] = new if each["file_name"] == old else each["file_name"]
    elif change == "shuffle":
        rng.shuffle(rows)
    elif change == "insert":
        name = f"images/new_{number}.png"
        Image.new("RGB", (SIZE, SIZE), (number % 256, number // 256, 77)).save(root / name)
        rows.insert(rng.randrange(len(rows)), {"file_name": name, "text": f"a new face, {number}"})
    elif change == "duplicate":
        rows.append(dict(row))
    elif change == "delete":
        rows.remove(row)
    elif change == "caption":
        row["text"] = [f"another caption, {number}"]
    elif change == "drop":
        row.pop("sketch_file_name", None)
    elif change == "share":
        row["sketch_file_name"] = rng.choice([each["sketch_file_name"] for each in rows if "sketch_file_name" in each])
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def restore(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        path.write_bytes(content)


@cache
def expected(column: str, content: bytes, suffix: str) -> torch.Tensor:
    """Return the latent of a file, encoded on its own."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        if column == IMAGE:
            image = read_photo(Path(file.name), SIZE)
        else:
            condition = CONDITIONS[column]
            raw = condition.read(file.name).raw
            image = condition.render(condition.resize(raw, SIZE, SIZE), SIZE, SIZE)
    return codec().encode(to_tensor([image]))[0]


@cache
def codec() -> LatentCodec:
    return LatentCodec(load_components(BUNDLED / COMMON).vae)


def wrong_records(faces: Path, out: Path) -> int:
    """Return the number of faces that are missing or wrong in a store; all if there is no store."""
    rows = read_folder(faces)
    try:
        store = Store(out)
    except InputError:
        return len(rows)
    if len(store) % len(rows):
        return len(rows)
    wrong = 0
    for number, row in enumerate(rows):
        sample = store[number]
        found = {IMAGE: sample.latents, **sample.conditions}
        same = list(sample.captions) == list(captions_of(row))
        same &= found.keys() == {name for name, column in COLUMNS.items() if column in row}
        paths = {name: row[COLUMNS[name]] for name in found if same}
        latents = {name: expected(name, path.read_bytes(), path.suffix) for name, path in paths.items()}
        wrong += not (same and all((found[name] - latents[name]).abs().max() < 0.02 for name in found))
    return wrong


def timed(name: str, work: Callable[[], Any], count: int | None = None) -> Any:
    started = time.monotonic()
    result = work()
    seconds = time.monotonic() - started
    each = f", {1000 * seconds / count:.2f} ms each of {count}" if count else ""
    print(f"{name}: {seconds:.2f} s{each}", flush=True)
    return result


def forked(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    worker = multiprocessing.get_context("fork").Process(target=work, args=arguments, kwargs=options)
    worker.start()
    return worker


if __name__ == "__main__":
    main()
