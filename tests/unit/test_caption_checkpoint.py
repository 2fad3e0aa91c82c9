"""Captions by tiny transformers checkpoints with random weights, saved as on the hub."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from builders import randomise, save_components
from likeness.annotators import face_parser
from likeness.cli import main
from likeness.data.synthetic import draw_face
from likeness.prepare.caption import models as caption_models
from likeness.prepare.caption.models import Question, open_checkpoint
from likeness.prepare.caption.prompts import PROMPTS
from likeness.types import InputError

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<image>", "<start>", "<end>", "<video>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}


def save_tokenizer(folder: Path, image: str = "<image>", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the names that processors look for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a woman with red hair", "a man with a beard"], trainer)
    names = {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template and template.replace("IMAGE", image),
        extra_special_tokens=names | {"video_token": "<video>", "image_token": "<image>"},
    )
    fast.save_pretrained(folder)
    return fast


def save_internvl(folder: Path) -> Path:
    """Tiny InternVL; its processor has a video part that needs torchvision."""
    tokenizer = save_tokenizer(folder)
    GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "InternVLProcessor", "image_seq_length": 1}')
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = InternVLConfig(
        vision_config=vision | {"image_size": [28, 28], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return save(InternVLForConditionalGeneration, config, folder)


def save_qwen2_vl(folder: Path) -> Path:
    """Tiny Qwen2-VL; images of any aspect ratio."""
    tokenizer = save_tokenizer(folder, "<start><image><end>")
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        text_config={
            "vocab_size": len(tokenizer),
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        image_token_id=SPECIAL.index("<image>"),
        video_token_id=SPECIAL.index("<video>"),
        vision_start_token_id=SPECIAL.index("<start>"),
        vision_end_token_id=SPECIAL.index("<end>"),
    )
    return save(Qwen2VLForConditionalGeneration, config, folder)


def save_llava(folder: Path) -> Path:
    """Tiny LLaVA; no videos."""
    tokenizer = save_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    (folder / "processor_config.json").write_text(json.dumps(processor | {"num_additional_image_tokens": 1}))
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=SPECIAL.index("<image>"),
    )
    return save(LlavaForConditionalGeneration, config, folder)


def save_qwen3(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Tiny Qwen3."""
    tokenizer = save_tokenizer(folder, template=template)
    return save(Qwen3ForCausalLM, Qwen3Config(vocab_size=len(tokenizer), **TEXT), folder)


def save(kind: type, config, folder: Path) -> Path:
    torch.manual_seed(0)
    randomise(kind(config), 1.0).save_pretrained(folder)  # large weights: small ones repeat one word for any input
    return folder


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    """Random weights never end; 12 tokens are enough."""
    monkeypatch.setattr(caption_models, "ANSWER_TOKENS", 12)


def images() -> list[Image.Image]:
    return [Image.fromarray(draw_face(0, index, 64).image) for index in range(2)]


@pytest.mark.parametrize("save_model", [save_internvl, save_qwen2_vl, save_llava])
def test_checkpoint_answers_about_images(tmp_path, save_model):
    folder = save_model(tmp_path / "model")
    model = open_checkpoint(str(folder), vision=True)
    first, second = Image.new("RGB", (64, 64), "white"), images()[0]
    alone = [next(model.answer([Question("Who is it?", image)])) for image in (first, second)]
    together = list(
        model.answer([Question("Who?", second), Question("Who is it?", first), Question("Who is it?", second)])
    )
    assert together[1:] == alone  # padded in a batch, in another order
    assert alone[0] != alone[1]  # depends on the image
    assert together[0] != together[2]  # depends on the text
    assert not any(answer.finished for answer in alone)
    assert model.name.startswith("model@")
    network = AutoModelForImageTextToText.from_pretrained(folder)
    assert sum(p.numel() for p in network.parameters()) < 1e5


def test_checkpoint_answers_text(tmp_path):
    folder = save_qwen3(tmp_path / "llm")
    model = open_checkpoint(str(folder), vision=False)
    questions = [Question("Check this."), Question("A longer question than the other one.")]
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for question, answer in zip(questions, model.answer(questions), strict=True):
        tokens = tokenizer(f"user: {question.text}<|im_end|>\nassistant: ", return_tensors="pt")["input_ids"]
        for _ in range(12):  # greedy, by hand
            tokens = torch.cat([tokens, network(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert answer.text == tokenizer.decode(tokens[0, -12:], skip_special_tokens=True)


def test_finished_answers(tmp_path):
    folder = save_qwen3(tmp_path / "llm")
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight.zero_()  # all tokens are equally likely, so it takes the first
    network.generation_config.eos_token_id = [0, 1]  # which is an end token
    network.save_pretrained(folder)
    (answer,) = open_checkpoint(str(folder), vision=False).answer([Question("Hello")])
    assert answer.finished
    assert answer.text == ""


def test_folder_end_to_end(tmp_path, capsys):
    """The command with both checkpoints; random text is dropped with the reason."""
    faces = tmp_path / "faces"
    faces.mkdir()
    for index, image in enumerate(images()):
        image.save(faces / f"{index}.png")
    (faces / "metadata.jsonl").write_text("".join(f'{{"file_name": "{index}.png"}}\n' for index in range(2)))
    vlm, llm = save_internvl(tmp_path / "vlm"), save_qwen3(tmp_path / "llm")
    components = save_components(tmp_path / "components")
    options = ["--vlm", str(vlm), "--refiner", str(llm), "--parallel", "1", "--components", str(components)]
    main(["prepare", "caption", str(faces), *options])
    answers = (faces / "answers.jsonl").read_bytes()
    records = [json.loads(line) for line in (faces / "captions.jsonl").read_text().splitlines()]
    assert [[c["prompt"] for c in record["captions"]] for record in records] == [list(PROMPTS)] * 2
    for caption in (caption for record in records for caption in record["captions"]):
        assert caption["model"].startswith("vlm@")
        assert bool(caption["text"]) == ("dropped" not in caption)
        assert caption["raw"]
    main(["prepare", "caption", str(faces), *options])
    assert (faces / "answers.jsonl").read_bytes() == answers  # no question was repeated
    assert "2 faces" in capsys.readouterr().out


def test_rejected_checkpoints(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        open_checkpoint(str(save_qwen3(tmp_path / "base", template=None)), vision=False)
    with pytest.raises(InputError, match="not a model for images and text"):
        open_checkpoint(str(save_qwen3(tmp_path / "blind")), vision=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        open_checkpoint(str(tmp_path / "empty"), vision=True)
    with pytest.raises(InputError, match="cannot be loaded"):
        open_checkpoint(str(tmp_path / "empty"), vision=False)
    with pytest.raises(InputError, match="Device 'nowhere' is not available"):
        open_checkpoint(str(save_qwen3(tmp_path / "llm")), vision=False, device="nowhere")
    broken = save_internvl(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be loaded"):
        open_checkpoint(str(broken), vision=True)


def load_parser(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")
    face_parser.load_face_parser(folder)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: open_checkpoint(str(folder), vision=True),
        lambda folder: open_checkpoint(str(folder), vision=False),
        load_parser,
    ],
    ids=["vision", "language", "face parser"],
)
def test_code_of_checkpoints_is_not_run(tmp_path, monkeypatch, load):
    """Not even if the user would answer yes to transformers' question."""
    names = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSemanticSegmentation")
    classes = dict.fromkeys(names, "code.Config")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Config", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
