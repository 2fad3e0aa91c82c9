"""Measure a bundled model with other samplers, numbers of steps and guidance scales on held-out faces.

python benchmarks/sampling.py data/celeba/test mmface-mini --out runs/sampling
python benchmarks/sampling.py data/celeba/test mmface-mini --out runs/sampling --settings dpm++:12:2.0 dpm++:12:3.0 \
    --weak MODEL

A setting is sampler:steps:guidance_scale. With `--weak`, a model with weaker weights of the same network, each is also
measured with autoguidance by that model instead of classifier-free guidance. *Passes* are evaluations of a network per
image. The ceiling is the photographs after encoding and decoding. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
from functools import partialmethod
from pathlib import Path
from typing import Any

import likeness
from likeness.evaluate.protocol import CEILING, NONE, Protocol
from likeness.evaluate.results import Results
from likeness.evaluate.run import evaluate
from likeness.objectives import make_objective
from likeness.pages import Section, markdown_table
from likeness.weights.hashes import weights_hash

SETTINGS = (
    "euler:20:2", "euler:12:2", "dpm++:6:2", "dpm++:8:2", "dpm++:12:2", "dpm++:20:2", "dpm++:12:1", "dpm++:12:1.5",
    "dpm++:12:3",
)  # fmt: skip

COLUMNS = {
    "mask accuracy": "pixel_accuracy/mask",
    "rare classes": "rare_class_recall/mask",
    "FD": "fd_text_image/mask",
    "recall": "recall_text_image/mask",
    "sharpness": "sharpness/mask",
    "edges F (sketch)": "edge_f_score/sketch",
    "keypoint error": "keypoint_error/keypoints",
    "complete faces (text)": "complete_faces/none",
    "retrieval": "retrieval/none",
    "FD ": "fd_text_image/none",
    "recall ": "recall_text_image/none",
}
"""Column of the table -> metric and condition set."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, help="prepared folder of held-out faces")
    parser.add_argument("model")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="sampler:steps:guidance_scale")
    parser.add_argument("--weak", help="model for autoguidance")
    parser.add_argument("--scale", type=float, default=1.7, help="scale of autoguidance")
    parser.add_argument("--landmarker", help="MediaPipe's face_landmarker.task, for keypoints")
    parser.add_argument("--count", type=int, default=200, help="maximum number of faces")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[list[Any]] = []
    for setting in options.settings:
        for weak in [None] + ([options.weak] if options.weak else []):
            passes, results = measure(options, setting, weak)
            values = {f"{one.metric}/{one.given}": one for one in results.numbers if one.against == "own"}
            if not rows:
                ceiling = {one.metric: one.value for one in results.numbers if one.given == CEILING}
                rows.append(["ceiling", "", *(number(ceiling.get(key.split("/")[0])) for key in COLUMNS.values())])
            name = f"{setting}{' autoguidance' if weak else ''}"
            found = [values[key].value if key in values else None for key in COLUMNS.values()]
            rows.append([name, f"{passes:.1f}", *map(number, found)])
            print(name, flush=True)
    print(markdown_table(Section(header=["setting", "passes", *COLUMNS], rows=rows)))


def number(value: float | None) -> str:
    """Return a value with three decimals, or nothing."""
    return "" if value is None else f"{value:.3f}"


def measure(options: argparse.Namespace, setting: str, weak: str | None) -> tuple[float, Results]:
    """Return the passes per image of a setting and its results."""
    sampler, steps, guidance = setting.split(":")
    pipeline = likeness.load(options.model)
    objective = make_objective({**pipeline.config.objective, "sampler": sampler})
    pipeline.scheduler = objective.scheduler()
    pipeline.register_to_config(objective=objective.config())
    networks = [pipeline.transformer]
    if weak:
        networks.append(likeness.load(weak).transformer)
        kind = type(pipeline)
        call = partialmethod(kind.__call__, guidance_model=networks[1], autoguidance_scale=options.scale)
        pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    given = ("mask", "sketch", *(["keypoints"] if options.landmarker else []), NONE)
    protocol = Protocol(
        given=given,
        count=options.count,
        steps=int(steps),
        guidance_scale=1.0 if weak else float(guidance),
        metrics=tuple(dict.fromkeys(key.split("/")[0] for key in COLUMNS.values())),
        landmarker=options.landmarker,
    )
    passes = count_passes(pipeline, networks, protocol)
    name = setting.replace(":", "-")
    if weak:
        name += f"-autoguidance-{options.scale:g}-{weights_hash(networks[1])[:8]}"
    folder = options.out / Path(options.model).name / name
    results = evaluate(options.faces, folder, protocol, pipeline=pipeline, model=name)
    assert results is not None
    return passes, results


def count_passes(pipeline: Any, networks: list[Any], protocol: Protocol) -> float:
    """Return the evaluations of the networks for an image from text; a batch of two counts twice."""
    batches: list[int] = []

    def count(network: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        batches.append(len([*given, *named.values()][0]))

    hooks = [network.register_forward_pre_hook(count, with_kwargs=True) for network in networks]
    pipeline("a person", num_inference_steps=protocol.steps, guidance_scale=protocol.guidance_scale)
    for hook in hooks:
        hook.remove()
    return float(sum(batches))


if __name__ == "__main__":
    main()
