"""By what trees of arrays are told apart: the names and shapes of their leaves, and a checksum of their bytes."""

import zlib
from typing import Any

import jax
import numpy as np

from simam_jax.task import Tree

Layout = dict[str, str]  # of a tree: name of a leaf -> shape and dtype


def checksum(tree: Tree) -> int:
    """CRC-32 of all leaves' bytes in the tree's order; the same on any number of devices."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return crc


def layout(tree: Tree) -> Layout:
    """The names of the leaves with their shapes and types: trees that differ in it cannot be exchanged."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _form(leaf) for path, leaf in leaves}


def _form(leaf: Any) -> str:
    return f"{leaf.shape} {leaf.dtype}"


def differences(found: Layout, wanted: Layout) -> str:
    """Which leaves two layouts differ in, the first eight of them."""
    lines = [f"missing {name}" for name in sorted(set(wanted) - set(found))]
    lines += [f"unexpected {name}" for name in sorted(set(found) - set(wanted))]
    both = sorted(set(found) & set(wanted))
    lines += [f"{name} is {found[name]} and not {wanted[name]}" for name in both if found[name] != wanted[name]]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")


def layout_number(tree: Tree) -> int:
    """What checkpoints of earlier versions have in place of a layout."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = [f"{jax.tree_util.keystr(path)} {_form(leaf)}" for path, leaf in leaves]
    return zlib.crc32("\n".join(text).encode())
