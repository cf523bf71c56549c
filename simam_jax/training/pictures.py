"""Where the network looks while it learns: SimAM's weights over a few evaluation images, for TensorBoard."""

import jax
import jax.numpy as jnp
import numpy as np

from simam_jax import data, visualize
from simam_jax.ops.images import normalize
from simam_jax.training.setup import Run
from simam_jax.training.state import Tree

IMAGES = 4


class AttentionPicture:
    """Of the first evaluation images, after the updates in `due`: every `config.visualize_every_epochs`.

    Only the first process draws, on a device of its own; the others neither compute nor wait.
    """

    def __init__(self, run: Run):
        every = run.config.visualize_every_epochs
        self.due = run.every(every) if every else set()
        self._run, self._active = run, bool(every) and jax.process_index() == 0
        if self._active:
            batches = data.eval_batches(run.config.data, global_batch_size=IMAGES, process_index=0, process_count=1)
            batch = next(batches)
            self._pixels = batch["image"][batch["mask"] > 0]

    def draw(self, variables: Tree) -> dict[str, np.ndarray]:
        """The picture, uint8 (1, H, W, 3), by its name in TensorBoard; none on the other processes."""
        if not self._active:
            return {}
        how, model = self._run.config.data, self._run.model
        images = normalize(jnp.asarray(self._pixels), how.mean, how.std, model.dtype)
        local = jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)
        weights = visualize.attention_weights(model, local, images)
        return {"attention": visualize.render(visualize.attention_figure(self._pixels, weights))[None]}
