"""The batches of a run on its devices, from any step on and after rollbacks."""

from collections.abc import Iterator
from itertools import islice

import jax
from jax import Array

from diffjax.data import DataSet, batches
from diffjax.data.latents import LOG_VARIANCE
from diffjax.loop.rollback import Rollbacks, seed_of
from diffjax.runs.setup import Setup
from diffjax.training.posterior import drawn, posterior_key
from diffjax.training.sharding import batch_sharding, part_of_batch


def device_batches(
    setup: Setup, dataset: DataSet, start_step: int, rollbacks: Rollbacks = Rollbacks()
) -> Iterator[dict[str, Array]]:
    """Global batches from `start_step` on; each process reads its own rows of them."""
    config = setup.config
    place = batch_sharding(setup.mesh)
    part = part_of_batch(place, config.batch_size)
    used = setup.wired.batch_shapes(config.batch_size)
    used[LOG_VARIANCE] = used["image"]
    for order, first, last in rollbacks.stretches(start_step, config.num_steps):
        stream = batches(
            dataset.train,
            batch_size=config.batch_size,
            seed=seed_of(config.seed, order),
            start_step=first,
            augment=setup.augment,
            part=part,
        )
        key = posterior_key(config.seed)
        for step, batch in enumerate(islice(stream, last - first), first):
            placed = {
                name: jax.make_array_from_process_local_data(
                    place, batch[name], (config.batch_size, *batch[name].shape[1:])
                )
                for name in used
                if name in batch or name != LOG_VARIANCE
            }
            yield drawn(placed, rollbacks.key(key, step + 1), step)
