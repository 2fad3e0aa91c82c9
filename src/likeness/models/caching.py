"""diffusers' caches between the steps of a call: reuse the output of blocks or layers of earlier steps.

diffusers assumes that every step runs the same passes. Here guidance intervals and conditions change them, so every
kind of pass has a context with its own state, and all states are dropped when the set of passes changes
(`likeness.pipelines.sampling`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from diffusers import CacheMixin
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.faster_cache import FasterCacheBlockState, _apply_faster_cache_on_attention_class
from diffusers.hooks.mag_cache import MagCacheState
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from likeness.types import InputError
from likeness.weights.hashes import hooks_of

ATTENTION_CACHES = (PyramidAttentionBroadcastConfig, FasterCacheConfig)
CACHES = (FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, *ATTENTION_CACHES)
"""The supported caches: of blocks, of layers by name, or of the blocks' attention."""

OUTPUT = {"return_hidden_states_index": 0}
"""Description of blocks whose first or only output is `hidden_states`."""


def stateful_hooks(network: nn.Module) -> list[Any]:
    """Return the hooks of a network's caches."""
    return [hook for hook in hooks_of(network) if hook._is_stateful]


class Caches(CacheMixin):
    """`CacheMixin` for the networks of this project."""

    _cached_blocks: ClassVar[dict[type, dict[str, int]]]
    """The network's blocks -> their description for diffusers (`TransformerBlockMetadata`)."""

    def enable_cache(self, config: Any) -> None:
        """As in diffusers. Raises `InputError` if a cache is enabled already, or the configuration is not supported."""
        name = type(config).__name__
        if self.is_cache_enabled:
            raise InputError(f"{type(self._cache_config).__name__} is enabled already: call disable_cache() first")
        if not isinstance(config, CACHES):
            raise InputError(f"{name} is not supported. Supported: {', '.join(cache.__name__ for cache in CACHES)}")
        if isinstance(config, ATTENTION_CACHES) and config.current_timestep_callback is None:
            raise InputError(f"{name} needs current_timestep_callback, such as lambda: pipeline.current_timestep")
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            raise InputError(f"{name} needs is_guidance_distilled=True: prompt and negative prompt run separately")
        for block, outputs in self._cached_blocks.items():
            TransformerBlockRegistry.register(block, TransformerBlockMetadata(**outputs))
        super().enable_cache(config)
        if isinstance(config, FasterCacheConfig):  # diffusers adds it to layers named `attn` only
            everywhere = replace(config, spatial_attention_block_identifiers=("blocks",))
            for layer, module in self.named_modules():
                if isinstance(module, AttentionModuleMixin) and not stateful_hooks(module):
                    _apply_faster_cache_on_attention_class(layer, module, everywhere)
        if not stateful_hooks(self):
            self.disable_cache()
            raise InputError(f"{name} matches no layer of {type(self).__name__}: set its identifiers")

    @contextmanager
    def cache_disabled(self) -> Iterator[None]:
        """Run passes outside of the steps within a `with` block, without the cache; its states are lost."""
        config = self._cache_config
        if config is not None:
            self.disable_cache()
        try:
            yield
        finally:
            if config is not None:
                self.enable_cache(config)

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """As in diffusers, also for caches that have one state for all contexts; `where` has the `step_index`."""
        with super().cache_context(name, **where):
            for hook in stateful_hooks(self):
                if hasattr(hook, "state"):
                    new = type(hook.state)()
                    if isinstance(new, FasterCacheBlockState):
                        new.iteration = hook.block_skip_range  # compute the first step, at any time
                    hook.state = vars(hook).setdefault("states", {}).setdefault(name, new)
                elif isinstance(state := hook.state_manager.get_state(), MagCacheState):
                    state.step_index = where["step_index"]  # this kind of pass may have started late
            yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        super()._reset_stateful_cache(recurse)
        for hook in stateful_hooks(self):
            vars(hook).pop("states", None)


def check_caches(network: Any, guidance_model: Any, steps: int) -> None:
    """Raise `InputError` if a cache between steps is not that of `enable_cache`, or is for other steps."""
    if hooks := [] if network.is_cache_enabled else stateful_hooks(network):
        raise InputError(
            f"The transformer has a {type(hooks[0]).__name__}: load the pipeline again, and enable caches with "
            "pipeline.transformer.enable_cache(config)"
        )
    if guidance_model is not None and stateful_hooks(guidance_model):
        raise InputError("guidance_model has a cache between steps: only the transformer can have one")
    config = network._cache_config
    if config is not None and network._parallel_config is not None:
        raise InputError("A cache between steps cannot be combined with context parallelism: call disable_cache()")
    if (own := getattr(config, "num_inference_steps", steps)) != steps:
        raise InputError(
            f"{type(config).__name__} has num_inference_steps={own}, but the call has {steps} steps: set the same"
        )
