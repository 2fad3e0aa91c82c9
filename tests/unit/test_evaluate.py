"""Evaluation from faces to a report, with tiny networks: files, numbers, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp

from builders import randomise, run, tiny_clip, tiny_face_parser, tiny_pipeline, tiny_tokenizer
from likeness.cli import main
from likeness.data.folder import read_folder
from likeness.encoders.text_image import AttributeHead, save_attribute_head
from likeness.evaluate.compare import Evaluation, compare_evaluations, difference, read_evaluation
from likeness.evaluate.config import Protocol
from likeness.evaluate.evaluation import evaluate
from likeness.evaluate.faces import faces_hash, read_faces
from likeness.evaluate.features import Extractor, Missing, key_of
from likeness.evaluate.generate import own_first
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.numbers import by_class
from likeness.evaluate.page import write_report
from likeness.evaluate.plugins import ask, score_in
from likeness.evaluate.report import published_tables, rounded
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


def test_a_changed_folder_is_made_anew(root, tmp_path):
    """Another caption, mask or row gives another portrait, another photograph another ceiling; the rest stays."""
    shutil.copytree(root / "faces" / "train", tmp_path / "faces")
    settings = protocol_of(root, given=("mask",), metrics=("ssim",))
    evaluate(tmp_path / "faces", tmp_path / "out", settings, pipeline=tiny_pipeline(), model="t")
    made, ceiling = tmp_path / "out" / "pictures" / "mask" / "0", tmp_path / "out" / "pictures" / "ceiling"
    rows = read_folder(tmp_path / "faces")
    names = [row["file_name"].stem for row in rows]
    before = {name: ((made / f"{name}.png").read_bytes(), (ceiling / f"{name}.png").read_bytes()) for name in names}
    times = {name: (made / f"{name}.png").stat().st_mtime_ns for name in names}
    lines = [json.loads(line) for line in (tmp_path / "faces" / "metadata.jsonl").read_text().splitlines()]
    lines[0]["text"][0] = "somebody else"
    lines[4], lines[5] = lines[5], lines[4]
    (tmp_path / "faces" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copy(rows[2]["mask_file_name"], rows[1]["mask_file_name"])
    rows[3]["mask_file_name"].write_text("no mask")
    shutil.copy(rows[7]["file_name"], rows[6]["file_name"])
    found = evaluate(tmp_path / "faces", tmp_path / "out", settings, pipeline=tiny_pipeline(), model="t")
    assert names[3] in {fault["file"] for fault in found["faults"]}
    assert number(found, "ssim", "mask")["n"] == COUNT - 1  # what cannot be made anew is not measured as it was
    for row, name in enumerate(names):
        if row != 3:
            assert ((made / f"{name}.png").read_bytes() != before[name][0]) == (row in (0, 1, 4, 5)), row
            assert ((made / f"{name}.png").stat().st_mtime_ns != times[name]) == (row in (0, 1, 4, 5)), row
        assert ((ceiling / f"{name}.png").read_bytes() != before[name][1]) == (row == 6), row


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
        assert (found["protocol"]["device"], found["protocol"]["dtype"]) == ("cpu", "float32")
        assert found["protocol"]["n"] == found["n"] <= COUNT
        assert found["low"] - 1e-6 <= found["value"] <= found["high"] + 1e-6, found
    assert number(results, "pixel_accuracy", "mask")["protocol"]["guidance_scale"] == 2.0  # the checkpoint's own
    assert len(number(results, "pixel_accuracy", "mask")["by_seed"]) == 2
    assert number(results, "pixel_accuracy", "mask", "another")
    assert number(results, "ssim", "ceiling")
    classes = {entry["class"]: entry for entry in results["classes"]["mask"]}
    assert set(classes) >= {"skin", "hair"}
    assert classes["skin"]["n"] == COUNT  # faces, of which each has two portraits


def test_classes_of_what_could_not_be_read():
    """A round without one readable picture has values of no form; two rounds are one mask a face."""
    unread, read = np.full((3, 1), np.nan), np.zeros((3, 2, 19, 3))
    read[:, :, 1] = (4, 8, 6)
    read[0] = np.nan
    assert by_class([unread]) == []
    (skin,) = by_class([read, unread, read])
    assert (skin["class"], skin["n"], skin["iou"], skin["shown"]) == ("skin", 2, 0.4, 1.0)


def test_attributes_belong_to_the_faces(root):
    """Whoever edits attributes gets new answers about them, and no comparison with the old."""
    faces, _ = read_faces(root / "faces", protocol_of(root))
    edited = [dataclasses.replace(faces[0], attributes={**faces[0].attributes, "hat": "red"}), *faces[1:]]
    extractor = Extractor(name="e", what="", hash="", look=lambda pictures, faces: np.zeros((len(pictures), 1)))
    files = [face.photo for face in faces]
    assert faces_hash(edited) != faces_hash(faces)
    assert key_of(extractor, files, edited, 32) != key_of(extractor, files, faces, 32)


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
    protocol = number(found, "nearest_training", "none")["protocol"]
    assert protocol["train_n"] == COUNT
    write_synthetic(tmp_path / "faces", COUNT, 32, seed=1)  # as many faces, and the folder has the same name
    other = dataclasses.replace(settings, train=str(tmp_path / "faces"))
    again = evaluate(root / "faces", tmp_path / "out", other, images=pictures)
    assert number(again, "nearest_training", "none")["protocol"]["train"] != protocol["train"]
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
    both = {"two": read_evaluation(root / "first"), "faces": read_evaluation(tmp_path / "faces")}
    with pytest.raises(InputError, match=r"have other faces \(12 and 11 of them"):
        compare_evaluations(both, allow=("faces",))
    with pytest.raises(InputError, match="no finished evaluation"):
        read_evaluation(tmp_path)


def test_settings_may_differ_by_their_own_names(root, results, tmp_path):
    """Size, caption and judge go by other names in the protocol of a number; each set has its own photographs."""
    shutil.copytree(root / "pair", tmp_path / "pair")
    randomise(tiny_clip()).save_pretrained(tmp_path / "pair" / "clip")
    few = {"seeds": 2, "given": ("mask",), "metrics": ("fd_text_image", "ssim")}
    changes = {"larger": {"size": 48}, "other": {"caption": "longest", "text_image": str(tmp_path / "pair")}}
    for name, own in changes.items():
        shutil.copytree(root / "first" / "pictures", tmp_path / name / "pictures")
        evaluate(root / "faces", tmp_path / name, protocol_of(root, **few, **own), pipeline=tiny_pipeline(), model="t")
        both = {"first": read_evaluation(root / "first"), name: read_evaluation(tmp_path / name)}
        for setting in own:
            with pytest.raises(InputError, match="cannot be compared"):
                compare_evaluations(both, allow=[*(set(own) - {setting})])
        found = compare_evaluations(both, allow=tuple(own))
        apart = {entry["metric"]: entry["value"] for entry in found["differences"]}
        values = {entry["metric"]: entry["values"] for entry in found["values"]}["fd_text_image"]
        assert apart["fd_text_image"] == pytest.approx(values[name]["value"] - values["first"]["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("apart", "p"),
    [
        ([1.0, 1.0], 0.5),  # as often as not two faces differ the same way
        ([1.0, 1.1, 0.9, 1.0, 1.0], 2**-4),
        ([1.0, 2.0, -0.5, 0.3, 0.2], ttest_1samp([1.0, 2.0, -0.5, 0.3, 0.2], 0).pvalue),
        ([0.0] * 6 + [1.0] * 4, 2**-3),
        ([0.0, 0.0], 1.0),
    ],
)
def test_few_faces_decide_little(apart, p):
    scores = [{"ssim/none": np.zeros(len(apart))}, {"ssim/none": np.array(apart)}]
    found = difference(METRICS["ssim"], "ssim", "none", *(Evaluation({}, own) for own in scores))
    assert found["p"] == pytest.approx(p, abs=1e-4)


# Plug-ins, report, command line


class Judge(BaseHTTPRequestHandler):
    """Answers 0.25 to whoever sends a picture and a caption, and nothing about nobody."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, picture = body["messages"][0]["content"]
        good = text["text"].strip() and picture["image_url"]["url"].startswith("data:image/png;base64,")
        told = "Score: 0.25" if good else "?"
        told = None if text["text"].endswith("nobody") else told  # a refusal
        answer = json.dumps({"choices": [{"message": {"content": told}}]}).encode()
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
        assert np.isnan(ask(address, "m", np.zeros((8, 8, 3), np.uint8), "nobody"))
    finally:
        server.shutdown()
        server.server_close()
    found = evaluate(root / "faces", tmp_path, settings, pipeline=tiny_pipeline(), model="t")
    assert number(found, "llm_score", "none")["value"] == 0.25  # from what is kept
    other = protocol_of(root, metrics=("llm_score",), given=("none",), count=4, judge=address, judge_model="m")
    found = evaluate(root / "faces", tmp_path, other, pipeline=tiny_pipeline(), model="t")
    assert "does not answer" in found["missing"][0]["why"]  # and nothing is kept of it


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("0.7", 0.7),
        ("Score: 1", 1.0),
        ("-0.5", None),
        ("I rate this 1 portrait 0.3", None),
        ("8/10", None),
        ("?", None),
    ],
)
def test_one_number_is_a_score(answer, score):
    assert score_in(answer) == score if score is not None else np.isnan(score_in(answer))


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
    assert "| MMFace-DiT (F) | 16.63 | 0.34 | 0.53 |" in told  # with the digits they are printed with
    assert "| DDGI | 56.57 | 0.43 |" in told
    assert "not comparable" in told
    assert "extractor" not in published_tables()[0]
    for table in published_tables():
        assert all(len(row) == 1 + len(table["columns"]) for row in table["rows"])
        assert table["source"].startswith("arXiv ")


def test_small_numbers_are_not_rounded_away():
    assert [rounded(value) for value in (3e-5, -0.0002, 0.0, 0.25, 31.6942)] == [
        "3.0e-05", "-2.0e-04", "0.0000", "0.2500", "31.69",
    ]  # fmt: skip
    assert rounded(0.5, "+") == "+0.5000"


def test_metrics_are_whole():
    for name, metric in METRICS.items():
        assert sum(way is not None for way in (metric.values, metric.distance, metric.rounds)) == 1, name


def test_command_line(root, tmp_path, capsys):
    judges = [f"face_parser={root}/parser", f"text_image={root}/pair"]
    common = [*judges, "metrics=edge_f_score,ssim", "given=mask", "count=4", "draws=100"]
    out = tmp_path / "out"
    assert run("evaluate", "--out", out, root / "model", root / "faces", *common, "--dtype", "fp32", "steps=1") == 0
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
        (["compare", out, f"{root}/model@count=3", "--faces", root, "--out", tmp_path / "x"], "other faces"),
        (["compare", out, root / "model", "--out", tmp_path / "x"], "name --faces"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_missing_is_bad_input():
    assert issubclass(Missing, InputError)
