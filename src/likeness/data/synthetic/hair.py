"""Draw hair and hats of synthetic faces.

Hair consists of locks: areas between an outer and an inner edge, both from the parting to the tips. Strands interpolate
the two edges and therefore follow any style.
"""

from __future__ import annotations

import numpy as np

from likeness.data.synthetic.canvas import Canvas, arc, ellipse, mix, resample, sided, toned
from likeness.data.synthetic.scene import Head
from likeness.data.synthetic.traits import CLOTH_COLORS, HAIR_COLORS, LONG, Traits

HAIR, HAT = 13, 14
Lock = tuple[np.ndarray, np.ndarray]


def natural_hair(traits: Traits) -> tuple[float, float, float]:
    """Return the color of brows and beard: that of the hair, unless it is dyed."""
    if traits.hair_color in ("blue", "pink"):
        red, green, blue = (value / 255 for value in HAIR_COLORS["dark brown"])
        return red, green, blue
    return traits.hair


def sheen(traits: Traits, head: Head) -> np.ndarray:
    """Return the light on the hair, [S, S]: a glossy band around the crown, darker downwards."""
    radius = np.hypot(head.u / 1.12, (head.v + 0.25) / 1.1)
    band = np.exp(-(((radius - 0.82 + 0.12 * head.u * traits.light_side) / 0.13) ** 2)) * (head.v < 0.1)
    low = np.exp(-(((head.v - 0.75) / 0.28) ** 2)) * (traits.hair_style in LONG)
    return head.light * 0.55 + 0.42 * band + 0.2 * low - 0.14 * np.clip(head.v, 0, 1.5)


def draw_strands(
    canvas: Canvas, traits: Traits, lock: Lock, alpha: np.ndarray, random: np.random.Generator, count: int, drawn: int
) -> None:
    """Draw `count` lighter and darker lines between the edges of a lock, about `drawn` of them also in the sketch."""
    outer, inner = (resample(edge, 22) for edge in lock)
    color = np.array(traits.hair)
    amounts = np.sort(random.uniform(0.04, 0.96, count))
    bend = random.uniform(-0.09, 0.09, count)
    t = np.linspace(0, 1, 22)
    curves = []
    for amount, sway in zip(amounts, bend, strict=True):
        weight = np.clip(amount + sway * np.sin(np.pi * t * 1.5), 0.01, 0.99)[:, None]
        curves.append(outer * (1 - weight) + inner * weight)
    canvas.tint(canvas.cover_lines(curves[::2], 0.006) * alpha * 0.4, color * 0.55)
    canvas.tint(canvas.cover_lines(curves[1::2], 0.006) * alpha * 0.38, mix(color, (1, 0.95, 0.85), 0.35))
    for curve in curves[:: max(1, count // drawn)]:
        start = int(random.integers(0, 5))
        canvas.line(curve[start : 22 - int(random.integers(1, 5))], grey=120)


def draw_lock(
    canvas: Canvas, traits: Traits, lock: Lock, light: np.ndarray, random: np.random.Generator, count: int = 16
) -> None:
    outer, inner = lock
    alpha = canvas.paint([np.concatenate([outer, inner[::-1]])], toned(traits.hair, light), HAIR, outline=40)
    draw_strands(canvas, traits, lock, alpha, random, count, max(3, count * 3 // 8))


def scallops(points: np.ndarray, size: float, random: np.random.Generator) -> list[np.ndarray]:
    """Return circles of about `size` along a line, in its units."""
    return [
        ellipse(x, y, size * scale, steps=18)
        for (x, y), scale in zip(points, random.uniform(0.8, 1.2, len(points)), strict=True)
    ]


def crown(traits: Traits) -> float:
    """Return the height of the hair above the skull."""
    flat = traits.hair_style in ("bun", "ponytail", "braids") or traits.hat != "none"
    return {"buzz cut": 0.025}.get(traits.hair_style, 0.06 if flat else traits.hair_volume)


def arch(volume: float, start: float, end: float, steps: int = 14) -> np.ndarray:
    """Outline of the hair above the skull between two angles from the crown (radians, positive to the right)."""
    angle = np.linspace(start, end, steps)
    return np.stack([(1.02 + 0.6 * volume) * np.sin(angle), -0.35 - (1.05 + volume) * np.cos(angle)], axis=1)


def draw_back_hair(canvas: Canvas, traits: Traits, head: Head, random: np.random.Generator) -> None:
    """Draw the hair behind head, neck and shoulders."""
    style, volume = traits.hair_style, crown(traits)
    light = sheen(traits, head) - 0.5
    color = np.array(traits.hair)
    if style in LONG:
        end = traits.hair_length
        levels = np.linspace(-0.4, end, 18)
        wide = 1.02 + 0.6 * volume + 0.1 * np.clip((levels + 0.4) / 0.9, 0, 1)
        wave = 0.07 * np.sin(levels * 6.5) * np.clip(levels, 0, 1) if style == "long wavy" else 0 * levels
        flare = (0.12 if style != "bob" else 0.16) * np.clip(levels + 0.3, 0, 1.2)
        if style == "bob":
            flare = flare - 0.1 * np.clip(levels - 0.7, 0, 1)
        if style == "long wavy":
            flare = flare * 1.7
        left = np.stack([-(wide + flare + wave), levels], axis=1)
        right = np.stack([wide + flare + wave[::-1] * 0.8, levels], axis=1)
        outline = np.concatenate([arch(volume, -1.5, 1.5), right, [(0.4, end + 0.04), (-0.4, end + 0.04)], left[::-1]])
        alpha = canvas.paint([head.rim(outline)], toned(color, light), HAIR, outline=40)
        for side in (left, right):
            inner = side * (0.35, 1)
            draw_strands(canvas, traits, (head.rim(side), head.rim(inner)), alpha, random, 16, 5)
    elif style in ("curly", "afro"):
        reach = 1.28 if style == "curly" else 1.44 + traits.hair_volume
        drop = 1.15 if style == "curly" else 0.55
        if traits.hat != "none":
            reach = 1.2
        angle = np.linspace(-2.2, 2.2, 26)
        rim = np.stack([reach * np.sin(angle), -0.3 - (reach * 0.98) * np.cos(angle)], axis=1)
        rim[:, 1] = np.where(rim[:, 1] > 0, rim[:, 1] * drop / (0.59 * reach), rim[:, 1])
        curls = [head.rim(curl) for curl in scallops(rim, 0.2 if style == "curly" else 0.17, random)]
        alpha = canvas.paint([head.rim(rim), *curls], toned(color, light + 0.25), HAIR, outline=40)
        draw_curls(canvas, traits, head, alpha, rim * (0.94, 0.94), random)
    elif style == "bun":
        knot = ellipse(0.06 * traits.part, -1.62, 0.38, 0.32)
        alpha = canvas.paint([head.flat(knot)], toned(color, light + 0.45), HAIR, outline=40)
        half = len(knot) // 2
        draw_strands(canvas, traits, (head.flat(knot[:half]), head.flat(knot[half:][::-1])), alpha, random, 9, 4)
    elif style == "ponytail":
        side = 1.0 if traits.part >= 0 else -1.0
        outer = arc(sided(side, [(0.5, -1.2), (1.25, -1.05), (1.62, -0.2), (1.5, 0.9), (1.2, 1.7)]))
        inner = arc(sided(side, [(0.5, -0.9), (0.98, -0.6), (1.08, 0.1), (1.02, 0.9), (1.2, 1.7)]))
        draw_lock(canvas, traits, (head.flat(outer), head.flat(inner)), light + 0.25, random, 14)


def draw_curls(
    canvas: Canvas, traits: Traits, head: Head, alpha: np.ndarray, around: np.ndarray, random: np.random.Generator
) -> None:
    """Draw small arcs on curly hair."""
    color = np.array(traits.hair)
    arcs = []
    for x, y in np.concatenate([around, around * (0.88, 0.85)]) + random.uniform(-0.09, 0.09, (2 * len(around), 2)):
        start = random.uniform(0, 2 * np.pi)
        angle = np.linspace(start, start + random.uniform(2, 4), 8)
        radius = random.uniform(0.05, 0.1)
        arcs.append(head.rim(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)))
    canvas.tint(canvas.cover_lines(arcs[::2], 0.008) * alpha * 0.45, color * 0.5)
    canvas.tint(canvas.cover_lines(arcs[1::2], 0.008) * alpha * 0.45, mix(color, (1, 0.95, 0.85), 0.4))
    for curl in arcs[::2]:
        canvas.line(curl, grey=110)


def front_locks(traits: Traits, head: Head) -> list[Lock]:
    """Return the edges of the hair above the forehead and next to the face, in image units."""
    style, volume, part = traits.hair_style, crown(traits), traits.part
    high = {"buzz cut": -0.98, "short": -0.9, "side-parted": -0.9}.get(style, -0.95)
    if traits.age == "older" and traits.presentation == "man":
        high -= 0.13
    locks = []
    for side in (-1, 1):
        start = float(np.arcsin(np.clip(part / (1.02 + 0.6 * volume), -1, 1)))
        over = arch(volume, start, side * np.pi / 2)
        full = 1.02 + 0.6 * volume
        falls = style in LONG and not traits.tucked
        hair_line = [(part, high)]
        # Hair swept away from the parting is lower on the far side of the forehead.
        swept = part * side < 0
        if style == "side-parted":
            hair_line += [(side * 0.42, -0.72 if swept else -0.92), (side * 0.74, -0.55 if swept else -0.68)]
        elif style in ("short", "buzz cut"):
            hair_line += [(side * 0.5, high + 0.03), (side * 0.76, -0.72)]
        else:
            hair_line += [(side * 0.5, -0.82 if swept else -0.86), (side * 0.78, -0.55)]
        hair_line.sort(key=lambda point: side * point[0])
        if falls:
            end = traits.hair_length
            levels = np.linspace(-0.35, end, 14)[1:]
            wave = 0 * levels
            flare = (0.14 if style == "bob" else 0.2) * np.clip(levels + 0.3, 0, 1.3)
            if style == "long wavy":
                wave = 0.06 * np.sin(levels * 6.5 + side) * np.clip(levels + 0.2, 0, 1)
                flare = flare * 1.4
            outside = np.stack([side * (full + flare + wave), levels], axis=1)
            inside = [(side * 0.88, -0.2), (side * 0.93, 0.3), (side * 0.92, 0.75)]
            if style == "bob":
                inside += [(side * 0.86, 1.0), (side * 0.88, end - 0.05)]
            else:
                inside += [(side * 0.84, 1.2), (side * (0.86 + 0.06 * (style == "long wavy")), 1.6), (side * 0.8, end)]
            outer = head.rim(np.concatenate([over, outside]))
            inner = np.concatenate([head.surface(hair_line), head.rim(inside)])
        else:
            low = {"buzz cut": -0.02, "short": 0.12, "side-parted": 0.1}.get(style, -0.12)
            outer = head.rim(np.concatenate([over, [(side * (full + 0.01), -0.15), (side * 0.99, low)]]))
            inner = np.concatenate([head.surface(hair_line), head.rim([(side * 0.9, -0.3), (side * 0.91, low)])])
        locks.append((arc(outer, steps=3), arc(inner, steps=5)))
    return locks


def fringe_edges(traits: Traits, head: Head, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return left edge (down), tips above the brows and right edge (up): the closed outline of the bangs."""
    drop = -0.44 if traits.hair_style != "short" else -0.62
    across = np.linspace(-0.88, 0.88, 9)
    tips = np.stack([across, drop + 0.1 * (np.abs(across) > 0.7) + random.uniform(-0.05, 0.05, 9)], axis=1)
    left, right = (
        np.concatenate([head.rim(arch(crown(traits) * 0.4, 0.1 * side, side * 0.85, 5)), head.surface(end)])
        for side, end in ((-1, tips[:1]), (1, tips[-1:]))
    )
    return left, head.surface(arc(tips, steps=3)), right[::-1]


def draw_front_hair(canvas: Canvas, traits: Traits, head: Head, face: np.ndarray, random: np.random.Generator) -> None:
    """Draw the hair in front of the face and its shadow on the forehead."""
    style = traits.hair_style
    if style == "bald":
        return
    skin = np.array(traits.skin)
    light = sheen(traits, head)
    locks = front_locks(traits, head)
    shapes = [np.concatenate([outer, inner[::-1]]) for outer, inner in locks]
    if style == "buzz cut":
        color = mix(traits.hair, skin, 0.22)
        # One shape: the halves have no visible parting.
        whole = np.concatenate([locks[0][0][::-1], locks[1][0], locks[1][1][::-1], locks[0][1]])
        canvas.tint(canvas.blur(canvas.cover(whole), 0.012) * face * 0.5, color)
        canvas.paint([whole], toned(color, light - 0.1), HAIR, opacity=0.93, outline=70)
        return
    if style in ("curly", "afro"):
        reach = 1.05 if traits.hat == "none" else 0.95
        angle = np.linspace(-1.45, 1.45, 13)
        line = np.stack([0.98 * np.sin(angle), -0.22 - 0.9 * reach * np.cos(angle)], axis=1)
        top = np.stack([1.2 * np.sin(angle), -0.3 - 1.22 * np.cos(angle)], axis=1)
        if traits.hat != "none":
            top = np.stack([1.08 * np.sin(angle), -0.3 - 1.12 * np.cos(angle)], axis=1)
        curls = [head.rim(curl) for curl in scallops(line, 0.16, random)]
        band = head.rim(np.concatenate([top, line[::-1]]))
        hidden = canvas.blur(canvas.cover(band, *curls), 0.02, (0, 0.02))
        canvas.tint(hidden * face * 0.4, skin * (0.5, 0.36, 0.36))
        alpha = canvas.paint([band, *curls], toned(traits.hair, light * 0.85 - 0.16), HAIR, outline=110)
        draw_curls(canvas, traits, head, alpha, np.concatenate([line, (line + top) / 2]), random)
        return
    bangs = fringe_edges(traits, head, random) if traits.bangs else None
    if bangs is not None:
        shapes.append(np.concatenate(bangs))
    shadow = canvas.blur(canvas.cover(*shapes), 0.018, (0, 0.022))
    canvas.tint(shadow * face * 0.45, skin * (0.5, 0.36, 0.36))
    for lock in locks:
        draw_lock(canvas, traits, lock, light, random, 20 if style in LONG else 14)
    if bangs is not None:
        left, _, right = bangs
        alpha = canvas.paint([np.concatenate(bangs)], toned(traits.hair, light), HAIR, outline=50)
        lock = arc(left), arc(right[::-1])
        draw_strands(canvas, traits, lock, alpha, random, 18, 7)
    if style == "braids":
        for side in (-1, 1):
            for step, y in enumerate(np.arange(0.4, 2.4, 0.22)):
                x = side * (1.02 + 0.04 * np.sin(step))
                for half in (-1, 1):
                    knot = ellipse(0, 0, 0.17, 0.11, steps=16)
                    rotation = np.array([[0.8, 0.6 * half], [-0.6 * half, 0.8]])
                    turned = knot @ rotation + (x + half * 0.075, y + 0.05 * half)
                    canvas.paint([head.flat(turned)], toned(traits.hair, light + 0.12 - 0.1 * half), HAIR, outline=60)


def draw_hat(canvas: Canvas, traits: Traits, head: Head, face: np.ndarray) -> None:
    if traits.hat == "none":
        return
    color = np.array(CLOTH_COLORS[traits.hat_color], dtype=np.float32) / 255
    light = head.light * 1.1 + 0.1
    turn = head.sine
    wide, tall = (1.2, 1.3) if traits.hair_style != "bald" else (1.1, 1.2)
    angle = np.linspace(-1.42, 1.42, 20)
    dome = np.stack([wide * np.sin(angle), -0.42 - (tall - 0.12) * np.cos(angle)], axis=1)
    lower = {"beanie": -0.5, "cap": -0.62, "wide-brimmed hat": -0.66}[traits.hat]
    dip = 0.1 if traits.hat != "beanie" else 0.05
    t = np.linspace(-1, 1, 12)
    base = np.stack([t[::-1] * wide + 0.15 * turn * (1 - t**2), lower + dip * (1 - t**2) - 0.08], axis=1)
    shape = np.concatenate([dome, base])
    under = canvas.blur(canvas.cover(head.flat(shape)), 0.02, (0, 0.03))
    canvas.tint(under * face * 0.4, np.array(traits.skin) * (0.45, 0.34, 0.36))
    canvas.paint([head.flat(shape)], toned(color, light), HAT)
    thin = canvas.at_least(0.008, 1)
    if traits.hat == "beanie":
        for x in np.linspace(-0.8, 0.8, 9):
            rib = arc([(x * 0.35, -1.62), (x * 0.95, -1.25), (x * wide, -0.78)])
            canvas.pen(head.flat(rib), color * 0.6, thin, 0.45, grey=150)
        high = np.stack([t * (wide + 0.03) + 0.15 * turn * (1 - t**2), lower - 0.36 + dip * (1 - t**2)], axis=1)
        low = np.stack([t * (wide + 0.03) + 0.15 * turn * (1 - t**2), lower + dip * (1 - t**2)], axis=1)
        canvas.paint([head.flat(np.concatenate([high, low[::-1]]))], toned(mix(color, (1, 1, 1), 0.12), light), HAT)
        for x in np.linspace(-0.92, 0.92, 13):
            rib = np.array([(x * wide, lower - 0.33 + dip * (1 - x**2)), (x * wide, lower - 0.03 + dip * (1 - x**2))])
            canvas.pen(head.flat(rib + np.array([0.15 * turn * (1 - x**2), 0])), color * 0.6, thin, 0.4, grey=160)
        if traits.part > 0:
            ball = head.flat(ellipse(0, -1.78, 0.27))
            canvas.paint([ball], toned(mix(color, (1, 1, 1), 0.45), light), HAT)
    elif traits.hat == "cap":
        for x in (-0.55, 0.0, 0.55):
            seam = arc([(0.05 * turn, -1.6), (x * 0.9 + 0.2 * turn, -1.25), (x * 1.1 + 0.3 * turn, -0.7)])
            canvas.pen(head.flat(seam), color * 0.6, thin, 0.6, grey=120)
        canvas.paint([head.flat(ellipse(0, -1.61, 0.07, 0.04, steps=10))], color * 0.8, HAT, outline=80)
        shift = 0.9 * turn
        # x, weight of the shift, y
        top = ((-0.92, 0.3, -0.66), (-0.5, 1, -0.84), (0.5, 1, -0.84), (0.92, 0.3, -0.66))
        bill = ((0.95, 0.4, -0.6), (0.6, 1.3, -0.42), (0, 1.4, -0.36), (-0.6, 1.3, -0.42), (-0.95, 0.4, -0.6))
        edges = [arc([(x + shift * weight, y) for x, weight, y in edge]) for edge in (top, bill)]
        visor = head.flat(np.concatenate(edges))
        dark = canvas.blur(canvas.cover(visor), 0.014, (0, 0.03))
        canvas.tint(dark * face * (canvas.mask != HAT) * 0.4, np.array(traits.skin) * (0.45, 0.34, 0.36))
        canvas.paint([visor], toned(color * 0.82, light - 0.1 + 0.5 * np.clip(head.v + 0.6, -0.3, 0.3)), HAT)
    else:
        band = np.concatenate([base + np.array([0, -0.22]), base[::-1]])
        ribbon_color = mix(color, (0.1, 0.08, 0.1), 0.6) if color.mean() > 0.35 else mix(color, (1, 1, 1), 0.5)
        canvas.paint([head.flat(band)], toned(ribbon_color, light), HAT)
        brim = ellipse(0.1 * turn, -0.66, 1.82, 0.25, steps=40)
        brim[:, 1] -= 0.1 * (brim[:, 0] / 1.8) ** 2
        upper = brim[:, 1] < -0.66
        # The far side of the brim is behind the dome: its upper edge follows the band.
        middle = np.abs(brim[:, 0]) < wide
        edge = np.maximum(brim[:, 1], -0.78 + 0.12 * (1 - (brim[:, 0] / wide) ** 2))
        brim[:, 1] = np.where(upper & middle, edge, brim[:, 1])
        place = head.flat(brim)
        dark = canvas.blur(canvas.cover(place), 0.018, (0, 0.04))
        canvas.tint(dark * face * (canvas.mask != HAT) * 0.45, np.array(traits.skin) * (0.45, 0.34, 0.36))
        canvas.paint([place], toned(color, light - 0.05 - 0.6 * np.clip(head.v + 0.66, -0.1, 0.3)), HAT)
