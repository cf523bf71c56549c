"""Which form of an operation a platform runs.

Every operation in `ops/` has one definition. Another form of it, for one platform, computes the same under jit, grad, vmap,
shard_map and export, and stands here because `python -m benchmarks.lowerings` shows what it wins (see ops/README.md).

The form is chosen while an operation is traced, for the platform of this process. What is exported from a machine for
another one is therefore right everywhere, and written for the machine it comes from; with symbolic sizes, as our exporter
has them, it is written in the default forms.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

_target: str | None = None


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """For the body, forms are chosen for `platform` (cpu, gpu, tpu) instead of this process's.

    For compiling ahead for a device that is not here, or for the XLA that TensorFlow brings (tensorflow). JAX forgets at
    both ends what it has traced: it would be used again, with the forms of the other platform.
    """
    global _target
    previous, _target = _target, platform
    jax.clear_caches()
    try:
        yield
    finally:
        _target = previous
        jax.clear_caches()


def choose(x: jax.Array, default: Callable, **forms: Callable) -> Callable:
    """The form for x: `forms[platform]`, or `default` on other platforms and where a size of x is symbolic.

    The sizes are what forms decide by, and those of jax.export's symbolic shapes cannot be asked for.
    """
    if is_symbolic(x):
        return default
    return forms.get(_target or jax.default_backend(), default)


def by_platform(x: jax.Array, *, cpu: Callable, accelerator: Callable) -> Callable:
    """The form for x of an operation that no platform can run well in the other's form.

    Where `choose` takes the default, both forms are traced, and the program has the one of the platform it is lowered for.
    """

    def either(*inputs: Any) -> Any:
        return lax.platform_dependent(*inputs, cpu=cpu, default=accelerator)

    return choose(x, either, cpu=cpu, gpu=accelerator, tpu=accelerator)


def is_symbolic(x: jax.Array) -> bool:
    """Whether x has a size that is one of jax.export's symbols."""
    return any(map(is_symbolic_dim, x.shape))


def compute_once(f: Callable[..., jax.Array], *inputs: jax.Array, after: jax.Array) -> jax.Array:
    """f(*inputs), computed once and kept in memory, and only when `after`, of any floating values, is there.

    XLA:CPU computes cheap functions again in everything that reads them, and removes `optimization_barrier` before it decides
    that. It does not fuse across a conditional. Both branches of this one are f.
    """
    return lax.cond(after[(0,) * after.ndim] == 0, f, f, *inputs)


def varying_as(x: Any, *others: Any) -> Any:
    """x, arrays that a loop over `others` starts with. Under shard_map they must vary over the devices as its results will.

    The choice between equal arrays has that type, and costs nothing: XLA removes it.
    """
    firsts = [
        leaf[(0,) * leaf.ndim] for leaf in map(jnp.asarray, jax.tree.leaves(others)) if is_symbolic(leaf) or leaf.size
    ]
    always = functools.reduce(jnp.logical_or, [first == first for first in firsts])
    return jax.tree.map(lambda leaf: jnp.where(always, leaf, leaf), x)
