"""Process settings: CPU threads, garbage collection and the log messages of other libraries.

`configure_process` changes settings for good and is meant for programs that only run likeness: the command line, a
service. In Python, `likeness.load` uses `library_imports`, which leaves threads and garbage collection as they were.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which a user sets the thread count."""

SMALL_WORK = 2e9
"""Weights times image tokens below which one thread is used (`benchmarks/threads.py`)."""

OPTIONAL = ("peft", "scipy", "torchao")
"""Packages that a bundled model does not need to generate (`optional_packages_hidden`)."""

NOISE = (
    ("torchao", r"Failed to load \S*_C\w*\."),
    ("torch.utils._pytree", r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass"),
    ("diffusers.quantizers.torchao.torchao_quantizer", r"Unable to import `torchao` Tensor objects"),
    ("diffusers.pipelines.pipeline_utils", r"Expected types for vae: .*LabelDecoder"),
    ("diffusers.models.modeling_utils", r".* should be kept in float32: \[\]"),
)
"""Logger and beginning of each message that is dropped. diffusers and transformers import torchao if it is installed,
and torchao logs which of its GPU kernels do not load. A model of masks decodes with a `LabelDecoder`. The last message
lists no modules.
"""


def configure_process() -> None:
    """Configure a process that only runs likeness. Call it before torch is imported.

    Waiting OpenMP threads sleep instead of spinning, unless OMP_WAIT_POLICY is set. Garbage is collected less often,
    and not at exit: the imported libraries create half a million objects that all stay alive.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    mute_noise()
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")  # Pillow's; ours is checked instead
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


@contextmanager
def optional_packages_hidden() -> Iterator[None]:
    """Import diffusers and transformers as if the packages in `OPTIONAL` were not installed.

    For a process that ends without LoRA, quantized weights or an unusual sampler: both libraries import these packages
    whenever they find them, a quarter of a cold start, and have no setting against it. What they found is final, so
    nothing is hidden once either of them is imported. `None` in `sys.modules` is Python's mark of an absent module.
    """
    late = "diffusers" in sys.modules or "transformers" in sys.modules
    hidden = {} if late else {name: sys.modules.get(name) for name in OPTIONAL}
    sys.modules.update(dict.fromkeys(hidden))  # pyrefly: ignore
    try:
        yield
    finally:
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:  # scipy, with which a sketch was read
                sys.modules[name] = module


@contextmanager
def library_imports() -> Iterator[None]:
    """Import diffusers and transformers without their noise, and with garbage collection paused."""
    mute_noise()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def mute_noise() -> None:
    """Drop the messages in `NOISE`, and no others."""
    for name, _ in NOISE:
        logging.getLogger(name).addFilter(is_shown)  # a filter that is present is not added twice


def is_shown(record: logging.LogRecord) -> bool:
    """Whether a log record is to be shown."""
    return not any(record.name == name and re.match(text, record.getMessage()) for name, text in NOISE)


def choose_threads(work: float) -> None:
    """Use one thread for a small network, which gains nothing from more, and torch's default for a larger one.

    A thread count set through the environment is kept.

    Args:
        work: weights of the network times image tokens.
    """
    if work < SMALL_WORK:
        set_threads(1)


def set_threads(count: int) -> None:
    """Set torch's thread count, unless the user set one through the environment."""
    import torch

    if not any(os.environ.get(name) for name in THREAD_VARIABLES):
        torch.set_num_threads(count)
