"""The text encoder: a tokenizer without unknown tokens, the pooled vector, training with exact resume, retrieval."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from likeness.config import load_toml
from likeness.data.folder import read_photo
from likeness.encoders.text import encode_text, token_ids, truncated_text
from likeness.encoders.text_image import load_attribute_head, name_attributes, resize_images
from likeness.train.components.steps import rows_with
from likeness.train.components.text_image import (
    MIN_VOCABULARY,
    Pairs,
    TextImageRecipe,
    attribute_classes,
    attribute_loss,
    build,
    contrastive_loss,
    losses,
    retrieval,
    train_text_image,
    train_tokenizer,
)
from likeness.types import InputError
from runs import check_resume, load_checkpoint, metrics, sigterm_in_step

COLORS = ("red", "green", "blue", "yellow", "white", "black")
SIDES = ("left", "right")
CAPTIONS = [f"A {color} box on the {side}." for color in COLORS for side in SIDES]
LONG = "a " + "very " * 40 + "red box"


def draw_folder(folder: Path) -> str:
    """Write twelve images of a box, described by its color and its side."""
    folder.mkdir(parents=True)
    rows = []
    for color in COLORS:
        for side in SIDES:
            image = Image.new("RGB", (40, 40), "gray")
            left = 2 if side == "left" else 22
            ImageDraw.Draw(image).rectangle((left, 8, left + 15, 31), fill=color)
            image.save(folder / f"{color}_{side}.png")
            text = [f"A {color} box on the {side}.", f"on the {side}, a {color} square"]
            attributes = {"color": color, "left": side == "left", "weight": 0.5, "kind": "box"}
            rows.append({"file_name": f"{color}_{side}.png", "text": text, "attributes": attributes})
    rows.append({"file_name": "red_left.png"})  # no caption: skipped
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TextImageRecipe:
    folder = draw_folder(tmp_path_factory.mktemp("boxes") / "train")
    return TextImageRecipe(
        train=(folder,),
        test=(folder,),
        size=16,
        vocabulary=600,
        max_tokens=16,
        text_width=32,
        text_layers=2,
        text_heads=2,
        vision_width=32,
        vision_layers=2,
        vision_heads=2,
        projection=16,
        images=800,
        batch=8,
        learning_rate=3e-3,
        warmup=80,
        retrieval_candidates=6,
        attribute_weight=0.5,
        checkpoint_every=400,
        compile=False,
        threads=1,
    )


@pytest.fixture(scope="module")
def run(recipe: TextImageRecipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    train_text_image(recipe, folder)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(run: Path) -> tuple[CLIPModel, CLIPTextModel, Any]:
    clip = CLIPModel.from_pretrained(run / "model" / "clip").eval()
    text_encoder = CLIPTextModel.from_pretrained(run / "model" / "text_encoder").eval()
    return clip, text_encoder, CLIPTokenizer.from_pretrained(run / "model" / "tokenizer")


def test_tokenizer_follows_clip(models):
    tokenizer = models[2]
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == len(tokenizer) - 1 > MIN_VOCABULARY
    ids = tokenizer("A RED box", padding="max_length", max_length=8).input_ids
    assert ids == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["a</w>", "red</w>", "box</w>"])] + [
        tokenizer.eos_token_id
    ] * (8 - 4)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red box"


@pytest.mark.parametrize("text", ["flamboyant", "façade", "日本", "😀", "ß", "\u0007", "x" * 30, "3", "naïve é ü."])
def test_every_character_is_encodable(models, text):
    tokenizer = models[2]
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]  # CLIP's unknown token is the end token
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" .", ".") == text


def test_truncation_keeps_the_end_token(models):
    tokenizer = models[2]
    assert tokenizer.model_max_length == 16
    ids = token_ids(tokenizer, [LONG, "red"], 16)
    assert ids.shape == (2, 16)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert (ids[0, :-1] != tokenizer.eos_token_id).all()
    assert truncated_text(tokenizer, LONG, 16).endswith("red box")
    assert truncated_text(tokenizer, "red box", 16) == ""


def test_tokenizer_is_independent_of_order_and_has_its_size():
    first, second = (train_tokenizer(captions, 530, 16) for captions in (CAPTIONS, CAPTIONS[::-1]))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 530
    for vocabulary, max_tokens in ((500, 16), (600, 2)):
        with pytest.raises(InputError, match="vocabulary"):
            train_tokenizer(CAPTIONS, vocabulary, max_tokens)


def test_pooled_is_at_the_first_end_token(models):
    _, text_encoder, tokenizer = models
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id != 2
    captions = ["", "red", CAPTIONS[0], LONG]
    ends = [len(tokenizer(caption, truncation=True, max_length=16).input_ids) - 1 for caption in captions]
    assert ends[0] == 1
    assert ends[-1] == 15
    with torch.no_grad():
        output = text_encoder(token_ids(tokenizer, captions, 16))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[range(4), ends])
    # padding has no effect, and other positions are different vectors
    shorter = encode_text(tokenizer, text_encoder, captions[:3], max_tokens=12)
    torch.testing.assert_close(shorter.pooled, output.pooler_output[:3], atol=1e-5, rtol=1e-4)
    assert (output.last_hidden_state[1, 0] - output.pooler_output[1]).abs().max() > 0.1


def test_published_parts_agree(models):
    clip, text_encoder, tokenizer = models
    features = encode_text(tokenizer, text_encoder, CAPTIONS, max_tokens=16)
    assert features.tokens.shape == (12, 16, 32)
    assert features.pooled.shape == (12, 32)
    with torch.no_grad():
        embedded = clip.get_text_features(input_ids=token_ids(tokenizer, CAPTIONS, 16)).pooler_output
    torch.testing.assert_close(clip.text_projection(features.pooled), embedded, atol=1e-5, rtol=1e-4)
    distances = torch.cdist(features.pooled, features.pooled) + torch.eye(12) * 1e3
    assert distances.min() > 0.1
    assert torch.isfinite(features.tokens).all()


def test_loss_falls_and_captions_are_retrieved(recipe, run, models):
    clip, _, tokenizer = models
    rows = rows_with("text", recipe.test)
    assert len(rows) == 12
    batch = Pairs(recipe, rows, tokenizer).make(0, range(12))
    torch.manual_seed(0)
    fresh = build(recipe, tokenizer).eval()
    with torch.no_grad():
        assert losses(clip, None, (), batch)[0] < 0.5 * losses(fresh, None, (), batch)[0]
    found = retrieval(clip, tokenizer, rows, recipe.size, candidates=6)
    assert found["n"] == 12
    assert found["find_caption"] > 0.6
    assert found["find_picture"] > 0.6
    assert retrieval(clip, tokenizer, rows, recipe.size, candidates=50)["candidates"] == 12
    lines = metrics(run)
    assert [line["attribute_loss"] for line in lines if "loss" in line][-1] < 0.6  # chance: (ln 6 + ln 2) / 2 = 1.24
    assert [line["seen"] for line in lines if "find_caption" in line] == [400, 800]


def test_resume_is_exact(recipe, tmp_path):
    short = dataclasses.replace(recipe, images=64, checkpoint_every=24, warmup=16)
    check_resume(lambda folder: train_text_image(short, folder), tmp_path, sigterm_in_step(5, 40))


def test_pairs_depend_on_their_position_only(recipe, models):
    pairs = Pairs(recipe, rows_with("text", recipe.train), models[2])
    whole = list(pairs.batches(range(0, 160, 8)))
    for index, batch in enumerate(Pairs(recipe, pairs.rows, models[2]).batches(range(80, 160, 8))):
        assert all(torch.equal(a, b) for a, b in zip(batch, whole[10 + index], strict=True))
    images = torch.cat([batch.images for batch in whole])
    assert -1 <= images.min() < images.max() <= 1
    assert len(images.mean(dim=(1, 2, 3)).unique()) > 12  # crops and brightness differ


def test_identical_captions_are_positives(recipe, models):
    rows = rows_with("text", recipe.train)[:3]
    for row, text in zip(rows, ("a box", "a  BOX", "a square"), strict=True):
        row["text"] = text
    batch = Pairs(recipe, rows, models[2]).make(0, [0, 1, 2, 2])
    same = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=bool)
    np.testing.assert_array_equal(batch.positives.numpy(), same)
    # two positives each: equal logits for both have the entropy of a choice between two, the minimum
    vectors = torch.eye(2)[[0, 0, 1, 1]]
    loss = contrastive_loss(vectors, vectors, batch.positives, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    assert contrastive_loss(vectors, vectors, torch.eye(4, dtype=torch.bool), torch.tensor(100.0)) >= loss - 1e-6


def test_attributes_are_strings_and_booleans(recipe, models):
    rows = rows_with("text", recipe.train)[:3]
    classes = attribute_classes(rows)
    assert classes == {"color": ["green", "red"], "left": ["False", "True"]}  # no numbers, no constants
    rows[1]["attributes"] = ["color"]  # names without values
    rows[2]["attributes"]["color"] = "mauve"
    labels = Pairs(recipe, rows, models[2], classes).make(0, [0, 1, 2]).labels
    assert labels.tolist() == [[1, 1], [-100, -100], [-100, 1]]
    head = torch.nn.Linear(5, 4)
    loss = attribute_loss(head, torch.randn(3, 5), labels, (2, 2))
    assert torch.isfinite(loss)
    assert attribute_loss(head, torch.randn(3, 5), torch.full_like(labels, -100), (2, 2)) == 0


def test_the_published_head_names_attributes(run, recipe, models):
    """Color and side of the boxes, predicted by the published head."""
    head = load_attribute_head(run / "model")
    assert head is not None
    rows = rows_with("text", recipe.train)
    images = [read_photo(row["file_name"]) for row in rows]
    named = name_attributes(models[0], head, resize_images(images, 16))
    assert set(named[0]) == set(head.classes) == {"color", "left"}
    for name in ("color", "left"):
        right = [found[name] == str(row["attributes"][name]) for found, row in zip(named, rows, strict=True)]
        assert np.mean(right) >= 0.9
    assert load_attribute_head(run) is None
    stored = load_checkpoint(run)
    assert torch.equal(head.weight, stored["average/0/head.weight"])
    assert not torch.equal(head.weight, stored["model/head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_heads": 3}, "vision_width is 32: it must be a multiple of vision_heads, 3"),
        ({"text_heads": 0}, "text_heads is 0: it must be at least 1"),
        ({"size": 4}, "size is 4: it must be at least 8"),
        ({"seed": 2**64}, "seed is 18446744073709551616: it must be below"),
        ({"crop": 2.0}, "crop is 2.0: it must be above 0, at most 1"),
        ({"retrieval_candidates": 0}, "retrieval_candidates is 0"),
    ],
)
def test_invalid_values(recipe, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_text_image(dataclasses.replace(recipe, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_without_captions_are_rejected(tmp_path, recipe):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(InputError, match="has 'text'"):
        rows_with("text", [str(tmp_path)])
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": [""]}\n{"file_name": "b.png", "text": "a"}\n'
    )
    assert [row["text"] for row in rows_with("text", [str(tmp_path)])] == ["a"]


def test_recipe_parses():
    path = Path(__file__).parents[2] / "recipes" / "text_image_mini.toml"
    recipe = load_toml(path, TextImageRecipe)
    assert recipe.text_width % recipe.text_heads == recipe.vision_width % recipe.vision_heads == 0
    assert recipe.size % recipe.patch == 0
    assert recipe.text_layers >= 2  # transformers use the features of the last but one
