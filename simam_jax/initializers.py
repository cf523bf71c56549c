"""Initial values: how each parameter is drawn, by JAX one at a time, or by NumPy all at once and without a compiler.

XLA takes seconds to compile the draws of a network of 25 million parameters; NumPy draws them in a quarter of one.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Initializer:
    """A Flax initializer: normal with deviation r, uniform within +-r, or everywhere r.

    Attributes:
        distribution: normal, uniform or constant.
        scale: r; with `fan` r is scale / sqrt(fan).
        fan: of a kernel (..., C, O) of K * K places: "in", C * K * K; "out", O * K * K; "mean", the mean of both.
    """

    distribution: Literal["normal", "uniform", "constant"]
    scale: float
    fan: Literal["in", "out", "mean"] | None = None

    def __call__(self, key: jax.Array | None, shape: Shape, dtype: Any = jnp.float32) -> Any:
        """An array drawn by JAX with `key`, which a constant does not use."""
        if _described.get():
            return _Description(jnp.zeros(shape, dtype), self)
        if self.distribution == "constant" or key is None:
            return jnp.full(shape, self.scale, dtype)
        draw = {"normal": jax.random.normal, "uniform": _within_1}[self.distribution]
        return draw(key, shape, dtype) * jnp.asarray(self.size(shape), dtype)

    def draw(self, generator: np.random.Generator, shape: Shape, dtype: Any) -> np.ndarray:
        """An array of the same distribution, drawn by NumPy."""
        dtype = np.dtype(dtype)
        if self.distribution == "constant":
            return np.full(shape, self.scale, dtype)
        size = dtype.type(self.size(shape))
        if self.distribution == "normal":
            values = generator.standard_normal(shape, dtype)
        else:
            values = generator.random(shape, dtype)
            values -= dtype.type(0.5)
            size *= 2
        values *= size
        return values

    def size(self, shape: Shape) -> float:
        """r, for a parameter of that shape."""
        if self.fan is None:
            return self.scale
        *places, inputs, outputs = shape
        channels = {"in": inputs, "out": outputs, "mean": (inputs + outputs) / 2}[self.fan]
        return self.scale / (np.prod(places) * channels) ** 0.5


he_normal = Initializer("normal", 2**0.5, "out")
torch_uniform = Initializer("uniform", 1.0, "in")
xavier_uniform = Initializer("uniform", 3**0.5, "mean")
zeros = Initializer("constant", 0.0)
ones = Initializer("constant", 1.0)


def draw(module: nn.Module, key: jax.Array, *inputs: Any) -> dict[str, Any]:
    """The variables of `module`, NumPy's, as `module.init(key, *inputs)` makes them; `inputs` may be shapes only.

    Every parameter has a generator of its own: PCG64, seeded by the numbers of `key` followed by the bytes of the
    parameter's path, such as `params/layer1_0/conv1/kernel`. The values depend on these and on NumPy's version alone: not on
    the platform, nor on the number of devices or processes.

    Raises:
        TypeError: a variable whose initializer is none of this file.
    """
    with _describing():
        # A function and a stream of their own, because what JAX has traced outside of this context is no description.
        described = jax.eval_shape(
            lambda key, *inputs: module.init({"params": key, "described": key}, *inputs), key, *inputs
        )
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def value(path: tuple[str, ...], description: Any) -> np.ndarray:
        name = "/".join(path)
        if not isinstance(description, _Description):
            raise TypeError(
                f"The initializer of {name} is none of simam_jax.initializers: it can only be drawn by `init`."
            )
        generator = np.random.Generator(np.random.PCG64([*seed, *name.encode()]))
        return description.initializer.draw(generator, description.value.shape, description.value.dtype)

    return unflatten_dict({path: value(path, leaf) for path, leaf in flatten_dict(described).items()})


def _within_1(key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


_described: ContextVar[bool] = ContextVar("described", default=False)


@contextlib.contextmanager
def _describing() -> Iterator[None]:
    """For the body, initializers do not draw: they say what they would draw."""
    token = _described.set(True)
    try:
        yield
    finally:
        _described.reset(token)


class _Description(struct.PyTreeNode, nn.meta.AxisMetadata):
    """Shape and dtype of a variable, with its initializer. Flax hands it on from `init`, and to modules only the value."""

    value: Any
    initializer: Initializer = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Description":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Description":
        raise NotImplementedError("No network here has lifted axes.")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Description":
        raise NotImplementedError("No network here has lifted axes.")
