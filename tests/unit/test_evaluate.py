"""Evaluation from faces to a report, with tiny networks."""

from __future__ import annotations

import dataclasses
import json
import os
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
from likeness.annotators.face_parser import parse_faces
from likeness.chat import Meter, Rejected, open_endpoint
from likeness.cli import main
from likeness.data.folder import read_folder
from likeness.encoders.text_image import AttributeHead, save_attribute_head
from likeness.evaluate import extractors
from likeness.evaluate.aggregate import class_scores, measure
from likeness.evaluate.compare import compare_evaluations, difference_test
from likeness.evaluate.external import parse_score, query_llm
from likeness.evaluate.faces import faces_hash, read_faces
from likeness.evaluate.features import Extractor, MissingError, cache_key, file_digest
from likeness.evaluate.images import work_order
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.report import comparison_table, format_number, published_tables, write_report
from likeness.evaluate.results import Evaluation, Measurement, Results, read_evaluation
from likeness.evaluate.run import evaluate
from likeness.prepare.synthetic import write_synthetic
from likeness.types import InputError

COUNT = 12
COMMON = {"given": ("mask", "none"), "steps": 2, "choices": 4, "bootstrap_samples": 200}
FEW = {"given": ("sketch",), "metrics": ("edge_f_score", "ssim", "fd_text_image")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Synthetic faces, a checkpoint, a face parser and a text-image pair with an attribute head."""
    root = tmp_path_factory.mktemp("evaluate")
    write_synthetic(root / "faces", COUNT, 32)
    tiny_pipeline().save_pretrained(root / "model")
    tiny_face_parser().save_pretrained(root / "parser" / "model")
    tiny_clip().save_pretrained(root / "pair" / "clip")
    tiny_tokenizer().save_pretrained(root / "pair" / "tokenizer")
    rows = [row["attributes"] for row in read_folder(root / "faces")]
    name = "hair_color" if any("hair_color" in attributes for attributes in rows) else next(iter(rows[0]))
    values = sorted({str(attributes[name]) for attributes in rows if name in attributes})
    torch.manual_seed(0)
    head = AttributeHead(torch.randn(len(values), 16), torch.zeros(len(values)), {name: values})
    save_attribute_head(head, root / "pair")
    return root


def protocol_of(root: Path, **changes) -> Protocol:
    networks = {"face_parser": str(root / "parser"), "text_image": str(root / "pair")}
    return Protocol(**{**COMMON, **networks, **changes})


def evaluate_model(root: Path, out: Path, faces: Path | None = None, **changes) -> Results | None:
    """Evaluate the tiny model."""
    return evaluate(faces or root / "faces", out, protocol_of(root, **changes), pipeline=tiny_pipeline(), model="t")


def evaluate_images(root: Path, out: Path, images: Path, **changes) -> Results:
    """Evaluate existing images."""
    results = evaluate(root / "faces", out, protocol_of(root, **{"steps": None, **changes}), images=images)
    assert results is not None
    return results


@pytest.fixture(scope="module")
def results(root) -> Results:
    """An evaluation of the tiny model in root/first, two images per face and condition set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        found = evaluate_model(root, root / "first", seeds=2)
    assert found is not None
    write_report(found, root / "first")
    return found


def number(results: Results, metric: str, given: str, against: str = "own") -> Measurement:
    (found,) = [n for n in results.numbers if (n.metric, n.given, n.against) == (metric, given, against)]
    return found


# --- Generation


def test_work_order_covers_all_faces():
    assert work_order(7, 1, 3) == [1, 4, 6, 5, 3, 2, 0]
    for world in (1, 2, 5):
        for rank in range(world):
            assert sorted(work_order(7, rank, world)) == list(range(7))


def test_files_do_not_depend_on_processes_and_runs_resume(root, results, tmp_path, monkeypatch):
    images = {path.relative_to(root / "first"): path for path in (root / "first" / "pictures").rglob("*.png")}
    assert len(images) == 2 * 2 * COUNT + COUNT  # two condition sets, two seeds, and the ceiling
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert evaluate_model(root, tmp_path, seeds=2) is None
    for name, path in images.items():
        assert (tmp_path / name).read_bytes() == path.read_bytes(), name
    deleted, kept = tmp_path / list(images)[3], tmp_path / list(images)[5]
    content, time = deleted.read_bytes(), kept.stat().st_mtime_ns
    deleted.unlink()
    monkeypatch.setenv("RANK", "1")
    evaluate_model(root, tmp_path, seeds=2)
    assert deleted.read_bytes() == content
    assert kept.stat().st_mtime_ns == time
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK is 3"):
        evaluate_model(root, tmp_path, seeds=2)


def test_images_equal_those_of_generate(root, results, tmp_path):
    """Seed k, first caption, the face's mask: the command line generates the same image."""
    row = read_folder(root / "faces")[4]
    options = ["--mask", str(row["mask_file_name"]), "--model", str(root / "model"), "--steps", "2", "--seed", "4"]
    main(["generate", row["text"][0], *options, "--out", str(tmp_path / "one.png")])
    file = root / "first" / "pictures" / "mask" / "0" / f"{row['file_name'].stem}.png"
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(tmp_path / "one.png")))


def test_changed_inputs_are_regenerated(root, tmp_path):
    """A new caption, mask or row regenerates the image, a new photograph the ceiling; other files are kept."""
    shutil.copytree(root / "faces" / "train", tmp_path / "faces")
    settings = {"faces": tmp_path / "faces", "given": ("mask",), "metrics": ("ssim",)}
    evaluate_model(root, tmp_path / "out", **settings)
    images, ceiling = tmp_path / "out" / "pictures" / "mask" / "0", tmp_path / "out" / "pictures" / "ceiling"
    rows = read_folder(tmp_path / "faces")
    names = [row["file_name"].stem for row in rows]
    before = {name: ((images / f"{name}.png").read_bytes(), (ceiling / f"{name}.png").read_bytes()) for name in names}
    times = {name: (images / f"{name}.png").stat().st_mtime_ns for name in names}
    lines = [json.loads(line) for line in (tmp_path / "faces" / "metadata.jsonl").read_text().splitlines()]
    lines[0]["text"][0] = "somebody else"
    lines[4], lines[5] = lines[5], lines[4]
    (tmp_path / "faces" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copy(rows[2]["mask_file_name"], rows[1]["mask_file_name"])
    rows[3]["mask_file_name"].write_text("not a mask")
    shutil.copy(rows[7]["file_name"], rows[6]["file_name"])
    os.utime(rows[6]["file_name"], (1e9, 1e9))  # older than its ceiling
    found = evaluate_model(root, tmp_path / "out", **settings)
    assert names[3] in found.faults
    assert number(found, "ssim", "mask").n == COUNT - 1  # the outdated image is not measured
    for row, name in enumerate(names):
        if row != 3:
            assert ((images / f"{name}.png").read_bytes() != before[name][0]) == (row in (0, 1, 4, 5)), row
            assert ((images / f"{name}.png").stat().st_mtime_ns != times[name]) == (row in (0, 1, 4, 5)), row
        assert ((ceiling / f"{name}.png").read_bytes() != before[name][1]) == (row == 6), row


def test_other_sampling_settings_are_rejected(root, results):
    with pytest.raises(InputError, match=r"steps was 2 and is now 3"):
        evaluate_model(root, root / "first", steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "number of steps is 0"),
        ({"train": "absent"}, "absent"),
        ({"mask_model": "mask-mini", "given": ("mask",)}, "mask_model is mask-mini, but has no effect"),
        ({"mask_model": "mmface-mini"}, "does not generate masks"),
    ],
)
def test_rejected_settings_leave_nothing(root, tmp_path, settings, message):
    """They are found before the first image; the corrected command can use the same folder."""
    with pytest.raises(InputError, match=message):
        evaluate_model(root, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_photographs_that_are_not_square(root, tmp_path):
    """One of them is a fault, also if it is the first, and its former ceiling is deleted; several are an error before
    any image is generated.
    """
    shutil.copytree(root / "faces" / "train", tmp_path / "faces")
    photos = [row["file_name"] for row in read_folder(tmp_path / "faces")]
    settings = {"faces": tmp_path / "faces", "given": ("mask",), "metrics": ("ssim",)}
    assert number(evaluate_model(root, tmp_path / "out", **settings), "ssim", "ceiling").n == COUNT
    Image.new("RGB", (32, 40)).save(photos[0])
    found = evaluate_model(root, tmp_path / "out", **settings)
    assert photos[0].stem in found.faults
    assert {number(found, "ssim", given).n for given in ("mask", "ceiling")} == {COUNT - 1}
    assert not (tmp_path / "out" / "pictures" / "ceiling" / f"{photos[0].stem}.png").exists()
    for photo in photos:
        Image.new("RGB", (32, 40)).save(photo)
    with pytest.raises(InputError, match="None of the 12 images"):
        evaluate_model(root, tmp_path / "other", **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("given", [(), ("mask", "mask"), ("mask+sketch", "sketch+mask"), ("mask+mask",)])
def test_condition_sets_are_different(given):
    with pytest.raises(InputError, match="name each set of conditions once"):
        Protocol(given=given)


# --- Numbers


def test_numbers_have_protocol_and_interval(results):
    offline = {"pixel_accuracy", "mean_iou", "edge_f_score", "clip_score", "retrieval", "attribute_recall", "ssim"}
    offline |= {"fd_text_image", "kid_text_image", "precision_text_image", "diversity_of_seeds"}
    assert offline <= {found.metric for found in results.numbers}
    facts = {"split", "faces", "n", "resolution", "file_format", "extractor", "extractor_hash", "seeds", "steps"}
    facts |= {"guidance_scale", "given", "caption", "model", "fingerprint"}
    for found in results.numbers:
        assert facts <= set(found.protocol)
        assert (found.protocol["device"], found.protocol["dtype"]) == ("cpu", "float32")
        assert found.protocol["n"] == found.n <= COUNT
        assert found.low - 1e-6 <= found.value <= found.high + 1e-6, found
    accuracy = number(results, "pixel_accuracy", "mask")
    assert accuracy.protocol["guidance_scale"] == 2.0  # the checkpoint's default
    assert len(accuracy.by_seed) == 2
    assert number(results, "pixel_accuracy", "mask", "another")
    assert number(results, "ssim", "ceiling")
    classes = {entry.name: entry for entry in results.classes["mask"]}
    assert set(classes) >= {"skin", "hair"}
    assert classes["skin"].n == COUNT  # faces, each with two images
    assert "too large" in number(results, "fd_text_image", "mask").warning
    assert "too high" in number(results, "precision_text_image", "mask").warning
    assert accuracy.warning == ""


def test_faces_are_parsed_once(root, tmp_path, monkeypatch):
    """Complete faces are counted in the label maps that are scored against the masks."""
    parsed = []

    def parse_and_keep(*arguments, **options):
        parsed.extend(parse_faces(*arguments, **options))
        return parsed[-len(arguments[1]) :]

    monkeypatch.setattr(extractors, "parse_faces", parse_and_keep)
    monkeypatch.setattr(extractors, "is_complete_face", lambda labels: labels[0, 0] % 2 == 0)  # tiny networks draw none
    found = evaluate_model(root, tmp_path, given=("mask",), metrics=("pixel_accuracy", "complete_faces"))
    assert len(parsed) == 2 * COUNT  # generated images, and those of the ceiling
    expected = np.mean([labels[0, 0] % 2 == 0 for labels in parsed[:COUNT]])
    assert number(found, "complete_faces", "mask").value == pytest.approx(expected)
    assert number(found, "pixel_accuracy", "mask").n == COUNT


def test_results_json(root, results):
    """Its keys, and what a comparison reads."""
    content = json.loads((root / "first" / "results.json").read_text())
    assert set(content) == {
        "numbers", "missing", "classes", "nearest", "extractors", "likeness", "protocol", "settings", "faults",
        "notes", "faces", "images",
    }  # fmt: skip
    keys = ["metric", "given", "against", "value", "low", "high", "n", "by_seed", "warning", "protocol"]
    assert list(content["numbers"][0]) == keys
    assert set(content["classes"]["mask"][0]) == {"name", "n", "iou", "shown"}
    assert set(content["missing"][0]) == {"metric", "why"}
    stored = read_evaluation(root / "first")
    assert stored.numbers == results.numbers
    assert stored.faces == [face["name"] for face in results.faces]
    assert stored.scores.keys() == results.scores.keys()


def test_a_set_without_scores_does_not_hide_the_others():
    outputs = {"mask": [np.array([[1.0], [3.0]])], "none": [np.full((2, 1), np.nan)]}
    (found,), scores, notes = measure("sharpness", METRICS["sharpness"], outputs, {}, Protocol())
    assert (found.given, found.value, list(scores)) == ("mask", 2.0, ["sharpness/mask"])
    assert notes == [
        "sharpness of none was not measured: Only 0 of 2 images can be scored, at least 2 are needed: the faces lack "
        "what is measured, or are too few"
    ]
    with pytest.raises(MissingError, match="Only 0 of 2"):
        measure("sharpness", METRICS["sharpness"], {"none": outputs["none"]}, {}, Protocol())


def test_class_scores_without_readable_images():
    """The output of a seed without readable images has another shape. Two seeds count as one mask per face."""
    unreadable, readable = np.full((3, 1), np.nan), np.zeros((3, 2, 19, 3))
    readable[:, :, 1] = (4, 8, 6)
    readable[0] = np.nan
    assert class_scores([unreadable]) == []
    (skin,) = class_scores([readable, unreadable, readable])
    assert (skin.name, skin.n, skin.iou, skin.shown) == ("skin", 2, 0.4, 1.0)


def test_attributes_are_part_of_the_hashes(root):
    faces, _ = read_faces(root / "faces", protocol_of(root))
    edited = [dataclasses.replace(faces[0], attributes={**faces[0].attributes, "hat": "red"}), *faces[1:]]
    extractor = Extractor(name="e", description="", hash="", extract=lambda images, faces: np.zeros((len(images), 1)))
    files = [face.photo for face in faces]
    assert faces_hash(edited) != faces_hash(faces)
    assert cache_key(extractor, files, edited, 32, file_digest) != cache_key(extractor, files, faces, 32, file_digest)


def test_contents_are_part_of_the_key_of_the_cache(root, tmp_path):
    faces, _ = read_faces(root / "faces", protocol_of(root))
    extractor = Extractor(name="e", description="", hash="", extract=lambda images, faces: np.zeros((len(images), 1)))
    file = tmp_path / "image.bin"
    keys = set()
    for content in (b"one", b"two"):  # of equal size, and changed at the same time
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))
        keys.add(cache_key(extractor, [file], faces[:1], 32, file_digest))
    assert len(keys) == 2
    odd = dataclasses.replace(faces[0], name="bad \udce9", caption="bad \udce9")  # not UTF-8
    assert cache_key(extractor, [file], [odd], 32, file_digest) not in keys


def test_attributes_that_are_a_list_of_names(root, tmp_path):
    """As in datasets of the Hugging Face Hub."""
    shutil.copytree(root / "faces" / "train", tmp_path / "faces")
    lines = [json.loads(line) for line in (tmp_path / "faces" / "metadata.jsonl").read_text().splitlines()]
    lines = [{**line, "attributes": ["Smiling"]} for line in lines]
    (tmp_path / "faces" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [face.attributes for face in read_faces(tmp_path / "faces", Protocol())[0]] == [{}] * COUNT


def test_damaged_caches_are_written_again(root, tmp_path):
    settings = {"given": ("none",), "metrics": ("ssim",), "count": 2}
    first = evaluate_model(root, tmp_path, **settings)
    for file in (tmp_path / "seen").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert evaluate_model(root, tmp_path, **settings).numbers == first.numbers


def test_the_input_size_is_part_of_the_hash_of_a_parser(root, tmp_path):
    """The same weights with images of another size are another extractor."""
    hashes = set()
    for size in (32, 64):
        network = tiny_face_parser()
        network.config.image_size = size
        network.save_pretrained(tmp_path / f"{size}")
        hashes.add(extractors.face_parser(Protocol(face_parser=str(tmp_path / f"{size}")), 32, "cpu").hash)
    assert len(hashes) == 2


def test_missing_metrics_say_what_to_provide(root, tmp_path):
    expected = {
        "fid": "pip install torch-fidelity",
        "lpips": "pip install lpips",
        "topiq": "pip install pyiqa",
        "llm_score": "llm_url=",
        "ms_ssim": "161",
        "keypoint_error": "landmarker=",
        "nearest_training": "train=",
        "diversity_of_seeds": "seeds=2",
        "fd_text_image": "3 images are too few",
        "retrieval": "fewer than one group of 4",
        "pixel_accuracy": "Folder absent does not exist",
    }
    few = {"given": ("none",), "count": 3}
    found = evaluate_model(root, tmp_path, metrics=(*expected, "clip_score"), face_parser="absent", **few)
    why = found.missing
    assert why.keys() == expected.keys()
    for metric, text in expected.items():
        assert text in why[metric]
    assert {entry.metric for entry in found.numbers} == {"clip_score"}  # the others are measured nevertheless
    assert {entry.n for entry in found.numbers} == {3}
    with pytest.raises(InputError, match="Unknown metric 'fidd'"):
        evaluate_model(root, tmp_path, metrics=("fidd",))


def test_training_photographs_are_their_own_nearest(root, tmp_path):
    settings = {"metrics": ("nearest_training",), "given": ("none",)}
    images = copy_photos(root, tmp_path / "photos")
    found = evaluate_images(root, tmp_path / "out", images, **settings, train=str(root / "faces"))
    assert number(found, "nearest_training", "none").value == pytest.approx(1, abs=1e-4)
    protocol = number(found, "nearest_training", "none").protocol
    assert protocol["train_n"] == COUNT
    assert [note for note in found.notes if f"{COUNT} of the photographs are also in {root / 'faces'}" in note]
    write_synthetic(tmp_path / "faces", COUNT, 32, seed=1)  # the same name and number of faces
    other = evaluate_images(root, tmp_path / "out", images, **settings, train=str(tmp_path / "faces"))
    assert number(other, "nearest_training", "none").protocol["train"] != protocol["train"]
    assert not [note for note in other.notes if "are also in" in note]
    assert len(found.nearest["none"]) == 8
    for neighbor in found.nearest["none"]:
        assert neighbor.cosine == pytest.approx(1, abs=1e-4)
        assert Path(neighbor.photo).stem == found.faces[neighbor.row]["name"]
    write_report(found, tmp_path / "out")
    assert "Nearest training photographs" in (tmp_path / "out" / "report.html").read_text()


# --- Images of any method


def copy_photos(root: Path, folder: Path) -> Path:
    """Images of a perfect method: the photographs."""
    folder.mkdir(parents=True)
    for row in read_folder(root / "faces"):
        Image.open(row["file_name"]).save(folder / f"{row['file_name'].stem}.png")
    return folder


def write_noise(root: Path, folder: Path) -> Path:
    """Images of a useless method."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for row in read_folder(root / "faces"):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row['file_name'].stem}.png")
    return folder


def test_perfect_images(root, tmp_path):
    found = evaluate_images(root, tmp_path / "out", copy_photos(root, tmp_path / "photos"), **FEW)
    assert number(found, "ssim", "sketch").value == pytest.approx(1, abs=1e-5)
    assert number(found, "fd_text_image", "sketch").value == pytest.approx(0, abs=1e-6)
    assert number(found, "ssim", "sketch").protocol.get("steps") is None


def test_one_unreadable_image(root, tmp_path):
    images = copy_photos(root, tmp_path / "photos")
    broken = sorted(images.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    found = evaluate_images(root, tmp_path / "out", images, **FEW)
    assert list(found.faults) == [str(broken)]
    assert {entry.n for entry in found.numbers} == {COUNT - 1}
    assert number(found, "ssim", "sketch").value == pytest.approx(1, abs=1e-5)
    write_report(found, tmp_path / "out")
    assert broken.name in (tmp_path / "out" / "report.md").read_text()
    assert '<img alt="unreadable">' in (tmp_path / "out" / "report.html").read_text()


def test_one_unreadable_mask(root, tmp_path):
    """It is missing for its own face, not for the face that it is the other mask of."""
    folder = tmp_path / "faces"
    shutil.copytree(root / "faces" / "train", folder)
    images = copy_photos(root, tmp_path / "photos")
    broken = Path(read_folder(folder)[3]["mask_file_name"])
    broken.write_bytes(broken.read_bytes()[:50])
    protocol = protocol_of(root, steps=None, given=("none",), metrics=("pixel_accuracy",))
    found = evaluate(folder, tmp_path / "out", protocol, images=images)
    assert {entry.n for entry in found.numbers if entry.against == "own"} == {COUNT - 1}
    assert len(found.faults) == 1


def test_images_must_match_faces(root, tmp_path):
    images = copy_photos(root, tmp_path / "photos")
    first = sorted(images.iterdir())[0]
    first.rename(images / "someone.png")
    with pytest.raises(InputError, match=r"do not match a face of .* such as someone"):
        evaluate_images(root, tmp_path / "out", images, **FEW)
    (images / "someone.png").unlink()
    with pytest.raises(InputError, match=f"no image of 1 of {COUNT} faces.*{first.stem}"):
        evaluate_images(root, tmp_path / "out", images, **FEW)
    found = evaluate_images(root, tmp_path / "out", images, **FEW, count=COUNT - 1)
    assert number(found, "ssim", "sketch").n == COUNT - 1
    with pytest.raises(InputError, match="contains no images"):
        evaluate_images(root, tmp_path / "out", tmp_path / "absent", **FEW)
    with pytest.raises(InputError, match="--images requires one condition set"):
        evaluate_images(root, tmp_path / "out", images)
    with pytest.raises(InputError, match="steps is 3, but has no effect: --images are finished"):
        evaluate_images(root, tmp_path / "out", images, **FEW, steps=3)


def test_the_ceiling_is_that_of_the_model(root, tmp_path):
    """Also if images of a method are measured again, with another autoencoder."""
    images, ceilings = copy_photos(root, tmp_path / "photos"), []
    for std in (0.05, 0.1):
        pipeline = tiny_pipeline()
        randomise(pipeline.vae, std)
        protocol = protocol_of(root, **FEW, steps=None)
        found = evaluate(root / "faces", tmp_path / "out", protocol, pipeline=pipeline, images=images)
        ceilings.append(number(found, "ssim", "ceiling").value)
    assert ceilings[0] != ceilings[1]


def test_faces_without_a_condition_are_skipped(root, tmp_path):
    folder = tmp_path / "faces"
    shutil.copytree(root / "faces" / "train", folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del lines[2]["mask_file_name"]
    lines[3]["text"] = []
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    faces, notes = read_faces(folder, protocol_of(root))
    assert [face.number for face in faces] == [0, 1, *range(4, COUNT)]  # seeds do not depend on skipped rows
    assert notes == ["1 faces without a caption were skipped", "1 faces without a mask were skipped"]
    assert faces[1].mismatched == faces[2].conditions


def test_faces_without_captions(root, tmp_path):
    """Text metrics are listed as not measured; a comparison carries that over, and withholds verdicts on few faces."""
    shutil.copytree(root / "faces" / "train", tmp_path / "faces")
    lines = [json.loads(line) for line in (tmp_path / "faces" / "metadata.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "text"} for line in lines]
    (tmp_path / "faces" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"given": ("none",), "metrics": ("clip_score", "retrieval", "sharpness", "precision_text_image")}
    for steps in (1, 2):
        found = evaluate_model(root, tmp_path / f"{steps}", tmp_path / "faces", **settings, steps=steps)
        assert found is not None
        assert found.protocol["n"] == COUNT
        assert {metric: "have no captions" in why for metric, why in found.missing.items()} == {
            "clip_score": True, "retrieval": True,
        }  # fmt: skip
    pair = {name: read_evaluation(tmp_path / name) for name in ("1", "2")}
    compared = compare_evaluations(pair, allow=("steps",))
    assert [note for note in compared.notes if note.startswith("Not measured: clip_score: The faces of")]
    assert [note for note in compared.notes if "precision on the text-image pair of 1, n = 12: too high" in note]
    by_metric = {found.metric: found for found in compared.differences}
    assert by_metric["sharpness"].p_corrected == by_metric["sharpness"].p  # the only test
    assert by_metric["precision_text_image"].p_corrected is None
    assert not by_metric["precision_text_image"].significant
    table = comparison_table(compared)
    assert [row[-1] for row in table.rows if "precision" in row[0]] == ["no verdict: needs 100 faces"]
    assert table.rows[-1][-1].startswith("no verdict")


# --- Comparison


def test_comparison_detects_differences(root, tmp_path):
    evaluations = {}
    for name, write in (("good", copy_photos), ("bad", write_noise)):
        evaluate_images(root, tmp_path / name, write(root, tmp_path / f"{name}-images"), **FEW)
        evaluations[name] = read_evaluation(tmp_path / name)
    by_metric = {found.metric: found for found in compare_evaluations(evaluations).differences}
    assert {name for name, found in by_metric.items() if found.better == "good"} >= {"ssim", "edge_f_score"}
    assert by_metric["ssim"].value < 0  # bad minus good
    assert by_metric["ssim"].low <= by_metric["ssim"].value <= by_metric["ssim"].high
    same = compare_evaluations({"good": evaluations["good"], "again": evaluations["good"]})
    assert not any(found.significant for found in same.differences)


def test_different_protocols_are_rejected(root, results, tmp_path):
    first = read_evaluation(root / "first")
    settings = {"seeds": 2, "metrics": ("ssim", "clip_score")}
    evaluate_model(root, tmp_path / "fewer", **settings, steps=1)
    pair = {"two": first, "one": read_evaluation(tmp_path / "fewer")}
    with pytest.raises(InputError, match=r"Cannot compare .*: steps is 2 in two and 1 in one"):
        compare_evaluations(pair)
    assert compare_evaluations(pair, allow=("steps",)).differences
    evaluate_model(root, tmp_path / "faces", **settings, count=COUNT - 1)
    pair = {"two": first, "faces": read_evaluation(tmp_path / "faces")}
    with pytest.raises(InputError, match=r"Cannot compare .*: faces is"):
        compare_evaluations(pair)
    with pytest.raises(InputError, match=r"two \(12 faces\) and faces \(11 faces\) have different"):
        compare_evaluations(pair, allow=("faces",))
    with pytest.raises(InputError, match="does not contain a finished evaluation"):
        read_evaluation(tmp_path)
    scores = tmp_path / "fewer" / "scores.npz"
    np.savez(scores, **{"ssim/mask": np.zeros(COUNT, np.float32)})
    with pytest.raises(InputError, match=r"scores\.npz has no '.*': run likeness evaluate again"):
        compare_evaluations({"two": first, "one": read_evaluation(tmp_path / "fewer")}, allow=("steps",))
    scores.write_bytes(scores.read_bytes()[:100])
    with pytest.raises(InputError, match="does not contain a finished evaluation"):
        read_evaluation(tmp_path / "fewer")


def test_allowed_differences(results):
    """A setting allows another extractor for its own metrics only; metrics of other versions are skipped."""
    names = ("ssim", "pixel_accuracy", "edge_f_score", "beauty")

    def evaluation(**hashes: str) -> Evaluation:
        facts = {name: {"n": COUNT, "extractor_hash": hashes.get(name, "same")} for name in names}
        numbers = [Measurement(name, "mask", "own", 0, 0, 0, COUNT, [], "", facts[name]) for name in names]
        return Evaluation(numbers, [], {f"{name}/mask": np.zeros(COUNT) for name in names})

    pair = {"one": evaluation(), "other": evaluation(pixel_accuracy="another")}
    for allow in ((), ("size",)):
        with pytest.raises(InputError, match="extractor_hash is same in one and another in other"):
            compare_evaluations(pair, allow=allow)
    found = compare_evaluations(pair, allow=("face_parser",))
    assert {difference.metric for difference in found.differences} == {"ssim", "pixel_accuracy", "edge_f_score"}
    assert "one has beauty, which this version does not have" in found.notes
    assert compare_evaluations({"one": evaluation(), "other": evaluation(edge_f_score="another")}, allow=("size",))
    with pytest.raises(InputError, match="Unknown part of a protocol 'stepz' in allow"):
        compare_evaluations(pair, allow=("stepz",))


@pytest.mark.parametrize("setting", ["size", "caption"])
def test_settings_may_differ_by_their_own_names(root, results, tmp_path, setting):
    """Size, caption and extractors have other names in the facts of a number; each set has its own photographs."""
    changes = {"size": 48} if setting == "size" else {"caption": "longest", "text_image": str(tmp_path / "pair")}
    shutil.copytree(root / "pair", tmp_path / "pair")
    randomise(tiny_clip()).save_pretrained(tmp_path / "pair" / "clip")
    shutil.copytree(root / "first" / "pictures", tmp_path / "other" / "pictures")
    settings = {"seeds": 2, "given": ("mask",), "metrics": ("fd_text_image", "ssim")}
    evaluate_model(root, tmp_path / "other", **settings, **changes)
    pair = {"first": read_evaluation(root / "first"), "other": read_evaluation(tmp_path / "other")}
    for name in changes:
        with pytest.raises(InputError, match="Cannot compare"):
            compare_evaluations(pair, allow=[*(set(changes) - {name})])
    found = compare_evaluations(pair, allow=tuple(changes))
    (difference,) = [difference.value for difference in found.differences if difference.metric == "fd_text_image"]
    values = found.values["fd_text_image", "mask"]
    assert difference == pytest.approx(values["other"].value - values["first"].value, rel=1e-4)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 1.0], 0.5),  # two random signs agree with probability 1/2
        ([1.0, 1.1, 0.9, 1.0, 1.0], 2**-4),
        ([1.0, 2.0, -0.5, 0.3, 0.2], ttest_1samp([1.0, 2.0, -0.5, 0.3, 0.2], 0).pvalue),
        ([0.0] * 6 + [1.0] * 4, 2**-3),
        ([0.0, 0.0], 1.0),
    ],
)
def test_p_of_few_faces(differences, p):
    scores = [{"ssim/none": np.zeros(len(differences))}, {"ssim/none": np.array(differences)}]
    found = difference_test("ssim", "none", *(Evaluation([], [], own) for own in scores))
    assert found["p"] == pytest.approx(p, abs=1e-4)


# --- External networks, report, command line


class Llm(BaseHTTPRequestHandler):
    """Scores any caption 0.25, but only every second request; does not score "nobody", and rejects "forbidden"."""

    requests = 0

    def do_POST(self):
        Llm.requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, image = body["messages"][0]["content"]
        valid = text["text"].strip() and image["image_url"]["url"].startswith("data:image/png;base64,")
        content = None if text["text"].endswith("nobody") else "Score: 0.25" if valid else "?"
        answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        rejected = 400 if text["text"].endswith("forbidden") else 200
        self.send_response(429 if Llm.requests % 2 else rejected)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


def test_addresses_with_credentials_are_rejected(tmp_path, capsys):
    """Results contain the address."""
    for url in ("http://me:hunter2@localhost/v1", "http://:hunter2@localhost/v1", "http://localhost/v1?key=hunter2"):
        assert run("evaluate", "mmface-mini", "faces", "metrics=llm_score", f"llm_url={url}", "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert "must be plain" in error
        assert "hunter2" not in error


def test_llm_score(root, tmp_path, monkeypatch):
    """A rate limit is waited for, a rejected question has no score, and a server that is gone is reported."""
    monkeypatch.setattr(Meter, "wait", lambda meter, seconds: None)
    server = HTTPServer(("127.0.0.1", 0), Llm)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    settings = {"metrics": ("llm_score",), "given": ("none",), "llm_url": url, "llm_model": "m"}
    faces, _ = read_faces(root / "faces", protocol_of(root))
    try:
        assert number(evaluate_model(root, tmp_path, count=3, **settings), "llm_score", "none").value == 0.25
        assert np.isnan(query_llm(open_endpoint(url, "m"), np.zeros((8, 8, 3), np.uint8), "nobody"))
        with pytest.raises(Rejected):
            query_llm(open_endpoint(url, "m"), np.zeros((8, 8, 3), np.uint8), "forbidden")
        llm = extractors.llm(protocol_of(root, **settings), 8, "cpu").extract
        images = [np.zeros((8, 8, 3), np.uint8)] * 2
        named = lambda *captions: [dataclasses.replace(faces[0], caption=caption) for caption in captions]  # noqa: E731
        assert np.isnan(llm(images, named("forbidden", "a man"))).tolist() == [[True], [False]]
        with pytest.raises(MissingError, match="m rejects all images"):  # not stored as an output
            llm(images, named("forbidden", "forbidden"))
    finally:
        server.shutdown()
        server.server_close()
    cached = evaluate_model(root, tmp_path, count=3, **settings)
    assert number(cached, "llm_score", "none").value == 0.25
    other = evaluate_model(root, tmp_path, count=4, **settings)
    assert "does not respond" in other.missing["llm_score"]  # the failure is not cached


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
def test_parse_score(answer, score):
    assert parse_score(answer) == score if score is not None else np.isnan(parse_score(answer))


def test_published_networks(root, tmp_path):
    """CLIP and DINOv2 as transformers saves them, at tiny size."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    CLIPVisionModelWithProjection(clip.config.vision_config).save_pretrained(tmp_path / "large")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=224, patch_size=56, **sizes)).save_pretrained(tmp_path / "dino")
    folders = {"text_image": tmp_path / "clip", "clip_large": tmp_path / "large", "dinov2": tmp_path / "dino"}
    settings = {name: str(folder) for name, folder in folders.items()} | {"given": ("mask",)}
    images = copy_photos(root, tmp_path / "photos")
    metrics = ("clip_score", "cmmd", "fd_dinov2", "precision", "recall")
    found = evaluate_images(root, tmp_path / "out", images, **settings, metrics=metrics)
    assert found.missing == {}
    for metric, value in (("cmmd", 0), ("fd_dinov2", 0), ("precision", 1), ("recall", 1)):
        assert number(found, metric, "mask").value == pytest.approx(value, abs=1e-6)
    assert -100 <= number(found, "clip_score", "mask").value <= 100
    settings["clip_large"] = str(tmp_path / "absent")
    found = evaluate_images(root, tmp_path / "out", images, **settings, metrics=("cmmd",))
    assert "not a folder and could not be downloaded" in found.missing["cmmd"]


def test_report(root, results):
    page = (root / "first" / "report.html").read_text()
    assert page.index("Images from mask: ") < page.index("data:image") < page.index("<svg") < page.index("<table")
    assert ">l_brow</text>" in page  # labels of charts are text
    assert page.count("data:image/webp;base64,") > COUNT
    assert "<script" not in page
    assert 'src="http' not in page
    markdown = (root / "first" / "report.md").read_text()
    for text in (page, markdown):
        assert "MMFace-DiT (F)" in text
        assert "not comparable" in text
    assert "| Mask: pixel accuracy ↑ | 12 |" in markdown
    assert "| MMFace-DiT (F) | 16.63 | 0.34 | 0.53 |" in markdown  # with the digits they are printed with
    assert "| DDGI | 56.57 | 0.43 |" in markdown
    for table in published_tables():
        assert all(len(row) == 1 + len(table["columns"]) for row in table["rows"])
        assert table["source"].startswith("arXiv ")


def test_report_escapes_html(results, tmp_path):
    faces = [{**results.faces[0], "caption": "<script>alert(1)</script>"}, *results.faces[1:]]
    write_report(dataclasses.replace(results, faces=faces), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_names_that_are_not_utf8(results, tmp_path):
    write_report(dataclasses.replace(results, faults={"bad \udce9.png": "cannot be read"}), tmp_path)
    assert all("bad ?.png" in (tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))


def test_small_numbers_keep_their_digits():
    numbers = {3e-5: "3.0e-05", -0.0002: "-2.0e-04", 0.0: "0.0000", 0.25: "0.2500", 31.6942: "31.69"}
    assert {value: format_number(value) for value in numbers} == numbers
    assert format_number(0.5, "+") == "+0.5000"


def test_command_line(root, tmp_path, capsys):
    networks = [f"face_parser={root}/parser", f"text_image={root}/pair"]
    common = [*networks, "metrics=edge_f_score,ssim", "given=mask", "count=4", "bootstrap_samples=100"]
    out = tmp_path / "out"
    assert run("evaluate", "--out", out, root / "model", root / "faces", *common, "--dtype", "fp32", "steps=1") == 0
    assert "| Photograph: SSIM ↑ | 4 |" in capsys.readouterr().out
    assert {"results.json", "report.md", "report.html"} <= {path.name for path in out.iterdir()}
    sources = [out, f"{root}/model@steps=2", *common]
    assert run("compare", *sources, "--faces", root / "faces", "--out", tmp_path / "compared") == 0
    assert "no verdict: needs 10 faces" in capsys.readouterr().out
    compared = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert list(compared) == ["names", "values", "differences", "notes"]
    page, text = ((tmp_path / "compared" / f"comparison.{suffix}").read_text() for suffix in ("html", "md"))
    assert all("significant: " in one for one in (page, text))
    assert page.count("data:image/webp;base64,") == 2 * 4  # an image of both, for each face
    assert page.count("<svg") == 1
    (second,) = [path for path in (tmp_path / "compared").iterdir() if path.is_dir()]
    (tmp_path / "p.toml").write_text("count = 4\nsteeps = 2\n")
    absent = tmp_path / "x"
    for arguments, text in (
        (["evaluate", root / "model", "--out", absent], "requires MODEL FACES"),
        (["evaluate", root / "model", root / "faces", "count=0", "--out", absent], "count is 0"),
        (["evaluate", root / "model", root / "faces", "given=hat", "--out", absent], "Unknown condition 'hat'"),
        (["evaluate", root / "model", root / "absent", "--out", absent], "metadata.jsonl"),
        (["evaluate", root / "model", root / "faces", "--protocol", tmp_path / "p.toml", "--out", out], "'steeps'"),
        (["compare", out, "--out", absent], "at least two"),
        (["compare", out, f"{root}/model@count=3", "--faces", root, "--out", absent], "different faces"),
        (["compare", out, root / "model", "--out", absent], "pass --faces"),
        (["compare", out, second, "count=1", "--out", absent], "All sources are finished evaluations"),
        (["evaluate", root / "faces", "--images", root, "--base", "x", "--out", absent], "there is no MODEL"),
    ):
        assert run(*arguments) == 2
        assert text in capsys.readouterr().err
    assert not absent.exists()
