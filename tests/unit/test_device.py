"""The device and number format of every command: automatic by default, and one sentence for what is not available."""

from __future__ import annotations

import inspect

import pytest
import torch

from builders import run, tiny_pipeline
from likeness.cli import COMMANDS, execute
from likeness.device import choose_device, choose_dtype, choose_precision, supports_bf16
from likeness.parallel import World
from likeness.pipelines.image_recipe import read_recipe
from likeness.pipelines.load import load
from likeness.types import InputError


@pytest.fixture
def four_devices(monkeypatch):
    """A machine with four accelerators, played by torch's meta device, which takes every operation."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def test_automatic_is_the_accelerator_if_present():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = choose_device("auto")
    assert device == ("cpu" if accelerator is None else accelerator.type)
    assert torch.ones(1, device=device).item() == 1
    assert choose_device(None) == choose_device("cpu") == "cpu"


def test_accelerators(four_devices, monkeypatch):
    assert [choose_device(name) for name in ("auto", "meta", "meta:3", "cpu", None)] == [
        "meta", "meta", "meta:3", "cpu", "cpu",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"'meta:4' is not available. Available: meta:0, meta:1, meta:2, meta:3, cpu$"):
        choose_device("meta:4")
    for rank, own in (("1", "meta:1"), ("5", "meta:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert [choose_device(name) for name in ("auto", "meta", "meta:3", "cpu")] == [own, own, "meta:3", "cpu"]


def test_accelerator_that_does_not_compute(four_devices, monkeypatch):
    """Such as a GPU that this build of PyTorch has no kernels for."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    with pytest.raises(InputError, match=r"Device 'xpu' does not work: .*Use another, such as cpu") as caught:
        choose_device("auto")
    assert "\n" not in str(caught.value)


def test_number_formats(four_devices):
    assert choose_dtype("auto", "cpu") is torch.float32
    assert choose_dtype("auto", "meta") is torch.bfloat16
    for name in ("fp16", "float16", torch.float16):
        assert choose_dtype(name, "cpu") is torch.float16
    with pytest.raises(InputError, match="Unknown dtype 'int4'"):
        choose_dtype("int4", "cpu")


@pytest.mark.parametrize(("capability", "precision"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_precision_of_a_processor(capability, precision, monkeypatch):
    """A processor without bf16 instructions emulates them: training there in fp32 is several times faster."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "cpu_name": "bf16", capability: True}
    )
    assert supports_bf16("cpu") == (precision == "bf16")
    assert choose_precision("auto", "cpu") == precision
    assert (choose_precision("bf16", "cpu"), choose_precision("fp32", "cpu")) == ("bf16", "fp32")
    with World().autocast("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == choose_dtype(precision, "cpu")


def test_every_command_chooses_by_itself():
    given = {name: command for name, command in COMMANDS.items() if name != "train"}  # there, a data sheet's name
    groups = {name: given.pop(name)[1] for name in list(given) if isinstance(given[name], tuple)}
    commands = given | {f"{group} {name}": own[name] for group, own in groups.items() for name in own}
    defaults = {
        (name, option): parameter.default
        for name, command in commands.items()
        for option, parameter in inspect.signature(command).parameters.items()
        if option in ("device", "dtype")
    }
    assert defaults.pop(("replay", "device")) is None  # that of the recipe
    expected = {"generate", "evaluate", "compare", "prepare annotate", "prepare encode"}
    assert {name for name, _ in defaults} >= expected
    assert set(defaults.values()) == {"auto"}


def test_load_stays_on_the_cpu_unless_told(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    assert pipeline.device.type == "cpu"
    assert pipeline.transformer.dtype is torch.float32
    for given in ({"dtype": "bf16"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        assert load(tmp_path, **given).transformer.dtype is torch.bfloat16
    assert load(tmp_path, device=torch.device("cpu")).device.type == "cpu"
    pipeline = load(tmp_path, device="auto", dtype="auto")
    assert pipeline.device.type == choose_device("auto")
    assert pipeline.transformer.dtype is choose_dtype("auto", choose_device("auto"))


def test_a_full_accelerator_is_one_sentence(capsys):
    def command():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(SystemExit, match="2"):
        execute(command)
    assert "the accelerator is out of memory: use a smaller size or batch" in capsys.readouterr().err


def test_recipes_record_the_format_in_use(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    given = ("generate", "--model", tmp_path / "model", "--seed", 1, "--device", "cpu")
    for dtype, name in (("auto", "float32"), ("bf16", "bfloat16")):
        image = tmp_path / f"{dtype}.png"
        assert run(*given, "--dtype", dtype, "--out", image) == 0
        environment = read_recipe(image)[0]["environment"]
        assert (environment["device"], environment["dtype"]) == ("cpu", name)
        assert run("replay", image, "--model", tmp_path / "model") == 0
        assert capsys.readouterr().out.endswith("bit-identical\n")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--model", "{model}"),
        ("evaluate", "{model}", "{model}", "--out", "{model}/out"),
    ],
    ids=" ".join,
)
def test_a_missing_device_is_one_sentence(command, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path)
    arguments = [word.format(model=tmp_path) for word in command]
    assert run(*arguments, "--device", "mps:7") == 2
    told = capsys.readouterr().err
    assert told.startswith("likeness: Device 'mps:7' is not available. Available: ")
    assert len(told) < 150
