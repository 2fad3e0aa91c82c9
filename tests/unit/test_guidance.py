"""Passes and their weights: v = v_0 + sum s_k (v_k - v_0), each v_k = u_k + g (t_k - u_k)."""

from __future__ import annotations

import pytest

from likeness.pipelines.guidance import Pass, passes
from likeness.types import ConditionInput


def condition(**options) -> ConditionInput:
    return ConditionInput(image=None, **options)


def prediction(found: tuple[Pass, ...], values: dict) -> float:
    return sum(p.weight * values[p.condition, p.negative] for p in found)


VALUES = {
    (None, False): 1.0,
    (None, True): 2.0,
    ("mask", False): 5.0,
    ("mask", True): 7.0,
    ("sketch", False): 11.0,
    ("sketch", True): 13.0,
}
SCALES = [{}, {"mask": 1.0}, {"mask": 0.5}, {"mask": 1.0, "sketch": 1.0}, {"mask": 0.3, "sketch": 1.4}]


@pytest.mark.parametrize("g", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("scales", SCALES)
def test_formula(g, scales):
    def guided(name):
        u, t = VALUES[name, True], VALUES[name, False]
        return u + g * (t - u)

    wanted = guided(None) + sum(s * (guided(name) - guided(None)) for name, s in scales.items())
    found = passes({name: condition(scale=s) for name, s in scales.items()}, g, 0.0)
    assert prediction(found, VALUES) == pytest.approx(wanted)


def test_passes_without_weight_are_not_run():
    assert passes({}, 1.0, 0.0) == (Pass(None, False, 1.0),)
    assert passes({"mask": condition()}, 1.0, 0.0) == (Pass("mask", False, 1.0),)
    assert [p.condition for p in passes({"mask": condition()}, 4.0, 0.0)] == ["mask", "mask"]
    tenths = {"mask": condition(scale=0.7), "sketch": condition(scale=0.2), "keypoints": condition(scale=0.1)}
    assert None not in [p.condition for p in passes(tenths, 1.0, 0.0)]  # 1 - (0.7 + 0.2 + 0.1) is 1e-16
    halves = {"mask": condition(scale=0.5), "sketch": condition(scale=0.5)}
    assert [p.condition for p in passes(halves, 1.0, 0.0)] == ["mask", "sketch"]
    assert [p.condition for p in passes({"mask": condition(), "sketch": condition()}, 1.0, 0.0)] == [
        None,
        "mask",
        "sketch",
    ]


def test_scale_zero_is_absent():
    assert passes({"mask": condition(scale=0)}, 4.0, 0.0) == passes({}, 4.0, 0.0)


def test_start_and_end():
    conditions = {"mask": condition(start=0.25, end=0.75)}
    active = [i for i in range(8) if any(p.condition for p in passes(conditions, 1.0, i / 8))]
    assert active == [2, 3, 4, 5]
    assert passes({"mask": condition(end=0.0)}, 1.0, 0.0) == passes({}, 1.0, 0.0)
