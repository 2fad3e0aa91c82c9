"""The claims of both papers: for each the command that tests it, the result and a verdict.

python benchmarks/claims.py                 # write docs/claims.md
python benchmarks/claims.py check           # list claims whose result is out of date
python benchmarks/claims.py record NAME     # after its command was run and `result` in claims.toml was written

`claims.toml` contains the claims. Those with a `pair` of variants are decided by `ablations.json`, which `ablate.py
collect` writes: the verdict of each metric follows from the 95 % interval of the difference. For the others, result and
verdict are written by hand, and `claims.json` stores a fingerprint of everything that the result depends on
(`depends`): a script or module without comments, or the files of a bundled model. A result is out of date if one has
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ablate

from likeness.cli.terminal import print_error
from likeness.config import build
from likeness.files import read_json, write_whole
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON, find_model
from likeness.weights.hashes import file_hash

HERE = Path(__file__).parent
ROOT = HERE.parent
CLAIMS, RECORDS, PAGE = HERE / "claims.toml", HERE / "claims.json", ROOT / "docs" / "claims.md"

REPRODUCED, CONTRADICTED, UNDECIDED, OPEN = "reproduced", "contradicted", "undecided", "not run yet"

HEADER = """# Claims of the papers, tested

Every statement of MDiTFace (arXiv 2511.12631) and MMFace-DiT (arXiv 2603.29029) that can be tested at small scale,
their open questions, and what could not be tested. `python benchmarks/claims.py` writes this page from
`benchmarks/claims.toml` and `benchmarks/ablations.json`.

*Micro* networks are 128 wide and 6 deep, have 64 image tokens (128 px), and were trained on photographs of CelebA and
CelebA-HQ with `benchmarks/ablate.py`, all with the same budget and precision. *Mini* are the bundled models. None of
this says what holds at full scale.

Differences of micro networks are paired by seed and face. A metric is *reproduced* if the 95 % interval of its
difference excludes zero on the claimed side, *contradicted* if it excludes zero on the other, else *undecided*. That
two variants are equal, or that one is not lower, is reproduced if the interval is within the stated margin,
contradicted if it is beyond. Intervals include the variance between faces (of KID, by the jackknife) and that between
seeds, which is estimated from all variants of the same network with three seeds (analysis of variance); comparisons
with a GAN, whose trainings differ more, take that of their own seeds. It is assumed to be equal for all variants: one
that varies more than others has too narrow an interval. Verdicts of one seed are marked. There is no correction for the
number of comparisons: of twenty differences, one excludes zero by chance.

The commands train three seeds and need the prepared data of `benchmarks/README.md` (`SHARDS`, `SHARDS64`, `FACES`);
`ablate.py collect` and `claims.py` then write the results.
"""


TABLE = """## All variants and baselines

Means over the seeds on 200 held-out faces, with three or more seeds their 95 % intervals. The first row has the
scores of photographs that were encoded and decoded. Metrics are those of images of mask and prompt, unless the
column says otherwise; retrieval is among 50 captions, by chance 0.020. Variants of MMFace-DiT and the baselines
take masks and sketches and were trained with a mask in 40 % of the images; those of MDiTFace take masks only, in 80
% (`mditface-all` all conditions, masks in 30 %). So compare within one network. `step` and `image` are CPU times of
a training step and of an image, relative to `mmface`. `python benchmarks/ablate.py list` describes the variants;
`baselines/` contains ControlNet, the composition and the GAN. `mmface-single` is also the baseline of channel
concatenation in a single stream, and `easycontrol` that of a cache of the condition alone.
"""

TITLES = {
    "pixel_accuracy": "mask accuracy",
    "mean_iou": "mIoU",
    "rare_class_recall": "rare classes",
    "edge_f_score": "edges F",
    "retrieval": "retrieval",
    "attribute_recall": "attributes",
    "complete_faces": "complete faces",
    "kid_text_image": "KID x 1000",
    "loss": "loss",
    "conflict": "contradiction",
}
"""Name of a metric in tables."""

GIVEN = {"mask": "", "sketch": " (sketch)", "none": " (text only)", "right": ""}
"""What is added to it for a condition set."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper."""

    paper: Literal["MDiTFace", "MMFace-DiT"]
    source: str
    """Table, section or open question."""
    claim: str
    change: str
    """What would change the verdict."""
    scale: str = ""
    """What was trained or measured."""
    pair: tuple[str, str] | None = None
    """Variant and reference of `ablate.py`."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Metric/condition set -> what the paper claims about variant minus reference: higher, lower, "equal 0.02" or "not
    lower 0.02", up to this margin.
    """
    command: str = ""
    """Of a claim without `pair`: the command that tests it; SHARDS etc. are the user's data."""
    size: Literal["", "tiny", "mini", "full size"] = ""
    """Of the network that was measured."""
    verdict: Literal["reproduced", "contradicted", "undecided", "not reachable"] | None = None
    result: str = ""
    """With numbers; or why it is not reachable."""
    depends: tuple[str, ...] = ()
    """Files of the repository, or `model:NAME`."""


def read_claims() -> dict[str, Claim]:
    """Return the claims by name. Raises `InputError` if an entry is incomplete."""
    claims = {
        name: build(Claim, values, where=f"{CLAIMS.name}: {name}")
        for name, values in tomllib.loads(CLAIMS.read_text(encoding="utf-8")).items()
    }
    for name, claim in claims.items():
        written = claim.verdict is not None and bool(claim.result) and bool(claim.command)
        if written == (claim.pair is not None and bool(claim.metrics)):
            raise InputError(f"{CLAIMS.name}: {name} needs either pair and metrics, or command, verdict and result")
        if claim.verdict not in (None, "not reachable") and not (claim.depends and claim.size):
            raise InputError(f"{CLAIMS.name}: {name} needs size, and depends: the code and models of its result")
        for expected in claim.metrics.values():
            parse(expected)
    return claims


def parse(expected: str) -> tuple[str, float]:
    """Split what is claimed about a difference into its kind and margin. Raises `InputError` if it is unknown."""
    kind, _, margin = expected.rpartition(" ") if expected[-1].isdigit() else (expected, "", "0")
    if kind not in ("higher", "lower", "equal", "not lower"):
        raise InputError(f"{CLAIMS.name}: {expected!r} is not higher, lower, equal MARGIN or not lower MARGIN")
    return kind, float(margin)


def decide(expected: str, low: float, high: float) -> str:
    """Return the verdict of a difference with the 95 % interval [low, high]."""
    kind, margin = parse(expected)
    if kind in ("equal", "not lower"):
        inside, outside = low >= -margin, high < -margin
        if kind == "equal":
            inside, outside = inside and high <= margin, outside or low > margin
    else:
        sign = 1 if kind == "higher" else -1
        inside, outside = min(sign * low, sign * high) > 0, max(sign * low, sign * high) < 0
    return REPRODUCED if inside else CONTRADICTED if outside else UNDECIDED


def title_of(metric: str) -> str:
    """Return the name of a metric in tables."""
    kind, _, given = metric.partition("/")
    return f"{given} of contradictions" if kind == "conflict" else TITLES[kind] + GIVEN[given]


def verdicts_of(claim: Claim, comparisons: Mapping[str, Any]) -> dict[str, str]:
    """Return title of each metric -> verdict, with the number of seeds if it is not three; of claims without a pair,
    "" -> verdict.
    """
    if claim.pair is None:
        return {"": "not reachable here" if claim.verdict == "not reachable" else f"{claim.verdict} ({claim.size})"}
    verdicts = {}
    for metric, expected in claim.metrics.items():
        found = comparisons.get(ablate.key_of(claim.pair, metric))
        verdict, seeds = OPEN, len(ablate.SEEDS)
        if found is not None:
            verdict, seeds = decide(expected, found["low"], found["high"]), len(found["by_seed"])
        few = "" if seeds == len(ablate.SEEDS) else f" ({seeds} seed{'s' * (seeds > 1)})"
        verdicts[title_of(metric)] = verdict + few
    return verdicts


def comparison_table(claim: Claim, comparisons: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with a row for each metric of a claim."""
    assert claim.pair is not None
    lines = [
        f"| | {claim.pair[0]} | {claim.pair[1]} | difference, 95 % interval | by seed | p | n | claimed | verdict |"
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for (metric, expected), (title, verdict) in zip(
        claim.metrics.items(), verdicts_of(claim, comparisons).items(), strict=True
    ):
        found = comparisons.get(ablate.key_of(claim.pair, metric))
        cells = [""] * 6
        if found is not None:
            factor = 1000 if metric.startswith(ablate.KID) else 1
            value, low, high, *by_seed = (
                f"{factor * one:+.4f}" for one in (found["value"], found["low"], found["high"], *found["by_seed"])
            )
            cells = [f"{factor * mean:.4f}" for mean in found["means"]]
            cells += [f"{value}, {low} to {high}", " ".join(by_seed), f"{found['p']:.3f}"]
            cells += [f"{found['n']} faces" if found["n"] > 1 else "means"]
        lines.append("| " + " | ".join([title, *cells, expected, verdict]) + " |")
    return lines


def fingerprint(name: str) -> str:
    """Return a fingerprint of something that a result depends on. Raises `InputError` if it does not exist."""
    kind, _, rest = name.rpartition(":")
    if kind == "model":
        folder = BUNDLED / COMMON if rest == COMMON else find_model(rest)
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
        return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()[:16]
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
    for variant in sorted({one for claim in claims.values() for one in claim.pair or ()}):
        stored = results["variants"].get(variant)
        if stored and not ablate.is_same_code(stored["fingerprint"], ablate.fingerprint(variant)):
            faults.append(f"the results of the variant {variant} are older than its code: delete and train it again")
    return faults


def page(claims: Mapping[str, Claim]) -> str:
    """Return the content of docs/claims.md."""
    comparisons = ablate.read_results()["comparisons"]
    lines = [HEADER, "| claim | paper | verdict |", "|---|---|---|"]
    for name, claim in claims.items():
        by_verdict: dict[str, list[str]] = {}
        for metric, verdict in verdicts_of(claim, comparisons).items():
            by_verdict.setdefault(verdict, []).append(metric)
        cell = "; ".join(verdict + f": {', '.join(one)}" * any(one) for verdict, one in by_verdict.items())
        lines.append(f"| [{name}](#{name}) | {claim.paper}, {claim.source} | {cell} |")
    lines += ["", TABLE, ablate.table(), ""]
    for name, claim in claims.items():
        lines += [f"## {name}", "", f"{claim.claim} ({claim.paper}, {claim.source})", ""]
        if claim.pair is None:
            verdict = verdicts_of(claim, comparisons)[""]
            lines += [f"**{verdict.capitalize()}.**", f"{claim.result}.", ""]
        else:
            lines += [*comparison_table(claim, comparisons), ""]
        lines += [f"- Scale: {claim.scale}"] if claim.scale else []
        lines += [f"- Command: `{command_of(claim)}`", f"- What would change it: {claim.change}", ""]
    return "\n".join(lines)


def command_of(claim: Claim) -> str:
    """Return the command that tests a claim."""
    if claim.pair is None:
        return claim.command
    small = " --small-shards SHARDS64" if any(ablate.VARIANTS[name].progressive for name in claim.pair) else ""
    return f"python benchmarks/ablate.py train {' '.join(claim.pair)}{small} --shards SHARDS --test TEST --faces FACES"


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
    try:
        claims = read_claims()
        if options.command == "record":
            record(options.names, claims)
        elif options.command == "check":
            faults = out_of_date(claims)
            print("\n".join(faults or ["all results are up to date"]))
            sys.exit(bool(faults))
        else:
            write_whole(PAGE, page(claims))
    except InputError as error:
        print_error(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
