"""Third-party face parsers: labels by name, their normalization, rejected networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    MaskFormerConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from builders import tiny_face_parser
from likeness.annotators.face_parser import (
    PARSER_NAMES,
    Translated,
    classes_of,
    load_face_parser,
    parse_faces,
    sides_swapped,
    to_input,
)
from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, FLIP_PAIRS, ORDERS
from likeness.data.synthetic import draw_face
from likeness.types import InputError
from likeness.weights.hashes import network_name

HUB = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
"""Labels of jonathandinu/face-parsing."""

FACER = (
    "background", "neck", "face", "cloth", "rr", "lr", "rb", "lb", "re", "le", "nose", "imouth", "llip", "ulip", "hair",
    "eyeg", "hat", "earr", "neck_l",
)  # fmt: skip
"""Labels of facer's CelebAMask-HQ parsers."""

LAPA = (
    "background", "skin", "left_eyebrow", "right_eyebrow", "left_eye", "right_eye", "nose", "upper_lip", "inner mouth",
    "lower_lip", "hair",
)  # fmt: skip

SETTINGS = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "SegformerFeatureExtractor",  # as older checkpoints have it
}


def save(folder: Path, labels: tuple[str, ...] = HUB, settings: dict | None = SETTINGS) -> Path:
    """A tiny SegFormer with these labels."""
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_names_of_known_parsers():
    assert classes_of(HUB, "x") == tuple(range(19))
    wanted = [CLASS_INDEX[name] for name in ORDERS["facer or SegFace"]]
    assert list(classes_of(FACER, "x")) == wanted
    assert [CLASSES[index] for index in classes_of(LAPA, "x")] == [
        "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "u_lip", "mouth", "l_lip", "hair",
    ]  # fmt: skip
    assert [CLASSES[index] for index in classes_of(LAPA, "x", swapped=True)][2:6] == [
        "r_brow", "l_brow", "r_eye", "l_eye",
    ]  # fmt: skip
    for order in ORDERS.values():
        assert [CLASSES[index] for index in classes_of(order, "x")] == list(order)
    every = [name for names in PARSER_NAMES.values() for name in names]
    assert len(every) == len(set(every))
    assert set(PARSER_NAMES) == set(CLASSES)


def test_unknown_names():
    with pytest.raises(InputError, match=r"3 of the 3 labels of net .* LABEL_0, LABEL_1, LABEL_2\. Name them"):
        classes_of(("LABEL_0", "LABEL_1", "LABEL_2"), "net")
    with pytest.raises(InputError, match=r"1 of the 12 labels .* facewear"):
        classes_of((*LAPA, "facewear"), "net")
    with pytest.raises(InputError, match="no label for nose, l_eye, r_eye"):
        classes_of(("background", "skin", "hair", "u_lip", "l_lip"), "net")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
    ],
)
def test_input_equals_that_of_its_processor(tmp_path, changes):
    """The logits equal those with the image processor of transformers, on an image that is not resized."""
    network, size = load_face_parser(save(tmp_path, settings=SETTINGS | changes))
    assert size == 32
    assert isinstance(network, Translated)
    image = draw_face(0, 0, 32).image
    processor = SegformerImageProcessorPil(
        **{k: v for k, v in (SETTINGS | changes).items() if k != "image_processor_type"}
    )
    given = processor(images=image, return_tensors="pt")["pixel_values"]
    wanted = network.network(pixel_values=given).logits
    found = network(pixel_values=to_input(image, 32)).logits
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_channel_order(tmp_path):
    even = SETTINGS | {"image_mean": [0.5] * 3, "image_std": [1.0] * 3}
    plain, _ = load_face_parser(save(tmp_path / "rgb", settings=even))
    bgr, _ = load_face_parser(save(tmp_path / "bgr", settings=even | {"do_flip_channel_order": True}))
    given = to_input(draw_face(0, 0, 32).image, 32)
    assert torch.allclose(bgr(pixel_values=given).logits, plain(pixel_values=given.flip(1)).logits, atol=1e-5)


def test_label_order_is_converted(tmp_path):
    """The same weights with another order of labels give the same masks."""
    image = draw_face(0, 3, 64).image
    ours, size = load_face_parser(save(tmp_path / "ours"))
    state = ours.network.state_dict()
    theirs = SegformerForSemanticSegmentation.from_pretrained(save(tmp_path / "facer", FACER))
    table = list(classes_of(FACER, "x"))  # ours of each of theirs
    for name in ("decode_head.classifier.weight", "decode_head.classifier.bias"):
        state[name] = state[name][table]
    theirs.load_state_dict(state)
    theirs.save_pretrained(tmp_path / "facer")
    shuffled, _ = load_face_parser(tmp_path / "facer")
    (wanted,), (found,) = (parse_faces(net, [image], size=size) for net in (ours, shuffled))
    assert len(np.unique(wanted)) > 3
    assert np.array_equal(wanted, found)


def test_missing_classes_never_appear(tmp_path):
    network, size = load_face_parser(save(tmp_path, LAPA))
    masks = parse_faces(network, [draw_face(0, index, 48).image for index in range(3)], size=size)
    assert set(np.unique(masks)) <= set(classes_of(LAPA, "x"))
    swapped, _ = load_face_parser(tmp_path, swapped=True)
    other = parse_faces(swapped, [draw_face(0, index, 48).image for index in range(3)], size=size)
    table = np.arange(19)
    for left, right in FLIP_PAIRS:
        table[[left, right]] = right, left
    scores = [
        F.interpolate(net(pixel_values=to_input(draw_face(0, 0, 48).image, 32)).logits, size=(48, 48)).argmax(1).numpy()
        for net in (network, swapped)
    ]
    assert np.array_equal(table[scores[0]], scores[1])
    assert [mask.shape for mask in other] == [(48, 48)] * 3


def test_other_architectures(tmp_path):
    labels = {"id2label": dict(enumerate(LAPA)), "label2id": {name: index for index, name in enumerate(LAPA)}}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    beit = BeitConfig(image_size=32, patch_size=8, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], **sizes, **labels)
    BeitForSemanticSegmentation(beit).save_pretrained(tmp_path / "beit")
    from transformers import SwinConfig

    swin = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    upernet = UperNetConfig(
        backbone_config=swin, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, **labels
    )
    UperNetForSemanticSegmentation(upernet).save_pretrained(tmp_path / "upernet")
    for name in ("beit", "upernet"):
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"size": 32}))
        network, size = load_face_parser(tmp_path / name)
        masks = parse_faces(network, [draw_face(0, 0, 40).image], size=size)
        assert set(np.unique(masks)) <= set(classes_of(LAPA, "x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": True}, "its masks would lack the border"),
        ({"size": {"height": 32, "width": 48}}, "does not take squares of one size"),
        ({"size": {"longest_edge": 32}}, "does not take squares of one size"),
        ({"do_resize": False}, "does not take squares of one size"),
        ({"size": 0}, "does not take squares of one size"),
        ({"size": {"height": [32]}}, "does not take squares of one size"),
        ({"image_mean": None}, "has no valid normalization"),
        ({"image_std": ["a", "b", "c"]}, "has no valid normalization"),
        ({"rescale_factor": 0}, "has no valid normalization"),
        ({"rescale_factor": None}, "has no valid normalization"),
    ],
)
def test_rejected_processors(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_face_parser(save(tmp_path, settings=SETTINGS | changes))


def test_rejected_checkpoints(tmp_path):
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        load_face_parser(save(tmp_path / "bare", settings=None))
    with pytest.raises(InputError, match="is not a checkpoint folder"):
        load_face_parser(tmp_path / "nowhere")
    MaskFormerConfig().save_pretrained(tmp_path / "maskformer")
    with pytest.raises(InputError, match="is not a semantic segmentation network"):
        load_face_parser(tmp_path / "maskformer")
    with pytest.raises(InputError, match="LABEL_0"):
        load_face_parser(save(tmp_path / "numbers", tuple(f"LABEL_{index}" for index in range(19))))


def test_weights_in_half_precision_and_incomplete_ones(tmp_path):
    network, _ = load_face_parser(save(tmp_path))
    folder = tmp_path / "half"
    shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("half"))
    network.network.half().save_pretrained(folder)
    found, size = load_face_parser(folder)
    assert found.dtype == torch.float32
    assert parse_faces(found, [np.zeros((32, 32, 3), np.uint8)], size=size)[0].shape == (32, 32)
    weights = folder / "model.safetensors"
    for content in (weights.read_bytes()[:1000], b"version https://git-lfs.github.com/spec/v1"):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors (cannot be read|is a pointer of Git LFS)"):
            load_face_parser(folder)


def test_bundled_parsers_have_no_processor(tmp_path):
    tiny_face_parser().save_pretrained(tmp_path)
    network, size = load_face_parser(tmp_path)
    assert size == 32
    assert not isinstance(network, Translated)
    assert network_name(network).startswith("SegformerForSemanticSegmentation ")


def test_name_depends_on_the_weights(tmp_path):
    network, _ = load_face_parser(save(tmp_path))
    name = network_name(network)
    assert name == network_name(load_face_parser(tmp_path)[0])
    assert name != network_name(load_face_parser(tmp_path, swapped=True)[0])
    with torch.no_grad():
        network.network.decode_head.classifier.bias[0] += 1
    assert network_name(network) != name


def test_swapped_sides():
    masks = [draw_face(0, index, 96).mask for index in range(5)]
    table = np.arange(19)
    table[[4, 5]] = 5, 4
    assert not sides_swapped(masks)
    assert sides_swapped([table[mask] for mask in masks])
    assert not sides_swapped([np.zeros((96, 96), np.uint8)] * 5)
    assert not sides_swapped([table[mask] for mask in masks[:2]])  # too few masks
