"""Evaluation from faces to a report, with tiny networks: files, numbers, refusals."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders import run, tiny_clip, tiny_face_parser, tiny_pipeline, tiny_tokenizer
from likeness.cli import main
from likeness.data.folder import read_folder
from likeness.encoders.text_image import AttributeHead, save_attribute_head
from likeness.evaluate.compare import compare_evaluations, read_evaluation
from likeness.evaluate.config import Protocol
from likeness.evaluate.evaluation import evaluate
from likeness.evaluate.faces import read_faces
from likeness.evaluate.features import Missing
from likeness.evaluate.generate import own_first
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.page import write_report
from likeness.evaluate.report import published_tables
from likeness.prepare.synthetic import write_synthetic
from likeness.types import InputError

COUNT = 12
COMMON = {"given": ("mask", "none"), "steps": 2, "choices": 4, "draws": 200}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Drawn faces, a checkpoint, a parser and a text-image pair that names attributes."""
    root = tmp_path_factory.mktemp("evaluate")
    write_synthetic(root / "faces", COUNT, 32)
    tiny_pipeline().save_pretrained(root / "model")
    tiny_face_parser().save_pretrained(root / "parser" / "model")
    clip = tiny_clip()
    clip.save_pretrained(root / "pair" / "clip")
    tiny_tokenizer().save_pretrained(root / "pair" / "tokenizer")
    rows = read_folder(root / "faces")
    values = sorted({str(row["attributes"]["hair_colour"]) for row in rows if "hair_colour" in row["attributes"]})
    name = "hair_colour" if values else next(iter(rows[0]["attributes"]))
    values = values or sorted({str(row["attributes"][name]) for row in rows})
    torch.manual_seed(0)
    head = AttributeHead(torch.randn(len(values), 16), torch.zeros(len(values)), {name: values})
    save_attribute_head(head, root / "pair")
    return root


def protocol_of(root: Path, **changes) -> Protocol:
    judges = {"face_parser": str(root / "parser"), "text_image": str(root / "pair")}
    return Protocol(**{**COMMON, **judges, **changes})


@pytest.fixture(scope="module")
def results(root) -> dict:
    """An evaluation of the tiny model in root/first, two portraits a face and set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        found = evaluate(
            root / "faces", root / "first", protocol_of(root, seeds=2), pipeline=tiny_pipeline(), model="t"
        )
    assert found is not None
    write_report(found, root / "first")
    return found


def number(results: dict, metric: str, given: str, against: str = "own") -> dict:
    (found,) = [n for n in results["numbers"] if (n["metric"], n["given"], n["against"]) == (metric, given, against)]
    return found


# Generation


def test_every_process_makes_what_is_missing():
    assert own_first(7, 1, 3) == [1, 4, 6, 5, 3, 2, 0]
    for world in (1, 2, 5):
        for rank in range(world):
            assert sorted(own_first(7, rank, world)) == list(range(7))


def test_files_do_not_depend_on_processes_and_runs_go_on(root, results, tmp_path, monkeypatch):
    pictures = {path.relative_to(root / "first"): path for path in (root / "first" / "pictures").rglob("*.png")}
    assert len(pictures) == 2 * 2 * COUNT + COUNT  # two sets, two rounds, and the ceiling
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    settings = protocol_of(root, seeds=2)
    assert evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t") is None
    for name, path in pictures.items():
        assert (tmp_path / name).read_bytes() == path.read_bytes(), name
    gone, there = tmp_path / list(pictures)[3], tmp_path / list(pictures)[5]
    content, before = gone.read_bytes(), there.stat().st_mtime_ns
    gone.unlink()
    monkeypatch.setenv("RANK", "1")
    evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    assert gone.read_bytes() == content
    assert there.stat().st_mtime_ns == before
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK is 3"):
        evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")


def test_portraits_are_those_of_generate(root, results, tmp_path):
    """Seed k, first caption, the face's mask: the command line makes the same portrait."""
    row = read_folder(root / "faces")[4]
    given = ["--mask", str(row["mask_file_name"]), "--model", str(root / "model"), "--steps", "2", "--seed", "4"]
    main(["generate", row["text"][0], *given, "--out", str(tmp_path / "one.png")])
    made = root / "first" / "pictures" / "mask" / "0" / f"{row['file_name'].stem}.png"
    assert np.array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(tmp_path / "one.png")))


def test_another_method_of_making_is_refused(root, results):
    with pytest.raises(InputError, match=r"its steps is 2, now it is 3"):
        evaluate(root / "faces", root / "first", protocol_of(root, steps=3), pipeline=tiny_pipeline(), model="t")


# Numbers


def test_every_number_has_its_protocol_and_interval(results):
    measured = {found["metric"] for found in results["numbers"]}
    offline = {"pixel_accuracy", "mean_iou", "edge_f_score", "clip_score", "retrieval", "attribute_recall", "ssim"}
    assert offline | {"fd_text_image", "kid_text_image", "precision_text_image", "diversity_of_seeds"} <= measured
    needed = {"split", "faces", "n", "resolution", "file_format", "extractor", "extractor_hash", "seeds", "steps"}
    for found in results["numbers"]:
        assert needed | {"guidance_scale", "given", "caption", "model", "fingerprint"} <= set(found["protocol"])
        assert found["protocol"]["n"] == found["n"] <= COUNT
        assert found["low"] - 1e-6 <= found["value"] <= found["high"] + 1e-6, found
    assert number(results, "pixel_accuracy", "mask")["protocol"]["guidance_scale"] == 2.0  # the checkpoint's own
    assert len(number(results, "pixel_accuracy", "mask")["by_seed"]) == 2
    assert number(results, "pixel_accuracy", "mask", "another")
    assert number(results, "ssim", "ceiling")
    assert {entry["class"] for entry in results["classes"]["mask"]} >= {"skin", "hair"}


def test_bias_is_named(results):
    assert "too large" in number(results, "fd_text_image", "mask")["warning"]
    assert "too high" in number(results, "precision_text_image", "mask")["warning"]
    assert number(results, "pixel_accuracy", "mask")["warning"] == ""


def test_what_is_missing_says_so(root, tmp_path):
    names = (
        "fid",
        "lpips",
        "topiq",
        "llm_score",
        "ms_ssim",
        "keypoint_error",
        "nearest_training",
        "diversity_of_seeds",
    )
    settings = protocol_of(root, metrics=(*names, "clip_score"), given=("none",), count=3)
    found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    assert {entry["metric"] for entry in found["missing"]} == set(names)
    why = {entry["metric"]: entry["why"] for entry in found["missing"]}
    assert "pip install torch-fidelity" in why["fid"]
    assert "pip install pyiqa" in why["topiq"]
    assert "161" in why["ms_ssim"]
    assert "landmarker=" in why["keypoint_error"]
    assert "train=" in why["nearest_training"]
    assert {number["metric"] for number in found["numbers"]} == {"clip_score"}
    with pytest.raises(InputError, match="no metric 'fidd'"):
        evaluate(root / "faces", tmp_path, protocol_of(root, metrics=("fidd",)), pipeline=tiny_pipeline())


def test_too_few_pictures_are_refused(root, tmp_path):
    settings = protocol_of(root, metrics=("fd_text_image", "retrieval", "ssim"), given=("none",), count=3)
    found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    why = {entry["metric"]: entry["why"] for entry in found["missing"]}
    assert "3 pictures are too few" in why["fd_text_image"]
    assert "fill no group of 4" in why["retrieval"]
    assert {number["n"] for number in found["numbers"]} == {3}


def test_no_folder_of_a_judge(root, tmp_path):
    settings = protocol_of(root, metrics=("pixel_accuracy", "ssim"), given=("none",), face_parser="absent", count=3)
    found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    assert "no folder absent" in found["missing"][0]["why"]
    assert [n["metric"] for n in found["numbers"]] == ["ssim", "ssim"]  # the others are measured all the same


def test_training_photographs_are_found_again(root, tmp_path):
    """Photographs that were learnt from have themselves as nearest."""
    settings = protocol_of(root, metrics=("nearest_training",), given=("none",), train=str(root / "faces"))
    pictures = copies(root, tmp_path / "photos")
    found = evaluate(root / "faces", tmp_path / "out", settings, images=pictures)
    assert number(found, "nearest_training", "none")["value"] == pytest.approx(1, abs=1e-4)
    assert number(found, "nearest_training", "none")["protocol"]["train_n"] == COUNT
    assert len(found["nearest"]["none"]) == 8
    for row, photo, cosine in found["nearest"]["none"]:
        assert cosine == pytest.approx(1, abs=1e-4)
        assert Path(photo).stem == found["faces"][row]["name"]
    write_report(found, tmp_path / "out")
    assert "Nearest training photographs" in (tmp_path / "out" / "report.html").read_text()


# Pictures of any method


def copies(root: Path, folder: Path) -> Path:
    """The photographs themselves, as the perfect method would make them."""
    folder.mkdir(parents=True)
    for row in read_folder(root / "faces"):
        Image.open(row["file_name"]).save(folder / f"{row['file_name'].stem}.png")
    return folder


def noise(root: Path, folder: Path) -> Path:
    """What no method would make."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for row in read_folder(root / "faces"):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row['file_name'].stem}.png")
    return folder


FEW = {"given": ("sketch",), "metrics": ("edge_f_score", "ssim", "fd_text_image")}


def test_pictures_of_any_method(root, tmp_path):
    found = evaluate(
        root / "faces", tmp_path / "out", protocol_of(root, **FEW), images=copies(root, tmp_path / "photos")
    )
    assert number(found, "ssim", "sketch")["value"] == pytest.approx(1, abs=1e-5)
    assert number(found, "fd_text_image", "sketch")["value"] == pytest.approx(0, abs=1e-6)
    assert number(found, "ssim", "sketch")["protocol"]["steps"] is None


def test_a_broken_picture_among_many(root, tmp_path):
    pictures = copies(root, tmp_path / "photos")
    broken = sorted(pictures.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    found = evaluate(root / "faces", tmp_path / "out", protocol_of(root, **FEW), images=pictures)
    assert [fault["file"] for fault in found["faults"]] == [str(broken)]
    assert {number["n"] for number in found["numbers"]} == {COUNT - 1}
    assert number(found, "ssim", "sketch")["value"] == pytest.approx(1, abs=1e-5)
    write_report(found, tmp_path / "out")  # the page leaves its place empty
    assert broken.name in (tmp_path / "out" / "report.md").read_text()


def test_mismatched_sets(root, tmp_path):
    pictures = copies(root, tmp_path / "photos")
    files = sorted(pictures.iterdir())
    files[0].rename(pictures / "someone.png")
    with pytest.raises(InputError, match=r"belong to no face of .* such as someone"):
        evaluate(root / "faces", tmp_path / "out", protocol_of(root, **FEW), images=pictures)
    (pictures / "someone.png").unlink()
    with pytest.raises(InputError, match=f"no picture of 1 of {COUNT} faces.*{files[0].stem}"):
        evaluate(root / "faces", tmp_path / "out", protocol_of(root, **FEW), images=pictures)
    found = evaluate(root / "faces", tmp_path / "out", protocol_of(root, **FEW, count=COUNT - 1), images=pictures)
    assert number(found, "ssim", "sketch")["n"] == COUNT - 1
    with pytest.raises(InputError, match="holds no pictures"):
        evaluate(root / "faces", tmp_path / "out", protocol_of(root, **FEW), images=tmp_path / "absent")
    with pytest.raises(InputError, match="--images holds one set"):
        evaluate(root / "faces", tmp_path / "out", protocol_of(root), images=pictures)


def test_faces_that_lack_a_condition_are_left_out(root, tmp_path):
    lines = [json.loads(line) for line in (root / "faces" / "train" / "metadata.jsonl").read_text().splitlines()]
    del lines[2]["mask_file_name"]
    lines[3]["text"] = []
    folder = tmp_path / "faces"
    folder.mkdir()
    for name in ("images", "masks", "sketches", "keypoints"):
        (folder / name).mkdir()
        for file in (root / "faces" / "train" / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    faces, notes = read_faces(folder, protocol_of(root))
    assert [face.number for face in faces] == [0, 1, *range(4, COUNT)]  # the seed is the row, whoever is left out
    assert notes == ["1 faces without a caption were left out", "1 faces without a mask were left out"]
    assert faces[1].another == faces[2].conditions


# Comparison


def test_comparison_knows_better_from_same(root, tmp_path):
    made = {}
    for name, pictures in (("good", copies), ("bad", noise)):
        evaluate(
            root / "faces", tmp_path / name, protocol_of(root, **FEW), images=pictures(root, tmp_path / f"{name}-p")
        )
        made[name] = read_evaluation(tmp_path / name)
    found = compare_evaluations(made)
    by_metric = {entry["metric"]: entry for entry in found["differences"]}
    assert {name for name, entry in by_metric.items() if entry["better"] == "good"} >= {"ssim", "edge_f_score"}
    assert by_metric["ssim"]["value"] < 0  # bad minus good
    assert by_metric["ssim"]["low"] <= by_metric["ssim"]["value"] <= by_metric["ssim"]["high"]
    same = compare_evaluations({"good": made["good"], "again": made["good"]})
    assert not any(entry["significant"] for entry in same["differences"])


def test_other_protocols_are_refused(root, results, tmp_path):
    metrics = ("ssim", "clip_score")
    settings = protocol_of(root, steps=1, seeds=2, metrics=metrics)
    evaluate(root / "faces", tmp_path / "fewer", settings, pipeline=tiny_pipeline(), model="t")
    both = {"two": read_evaluation(root / "first"), "one": read_evaluation(tmp_path / "fewer")}
    with pytest.raises(InputError, match="cannot be compared: steps is 2 in two and 1 in one"):
        compare_evaluations(both)
    assert compare_evaluations(both, allow=("steps",))["differences"]
    fewer = protocol_of(root, seeds=2, count=COUNT - 1, metrics=metrics)
    evaluate(root / "faces", tmp_path / "faces", fewer, pipeline=tiny_pipeline(), model="t")
    with pytest.raises(InputError, match="cannot be compared: faces is"):
        compare_evaluations({"two": read_evaluation(root / "first"), "faces": read_evaluation(tmp_path / "faces")})
    with pytest.raises(InputError, match="no finished evaluation"):
        read_evaluation(tmp_path)


# Plug-ins, report, command line


class Judge(BaseHTTPRequestHandler):
    """Answers 0.25 to whoever sends a picture and a caption."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, picture = body["messages"][0]["content"]
        good = text["text"].strip() and picture["image_url"]["url"].startswith("data:image/png;base64,")
        answer = json.dumps({"choices": [{"message": {"content": "Score: 0.25" if good else "?"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


def test_llm_score(root, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    settings = protocol_of(root, metrics=("llm_score",), given=("none",), count=3, judge=address, judge_model="m")
    try:
        found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
        assert number(found, "llm_score", "none")["value"] == 0.25
    finally:
        server.shutdown()
        server.server_close()
    found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    assert number(found, "llm_score", "none")["value"] == 0.25  # from what is kept
    other = protocol_of(root, metrics=("llm_score",), given=("none",), count=4, judge=address, judge_model="m")
    found = evaluate(root / "faces", tmp_path, other, pipeline=tiny_pipeline(), model="t")
    assert "does not answer" in found["missing"][0]["why"]  # and nothing is kept of it


def test_published_networks(root, tmp_path):
    """CLIP and DINOv2 as transformers saves them, at tiny size."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    CLIPVisionModelWithProjection(clip.config.vision_config).save_pretrained(tmp_path / "large")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=224, patch_size=56, **sizes)).save_pretrained(tmp_path / "dino")
    metrics = ("clip_score", "cmmd", "fd_dinov2", "precision", "recall")
    folders = {"text_image": tmp_path / "clip", "clip_large": tmp_path / "large", "dinov2": tmp_path / "dino"}
    settings = protocol_of(root, metrics=metrics, given=("mask",), **{name: str(to) for name, to in folders.items()})
    found = evaluate(root / "faces", tmp_path / "out", settings, images=copies(root, tmp_path / "photos"))
    assert found["missing"] == []
    assert number(found, "cmmd", "mask")["value"] == pytest.approx(0, abs=1e-6)
    assert number(found, "fd_dinov2", "mask")["value"] == pytest.approx(0, abs=1e-6)
    assert number(found, "precision", "mask")["value"] == number(found, "recall", "mask")["value"] == 1
    assert -100 <= number(found, "clip_score", "mask")["value"] <= 100
    gone = protocol_of(root, metrics=("cmmd",), given=("mask",), clip_large=str(tmp_path / "absent"))
    found = evaluate(root / "faces", tmp_path / "out", gone, images=tmp_path / "photos")
    assert "neither a folder nor could it be downloaded" in found["missing"][0]["why"]


def test_report(root, results):
    page = (root / "first" / "report.html").read_text()
    assert "<svg" in page
    assert page.count("data:image/webp;base64,") > COUNT
    assert "<script" not in page
    assert 'src="http' not in page
    assert "MMFace-DiT (F)" in page
    told = (root / "first" / "report.md").read_text()
    assert "| Mask: pixel accuracy ↑ | 12 |" in told
    assert "not comparable" in told
    assert "extractor" not in published_tables()[0]
    for table in published_tables():
        assert all(len(row) == 1 + len(table["columns"]) for row in table["rows"])
        assert table["source"].startswith("arXiv ")


def test_metrics_are_whole():
    for name, metric in METRICS.items():
        assert sum(way is not None for way in (metric.values, metric.distance, metric.rounds)) == 1, name


def test_command_line(root, tmp_path, capsys):
    judges = [f"face_parser={root}/parser", f"text_image={root}/pair"]
    common = [*judges, "metrics=edge_f_score,ssim", "given=mask", "count=4", "draws=100"]
    out = tmp_path / "out"
    assert run("evaluate", root / "model", root / "faces", *common, "steps=1", "--out", out) == 0
    told = capsys.readouterr().out
    assert "| Photograph: SSIM ↑ | 4 |" in told
    assert {"results.json", "report.md", "report.html"} <= {path.name for path in out.iterdir()}
    sources = [out, f"{root}/model@steps=2", *common]
    assert run("compare", *sources, "--faces", root / "faces", "--out", tmp_path / "compared") == 0
    assert "no significant difference" in capsys.readouterr().out
    assert (tmp_path / "compared" / "comparison.html").is_file()
    (tmp_path / "p.toml").write_text("count = 4\nsteeps = 2\n")
    for arguments, words in (
        (["evaluate", root / "model", "--out", tmp_path / "x"], "it needs MODEL FACES"),
        (["evaluate", root / "model", root / "faces", "count=0", "--out", tmp_path / "x"], "count is 0"),
        (["evaluate", root / "model", root / "faces", "given=hat", "--out", tmp_path / "x"], "condition 'hat'"),
        (["evaluate", root / "model", root / "absent", "--out", tmp_path / "x"], "metadata.jsonl"),
        (["evaluate", root / "model", root / "faces", "--protocol", tmp_path / "p.toml", "--out", out], "'steeps'"),
        (["compare", out, "--out", tmp_path / "x"], "needs two"),
        (["compare", out, root / "model", "--out", tmp_path / "x"], "name --faces"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_missing_is_bad_input():
    assert issubclass(Missing, InputError)
