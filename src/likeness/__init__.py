"""Generate face images from text, semantic masks, sketches and keypoints.

    >>> import torch, likeness
    >>> pipeline = likeness.load()  # a bundled model, a folder or a Hub id
    >>> result = pipeline("a smiling woman", control_image="mask.png", generator=torch.Generator().manual_seed(1))
    >>> result.save("face.png")  # with its recipe, for `likeness replay`

`load` documents the models, the pipelines' `__call__` all arguments. Heavy modules are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from likeness.runtime import library_imports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from likeness.models.mditface import MDiTFaceTransformer
    from likeness.models.mmface import MMFaceTransformer
    from likeness.pipelines.editing.pipelines import (
        MDiTFaceImg2ImgPipeline,
        MDiTFaceInpaintPipeline,
        MMFaceImg2ImgPipeline,
        MMFaceInpaintPipeline,
    )
    from likeness.pipelines.load import load
    from likeness.pipelines.mditface import MDiTFacePipeline
    from likeness.pipelines.mmface import MMFacePipeline
    from likeness.types import InputError, PortraitRequest

_MODULES = {
    "InputError": "likeness.types",
    "MDiTFaceImg2ImgPipeline": "likeness.pipelines.editing.pipelines",
    "MDiTFaceInpaintPipeline": "likeness.pipelines.editing.pipelines",
    "MDiTFacePipeline": "likeness.pipelines.mditface",
    "MDiTFaceTransformer": "likeness.models.mditface",
    "MMFaceImg2ImgPipeline": "likeness.pipelines.editing.pipelines",
    "MMFaceInpaintPipeline": "likeness.pipelines.editing.pipelines",
    "MMFacePipeline": "likeness.pipelines.mmface",
    "MMFaceTransformer": "likeness.models.mmface",
    "PortraitRequest": "likeness.types",
    "load": "likeness.pipelines.load",
}

__all__ = [
    "InputError",
    "MDiTFaceImg2ImgPipeline",
    "MDiTFaceInpaintPipeline",
    "MDiTFacePipeline",
    "MDiTFaceTransformer",
    "MMFaceImg2ImgPipeline",
    "MMFaceInpaintPipeline",
    "MMFacePipeline",
    "MMFaceTransformer",
    "PortraitRequest",
    "__version__",
    "load",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in _MODULES:
        with library_imports():
            return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'likeness' has no attribute {name!r}")
