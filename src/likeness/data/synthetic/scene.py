"""Head pose of a synthetic face, and its background, neck, clothes and necklace.

Head coordinates: the origin is between the eyes, x points to the viewer's right and y down, and half the width of the
face is 1, so that the chin is near y = 1.43. Yaw moves points by their depth on an ellipsoid.
"""

from __future__ import annotations

import numpy as np

from likeness.data.synthetic.canvas import Canvas, arc, ellipse, mirrored, mix, resample, ribbon, sided, smooth, toned
from likeness.data.synthetic.traits import BACKGROUND_COLORS, CLOTH_COLORS, Traits

NECKLACE, NECK, CLOTH = 16, 17, 18

YAW_LIMIT = np.radians(25)


class Head:
    """Transform from head coordinates to image units, and the light on the head."""

    def __init__(self, traits: Traits, canvas: Canvas) -> None:
        self.traits = traits
        self.scale = traits.scale
        self.center = np.array([0.5 + traits.shift[0], 0.475 + traits.shift[1]])
        self.sine, self.cosine = np.sin(traits.yaw * YAW_LIMIT), np.cos(traits.yaw * YAW_LIMIT)
        cosine, sine = np.cos(traits.roll), np.sin(traits.roll)
        self.rotation = np.array([[cosine, sine], [-sine, cosine]])
        across, down = (canvas.x - self.center[0]) / self.scale, (canvas.y - self.center[1]) / self.scale
        self.u = (across * cosine + down * sine).astype(np.float32)
        self.v = (down * cosine - across * sine).astype(np.float32)
        """Head coordinates of each pixel, without yaw: [S, S]."""
        normal_x, normal_y = self.u / 1.2, (self.v - 0.05) / 1.75
        normal_z = np.sqrt(np.clip(1 - normal_x**2 - normal_y**2, 0, 1))
        self.light = ((0.5 * traits.light_side * normal_x - 0.45 * normal_y + 0.74 * normal_z) - 0.62) * 1.15
        """Light on an ellipsoid, about -0.8..0.45: [S, S]."""

    def flat(self, points: object) -> np.ndarray:
        """Head coordinates -> image units, without yaw: [N, 2]."""
        return np.asarray(points, dtype=np.float64) @ self.rotation * self.scale + self.center

    def rim(self, points: object) -> np.ndarray:
        """As `flat` for points of the silhouette: yaw moves the chin more than the skull."""
        moved = np.array(points, dtype=np.float64)
        moved[:, 0] += self.sine * (-0.08 + 0.28 * np.clip((moved[:, 1] + 0.2) / 1.6, 0, 1) ** 1.2)
        return self.flat(moved)

    def surface(self, points: object, extra: float | np.ndarray = 0.0) -> np.ndarray:
        """As `flat` for points on the front of the head, at distance `extra` from it: yaw moves them by their depth."""
        moved = np.array(points, dtype=np.float64)
        x, y = moved.T
        depth = 0.75 * np.sqrt(np.clip(1 - (x / 1.1) ** 2, 0, 1) * np.clip(1 - ((y - 0.05) / 1.75) ** 2, 0, 1))
        moved[:, 0] = x * self.cosine + (depth + extra - 0.45) * self.sine
        return self.flat(moved)

    def body(self, points: object) -> np.ndarray:
        """As `flat` for points of neck and shoulders, without yaw and roll."""
        return np.asarray(points, dtype=np.float64) * self.scale + self.center


def draw_background(canvas: Canvas, traits: Traits, random: np.random.Generator) -> None:
    base = np.array(BACKGROUND_COLORS[traits.background_color], dtype=np.float32) / 255
    second = mix(base, traits.background_second, 0.55)
    canvas.image[:] = base
    if traits.background == "gradient":
        angle = random.uniform(0, 2 * np.pi)
        ramp = 0.5 + (canvas.x - 0.5) * np.cos(angle) + (canvas.y - 0.5) * np.sin(angle)
        canvas.tint(np.clip(ramp, 0, 1), mix(second, (1, 1, 1), 0.1))
        canvas.tint(np.clip(0.35 - ramp, 0, 1), base * 0.6)
    elif traits.background == "bokeh":
        canvas.tint(np.clip(canvas.y, 0, 1) * 0.5, base * 0.55)
        for _ in range(16):
            x, y, radius, opacity = random.uniform((0, 0, 0.03, 0.12), (1, 1, 0.12, 0.42))
            spot = canvas.blur(canvas.cover(ellipse(x, y, radius)), 0.008)
            canvas.tint(spot * opacity, mix(second, (1, 1, 0.95), 0.55))
    elif traits.background == "striped":
        angle, count = random.uniform(0, np.pi), random.uniform(7, 15)
        wave = np.sin(2 * np.pi * count * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle)) / 2)
        canvas.tint(np.clip(wave * canvas.size / 50 + 0.5, 0, 1) * 0.6, second)
    elif traits.background == "outdoor":
        canvas.image[:] = np.array([0.56, 0.75, 0.93], dtype=np.float32)
        canvas.tint(canvas.y, np.array([0.93, 0.95, 0.93]))
        for _ in range(4):
            x, y, radius = random.uniform((0, 0.03, 0.05), (1, 0.3, 0.1))
            cloud = canvas.cover(
                *[ellipse(x + k * radius, y, radius * (1.1 - 0.4 * abs(k)), radius * 0.55) for k in (-1, 0, 1)]
            )
            canvas.tint(canvas.blur(cloud, 0.012) * 0.8, (1, 1, 1))
        for level in range(3):
            height = 0.52 + 0.13 * level
            bumps = [(k / 6, height + random.uniform(-0.05, 0.05)) for k in range(-1, 8)]
            hill = np.concatenate([arc(bumps), [(1.2, 1.1), (-0.2, 1.1)]])
            green = mix((0.58, 0.74, 0.62), (0.36, 0.55, 0.34), level / 2)
            canvas.tint(canvas.blur(canvas.cover(hill), 0.006), green)
    else:
        canvas.tint(canvas.glow((0.5, 0.4), 0.6) * 0.3, mix(base, (1, 1, 1), 0.6))


def cloth_colors(traits: Traits) -> tuple[np.ndarray, np.ndarray]:
    """Color of the clothes, and a contrasting one for stripes."""
    cloth = np.array(CLOTH_COLORS[traits.clothing_color], dtype=np.float32) / 255
    return cloth, mix(cloth, (1, 1, 1), 0.55) if cloth.mean() < 0.6 else mix(cloth, (0.15, 0.17, 0.3), 0.7)


def draw_body(canvas: Canvas, traits: Traits, head: Head, face: np.ndarray) -> None:
    """Draw neck, clothes and necklace."""
    cloth, second = cloth_colors(traits)
    across = (canvas.x - head.center[0]) / head.scale
    down = (canvas.y - head.center[1]) / head.scale
    slope = (across * traits.light_side * 0.3 - (np.abs(across) / 2.6) ** 2 * 0.5 + 0.1).astype(np.float32)
    stout = 0.56 if traits.presentation == "woman" else 0.64
    reach = 1.95 if traits.presentation == "woman" else 2.12

    def symmetric(right: list[tuple[float, float]]) -> np.ndarray:
        return head.body(arc(mirrored(right), steps=5))

    if traits.clothing == "hoodie":
        hood = symmetric([(0.2, 1.0), (0.95, 1.1), (1.18, 1.45), (1.25, 1.9), (0.6, 2.2)])
        canvas.paint([hood], toned(cloth, slope - 0.5), CLOTH)
    neck = symmetric([(stout, 0.6), (stout * 0.97, 1.2), (stout, 1.5), (stout + 0.25, 1.68), (1.6, 2.0), (1.5, 2.7)])
    alpha = canvas.paint([neck], toned(traits.skin, slope * 1.2 - 0.1 - 0.25 * (np.abs(across) / 0.7) ** 2), NECK)
    under = canvas.blur(face, 0.02, (-0.012 * traits.light_side, 0.045))
    canvas.tint(under * alpha * 0.5, np.array(traits.skin) * (0.5, 0.38, 0.38))
    for side in (-1, 1):
        bone = head.body(arc(sided(side, [(0.15, 2.02), (0.5, 1.93), (0.95, 1.86)])))
        canvas.pen(bone, np.array(traits.skin) * 0.6, canvas.at_least(0.008, 1), 0.35, grey=140)

    shoulder = [(stout + 0.55, 1.72), (reach - 0.35, 1.92), (reach, 2.15), (reach + 0.15, 2.9)]
    necklines = {
        "t-shirt": [(0.0, 1.98), (0.4, 1.9), (stout + 0.06, 1.66)],
        "striped shirt": [(0.0, 1.92), (0.4, 1.85), (stout + 0.06, 1.62)],
        "v-neck": [(0.0, 2.2), (0.32, 1.92), (stout + 0.08, 1.62)],
        "shirt": [(0.0, 2.12), (0.3, 1.88), (stout + 0.02, 1.58)],
        "turtleneck": [(0.0, 1.58), (0.4, 1.55), (stout + 0.05, 1.46)],
        "hoodie": [(0.0, 1.98), (0.42, 1.86), (stout + 0.1, 1.56)],
        "blazer": [(0.0, 2.2), (0.3, 1.92), (stout + 0.04, 1.58)],
        "dress": [(0.0, 2.14), (0.5, 2.1), (0.95, 1.9)],
    }
    right = [*necklines[traits.clothing], *shoulder]
    if traits.clothing == "dress":
        right = [(0.0, 2.14), (0.5, 2.1), (0.86, 1.92), (0.98, 1.76), (1.2, 1.78), (1.32, 2.0), (1.5, 2.4), (1.5, 2.9)]
    half = arc(right, steps=5)
    garment = head.body(np.concatenate([half, (half * (-1, 1))[::-1]]))
    if traits.clothing == "dress":
        bare = symmetric([(stout, 1.66), (1.3, 1.78), (1.85, 2.0), (2.05, 2.8)])
        canvas.paint([bare], toned(traits.skin, slope), NECK)
        canvas.tint(under * canvas.cover(neck) * 0.4, np.array(traits.skin) * (0.5, 0.38, 0.38))
    if traits.clothing == "blazer":
        inner = mirrored([(0.0, 2.05), (0.36, 1.72), (stout + 0.1, 1.5), (1.0, 2.8)])[:-1]
        canvas.paint([head.body(inner)], toned((0.93, 0.93, 0.92), slope - 0.1), CLOTH)
    folds = 0.25 * np.exp(-(((np.abs(across) - 1.3) / 0.5) ** 2))
    pattern = toned(cloth, slope + folds - 0.35 * np.clip(down - 2.0, 0, 1))
    if traits.clothing == "striped shirt":
        bands = np.clip(np.sin((down + 0.12 * across**2) * 2 * np.pi / 0.22) * 3 + 0.5, 0, 1)[..., None]
        pattern = pattern * (1 - bands) + toned(second, slope) * bands
    alpha = canvas.paint([garment], pattern, CLOTH)
    canvas.tint(canvas.blur(face, 0.03, (0, 0.05)) * alpha * 0.3, cloth * 0.4)
    draw_collar(canvas, traits, head, slope, necklines[traits.clothing])
    if traits.necklace != "none":
        draw_necklace(canvas, traits, head, stout)


def draw_collar(
    canvas: Canvas, traits: Traits, head: Head, slope: np.ndarray, neckline: list[tuple[float, float]]
) -> None:
    """Draw ribbing, collar, lapels and cords."""
    cloth, second = cloth_colors(traits)
    dark, thin = cloth * 0.55, canvas.at_least(0.008, 1)
    edge = arc(neckline, steps=5)
    whole = head.body(np.concatenate([(edge * (-1, 1))[::-1], edge[1:]]))
    if traits.clothing in ("t-shirt", "v-neck", "striped shirt", "hoodie"):
        rib = ribbon(whole + np.array([0, 0.012]), 0.026)
        color = second if traits.clothing == "striped shirt" else mix(cloth, (0, 0, 0), 0.14)
        canvas.paint([rib], toned(color, slope), CLOTH, outline=110)
    if traits.clothing == "turtleneck":
        top = [(0.0, 1.56), (0.4, 1.52), (0.68, 1.42), (0.74, 1.7), (0.45, 1.84), (0.0, 1.9)]
        band = smooth(np.array(mirrored(top, shared=1)), steps=5)
        canvas.paint([head.body(band)], toned(mix(cloth, (1, 1, 1), 0.08), slope * 1.6), CLOTH)
        for x in np.linspace(-0.6, 0.6, 9):
            fold = head.body([(x, 1.58 - 0.22 * abs(x)), (x * 1.06, 1.84 - 0.2 * abs(x))])
            canvas.pen(fold, dark, thin, 0.35, grey=150)
    for side in (-1, 1):
        if traits.clothing == "hoodie":
            cord = head.body(arc(sided(side, [(0.42, 1.9), (0.46, 2.1), (0.42, 2.4)])))
            canvas.pen(cord, mix(cloth, (1, 1, 1), 0.75), canvas.at_least(0.014, 1.3), 0.95, grey=90)
        if traits.clothing in ("shirt", "blazer"):
            tip = 2.08 if traits.clothing == "shirt" else 2.0
            flap = sided(side, [(0.62, 1.47), (0.74, 1.6), (0.5, tip + 0.04), (0.04, 2.06), (0.42, 1.74)])
            shade = mix(cloth, (1, 1, 1), 0.2) if traits.clothing == "shirt" else np.array((0.96, 0.96, 0.95))
            canvas.paint([head.body(flap)], toned(shade, slope), CLOTH)
        if traits.clothing == "blazer":
            lapel = sided(side, [(0.78, 1.58), (1.12, 1.86), (0.9, 1.96), (1.0, 2.05), (0.2, 2.75), (0.3, 2.3)])
            canvas.paint([head.body(lapel)], toned(mix(cloth, (1, 1, 1), 0.1), slope), CLOTH)
        if traits.clothing != "dress":
            sleeve = head.body(arc(sided(side, [(1.35, 2.05), (1.42, 2.25), (1.4, 2.6)])))
            canvas.pen(sleeve, dark, thin, 0.5, grey=120)
    if traits.clothing == "shirt":
        canvas.pen(head.body([(0.0, 2.1), (0.0, 2.9)]), dark, thin, 0.6, grey=100)


def draw_necklace(canvas: Canvas, traits: Traits, head: Head, stout: float) -> None:
    chain = head.body(arc([(-stout - 0.06, 1.56), (-0.4, 1.8), (0, 1.9), (0.4, 1.8), (stout + 0.06, 1.56)]))
    jewel = np.array(traits.jewel)
    if traits.necklace == "beads":
        beads = [ellipse(x, y, canvas.at_least(0.0155, 1.9), steps=12) for x, y in resample(chain, 17)]
        canvas.paint(beads, toned(jewel, head.light), NECKLACE, outline=60)
        for x, y in resample(chain, 17):
            canvas.tint(canvas.glow((x - 0.004, y - 0.005), 0.006) * 0.7, (1, 1, 1))
        return
    canvas.paint([ribbon(chain, canvas.at_least(0.014, 1.8))], jewel * 0.92, NECKLACE, outline=60)
    if traits.necklace == "pendant":
        x, y = head.body([(0, 1.97)])[0]
        canvas.paint([ellipse(x, y, 0.024, 0.03)], toned(jewel, head.light + 0.3), NECKLACE, outline=40)
        canvas.tint(canvas.glow((x - 0.006, y - 0.009), 0.009), (1, 1, 1))
