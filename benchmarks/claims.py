"""The claims of both papers: for each the command that tests it, the result and a verdict.

python benchmarks/claims.py                 # write docs/claims.md
python benchmarks/claims.py check           # list claims whose result is out of date
python benchmarks/claims.py record NAME     # after its command was run and `result` in claims.toml was written

`claims.toml` contains the claims. Those with `compare` are decided by `ablations.json`, which `ablate.py collect`
writes: the verdict follows from the 95 % interval of the difference. For the others, result and verdict are written by
hand, and `claims.json` stores a fingerprint of everything that the result depends on (`depends`): a script or module
without comments, the weights of a bundled model, or a variant of `ablate.py`. A result is out of date if one has
changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ablate

from likeness.config import build
from likeness.files import read_json, write_whole
from likeness.types import InputError
from likeness.weights.catalog import find_model
from likeness.weights.hashes import file_hash

HERE = Path(__file__).parent
ROOT = HERE.parent
CLAIMS, RECORDS, PAGE = HERE / "claims.toml", HERE / "claims.json", ROOT / "docs" / "claims.md"

REPRODUCED, CONTRADICTED, UNDECIDED, UNREACHABLE, OPEN = (
    "reproduced at mini scale", "contradicted at mini scale", "undecided at mini scale", "not reachable here",
    "not run yet",
)  # fmt: skip

HEADER = """# Claims of the papers, tested

Every statement of MDiTFace (arXiv 2511.12631) and MMFace-DiT (arXiv 2603.29029) that can be tested at small scale,
their open questions, and what could not be tested. `python benchmarks/claims.py` writes this page from
`benchmarks/claims.toml` and `benchmarks/ablations.json`.

*Micro* networks are 128 wide and 6 deep, have 64 image tokens (128 px), and were trained on photographs of CelebA and
CelebA-HQ with `benchmarks/ablate.py`, all with the same budget, in bf16 or, on processors without it, in fp32.
Differences are paired by seed and face; their intervals include the variance between seeds, which a comparison of fewer
than three seeds takes from the variants of the same network that were trained with three. A claim is *reproduced* if
its interval excludes zero on the claimed side, *contradicted* if it excludes zero on the other, else *undecided*. A
claim that two variants are equal, or that one is not worse, is reproduced if the interval is within the stated margin,
contradicted if it is beyond. There is no correction for the number of claims: of twenty differences, one excludes zero
by chance. None of this says what holds at full scale.
"""


TABLE = """## All variants and baselines

Measured so far, on 200 held-out faces: means over the seeds, with three or more their 95 % intervals. A metric of the
prompt has mask and prompt unless it says otherwise. Variants of MMFace-DiT and the baselines take masks and sketches
and were trained with a mask in 40 % of the images; those of MDiTFace take masks only, in 80 %. So compare within one
network. `step` and `image` are CPU times of a training step and of an image, relative to `mmface`.
`python benchmarks/ablate.py list` describes the variants; `baselines/` contains ControlNet, the composition and the
GAN. `mmface-single` is also the baseline of channel concatenation in a single stream, and `easycontrol` that of a cache
of the condition alone.
"""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper."""

    paper: Literal["MDiTFace", "MMFace-DiT"]
    source: str
    """Table, section or open question."""
    claim: str
    command: str
    """Command that tests it; {shards} etc. are the user's data."""
    scale: str = ""
    """What was trained or measured."""
    compare: tuple[str, str, str] | None = None
    """Variant, reference and metric of `ablate.py`."""
    expect: Literal["higher", "lower", "equal", "not lower"] = "higher"
    """What the paper claims about variant minus reference."""
    within: float = 0.0
    """Largest difference that counts as equal, or as not lower."""
    verdict: Literal["reproduced", "contradicted", "undecided", "not reachable"] | None = None
    """Of a claim without `compare`."""
    result: str = ""
    """Of a claim without `compare`, with numbers; or why it is not reachable."""
    depends: tuple[str, ...] = ()
    """Files of the repository, `model:NAME` or `variant:NAME`."""
    change: str
    """What would change the verdict."""


def read_claims() -> dict[str, Claim]:
    """Return the claims by name. Raises `InputError` if an entry is incomplete."""
    claims = {
        name: build(Claim, values, where=f"{CLAIMS.name}: {name}")
        for name, values in tomllib.loads(CLAIMS.read_text(encoding="utf-8")).items()
    }
    for name, claim in claims.items():
        decided = claim.verdict is not None and bool(claim.result)
        if (claim.compare is not None) == decided:
            raise InputError(f"{CLAIMS.name}: {name} needs either `compare`, or `verdict` and `result`")
        if claim.verdict not in (None, "not reachable") and not claim.depends:
            raise InputError(f"{CLAIMS.name}: {name} needs `depends`: the code and models of its result")
    return claims


def verdict_of(claim: Claim, comparisons: Mapping[str, Any]) -> tuple[str, str]:
    """Return verdict and result of a claim."""
    if claim.compare is None:
        verdicts = {"reproduced": REPRODUCED, "contradicted": CONTRADICTED, "undecided": UNDECIDED}
        return verdicts.get(claim.verdict or "", UNREACHABLE), claim.result
    found = comparisons.get(key_of(claim.compare))
    if found is None:
        return OPEN, ""
    seeds = ", ".join(f"{value:+.4f}" for value in found["by_seed"])
    if len(found["by_seed"]) < len(ablate.SEEDS):
        seeds += " alone"
    faces = f"{found['n']} faces" if found["n"] > 1 else "means of all faces, whose variance is left out"
    text = (
        f"{claim.compare[0]} {found['means'][0]:.4f}, {claim.compare[1]} {found['means'][1]:.4f}: difference "
        f"{found['value']:+.4f}, 95 % interval {found['low']:+.4f} to {found['high']:+.4f}; by seed {seeds}; "
        f"p {found['p']:.3f}; {faces}, {found['images']:,} training images each"
    )
    low, high = found["low"], found["high"]
    if claim.expect in ("equal", "not lower"):
        text += f"; margin {claim.within}"
        inside, outside = low >= -claim.within, high < -claim.within
        if claim.expect == "equal":
            inside, outside = inside and high <= claim.within, outside or low > claim.within
    else:
        sign = 1 if claim.expect == "higher" else -1
        inside, outside = min(sign * low, sign * high) > 0, max(sign * low, sign * high) < 0
    return REPRODUCED if inside else CONTRADICTED if outside else UNDECIDED, text


def key_of(compare: tuple[str, str, str]) -> str:
    """Name of a comparison in `ablations.json`."""
    return " ".join(compare)


def fingerprint(name: str) -> str:
    """Return a fingerprint of something that a result depends on. Raises `InputError` if it does not exist."""
    kind, _, rest = name.rpartition(":")
    if kind == "model":
        files = sorted(find_model(rest).rglob("*.safetensors"))
        return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()[:16]
    if kind == "variant":
        return str(ablate.fingerprint(rest))
    if not (ROOT / name).is_file():
        raise InputError(f"{CLAIMS.name} depends on {name}, which does not exist")
    return hashlib.sha256(ast.dump(ast.parse((ROOT / name).read_text(encoding="utf-8"))).encode()).hexdigest()[:16]


def out_of_date(claims: Mapping[str, Claim]) -> list[str]:
    """Return one sentence per claim whose result is missing or older than what it depends on."""
    records, faults = read_json(RECORDS) if RECORDS.is_file() else {}, []
    for name, claim in claims.items():
        known = records.get(name, {}).get("depends", {})
        for one in claim.depends:
            if known.get(one) != fingerprint(one):
                faults.append(f"{name}: its result is older than {one}; run its command again, then `record {name}`")
    results = ablate.read_results()
    for variant in sorted({one for claim in claims.values() if claim.compare for one in claim.compare[:2]}):
        stored = results["variants"].get(variant)
        if stored and stored["fingerprint"] != ablate.fingerprint(variant):
            faults.append(f"the results of the variant {variant} are older than its code: delete and train it again")
    return faults


def page(claims: Mapping[str, Claim]) -> str:
    """Return the content of docs/claims.md."""
    comparisons = ablate.read_results()["comparisons"]
    found = {name: verdict_of(claim, comparisons) for name, claim in claims.items()}
    lines = [
        HEADER,
        "| claim | paper | verdict |",
        "|---|---|---|",
        *(
            f"| [{name}](#{name}) | {claim.paper}, {claim.source} | {found[name][0]} |"
            for name, claim in claims.items()
        ),
        "",
        TABLE,
        ablate.table(),
        "",
    ]
    for name, claim in claims.items():
        verdict, result = found[name]
        lines += [
            f"## {name}",
            "",
            f"{claim.claim} ({claim.paper}, {claim.source})",
            "",
            f"**{verdict.capitalize()}.**",
        ]
        lines += [f"{result}." if result and not result.endswith(".") else result, ""]
        lines += [f"- Scale: {claim.scale}"] if claim.scale else []
        lines += [f"- Command: `{claim.command}`", f"- What would change it: {claim.change}", ""]
    return "\n".join(lines)


def record(names: list[str], claims: Mapping[str, Claim]) -> None:
    """Store today's fingerprints for claims."""
    if unknown := sorted(set(names) - set(claims)):
        raise InputError(f"Unknown claim {unknown[0]!r}")
    records = read_json(RECORDS) if RECORDS.is_file() else {}
    for name in names:
        records[name] = {"commit": ablate.commit(), "depends": {one: fingerprint(one) for one in claims[name].depends}}
    write_whole(RECORDS, json.dumps(records, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["write", "check", "record"], default="write")
    parser.add_argument("names", nargs="*", help="claims to record")
    options = parser.parse_args()
    claims = read_claims()
    if options.command == "record":
        record(options.names, claims)
    elif options.command == "check":
        faults = out_of_date(claims)
        print("\n".join(faults or ["all results are up to date"]))
        sys.exit(bool(faults))
    else:
        write_whole(PAGE, page(claims))


if __name__ == "__main__":
    main()
