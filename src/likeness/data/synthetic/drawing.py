"""Draw a synthetic face from its traits, from back to front.

Coordinates are those of `likeness.data.synthetic.scene.Head`. Each feature uses the same curves for its shape and its
keypoints, so that the keypoints are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from likeness.data.synthetic.canvas import (
    INK,
    Canvas,
    arc,
    ellipse,
    mirrored,
    mix,
    resample,
    ribbon,
    sided,
    smooth,
    toned,
)
from likeness.data.synthetic.hair import draw_back_hair, draw_front_hair, draw_hat, natural_hair
from likeness.data.synthetic.scene import Head, draw_background, draw_body
from likeness.data.synthetic.traits import LONG, Traits

SKIN, NOSE, EYE_G, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR, MOUTH, U_LIP, L_LIP = range(1, 13)
EARRING = 15

SKULL = ((-1.33, 0.42), (-1.08, 0.78), (-0.62, 0.97), (-0.1, 1.0))
"""(y, half width of the face) from the top of the skull; `JAWS` continues to the chin."""
JAWS = {
    "oval": ((0.3, 0.97), (0.7, 0.87), (1.02, 0.68), (1.27, 0.42), (1.40, 0.19)),
    "round": ((0.3, 1.02), (0.7, 0.97), (1.00, 0.80), (1.22, 0.53), (1.34, 0.24)),
    "square": ((0.3, 0.98), (0.7, 0.93), (1.02, 0.83), (1.27, 0.58), (1.38, 0.30)),
    "long": ((0.3, 0.94), (0.75, 0.86), (1.10, 0.69), (1.38, 0.43), (1.50, 0.21)),
    "heart-shaped": ((0.3, 0.98), (0.7, 0.84), (1.02, 0.60), (1.27, 0.33), (1.40, 0.15)),
}


class Drawing(NamedTuple):
    """Image uint8 [S, S, 3], mask uint8 [S, S], sketch uint8 [S, S], keypoints float32 [68, 2]."""

    image: np.ndarray
    mask: np.ndarray
    sketch: np.ndarray
    keypoints: np.ndarray


def draw(traits: Traits, size: int, random: np.random.Generator) -> Drawing:
    """Draw a face at `size` x `size` pixels. `random` affects only strands, freckles and lights."""
    canvas = Canvas(size)
    head = Head(traits, canvas)
    keypoints = np.zeros((68, 2))
    outline = face_outline(traits, head, keypoints)
    draw_background(canvas, traits, random)
    draw_back_hair(canvas, traits, head, random)
    face = canvas.cover(outline)
    draw_body(canvas, traits, head, face)
    draw_ears(canvas, traits, head)
    draw_skin(canvas, traits, head, outline, face, random)
    draw_beard(canvas, traits, head, face, random)
    draw_nose(canvas, traits, head, keypoints)
    draw_mouth(canvas, traits, head, keypoints)
    for side in (-1, 1):
        draw_eye(canvas, traits, head, side, keypoints)
    for side in (-1, 1):
        draw_brow(canvas, traits, head, side, keypoints, random)
    if traits.glasses != "none":
        draw_glasses(canvas, traits, head)
    draw_front_hair(canvas, traits, head, face, random)
    draw_hat(canvas, traits, head, face)
    if traits.earrings != "none":
        draw_earrings(canvas, traits, head)
    # A slight vignette.
    fall = 1.03 - 0.16 * ((canvas.x - 0.5) ** 2 + (canvas.y - 0.45) ** 2)[..., None]
    image = np.clip(canvas.image * fall, 0, 1)
    return Drawing((image * 255 + 0.5).astype(np.uint8), canvas.mask, canvas.sketch(), keypoints.astype(np.float32))


def face_outline(traits: Traits, head: Head, keypoints: np.ndarray) -> np.ndarray:
    """Return the closed outline of skull and jaw in image units, and set the keypoints of the jaw."""
    jaw = [(y, width * (traits.jaw_width if y > 0.5 else 1.0)) for y, width in JAWS[traits.face_shape]]
    side = [(width, y) for y, width in (*SKULL, *jaw)]
    chin = jaw[-1][0] + 0.035
    local = smooth([(0.0, -1.40), *side, (0.0, chin), *[(-x, y) for x, y in reversed(side)]], steps=8)
    lower = local[local[:, 1] >= -0.1 - 1e-9]
    keypoints[0:17] = head.rim(resample(lower[::-1], 17))
    return head.rim(local)


def ear_places(head: Head) -> list[tuple[int, float, float]]:
    """Return (side, x of the center, half width) of each visible ear."""
    ears: list[tuple[int, float, float]] = []
    if head.traits.hair_style in LONG and not head.traits.tucked:
        return ears
    for side in (-1, 1):
        away = side * head.traits.yaw
        width = 0.19 * (1 - 0.75 * max(away, 0)) + 0.03 * max(-away, 0)
        if away < 0.8:
            ears.append((side, side * (1.03 - 0.07 * max(away, 0) - 0.02 * max(-away, 0)), width))
    return ears


def draw_ears(canvas: Canvas, traits: Traits, head: Head) -> None:
    for side, x, width in ear_places(head):
        shape = [(0.0, -0.2), (0.75, -0.22), (1.0, -0.02), (0.8, 0.26), (0.42, 0.47), (-0.1, 0.46), (-0.4, 0.1)]
        local = smooth([(x + side * dx * width, y) for dx, y in shape], steps=5)
        label = R_EAR if side < 0 else L_EAR
        canvas.paint([head.rim(local)], toned(mix(traits.skin, (0.85, 0.35, 0.3), 0.09), head.light + 0.15), label)
        fold = arc([(x + side * dx * width, y) for dx, y in [(0.1, -0.08), (0.62, -0.08), (0.62, 0.1), (0.3, 0.26)]])
        dark = np.array(traits.skin) * (0.6, 0.45, 0.42)
        canvas.pen(head.rim(fold), dark, canvas.at_least(0.011, 1.1), 0.6, grey=120)


def draw_earrings(canvas: Canvas, traits: Traits, head: Head) -> None:
    jewel = np.array(traits.jewel)
    for side, x, width in ear_places(head):
        lobe_x, lobe_y = head.rim([(x + side * 0.25 * width, 0.46)])[0]
        if traits.earrings == "hoops":
            radius = 0.036
            ring, hole = ellipse(lobe_x, lobe_y + radius, radius), ellipse(lobe_x, lobe_y + radius, radius - 0.013)
            canvas.paint([ring], jewel, EARRING, holes=(hole,), outline=50)
        elif traits.earrings == "drops":
            line = np.array([(lobe_x, lobe_y - 0.01), (lobe_x, lobe_y + 0.035)])
            canvas.paint([ribbon(line, canvas.at_least(0.012, 1.5))], jewel * 0.85, EARRING, outline=60)
            drop = ellipse(lobe_x, lobe_y + 0.052, 0.019, 0.027)
            canvas.paint([drop], toned(jewel, head.light + 0.2), EARRING, outline=50)
            canvas.tint(canvas.glow((lobe_x - 0.005, lobe_y + 0.045), 0.007), (1, 1, 1))
        else:
            canvas.paint([ellipse(lobe_x, lobe_y, 0.02)], toned(jewel, head.light + 0.25), EARRING, outline=50)
            canvas.tint(canvas.glow((lobe_x - 0.005, lobe_y - 0.006), 0.008), (1, 1, 1))


def draw_skin(
    canvas: Canvas, traits: Traits, head: Head, outline: np.ndarray, face: np.ndarray, random: np.random.Generator
) -> None:
    """Draw the skin with light, blush, freckles and wrinkles."""
    skin = np.array(traits.skin)
    canvas.paint([outline], toned(skin, head.light), SKIN)

    def spot(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
        center_x, center_y = head.surface([(x, y)])[0]
        return canvas.glow((center_x, center_y), radius_x * head.scale, radius_y * head.scale)

    blush = 0.34 if traits.makeup else 0.2
    rosy = skin * (1.0, 0.62, 0.58) + (0.06, 0, 0)
    for side in (-1, 1):
        canvas.tint(spot(side * 0.6, 0.5, 0.33, 0.24) * face * blush, np.clip(rosy, 0, 1))
        canvas.tint(spot(side * 0.45, -0.02, 0.36, 0.24) * face * 0.2, skin * (0.66, 0.52, 0.52))
        canvas.tint(spot(side * 0.52, 0.3, 0.22, 0.1) * face * 0.22, mix(skin, (1, 0.97, 0.92), 0.6))
    canvas.tint(spot(0.1 * traits.light_side, -0.75, 0.5, 0.26) * face * 0.25, mix(skin, (1, 0.98, 0.94), 0.6))
    canvas.tint(spot(0, 1.24, 0.2, 0.1) * face * 0.2, mix(skin, (1, 0.97, 0.92), 0.6))
    canvas.tint(spot(0, 1.14, 0.24, 0.06) * face * 0.25, skin * (0.66, 0.52, 0.52))
    if traits.hair_style == "bald":
        canvas.tint(spot(0.35 * traits.light_side, -1.12, 0.3, 0.12) * face * 0.5, mix(skin, (1, 1, 1), 0.7))
    if traits.freckles:
        places = random.normal(0, 1, (46, 2)) * (0.26, 0.13)
        side = np.where(np.arange(46) % 2, 0.5, -0.5)
        where = head.surface(places + np.stack([side, np.full(46, 0.38)], axis=1))
        dots = canvas.cover(*[ellipse(x, y, canvas.at_least(0.0055, 0.7), steps=7) for x, y in where])
        canvas.tint(dots * face * 0.55, skin * (0.66, 0.46, 0.36))
    lines = {"young": 0.0, "middle-aged": 0.28, "older": 0.55}[traits.age]
    if lines:
        curves = []
        for side in (-1, 1):
            curves.append(sided(side, [(0.27, 0.55), (0.42, 0.72), (0.5, 0.92)]))
            curves.append(sided(side, [(0.26, 0.22), (0.42, 0.27), (0.58, 0.22)]))
            if traits.age == "older":
                curves.append(sided(side, [(0.76, -0.02), (0.84, -0.06), (0.9, -0.1)]))
                curves.append(sided(side, [(0.76, 0.06), (0.84, 0.1), (0.9, 0.14)]))
        for y in (-0.72, -0.58) if traits.age == "older" else ():
            curves.append([(-0.42, y + 0.02), (0, y - 0.02), (0.42, y + 0.02)])
        for curve in curves:
            place = head.surface(arc(curve))
            grey = 150 if lines < 0.5 else 110
            canvas.pen(place, skin * (0.55, 0.4, 0.38), canvas.at_least(0.008, 1), lines, grey=grey)


def draw_beard(canvas: Canvas, traits: Traits, head: Head, face: np.ndarray, random: np.random.Generator) -> None:
    """Draw beard and moustache as color on the skin: the mask has no class for them."""
    color = np.array(natural_hair(traits)) * 0.85
    if traits.beard != "none":
        jaw = [(1.1, 0.12), (1.1, 0.8), (0.8, 1.3), (0.4, 1.6)]
        cheek = {
            "stubble": [(0.8, 0.3), (0.66, 0.62), (0.42, 0.72), (0.14, 0.72)],
            "short beard": [(0.95, 0.35), (0.8, 0.86), (0.52, 0.9), (0.42, 0.76), (0.14, 0.73)],
            "full beard": [(0.84, 0.12), (0.74, 0.52), (0.46, 0.7), (0.14, 0.7)],
        }[traits.beard]
        right = [*reversed(cheek), *jaw]
        area = smooth(mirrored(right), steps=4)
        opacity = {"stubble": 0.26, "short beard": 0.75, "full beard": 0.92}[traits.beard]
        place = canvas.blur(canvas.cover(head.surface(area)), 0.008) * face
        canvas.tint(place * opacity, toned(color, head.light + 0.1))
        if traits.beard != "stubble":
            starts = np.stack([random.uniform(-0.8, 0.8, 70), random.uniform(0.55, 1.4, 70)], axis=1)
            ends = [point + point[0] * np.array([0.03, 0]) + np.array([0, 0.1]) for point in starts]
            strokes = [head.surface([start, end]) for start, end in zip(starts, ends, strict=True)]
            canvas.tint(canvas.cover_lines(strokes, 0.006) * place * 0.35, mix(color, (1, 0.9, 0.8), 0.3))
            for stroke in strokes:
                x, y = np.clip(stroke.mean(axis=0) * canvas.size, 0, canvas.size - 1).astype(int)
                if place[y, x] > 0.6:
                    canvas.line(stroke, grey=130)
    if traits.mustache:
        right = [(0.0, 0.72), (0.16, 0.7), (0.34, 0.78), (0.44, 0.92), (0.3, 0.88), (0.0, 0.86)]
        shape = smooth(mirrored(right, shared=1), steps=4)
        canvas.paint([head.surface(shape, 0.05)], toned(color, head.light + 0.05), None, opacity=0.92, outline=110)


def draw_nose(canvas: Canvas, traits: Traits, head: Head, keypoints: np.ndarray) -> None:
    skin, wide, long = np.array(traits.skin), traits.nose_width, traits.nose_length

    def out(points: object) -> np.ndarray:
        local = np.array(points, dtype=np.float64) * (wide, long)
        return head.surface(local, 0.22 * np.clip(local[:, 1] / long, 0, 1) ** 1.3)

    right = [(0.07, -0.05), (0.085, 0.3), (0.11, 0.6), (0.2, 0.76), (0.25, 0.9), (0.17, 1.0), (0.06, 1.03)]
    shape = out(smooth(mirrored(right), steps=4))
    dark = skin * (0.62, 0.47, 0.46)
    alpha = canvas.paint([shape], skin, NOSE, opacity=0.0, outline=None)
    away = -traits.light_side
    shade = out(sided(away, [(0.02, 0), (0.03, 0.7), (0.24, 0.95), (0.14, 0.5), (0.12, 0)]))
    canvas.tint(canvas.blur(canvas.cover(shade), 0.01) * 0.42, dark)
    canvas.tint(canvas.blur(alpha, 0.012, (0.006 * away, 0.022)) * (1 - alpha) * 0.35 * (head.v > long * 0.8), dark)
    canvas.tint(alpha * canvas.glow(out([(-away * 0.03, 0.82)])[0], 0.024) * 0.55, mix(skin, (1, 1, 0.97), 0.75))
    canvas.tint(alpha * canvas.glow(out([(-away * 0.02, 0.35)])[0], 0.013, 0.05) * 0.4, mix(skin, (1, 1, 0.97), 0.7))
    for side in (-1, 1):
        wing = out(arc(sided(side, [(0.17, 0.74), (0.235, 0.9), (0.17, 1.0)])))
        canvas.pen(wing, dark, canvas.at_least(0.009, 1.1), 0.7, grey=50)
        hole = out(smooth(sided(side, [(0.05, 0.97), (0.11, 0.93), (0.15, 0.96), (0.1, 1.0)]), steps=4))
        canvas.tint(canvas.cover(hole) * 0.75, skin * (0.38, 0.24, 0.24))
        canvas.line(np.concatenate([hole, hole[:1]]), grey=60)
    canvas.line(out(arc([(-0.06, 1.0), (0, 1.03), (0.06, 1.0)])), grey=70)
    canvas.line(out(arc([(away * 0.085, 0.05), (away * 0.085, 0.3), (away * 0.11, 0.55)])), grey=130)
    keypoints[27:31] = out([(0, 0.05), (0, 0.3), (0, 0.56), (0, 0.82)])
    keypoints[31:36] = out([(-0.17, 0.98), (-0.085, 1.01), (0, 1.03), (0.085, 1.01), (0.17, 0.98)])


MOUTHS = {
    "neutral": (1.0, 0.0, 0.0),
    "smile": (1.22, 0.085, 0.0),
    "big smile": (1.36, 0.11, 0.17),
    "surprised": (0.7, -0.02, 0.25),
    "sad": (0.98, -0.08, 0.0),
}
"""Expression -> width of the mouth, lift of its corners, opening."""


def draw_mouth(canvas: Canvas, traits: Traits, head: Head, keypoints: np.ndarray) -> None:
    width, lift, opening = MOUTHS[traits.expression]
    half, full = traits.mouth_width * width, traits.lip_fullness
    level = (0.92 if traits.face_shape != "long" else 0.97) + (0.04 if lift > 0 else 0.0)

    def along(t: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Points at t in [-1, 1] between the corners, `height` below the line between the lips."""
        bend = lift * (1 - np.abs(t) ** 1.7) - lift * 0.75
        return head.surface(np.stack([t * half, level + bend + height], axis=1), 0.06 * (1 - t**2))

    def upper_inner(t: np.ndarray) -> np.ndarray:
        closed = 0.012 * np.cos(np.pi * t * 2) * (1 - t**2)
        return closed - opening * 0.42 * (1 - np.abs(t) ** 2.6) * (1.0 if lift < 0 else 0.25)

    def lower_inner(t: np.ndarray) -> np.ndarray:
        return upper_inner(t) * (opening == 0) + opening * 0.9 * (1 - np.abs(t) ** 2.2)

    def upper_outer(t: np.ndarray) -> np.ndarray:
        bow = 0.1 * (1 - np.abs(t) ** 1.5) - 0.025 * np.exp(-((t / 0.16) ** 2))
        return np.minimum(upper_inner(t), 0) - bow * full * (0.85 if opening else 1.0)

    def lower_outer(t: np.ndarray) -> np.ndarray:
        return lower_inner(t) + 0.125 * full * (1 - np.abs(t) ** 2.4) * (0.85 if opening else 1.0)

    t = np.linspace(-1, 1, 21)
    top, bottom = along(t, upper_inner(t)), along(t, lower_inner(t))
    over, below = along(t, upper_outer(t)), along(t, lower_outer(t))
    lip = np.array(traits.lip)
    light = head.light * 0.7
    upper, lower = np.concatenate([over, top[::-1]]), np.concatenate([bottom, below[::-1]])
    shadow = canvas.blur(canvas.cover(lower), 0.012, (0, 0.018))
    canvas.tint(shadow * 0.3, np.array(traits.skin) * (0.62, 0.46, 0.46))
    if opening:
        inside = np.concatenate([top, bottom[::-1]])
        alpha = canvas.paint([inside], (0.26, 0.07, 0.09), MOUTH)
        tongue = canvas.glow(along(np.zeros(1), np.array([opening * 0.85]))[0], half * 0.6 * head.scale, 0.03)
        canvas.tint(tongue * alpha * 0.75, (0.78, 0.36, 0.38))
        reach = 0.62 if lift > 0 else 0.26
        edge = upper_inner(t) + (lower_inner(t) - upper_inner(t)) * reach
        teeth = canvas.cover(np.concatenate([top, along(t, edge)[::-1]])) * alpha
        canvas.tint(teeth * 0.97, (0.97, 0.96, 0.93))
        canvas.line(along(t, edge)[2:-2], grey=120)
        for place in (-0.5, -0.25, 0.0, 0.25, 0.5):
            gap = np.array([place, place])
            low = np.array([np.interp(place, t, upper_inner(t)), np.interp(place, t, edge)])
            canvas.tint(canvas.cover(ribbon(along(gap, low), 0.004)) * teeth * 0.35, (0.6, 0.55, 0.55))
        canvas.tint(canvas.blur(canvas.cover(upper), 0.006, (0, 0.008)) * alpha * 0.35, (0.2, 0.05, 0.06))
    lower_alpha = canvas.paint([lower], toned(mix(lip, (1, 0.85, 0.82), 0.1), light + 0.05), L_LIP, outline=70)
    canvas.paint([upper], toned(lip * 0.9, light - 0.05), U_LIP, outline=70)
    middle = along(np.array([0.15 * traits.light_side]), lower_inner(np.array([0.15])) + 0.05 * full)[0]
    gloss = canvas.glow(middle, half * 0.42 * head.scale, 0.011)
    canvas.tint(gloss * lower_alpha * (0.65 if traits.makeup else 0.4), (1, 0.93, 0.92))
    if not opening:
        canvas.pen(top, lip * (0.42, 0.3, 0.32), canvas.at_least(0.009, 1.2), 0.8, grey=INK)
    for side in (0, -1):
        canvas.tint(canvas.glow(top[side], 0.012) * 0.4, np.array(traits.skin) * (0.5, 0.35, 0.34))
    fifth = np.array([-1, -0.6, -0.25, 0, 0.25, 0.6, 1])
    keypoints[48:55] = along(fifth, upper_outer(fifth))
    keypoints[55:60] = along(fifth, lower_outer(fifth))[5:0:-1]
    inner = np.array([-0.86, -0.4, 0.0, 0.4, 0.86])
    keypoints[60:65] = along(inner, upper_inner(inner))
    keypoints[65:68] = along(inner, lower_inner(inner))[3:0:-1]


def draw_eye(canvas: Canvas, traits: Traits, head: Head, side: int, keypoints: np.ndarray) -> None:
    """Draw an eye; `side` -1 is the viewer's left, the person's right."""
    wide = 0.235 * traits.eye_size
    squint = {"neutral": 1.0, "smile": 0.9, "big smile": 0.8, "surprised": 1.3, "sad": 0.92}[traits.expression]
    high = 0.118 * traits.eye_size * squint
    slant = traits.eye_slant - (0.035 if traits.expression == "sad" else 0.0)
    cheek = 0.5 if traits.expression in ("smile", "big smile") else 0.62

    def place(t: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Points at t in [-1, 1] from the inner to the outer corner, at height y."""
        return head.surface(np.stack([side * (0.455 + t * wide), y - slant * t], axis=1))

    def upper(t: np.ndarray) -> np.ndarray:
        return -high * (1 - np.abs(t) ** 2.3)

    def lower(t: np.ndarray) -> np.ndarray:
        return high * cheek * (1 - np.abs(t) ** 2)

    t = np.linspace(-1, 1, 17)
    lid, under = place(t, upper(t)), place(t, lower(t))
    skin = np.array(traits.skin)
    crease = place(t * 1.08, upper(t) - 0.075 + 0.03 * t**2)
    if traits.makeup:
        area = np.concatenate([place(t * 1.15, upper(t) - 0.16 * (1 - 0.5 * t**2)), under[::-1]])
        canvas.tint(canvas.blur(canvas.cover(area), 0.01) * 0.6, traits.shadow_color)
    canvas.pen(crease, skin * (0.5, 0.36, 0.35), canvas.at_least(0.008, 1), 0.55, grey=110)
    label = R_EYE if side < 0 else L_EYE
    opening = canvas.paint([np.concatenate([lid, under[::-1]])], (0.96, 0.95, 0.94), label)
    canvas.tint(canvas.glow(place(np.array([-0.9]), np.array([0.02]))[0], 0.012) * opening * 0.5, (0.85, 0.55, 0.52))
    gaze = side * traits.yaw * 0.12
    radius = 0.122 * traits.eye_size * (0.94 if traits.expression == "surprised" else 1.0)
    middle = -0.022 * squint

    def disc(size: float) -> np.ndarray:
        round_shape = ellipse(gaze, middle, size / wide, size, steps=24)
        return place(round_shape[:, 0], np.clip(round_shape[:, 1], upper(round_shape[:, 0]), lower(round_shape[:, 0])))

    iris = np.array(traits.eye)
    center_x, center_y = place(np.array([gaze]), np.array([middle]))[0]
    below = np.clip((canvas.y - center_y) / (radius * head.scale), -1, 1)
    canvas.paint([disc(radius)], np.clip(iris * 0.55, 0, 1), None, outline=60)
    canvas.paint([disc(radius * 0.82)], toned(iris, below * 0.9), None, outline=None)
    canvas.paint([disc(radius * 0.45)], (0.05, 0.04, 0.05), None, outline=40)
    canvas.tint(canvas.blur(canvas.cover(ribbon(lid, 0.02)), 0.006, (0, 0.007)) * opening * 0.45, (0.2, 0.14, 0.16))
    large, small = (0.3 * traits.light_side, -0.3, 0.34, 1.0), (-0.35 * traits.light_side, 0.4, 0.16, 0.55)
    for dx, dy, size, strength in (large, small):
        x, y = center_x + dx * radius * head.scale, center_y + dy * radius * head.scale
        shine = ellipse(x, y, radius * head.scale * size, steps=12)
        canvas.tint(canvas.cover(shine) * opening * strength, (1, 1, 1))
    thick = 0.017 if traits.makeup else (0.013 if traits.presentation == "woman" else 0.011)
    lash = (0.1, 0.07, 0.08)
    weight = np.linspace(0.5, 1.15, len(lid)) * canvas.at_least(thick, 1.2)
    canvas.tint(canvas.cover(ribbon(lid, weight)) * 0.95, lash)
    canvas.line(lid, width=1.5)
    if traits.makeup or traits.presentation == "woman":
        tip = place(np.array([0.6, 1.0, 1.28]), np.array([upper(np.array([0.6]))[0], 0.0, -0.07]))
        canvas.tint(canvas.cover(ribbon(arc(tip), np.linspace(1.2, 0.4, 13) * canvas.at_least(0.012, 1.1))) * 0.9, lash)
        canvas.line(tip)
    canvas.tint(canvas.cover(ribbon(under, canvas.at_least(0.006, 0.8))) * 0.45, skin * (0.45, 0.32, 0.32))
    sixth = np.array([-1, -0.38, 0.38, 1])
    inner, above_inner, above_outer, outer = place(sixth, upper(sixth))
    below_inner, below_outer = place(sixth, lower(sixth))[1:3]
    if side < 0:
        keypoints[36:42] = outer, above_outer, above_inner, inner, below_inner, below_outer
    else:
        keypoints[42:48] = inner, above_inner, above_outer, outer, below_outer, below_inner


def draw_brow(
    canvas: Canvas, traits: Traits, head: Head, side: int, keypoints: np.ndarray, random: np.random.Generator
) -> None:
    raised = {"neutral": 0.0, "smile": 0.02, "big smile": 0.04, "surprised": 0.14, "sad": 0.03}[traits.expression]
    tilt = 0.11 if traits.expression == "sad" else 0.02
    t = np.linspace(-1, 1, 13)
    y = -0.34 - raised - traits.brow_arch * (1 - (t - 0.12) ** 2) + tilt * t
    curve = head.surface(np.stack([side * (0.48 + 0.3 * t), y], axis=1))
    taper = 1 - 0.62 * np.clip((t + 0.35) / 1.35, 0, 1) ** 1.4
    width = traits.brow_width * head.scale * taper * np.where(t < -0.8, 0.8, 1)
    base = np.array(natural_hair(traits))
    color = base * 0.72 if base.mean() < 0.62 else base * 0.8
    label = R_BROW if side < 0 else L_BROW
    canvas.paint([ribbon(curve, np.maximum(width, 0.9 / canvas.size))], color, label, opacity=0.92, outline=70)
    for along in random.uniform(0, 1, 5):
        start = curve[int(along * 9)]
        canvas.line(start + np.array([(0, 0.006), (side * 0.014, -0.006)]), grey=90)
    five = curve[[0, 3, 6, 9, 12]]
    keypoints[17:27][slice(0, 5) if side < 0 else slice(5, 10)] = five[::-1] if side < 0 else five


def draw_glasses(canvas: Canvas, traits: Traits, head: Head) -> None:
    frame = np.array(traits.glasses_color)
    thick = canvas.at_least(0.017, 1.9)
    stand = 0.1

    def path(points: object) -> np.ndarray:
        return head.surface(points, stand)

    rims = []
    for side in (-1, 1):
        if traits.glasses == "round":
            local = ellipse(side * 0.47, 0.03, 0.36, 0.34, steps=36)
        elif traits.glasses == "square":
            right = [(0.36, -0.24), (0.37, 0.05), (0.3, 0.26)]
            corner = [(-0.36, -0.22), (0, -0.26), *right, (0, 0.29), (-0.28, 0.26), (-0.35, 0.05)]
            local = smooth([(side * (0.47 + x), y + 0.02) for x, y in corner], steps=4)
        else:
            corner = [(-0.36, -0.2), (0, -0.27), (0.4, -0.24), (0.38, 0.1), (0.16, 0.34), (-0.16, 0.34), (-0.34, 0.1)]
            local = smooth([(side * (0.48 + x), y + 0.02) for x, y in corner], steps=5)
        rims.append(path(local))
        arm = np.concatenate([path([(side * 0.82, -0.06)]), head.rim([(side * 1.03, -0.1)])])
        if side * traits.yaw < 0.75:
            canvas.paint([ribbon(arm, thick)], frame * 0.8, EYE_G)
    bridge = path(arc([(-0.13, -0.04), (0, -0.1), (0.13, -0.04)]))
    canvas.paint([ribbon(bridge, thick)], frame, EYE_G)
    for rim in rims:
        middle = rim.mean(axis=0)
        if traits.glasses == "sunglasses":
            down = np.clip((canvas.y - middle[1]) / (0.33 * head.scale), -1, 1)
            canvas.paint([rim], toned((0.17, 0.16, 0.19), down * 0.7), EYE_G)
            glare = np.clip(1 - np.abs((canvas.x - middle[0]) + (canvas.y - middle[1]) + 0.03) / 0.022, 0, 1)
            canvas.tint(canvas.cover(rim) * glare * 0.35, (1, 1, 1))
            canvas.tint(canvas.cover(rim, holes=(middle + (rim - middle) * 0.88,)), frame)
            continue
        hole = middle + (rim - middle) * (1 - thick / (0.34 * head.scale))
        lens = canvas.cover(hole)
        canvas.tint(canvas.blur(lens, 0.006, (0, 0.012)) * 0.12, (0.2, 0.15, 0.15))
        canvas.tint(lens * 0.08, (0.9, 0.95, 1))
        streak = np.clip(1 - np.abs((canvas.x - middle[0]) + (canvas.y - middle[1]) + 0.05) / 0.012, 0, 1)
        canvas.tint(lens * streak * 0.35, (1, 1, 1))
        canvas.paint([rim], frame, EYE_G, holes=(hole,))
