"""The MMFace-DiT network: the published size, and every input and option doing what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import load_script, randomise, tiny_transformer
from likeness.models.layers import use_explicit_attention
from likeness.models.mmface import MMFaceTransformer
from likeness.types import TextFeatures

ROOT = Path(__file__).parents[2]


def inputs(batch: int = 2, height: int = 4, width: int = 4, tokens: int = 5) -> dict:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "latents": draw(batch, 4, height, width),
        "time": torch.full((batch,), 300.0),
        "text": TextFeatures(draw(batch, tokens, 32), draw(batch, 32)),
        "condition_latents": draw(batch, 1, 4, height, width),
        "condition_index": torch.zeros(batch, 1, dtype=torch.long),
    }


def variant(**changes) -> MMFaceTransformer:
    """The tiny transformer with other options."""
    config = {name: value for name, value in tiny_transformer().config.items() if not name.startswith("_")}
    return MMFaceTransformer(**{**config, **changes})


def count(**config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MMFaceTransformer(**config).parameters())


def test_published_parameter_count():
    assert count() == 1_345_298_624
    assert count(condition_names=("mask", "sketch", "keypoints")) == 1_345_298_624 + 1152
    assert count(latent_channels=4) == 1_345_132_688


def test_initial_output_is_zero():
    model = MMFaceTransformer(latent_channels=4, hidden_size=32, depth=1, heads=2, text_dim=32, max_text_tokens=8)
    assert model(**inputs()).abs().max() == 0


@pytest.mark.parametrize("name", ["latents", "time", "text", "pooled", "condition_latents", "condition_index"])
def test_every_input_matters(name):
    model, given = tiny_transformer(), inputs()
    before = model(**given)
    changed = dict(given)
    if name == "text":
        changed["text"] = TextFeatures(given["text"].tokens + 1, given["text"].pooled)
    elif name == "pooled":
        changed["text"] = TextFeatures(given["text"].tokens, given["text"].pooled + 1)
    elif name == "time":
        changed["time"] = given["time"] + 100
    else:
        changed[name] = given[name] + 1
    assert (model(**changed) - before).abs().max() > 1e-5


def test_absent_condition():
    """-1 is the `none` row and a zero latent, for any latent; without a `none` row it is row 0."""
    model, given = tiny_transformer(), inputs()
    none = model.config.condition_names.index("none")
    zero = torch.zeros_like(given["condition_latents"])
    absent = model(**{**given, "condition_index": torch.full((2, 1), -1)})
    explicit = model(**{**given, "condition_index": torch.full((2, 1), none), "condition_latents": zero})
    assert torch.equal(absent, explicit)
    released = tiny_transformer(("mask", "sketch"))
    absent = released(**{**given, "condition_index": torch.full((2, 1), -1)})
    assert torch.equal(absent, released(**{**given, "condition_latents": zero}))


def test_sizes_and_aspect_ratios():
    model = tiny_transformer()
    for height, width in ((2, 2), (4, 10), (16, 6)):
        assert model(**inputs(height=height, width=width)).shape == (2, 4, height, width)


def test_positions_matter():
    """Attention is blind to order without rotary positions: a flipped input only flips the output."""
    model, given = randomise(variant(patch_size=1), std=0.3), inputs(batch=1)
    flipped = {**given, "latents": given["latents"].flip(-1), "condition_latents": given["condition_latents"].flip(-1)}
    cos, sin = model.rope(*given["latents"].shape[-2:], given["text"].tokens.shape[1])
    for rope, equal in (((cos, sin), False), ((torch.ones_like(cos), torch.zeros_like(sin)), True)):
        outputs = model(**flipped, rope=rope).flip(-1), model(**given, rope=rope)
        assert torch.allclose(*outputs, atol=1e-5) == equal


@pytest.mark.parametrize(("text_rope", "order_matters"), [("sequential", True), ("none", False)])
def test_text_rope(text_rope, order_matters):
    model, given = randomise(variant(text_rope=text_rope), std=0.3), inputs()
    reversed_text = TextFeatures(given["text"].tokens.flip(1), given["text"].pooled)
    before, after = model(**given), model(**{**given, "text": reversed_text})
    assert ((after - before).norm() / before.norm() > 1e-4) == order_matters


def test_precomputed_rope_changes_nothing():
    model, given = tiny_transformer(), inputs()
    assert torch.equal(model(**given, rope=model.rope(4, 4, 5)), model(**given))


def test_explicit_attention():
    """The same prediction and gradients up to rounding, in passes with gradients only."""
    fused, explicit, given = tiny_transformer(), tiny_transformer(), inputs()
    use_explicit_attention(explicit)
    outputs = [model(**given) for model in (fused, explicit)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    weights = zip(fused.parameters(), explicit.parameters(), strict=True)
    for one, other in ((a.grad, b.grad) for a, b in weights if a.grad is not None):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(fused(**given), explicit(**given))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_what_is_not_trained():
    """Only the null vector, and what follows the last attention in the text stream, which nothing reads."""
    model = tiny_transformer().train()
    model(**inputs()).square().sum().backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    last = len(model.blocks) - 1
    assert untrained[0] == "null_pooled"
    unread = (f"blocks.{last}.attention.text_out", f"blocks.{last}.text_mlp")
    assert all(name.startswith(unread) for name in untrained[1:])


def test_save_and_load(tmp_path):
    model, given = tiny_transformer(), inputs()
    model.save_pretrained(tmp_path)
    again = MMFaceTransformer.from_pretrained(tmp_path)
    assert list(again.config.condition_names) == list(model.config.condition_names)
    assert torch.equal(again(**given), model(**given))


def test_patch_size_one():
    assert variant(patch_size=1)(**inputs(height=3, width=5)).shape == (2, 4, 3, 5)


def test_bad_widths_are_rejected():
    with pytest.raises(ValueError, match="multiple"):
        MMFaceTransformer(hidden_size=30, heads=4)


@pytest.mark.parametrize("text_rope", ["sequential", "none"])
def test_equals_the_plain_formulas(text_rope):
    """Against an independent writing-down of the paper's equations (benchmarks/plain_mmface.py)."""
    plain = load_script(ROOT / "benchmarks" / "plain_mmface.py")
    model, given = randomise(variant(text_rope=text_rope), std=0.3), inputs(height=4, width=6)
    given["condition_index"] = torch.tensor([[1], [-1]])
    wanted = plain.forward(model, *given.values())
    assert (model(**given) - wanted).norm() / wanted.norm() < 1e-5
