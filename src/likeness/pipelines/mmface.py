"""Portraits from words and one or several spatial conditions with MMFace-DiT.

The network takes one condition a pass, so several are combined in the prediction (`likeness.pipelines.guidance`). The
modulations of all steps, a third of the network's weights, are computed in one go before the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from likeness.encoders.text import encode_text
from likeness.models.mmface import MMFaceTransformer, Modulation
from likeness.pipelines.arguments import check_settings
from likeness.pipelines.guidance import Pass, passes
from likeness.pipelines.portrait import Call, Job, PortraitPipeline
from likeness.types import InputError, TextFeatures

DEFAULTS: dict[str, Any] = {"size": 256, "steps": 50, "guidance_scale": 7.5, "guidance_interval": (0.0, 1.0)}
"""What a request leaves open, where a checkpoint does not say otherwise."""

MODULATION_ROWS = 512
"""Most samples of a group of pictures whose modulations are kept: in the published network this is 0.4 GB in bf16. On a
CPU every picture is such a group, and a bound that depended on their number would change bits.
"""


class Step(NamedTuple):
    """The passes of one step for one group of pictures; P of them."""

    first_row: int
    """Position of the first among all passes of the group's plan."""
    items: list[int]
    """Which picture each belongs to, [P]."""
    text: Tensor
    """Which text each reads, [P]."""
    condition: Tensor
    """Which condition each sees, 0 for none, [P]."""
    weights: list[float]
    """Factor of each in its picture's prediction, [P]."""


class MMFacePipeline(PortraitPipeline):
    """Text, mask, sketch and keypoints, in any subset, to portraits.

    Args:
        transformer: the network.
        vae: the autoencoder it was trained on; None where a converted folder lacks it.
        text_encoder: the CLIP text model it was trained with, likewise.
        tokenizer: its tokenizer.
        scheduler: the sampler that inverts the objective.
        objective: configuration of the objective (`likeness.objectives.make_objective`).
        latent_mean: mean of the autoencoder's latents, one number or one a channel.
        latent_std: their standard deviation.
        text_layer: which hidden state of the text model gives the tokens.
        max_text_tokens: length captions are padded to.
        condition_resize: `exact` never blends labels; `lanczos` resizes rendered conditions as pictures, which the
            released weights were trained with.
        defaults: `size`, `steps`, `guidance_scale`, `guidance_interval` of this checkpoint.
        sizes: Sizes it was trained at, (width, height) in pixels, for example [[128, 128]], or "any". Default: the
            square of `defaults["size"]`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]  # diffusers concatenates lists

    def __init__(
        self,
        transformer: MMFaceTransformer,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        scheduler: SchedulerMixin,
        objective: dict[str, Any] | None = None,
        latent_mean: float | list[float] = 0.0,
        latent_std: float | list[float] = 1.0,
        text_layer: int = -2,
        max_text_tokens: int = 77,
        condition_resize: str = "exact",
        defaults: dict[str, Any] | None = None,
        sizes: Sequence[Sequence[int]] | str | None = None,
    ) -> None:
        super().__init__()
        check_settings(condition_resize, defaults or {}, DEFAULTS, sizes)
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            objective=dict(objective or {"name": "rectified_flow"}),
            latent_mean=latent_mean,
            latent_std=latent_std,
            text_layer=text_layer,
            max_text_tokens=max_text_tokens,
            condition_resize=condition_resize,
            defaults={**DEFAULTS, **(defaults or {})},
            sizes=sizes,
        )

    @property
    def patch_size(self) -> int:
        """Side of the network's patches, in latent pixels."""
        return self.transformer.config.patch_size

    def check_family(self, negatives: Sequence[str]) -> None:
        """Refuse to run without the components that a converted folder may lack."""
        absent = [name for name in self._optional_components if getattr(self, name) is None]
        if absent:
            raise InputError(
                f"this checkpoint has no {' and no '.join(absent)}: convert it again with --text-encoder and --vae"
            )

    def text_features(self, texts: Sequence[str]) -> TextFeatures:
        """Features of T distinct texts, tokens [T, L, D]."""
        limit, layer = self.config.max_text_tokens, self.config.text_layer
        return encode_text(self.tokenizer, self.text_encoder, texts, max_tokens=limit, layer=layer)

    def calls(self, job: Job, group: Sequence[int]) -> Iterator[Call]:
        """The passes of these pictures, step by step."""
        steps = self.plan(job, group)
        modulation = self.modulations(job, steps)
        height, width = job.condition_latents.shape[-2:]
        rope = self.transformer.rope(height, width, job.text.tokens.shape[1], job.condition_latents.device)
        for step in steps:
            arguments = {
                "text": TextFeatures(job.text.tokens[step.text], job.text.pooled[step.text]),
                "condition_latents": job.condition_latents[step.condition][:, None],
                "condition_index": job.condition_rows[step.condition][:, None],
                "rope": rope,
            }
            if modulation is not None:
                arguments["modulation"] = modulation.rows(step.first_row, step.first_row + len(step.items))
            yield Call(step.items, step.weights, arguments)

    def plan(self, job: Job, group: Sequence[int]) -> list[Step]:
        """The passes of every step for one group of pictures that run together."""
        device = job.condition_rows.device
        steps, first_row = [], 0
        for i, guidance in enumerate(job.guidance):
            found: list[tuple[int, Pass]] = []
            for item in group:
                scale = 1.0 if job.prompts[item] == job.negatives[item] else guidance
                found += [(item, p) for p in passes(job.controls[item], scale, i / len(job.guidance))]
            text = [(job.negatives if p.negative else job.prompts)[item] for item, p in found]
            condition = [0 if p.condition is None else job.conditions[item][p.condition] for item, p in found]
            steps.append(
                Step(
                    first_row,
                    [item for item, _ in found],
                    torch.tensor(text, device=device),
                    torch.tensor(condition, device=device),
                    [p.weight for _, p in found],
                )
            )
            first_row += len(found)
        return steps

    def modulations(self, job: Job, steps: Sequence[Step]) -> Modulation | None:
        """The modulations of all passes of all steps, in the plan's order, or None where they would be too many."""
        if sum(len(step.items) for step in steps) > MODULATION_ROWS:
            return None
        time = torch.cat([job.times[i].expand(len(step.items)) for i, step in enumerate(steps)])  # [rows]
        text, condition = (torch.cat([getattr(step, name) for step in steps]) for name in ("text", "condition"))
        return self.transformer.modulation(time, job.text.pooled[text], job.condition_rows[condition][:, None])
