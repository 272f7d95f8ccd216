"""Rendered scenes: textured solids on a table under a lamp, with shadows, seen from the side and above.

A small ray tracer in NumPy. Solids stand on the plane z = 0; the camera looks down on it. Rays of a pixel meet every
solid in the solid's own frame, where each kind has a closed form; the nearest hit wins. A second ray from the hit to
the lamp, which is a little moved for each ray of a pixel, decides about shadow. Colours come from noise in three
dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from dimaskdino import config

Array = np.ndarray
Random = np.random.Generator

RAYS = 2  # per pixel and axis
FAR = 1e9
EPSILON = 1e-3
MOST_SOLIDS = 7
LEAST_PIXELS = 20  # of a solid that counts as an object
INNER = 0.55  # radius of a hoop's hole, relative to the hoop's
WALL = 10.0  # distance from the camera


@dataclass(frozen=True)
class Solid:
    """A solid that stands on the table.

    Attributes:
        kind: its class.
        centre: (x, y) on the table.
        radius: of its circle, or half of its longer side.
        height: above the table.
        turn: angle about the vertical axis.
        narrow: the shorter side of a block relative to the longer one.
        colour: what it is made of, from points in its own frame (n, 3) to RGB in [0, 1].
        gloss: strength of the highlight.
    """

    kind: str
    centre: tuple[float, float]
    radius: float
    height: float
    turn: float
    narrow: float
    colour: Callable[[Array], Array]
    gloss: float

    def near(self, origins: Array, directions: Array) -> Array:
        """Which rays (n,) meet a sphere around it; the others need no closer look."""
        to = np.array([*self.centre, self.height / 2]) - origins
        squared = 2 * self.radius**2 + (self.height / 2) ** 2
        return _dot(to, to) - _dot(to, directions) ** 2 < squared

    def hit(self, origins: Array, directions: Array) -> tuple[Array, Array, Array]:
        """Distance (n,), FAR without a hit, normal (n, 3) and point in its own frame (n, 3) for rays (n, 3)."""
        o, d = self.inwards(origins), _turned(directions, -self.turn)
        t, normals = _HITS[self.kind](self, o, d)
        points = o + np.minimum(t, FAR)[:, None] * d
        return t, _turned(normals, self.turn), points

    def inwards(self, points: Array) -> Array:
        """Points (n, 3) in the solid's own frame."""
        return _turned(points - np.array([*self.centre, 0.0]), -self.turn)


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("ij,ij->i", a, b)


def _turned(v: Array, angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * v[:, 0] - s * v[:, 1], s * v[:, 0] + c * v[:, 1], v[:, 2]], axis=1)


def _first(*candidates: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """The nearest of several (distance, valid, normal)."""
    t = np.full(len(candidates[0][0]), FAR)
    normals = np.zeros((len(t), 3))
    for distance, valid, normal in candidates:
        nearer = valid & (distance > EPSILON) & (distance < t)
        t[nearer] = distance[nearer]
        normals[nearer] = normal[nearer]
    return t, normals


def _roots(a: Array, b: Array, c: Array) -> tuple[Array, Array, Array]:
    """Both roots of a·t² + 2·b·t + c, ascending, and where they are real."""
    inside = b * b - a * c
    real = (inside > 0) & (np.abs(a) > 1e-12)
    root = np.sqrt(np.maximum(inside, 0))
    a = np.where(real, a, 1.0)
    low, high = (-b - root) / a, (-b + root) / a
    return np.minimum(low, high), np.maximum(low, high), real


def _ball(solid: Solid, o: Array, d: Array) -> tuple[Array, Array]:
    r = solid.radius
    centred = o - np.array([0.0, 0.0, r])
    t, _, real = _roots(_dot(d, d), _dot(centred, d), _dot(centred, centred) - r * r)
    normal = (centred + t[:, None] * d) / r
    return _first((t, real, normal))


def _block(solid: Solid, o: Array, d: Array) -> tuple[Array, Array]:
    half = np.array([solid.radius, solid.radius * solid.narrow, solid.height / 2])
    centred = o - np.array([0.0, 0.0, solid.height / 2])
    safe = np.where(np.abs(d) < 1e-9, 1e-9, d)
    near, far = (-np.sign(safe) * half - centred) / safe, (np.sign(safe) * half - centred) / safe
    axis = near.argmax(1)
    t = near.max(1)
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(safe[rows, axis])
    return _first((t, t < far.min(1), normal))


def _side(o: Array, d: Array, radius: float, height: float, outwards: float) -> list[tuple[Array, Array, Array]]:
    """Both hits of a vertical tube; its normals point away from the axis (1) or towards it (−1)."""
    a, b = _dot(d[:, :2], d[:, :2]), _dot(o[:, :2], d[:, :2])
    found = []
    *roots, real = _roots(a, b, _dot(o[:, :2], o[:, :2]) - radius * radius)
    for t in roots:
        point = o + t[:, None] * d
        normal = outwards * np.column_stack([point[:, :2] / radius, np.zeros(len(t))])
        found.append((t, real & (point[:, 2] > 0) & (point[:, 2] < height), normal))
    return found


def _top(o: Array, d: Array, height: float, inner: float, outer: float) -> tuple[Array, Array, Array]:
    flat = np.abs(d[:, 2]) > 1e-9
    t = (height - o[:, 2]) / np.where(flat, d[:, 2], 1.0)
    distance = ((o[:, :2] + t[:, None] * d[:, :2]) ** 2).sum(1)
    normal = np.broadcast_to(np.array([0.0, 0.0, 1.0]), o.shape)
    return t, flat & (distance < outer * outer) & (distance >= inner * inner), normal


def _can(solid: Solid, o: Array, d: Array) -> tuple[Array, Array]:
    return _first(*_side(o, d, solid.radius, solid.height, 1.0)[:1], _top(o, d, solid.height, 0.0, solid.radius))


def _hoop(solid: Solid, o: Array, d: Array) -> tuple[Array, Array]:
    inner = INNER * solid.radius
    return _first(
        *_side(o, d, solid.radius, solid.height, 1.0)[:1],
        *_side(o, d, inner, solid.height, -1.0)[1:],
        _top(o, d, solid.height, inner, solid.radius),
    )


def _cone(solid: Solid, o: Array, d: Array) -> tuple[Array, Array]:
    slope = solid.radius / solid.height
    above = solid.height - o[:, 2]  # x² + y² = slope²·(height − z)²
    a = _dot(d[:, :2], d[:, :2]) - (slope * d[:, 2]) ** 2
    b = _dot(o[:, :2], d[:, :2]) + slope * slope * above * d[:, 2]
    found = []
    *roots, real = _roots(a, b, _dot(o[:, :2], o[:, :2]) - (slope * above) ** 2)
    for t in roots:
        point = o + t[:, None] * d
        normal = np.column_stack([point[:, :2], slope * slope * (solid.height - point[:, 2])])
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        found.append((t, real & (point[:, 2] > 0) & (point[:, 2] < solid.height), normal))
    return _first(*found)


_HITS = {"ball": _ball, "block": _block, "can": _can, "cone": _cone, "hoop": _hoop}


def noise(points: Array, seed: int) -> Array:
    """Smooth noise in [0, 1] at points (n, 3): random values on a lattice of distance 1, interpolated."""
    whole = np.floor(points).astype(np.int64)
    part = points - whole
    part = part * part * (3 - 2 * part)
    # per axis, for the lattice points below and above: their weight and their part of the hash
    weights = [(1 - p, p) for p in part.T]
    primes = np.array([73856093, 19349663, 83492791], np.uint64)
    hashed = [
        (w * prime, (w + np.uint64(1)) * prime) for w, prime in zip(whole.T.astype(np.uint64), primes, strict=True)
    ]
    total = np.zeros(len(points))
    for x, y, z in np.ndindex(2, 2, 2):
        weight = weights[0][x] * weights[1][y] * weights[2][z]
        mixed = hashed[0][x] ^ hashed[1][y] ^ hashed[2][z] ^ np.uint64(seed * 97)
        mixed = (mixed ^ (mixed >> np.uint64(13))) * np.uint64(1274126177)
        total += weight * ((mixed ^ (mixed >> np.uint64(16))) & np.uint64(0xFFFF)) / 0xFFFF
    return total


def turbulence(points: Array, seed: int, octaves: int = 3) -> Array:
    """Noise of several scales in [0, 1]."""
    total = sum(noise(points * 2**i, seed + i) / 2**i for i in range(octaves))
    return total / (2 - 2.0 ** (1 - octaves))


def material(random: Random, vivid: float) -> Callable[[Array], Array]:
    """A random texture: colours by points (n, 3). `vivid` is 0 for greys, 1 for any colour."""
    drawn = random.uniform(0.05, 0.95, (2, 3))
    grey = drawn.mean(1, keepdims=True)
    first, second = grey + vivid * (drawn - grey)
    seed, scale = int(random.integers(1 << 20)), random.uniform(3.0, 9.0)
    axis = random.normal(size=3)
    axis /= np.linalg.norm(axis)
    kind = random.choice(["plain", "stripes", "checks", "marble", "wood", "speckles"])

    def mixture(points: Array) -> Array:
        p = points * scale
        if kind == "plain":
            return 0.3 * turbulence(p, seed)
        if kind == "stripes":
            return (np.sin(4 * p @ axis) > 0).astype(float)
        if kind == "checks":
            return np.floor(p + 1e-4).sum(1) % 2
        if kind == "marble":
            return 0.5 + 0.5 * np.sin(2 * p @ axis + 6 * turbulence(p, seed))
        if kind == "wood":
            return np.hypot(p[:, 0] + noise(p, seed), p[:, 2]) * 1.5 % 1
        return (noise(2 * p, seed) > 0.6).astype(float)

    def colour(points: Array) -> Array:
        part = mixture(points)[:, None]
        return (1 - part) * first + part * second

    return colour


def _placed(random: Random, kinds: tuple[str, ...]) -> list[tuple[int, Solid]]:
    """Solids with their class indices, none inside another."""
    solids: list[tuple[int, Solid]] = []
    for _ in range(int(random.integers(2, MOST_SOLIDS + 1))):
        for _ in range(20):
            label, radius = int(random.integers(len(kinds))), random.uniform(0.22, 0.62)
            centre = tuple(random.uniform(-1.7, 1.7, 2))
            if all(np.hypot(*np.subtract(centre, s.centre)) > 0.95 * (radius + s.radius) for _, s in solids):
                kind = kinds[label]
                tall = {"ball": 2.0, "hoop": random.uniform(0.25, 0.6)}.get(kind, random.uniform(0.7, 2.2))
                turn, narrow = random.uniform(0, 2 * np.pi), random.uniform(0.4, 1.0)
                gloss = float(random.choice([0.0, 0.25, 0.7]))
                made = Solid(kind, centre, radius, tall * radius, turn, narrow, material(random, 0.8), gloss)
                solids.append((label, made))
                break
    return solids


def _nearest(solids: list[Solid], origins: Array, directions: Array) -> tuple[Array, Array, Array, Array]:
    """Distance, number of the solid (−1: none), normal and own point of the nearest hit of each ray."""
    t, which = np.full(len(origins), FAR), np.full(len(origins), -1)
    normals, points = np.zeros_like(origins), np.zeros_like(origins)
    for number, solid in enumerate(solids):
        rows = np.flatnonzero(solid.near(origins, directions))
        distance, normal, point = solid.hit(origins[rows], directions[rows])
        nearer = distance < t[rows]
        rows = rows[nearer]
        t[rows], which[rows] = distance[nearer], number
        normals[rows], points[rows] = normal[nearer], point[nearer]
    return t, which, normals, points


def scene(settings: config.Shapes, split: str, index: int) -> tuple[Array, list[int], list[Array]]:
    """Render one scene, a function of the arguments alone.

    Returns:
        The image (size, size, 3) uint8, the class of each solid, and each solid's visible mask (size, size) uint8.
    """
    random = np.random.default_rng([settings.seed, 7, ("train", "val").index(split), index])
    placed = _placed(random, settings.kinds)
    solids = [solid for _, solid in placed]
    size, table, wall = settings.size, material(random, 0.35), random.uniform(0.4, 0.8) * np.ones(3)
    directions, eye, forwards = _camera(random, size)
    origins = np.broadcast_to(eye, directions.shape)
    t, which, normals, own = _nearest(solids, origins, directions)
    down = directions[:, 2] < -1e-3
    floor = np.where(down, -eye[2] / np.where(down, directions[:, 2], 1.0), FAR)
    on_table = (floor < t) & (floor * (directions @ forwards) < WALL)
    t, which = np.where(on_table, floor, t), np.where(on_table, -1, which)
    normals[on_table] = (0.0, 0.0, 1.0)
    seen = on_table | (which >= 0)
    points = origins + np.minimum(t, 50)[:, None] * directions
    colours = np.broadcast_to(wall, points.shape) * (0.75 + 0.5 * turbulence(points * 0.5, 3))[:, None]
    colours[on_table] = 0.85 * table(points[on_table] * 0.35)
    for number, solid in enumerate(solids):
        rows = which == number
        colours[rows] = solid.colour(own[rows])
    shading, highlight = _light(random, solids, points, normals, directions, seen)
    gloss = np.array([*(solid.gloss for solid in solids), 0.0])[which]
    colours = np.where(seen[:, None], colours * shading[:, None] + (gloss * highlight)[:, None], colours)
    image = _developed(random, colours.reshape(size, RAYS, size, RAYS, 3).mean((1, 3)))
    numbers = which.reshape(size, RAYS, size, RAYS)
    kept, taken = [], np.zeros((size, size), bool)
    for number, (label, _) in enumerate(placed):
        mask = ((numbers == number).mean((1, 3)) >= 0.5) & ~taken
        taken |= mask
        if mask.sum() >= LEAST_PIXELS:
            kept.append((label, mask.astype(np.uint8)))
    if not kept:  # all solids out of view
        return scene(settings.model_copy(update={"seed": settings.seed + 10**6}), split, index)
    return image, [label for label, _ in kept], [mask for _, mask in kept]


def _camera(random: Random, size: int) -> tuple[Array, Array, Array]:
    """Directions of the rays (rays, 3), row by row, the camera's place, and where it looks."""
    far, height, turn = random.uniform(3.6, 5.0), random.uniform(1.8, 3.6), random.uniform(0, 2 * np.pi)
    eye = np.array([far * np.cos(turn), far * np.sin(turn), height])
    forwards = np.array([*random.uniform(-0.3, 0.3, 2), 0.25]) - eye
    forwards /= np.linalg.norm(forwards)
    right = np.cross(forwards, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    up = np.cross(right, forwards)
    place = ((np.arange(size * RAYS) + 0.5) / (size * RAYS) - 0.5) * 2 * random.uniform(0.38, 0.5)
    across, upwards = np.meshgrid(place, -place)
    directions = forwards + across.reshape(-1, 1) * right + upwards.reshape(-1, 1) * up
    return directions / np.linalg.norm(directions, axis=1, keepdims=True), eye, forwards


def _light(
    random: Random, solids: list[Solid], points: Array, normals: Array, directions: Array, seen: Array
) -> tuple[Array, Array]:
    """Brightness and highlight of every ray's hit."""
    turn, height = random.uniform(0, 2 * np.pi), random.uniform(3.5, 6.0)
    lamp = np.array([4 * np.cos(turn), 4 * np.sin(turn), height])
    # the rays of a pixel see different places of the lamp, which makes the edges of shadows soft
    places = lamp + 0.3 * random.normal(size=(RAYS, RAYS, 3))
    side = round(len(points) ** 0.5)
    towards = np.tile(places, (side // RAYS, side // RAYS, 1)).reshape(-1, 3) - points
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    lit = np.zeros(len(points), bool)
    lit[seen] = _nearest(solids, points[seen] + 0.01 * normals[seen], towards[seen])[0] >= FAR
    facing = np.maximum(_dot(normals, towards), 0)
    ambient = random.uniform(0.25, 0.45)
    half = towards - directions
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    highlight = lit * np.maximum(_dot(normals, half), 0) ** 40
    return ambient * (0.7 + 0.3 * normals[:, 2]) + (1.15 - ambient) * facing * lit, highlight


def _developed(random: Random, image: Array) -> Array:
    """As a camera would store it: a tint, a slight blur, noise, gamma."""
    tinted = image * random.uniform(0.85, 1.15, 3) * random.uniform(0.85, 1.15)
    blurred = gaussian_filter(tinted, (random.uniform(0.2, 0.7),) * 2 + (0,))
    noisy = blurred + random.normal(scale=random.uniform(0.0, 0.02), size=image.shape)
    return (255 * np.clip(noisy, 0, 1) ** (1 / 1.6)).round().astype(np.uint8)
