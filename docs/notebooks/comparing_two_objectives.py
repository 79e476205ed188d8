# %% [markdown]
# # Comparing two objectives
#
# Is one objective better than another, or was it luck? One training run of each can't tell. This notebook trains three
# seeds of each arm, and ends in a verdict with an error rate.
#
# The data are single pixels of eight colours, a distribution that is known, so that a training takes seconds. The arms
# are flow matching, and noise prediction on DDPM's path.

# %%
from pathlib import Path

import diffjax
import numpy as np
from configs import colours
from diffjax.comparison.results import read_sweep
from diffjax.comparison.summary import numbers
from diffjax.ensemble.ensemble import train_together
from diffjax.reports.sweep_text import verdict_markdown

SEEDS = (0, 1, 2)  # in tests: (0, 1)
NUM_STEPS = 200  # in tests: 8


def config_of(objective, seed):
    config = colours.get_config(f"objective={objective}")
    config.seed = seed
    config.num_steps = NUM_STEPS
    config.batch_size = 128
    config.sample_every_steps = NUM_STEPS
    config.checkpoint_every_steps = NUM_STEPS
    config.evaluation.num_samples = 2_000  # in tests: 100
    config.evaluation.num_steps = (9,)
    return config


# %% [markdown]
# ## Training
#
# The three seeds of an arm differ in a number alone, so one program trains them together. Each has a folder of its own, as
# if it had been trained alone.

# %%
for objective in ("flow", "ddpm"):
    train_together(
        [config_of(objective, seed) for seed in SEEDS],
        [Path("runs/compared") / f"{objective}-seed{seed}" for seed in SEEDS],
    )

# %% [markdown]
# ## What the arms share
#
# Network, number of steps, batch, data and the noise of each seed are the same, and so is everything that evaluates them:
# distances that were measured in different ways are not compared.

# %%
one = diffjax.load("runs/compared/flow-seed0")
other = diffjax.load("runs/compared/ddpm-seed0")
print(one)
print(other)

# %% [markdown]
# ## The verdict
#
# The Fréchet distance from the training data, lower is better: the mean over the seeds with Student's interval, and the
# paired difference from the best arm. An arm is `worse` only if the difference is significant at 5 %.

# %%
found = numbers(read_sweep(["runs/compared"]))
print(verdict_markdown(found["verdict_rows"]))

# %% [markdown]
# Where three seeds decide nothing, the verdict says how many would, if the true difference were the measured one. The rule
# behind it, as the report states it:

# %%
print(found["rule"])

# %% [markdown]
# What the arms draw, without numbers: the mean of samples by red, green and blue, and of the data.

# %%
data = one.dataset()
real = np.stack([data.train[i]["image"] for i in range(1_000)]) / 127.5 - 1.0
for name, pixels in (
    ("data", real),
    ("flow", one.sample(1_000).clip(-1.0, 1.0)),
    ("ddpm", other.sample(1_000).clip(-1.0, 1.0)),
):
    mean, deviation = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    print(f"{name}: mean {np.round(mean, 2)}, standard deviation {np.round(deviation, 2)}")

# %% [markdown]
# ## Next
#
# - [Sweeps](../sweeps.md): many arms from one file, any number of workers, matched by steps, images or FLOPs.
# - [Reports](../reports.md): the page with curves, losses by noise level, and samples from the same noise.
