"""Copies of the same photograph, by name or by content: they must not be on both sides of a split."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_VERSION = re.compile(r"(_(jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9a-z]+$")  # Roboflow's copies


def groups_of_copies(paths: Sequence[Path], versions_alone: bool = False) -> list[int]:
    """A number per file, from 0, equal for the same content or base name (with `versions_alone`: Roboflow's alone)."""
    files_of_size = Counter(path.stat().st_size for path in paths)
    nodes: dict[object, int] = {}  # names and contents; each file is an edge between two
    names, contents = [], []
    for path in paths:
        name, versions = _VERSION.subn("", path.stem.lower())
        names.append(nodes.setdefault(path if versions_alone and not versions else name, len(nodes)))
        alone = files_of_size[path.stat().st_size] == 1
        contents.append(nodes.setdefault(path if alone else hashlib.sha256(path.read_bytes()).digest(), len(nodes)))
    graph = coo_array((np.ones(len(paths)), (names, contents)), shape=(len(nodes), len(nodes)))
    return connected_components(graph, directed=False)[1][names].tolist()


def shared_between(splits: Mapping[str, Sequence[Path]]) -> list[tuple[Path, Path]]:
    """Pairs of copies in two splits. Equal file names are no sign: images are often numbered anew in each split."""
    files = [(split, path) for split, paths in splits.items() for path in paths]
    first: dict[int, tuple[str, Path]] = {}
    pairs = []
    for group, (split, path) in zip(groups_of_copies([path for _, path in files], True), files, strict=True):
        other, original = first.setdefault(group, (split, path))
        if split != other:
            pairs.append((original, path))
    return pairs
