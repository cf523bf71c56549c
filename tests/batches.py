"""Batches of labelled images from a config's data section, for the tests of the pipeline."""

from simam_jax import data
from simam_jax.classification.decode import eval_decode, train_decode


def train_batches(config, *, seed, start_step, global_batch_size, **process):
    return data.train_batches(
        data.open_records(config, config.train_split),
        train_decode(config, seed),
        seed=seed,
        start_step=start_step,
        batch_size=global_batch_size,
        prefetch=config.prefetch,
        max_unreadable=config.max_unreadable,
        **process,
    )


def eval_batches(config, *, global_batch_size, **process):
    records, decode = data.open_records(config, config.eval_split), eval_decode(config)
    return data.eval_batches(records, decode, batch_size=global_batch_size, prefetch=config.prefetch, **process)
