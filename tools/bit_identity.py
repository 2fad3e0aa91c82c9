"""Check that a refactoring changes no bits: hash the losses of recipes/debug.toml and the pixels of nine requests.

    python tools/bit_identity.py --out before.json        # before the change
    python tools/bit_identity.py --compare before.json    # after it, on the same machine

Bits differ between processors and PyTorch versions, so the hashes are not stored in the repository. Takes about two
minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MASK, SKETCH, POINTS = "examples/masks/smile.png", "examples/sketches/fringe.png", "examples/keypoints/smile.json"

REQUESTS: dict[str, list[str]] = {
    "text": ["a man with black hair and a beard", "--seed", "1"],
    "mask": ["a smiling woman", "--mask", MASK, "--seed", "2"],
    "sketch": ["an old man", "--sketch", SKETCH, "--seed", "3", "--guidance-scale", "3"],
    "keypoints": ["a woman", "--keypoints", POINTS, "--seed", "4", "--steps", "12"],
    "mask and sketch": ["a woman", "--mask", MASK, "--sketch", SKETCH, "--sketch-scale", "0.5", "--seed", "5"],
    "interval": ["", "--mask", MASK, "--control-guidance-end", "0.6", "--negative-prompt", "a man", "--seed", "6"],
    "few steps": ["a woman", "--mask", MASK, "--seed", "9", "--model", "mmface-mini-fast"],
    "mditface": ["a smiling woman", "--mask", MASK, "--model", "mditface-mini", "--seed", "7"],
    "mditface, two": ["a man", "--mask", MASK, "--sketch", SKETCH, "--model", "mditface-mini", "--seed", "8"],
}


def likeness(*arguments: str | Path) -> None:
    """Run a command of this checkout, with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "likeness.cli", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def hashes(work: Path) -> dict[str, str]:
    """Hash of the pixels of every request, of the losses, and of the trained weights."""
    found = {}
    for name, arguments in REQUESTS.items():
        model = () if "--model" in arguments else ("--model", "mmface-mini")
        likeness("generate", *arguments, *model, "--out", work / "image.png")
        found[name] = digest(np.asarray(Image.open(work / "image.png")).tobytes())
        (work / "image.png").unlink()
    likeness("prepare", "synthetic", work / "faces", "--count", "16", "--size", "128")
    likeness("prepare", "encode", work / "faces", work / "shards")
    likeness("train", "recipes/debug.toml", f'data.shards=["{work / "shards"}"]', "--out", work / "run")
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses, "the run reported no loss"
    found["losses"] = digest(json.dumps(losses).encode())
    weights = next((work / "run" / "model" / "transformer").glob("*.safetensors"))
    found["weights"] = digest(weights.read_bytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the hashes to")
    parser.add_argument("--compare", type=Path, help="file with the hashes to compare with; exit code 1 if any differs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = hashes(Path(work))
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if options.compare:
        before = json.loads(options.compare.read_text())
        changed = [name for name in before if found.get(name) != before[name]]
        print(f"changed: {', '.join(changed)}" if changed else "bit-identical")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
