# %% [markdown]
# # Sampling and guidance
#
# One trained model, sampled in many ways. Solver, grid of times, number of steps and guidance are chosen when samples are
# drawn; none of them needs another training.
#
# This notebook uses the run of [a first model](first_model.ipynb), and trains it if it is not there yet.

# %%
import diffjax
import numpy as np
from configs import digits
from diffjax.reports.pictures import image_grid
from PIL import Image

config = digits.get_config("objective=flow,model=dit")
config.num_steps = 300  # in tests: 12
config.batch_size = 64
config.sample_every_steps = config.num_steps
config.checkpoint_every_steps = config.num_steps
config.evaluation.num_samples = 200  # in tests: 20
config.evaluation.num_steps = (9,)
diffjax.train(config, "runs/first_model")
run = diffjax.load("runs/first_model")
print(run.recipe)

# %% [markdown]
# The recipe is what `sample` does if nothing else is wanted. An argument changes one part of it.
#
# ## Fewer steps
#
# The price of a sample is the number of network evaluations (NFE). Ten labels in each row, the same noise in all rows;
# from above 1, 2, 5 and 20 steps of DDIM, without guidance, which is one evaluation for each step:

# %%
labels = np.arange(10)
rows = [
    run.sample(labels, solver="ddim", num_steps=n, guidance_scale=1.0, seed=3)
    for n in (1, 2, 5, 20)
]
Image.fromarray(image_grid(np.concatenate(rows), columns=10).squeeze())

# %% [markdown]
# One step returns the mean image of the class: the best guess for noise that contains no signal. More steps decide.
#
# ## Solvers
#
# How far from the exact solution of the flow do samples end? The exact one is computed in many small steps of a method
# of order 4; then each solver has ten evaluations. The distance is the root mean square over pixels, which lie in [-1, 1].

# %%
exact = run.sample(labels, solver="rk4", num_steps=32, guidance_scale=1.0, seed=3)
for solver, num_steps in (("ddim", 10), ("heun", 5), ("dpmpp_2m", 10), ("unipc", 10)):
    images = run.sample(labels, solver=solver, num_steps=num_steps, guidance_scale=1.0, seed=3)
    print(f"{solver:9} {np.sqrt(np.mean((images - exact) ** 2)):.3f}")

# %% [markdown]
# ## Guidance
#
# Classifier-free guidance extrapolates from the prediction without a label to the one with it. A scale of 1 is off, and
# costs one evaluation for each step; every other scale costs two. From above: 1, 1.5, 3 and 8.

# %%
SCALES = (1.0, 1.5, 3.0, 8.0)
labels = np.repeat([2, 3, 8], 4)
rows = [run.sample(labels, guidance_scale=scale, seed=5) for scale in SCALES]
Image.fromarray(image_grid(np.concatenate(rows), columns=12).squeeze())

# %% [markdown]
# Stronger guidance makes images more typical of their label, and more alike. The second is its price, and it can be
# measured: the standard deviation between samples of one label, over that of the training images of this label.

# %%
data = run.dataset()
real = np.stack([data.train[i]["image"] for i in range(len(data.train))])
kinds = np.array([data.train[i]["label"] for i in range(len(data.train))])
variety = real[kinds == 3].std(axis=0).mean()
for scale in SCALES:
    images = run.sample([3] * 64, guidance_scale=scale, seed=7)
    print(f"scale {scale:3}: variety {images.std(axis=0).mean() / variety:.2f} of the real images'")

# %% [markdown]
# ## Next
#
# - [Sampling](../sampling.md): grids, guidance in an interval, against a weaker model, samples that tile, editing.
# - [Few steps](few_steps.ipynb): a model that is trained for one step.
