"""Batches on their way from the host to the devices."""

import collections
import itertools
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from simam_jax.task import Batch
from simam_jax.training.step import batch_sharded


def to_devices(batches: Iterator[Batch], mesh: Mesh, ahead: int) -> Iterator[dict[str, jax.Array]]:
    """The batches as global arrays, cut over the mesh; `ahead` of them are under way while one is used."""
    sharding = batch_sharded(mesh)
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()

    def send(count: int) -> None:
        for batch in itertools.islice(batches, count):
            queue.append({name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()})

    send(ahead + 1)
    while queue:
        yield queue.popleft()
        send(1)
