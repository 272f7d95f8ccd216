"""Images that show almost the same: they must not be on both sides of a split."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dimaskdino.data.images import open_image
from dimaskdino.utils.progress import progress_bar

SIDE = 8
MOST_DIFFERENT = 6  # of 2·SIDE² bits
_ROWS = 1024  # compared at a time, which bounds the memory
_COPIES = re.compile(r"(_(jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9A-Za-z]+$")


def base_name(path: Path) -> str:
    """The name of the photograph that an image was made from: without suffix and without Roboflow's `.rf.HASH`."""
    return _COPIES.sub("", path.stem).lower()


def difference_hash(path: Path) -> UInt8[np.ndarray, "16"]:
    """A fingerprint of 128 bits: where brightness grows to the right and downwards, in 8x8 cells (dHash).

    Raises:
        UserError: the image cannot be read.
    """
    with open_image(path) as image:
        image.draft("L", (8 * SIDE, 8 * SIDE))  # a JPEG is decoded at a fraction of its size
        small = image.convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    bits = [grey[:SIDE, 1:] > grey[:SIDE, :-1], grey[1:, :SIDE] > grey[:-1, :SIDE]]
    return np.packbits(np.concatenate([b.ravel() for b in bits]))


def groups_of_duplicates(paths: Sequence[Path]) -> list[int]:
    """A number per image, counted from 0, equal for images of the same base name or nearly the same fingerprint.

    Raises:
        UserError: an image cannot be read.
    """
    return _connected(_same_name(paths) + _near(_fingerprints(paths)), len(paths))


def _fingerprints(paths: Sequence[Path]) -> UInt8[np.ndarray, "n 16"]:
    return np.stack([difference_hash(path) for path in progress_bar(paths, "comparing images")])


def _connected(pairs: Sequence[tuple[int, int]], count: int) -> list[int]:
    """The number of the connected component of each of `count` items."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(count, count))
    return connected_components(graph, directed=False)[1].tolist()


def shared_between(splits: Mapping[str, Sequence[Path]]) -> list[tuple[Path, Path]]:
    """Pairs of images of two splits that are versions of one photograph by their names, or look almost the same.

    Equal file names are no sign: images are often numbered anew in each split.

    Raises:
        UserError: an image cannot be read.
    """
    paths: list[Path] = []
    split: list[str] = []
    for name, images in splits.items():
        paths += images
        split += [name] * len(images)
    members: dict[int, list[int]] = defaultdict(list)
    pairs = _near(_fingerprints(paths)) + _same_name(paths, versions_alone=True)
    for number, group in enumerate(_connected(pairs, len(paths))):
        members[group].append(number)
    shared = []
    for first, *others in members.values():
        for other in others:
            if split[other] != split[first]:
                shared.append((paths[first], paths[other]))
    return shared


def _same_name(paths: Sequence[Path], versions_alone: bool = False) -> list[tuple[int, int]]:
    first: dict[str, int] = {}
    pairs = []
    for number, path in enumerate(paths):
        name = base_name(path)
        if versions_alone and name == path.stem.lower():
            continue
        if name in first:
            pairs.append((first[name], number))
        first.setdefault(name, number)
    return pairs


def _near(hashes: UInt8[np.ndarray, "n 16"]) -> list[tuple[int, int]]:
    # one fingerprint for all that share it, since a thousand frames of a still camera would give a million pairs
    distinct, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    equal = first[inverse.ravel()]
    pairs = [(int(original), number) for number, original in enumerate(equal) if original != number]
    words = np.ascontiguousarray(distinct).view(np.uint64)
    for start in range(0, len(words), _ROWS):
        part = words[start : start + _ROWS]
        different = np.bitwise_count(part[:, None] ^ words[None, start:]).sum(-1)
        rows, columns = np.nonzero(different <= MOST_DIFFERENT)
        for a, b in zip(first[start + rows], first[start + columns], strict=True):
            if a != b:
                pairs.append((int(a), int(b)))
    return pairs
