"""Canvas that draws image, mask and sketch together, shape by shape.

Each polygon is rasterized once with supersampling. Its coverage blends into the image, its majority labels the mask,
and its outline replaces what was in the sketch: the three agree by construction. Shapes in front must be drawn later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PAPER = 255
INK = 30
"""Grey level of a strong stroke."""


def smooth(points: object, closed: bool = True, steps: int = 6) -> np.ndarray:
    """Catmull-Rom curve through the points: [N, 2] -> [about N * steps, 2]. An open curve includes both end points."""
    knots = np.asarray(points, dtype=np.float64)
    if closed:
        padded = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    before, start, end, after = padded[:-3, None], padded[1:-2, None], padded[2:-1, None], padded[3:, None]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    )
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, knots[-1:]])


def arc(points: object, steps: int = 6) -> np.ndarray:
    """Open Catmull-Rom curve through the points, see `smooth`."""
    return smooth(points, closed=False, steps=steps)


def mirrored(right: list[tuple[float, float]], shared: int = 0) -> list[tuple[float, float]]:
    """The points, then their mirror images in reverse order, without the first and last `shared` of them."""
    return [*right, *sided(-1, right[shared : len(right) - shared][::-1])]


def sided(side: float, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of the viewer's right (`side` 1) or their mirror images (`side` -1)."""
    return [(side * x, y) for x, y in points]


def resample(curve: np.ndarray, count: int) -> np.ndarray:
    """Resample an open curve to `count` points of equal arc-length distance: [N, 2] -> [count, 2]."""
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
    wanted = np.linspace(0, length[-1], count)
    return np.stack([np.interp(wanted, length, curve[:, 0]), np.interp(wanted, length, curve[:, 1])], axis=1)


def ellipse(x: float, y: float, radius_x: float, radius_y: float | None = None, steps: int = 28) -> np.ndarray:
    """Closed ellipse, [steps, 2]."""
    angle = np.arange(steps) * (2 * np.pi / steps)
    height = radius_x if radius_y is None else radius_y
    return np.stack([x + radius_x * np.cos(angle), y + height * np.sin(angle)], axis=1)


def ribbon(curve: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Outline of an open curve with a width (a number, or one per point): [N, 2] -> [2 N, 2]."""
    along = np.gradient(curve, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.hypot(*along.T)[:, None] + 1e-9)
    half = np.broadcast_to(np.asarray(width, dtype=np.float64) / 2, len(curve))[:, None]
    return np.concatenate([curve + across * half, (curve - across * half)[::-1]])


def mix(first: object, second: object, amount: float) -> np.ndarray:
    """Interpolate two colors: `amount` 0 is the first, 1 the second."""
    return np.asarray(first, dtype=np.float32) * (1 - amount) + np.asarray(second, dtype=np.float32) * amount


def toned(color: object, light: np.ndarray) -> np.ndarray:
    """Shade a color with a light field in about -1..1: [3], [S, S] -> [S, S, 3].

    Shadows are darker and more saturated, highlights paler, rather than black and white.
    """
    base = np.asarray(color, dtype=np.float32)
    shadow = base * np.array([0.66, 0.54, 0.56], dtype=np.float32)
    bright = mix(base, (1.0, 0.97, 0.9), 0.42)
    field = np.clip(light, -1, 1)[..., None]
    return base + np.maximum(field, 0) * (bright - base) + np.maximum(-field, 0) * (shadow - base)


class Canvas:
    """Image float32 [S, S, 3] in 0..1, mask uint8 [S, S] and sketch. Coordinates are image units: x, y in [0, 1]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.factor = 4 if size <= 256 else 2
        center = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(center, center)
        self.image = np.zeros((size, size, 3), dtype=np.float32)
        self.mask = np.zeros((size, size), dtype=np.uint8)
        self.fine = size * self.factor
        self.paper = Image.new("L", (self.fine, self.fine), PAPER)
        self.pencil = ImageDraw.Draw(self.paper)
        self.stroke = 1.2 / 128 * self.fine
        """Width of a sketch line in supersampled pixels."""

    def at_least(self, width: float, pixels: float = 1.4) -> float:
        """Return `width` in image units, but at least `pixels`, so that it remains visible in small images."""
        return max(width, pixels / self.size)

    def _fine(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (points * self.fine - 0.5).tolist()]

    def cover(self, *polygons: np.ndarray, holes: tuple[np.ndarray, ...] = ()) -> np.ndarray:
        """Coverage of each pixel by the union of the polygons without the holes: [S, S] in 0..1."""
        everything = np.concatenate(polygons)
        low = np.clip(np.floor(everything.min(axis=0) * self.size) - 1, 0, self.size).astype(int)
        high = np.clip(np.ceil(everything.max(axis=0) * self.size) + 1, 0, self.size).astype(int)
        alpha = np.zeros((self.size, self.size), dtype=np.float32)
        width, height = (high - low).tolist()
        if width <= 0 or height <= 0:
            return alpha
        tile = Image.new("L", (width * self.factor, height * self.factor), 0)
        brush = ImageDraw.Draw(tile)
        shift = low / self.size
        for polygon in polygons:
            brush.polygon(self._fine(polygon - shift), fill=255)
        for hole in holes:
            brush.polygon(self._fine(hole - shift), fill=0)
        reduced = np.asarray(tile.reduce(self.factor), dtype=np.float32) / 255
        alpha[low[1] : high[1], low[0] : high[0]] = reduced
        return alpha

    def cover_lines(self, curves: list[np.ndarray], width: float) -> np.ndarray:
        """Coverage of thin lines, `width` in image units: [S, S] in 0..1."""
        tile = Image.new("L", (self.fine, self.fine), 0)
        brush = ImageDraw.Draw(tile)
        pixels = max(1, round(width * self.fine))
        for curve in curves:
            brush.line(self._fine(curve), fill=255, width=pixels)
        return np.asarray(tile.reduce(self.factor), dtype=np.float32) / 255

    def blur(self, alpha: np.ndarray, radius: float, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
        """Blur coverage with a Gaussian of `radius` and translate it by `shift`, both in image units."""
        moved = np.roll(alpha, [round(shift[1] * self.size), round(shift[0] * self.size)], axis=(0, 1))
        soft = Image.fromarray((moved * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius * self.size))
        return np.asarray(soft, dtype=np.float32) / 255

    def glow(
        self, center: np.ndarray | tuple[float, float], radius_x: float, radius_y: float | None = None
    ) -> np.ndarray:
        """Gaussian spot with peak 1, center and radii in image units."""
        x, y = center
        height = radius_x if radius_y is None else radius_y
        return np.exp(-(((self.x - x) / radius_x) ** 2) - ((self.y - y) / height) ** 2)

    def tint(self, alpha: np.ndarray, color: object) -> None:
        """Blend a color ([3] or [S, S, 3]) over the image; mask and sketch are unchanged."""
        rows = np.flatnonzero(alpha.max(axis=1) > 0.004)
        if not len(rows):
            return
        columns = np.flatnonzero(alpha.max(axis=0) > 0.004)
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        shade = np.asarray(color, dtype=np.float32)
        part = self.image[window]
        part += alpha[window][..., None] * ((shade if shade.ndim == 1 else shade[window]) - part)

    def paint(
        self,
        polygons: list[np.ndarray],
        color: object,
        label: int | None,
        *,
        holes: tuple[np.ndarray, ...] = (),
        opacity: float = 1.0,
        outline: int | None = INK,
    ) -> np.ndarray:
        """Draw a shape in image, mask (if `label`) and sketch (if `outline`), and return its coverage."""
        alpha = self.cover(*polygons, holes=holes)
        self.tint(alpha * opacity, color)
        if label is not None:
            self.mask[alpha >= 0.5] = label
        if outline is not None:
            self.trace(polygons, outline, wipe=not holes)
            for hole in holes:
                self.line(np.concatenate([hole, hole[:1]]), grey=outline)
        return alpha

    def trace(self, polygons: list[np.ndarray], grey: int, wipe: bool = True) -> None:
        """Draw the outline of the union of the polygons in the sketch and erase what is behind them."""
        paths = [self._fine(polygon) for polygon in polygons]
        for path in paths:
            self.pencil.line([*path, path[0]], fill=grey, width=max(1, round(self.stroke)))
        if wipe:
            # Erasing after the strokes leaves only their outer half, so that overlapping polygons form one shape.
            for path in paths:
                self.pencil.polygon(path, fill=PAPER)
            if len(paths) == 1:
                self.pencil.line([*paths[0], paths[0][0]], fill=grey, width=max(1, round(self.stroke)))

    def line(self, curve: np.ndarray, grey: int = INK, width: float = 1.0) -> None:
        """Draw a line in the sketch; `width` is relative to the normal width."""
        self.pencil.line(self._fine(curve), fill=grey, width=max(1, round(self.stroke * width)))

    def pen(self, curve: np.ndarray, color: object, width: float, opacity: float = 1.0, grey: int | None = INK) -> None:
        """Draw a thin line in the image and, if `grey`, in the sketch."""
        alpha = self.cover(ribbon(curve, width))
        self.tint(alpha * opacity, color)
        if grey is not None:
            self.line(curve, grey)

    def sketch(self) -> np.ndarray:
        """Return the sketch, uint8 [S, S], dark strokes on white."""
        return np.asarray(self.paper.reduce(self.factor), dtype=np.uint8).copy()
