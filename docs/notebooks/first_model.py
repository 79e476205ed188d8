# %% [markdown]
# # A first model
#
# In a minute this notebook trains a class-conditional model of handwritten digits on the CPU, looks at what it
# learned, and draws samples. It needs no download: the images (8×8 pixels) come with scikit-learn.
#
# A *diffusion model* learns to remove noise. In training, noise is mixed into an image, `x_t = a(t)·x0 + s(t)·eps`,
# and a network predicts from `x_t` and `t` what was mixed. Samples are made by starting with noise alone and following
# the predictions back to `t = 0`.

# %%
from pathlib import Path

import diffjax
import numpy as np
from configs import digits
from diffjax.reports.pictures import image_grid
from matplotlib.figure import Figure
from PIL import Image

# %% [markdown]
# ## The config
#
# An experiment is one config. Its argument chooses parts by name: here flow matching, which predicts a velocity on a
# straight path, and a small transformer. Every value in it can be changed; its default, 1,200 steps of 128 images, takes two
# and a half minutes. A quarter of the steps, of half as many images, is enough to see digits.

# %%
config = digits.get_config("objective=flow,model=dit")
config.num_steps = 300  # in tests: 12
config.batch_size = 64
config.sample_every_steps = config.num_steps
config.checkpoint_every_steps = config.num_steps
config.evaluation.num_samples = 200  # in tests: 20
config.evaluation.num_steps = (9,)
print(config.objective)

# %% [markdown]
# ## Training
#
# `train` checks the whole config, trains, evaluates, and writes a page about the run. If it is interrupted, the same
# call goes on where it stopped; of a finished run it returns the page at once.

# %%
page = diffjax.train(config, "runs/first_model")
page

# %% [markdown]
# ## What came out
#
# `load` brings the run back: its weights, and everything that is needed to sample with them.

# %%
run = diffjax.load("runs/first_model")
run

# %%
metrics = run.metrics()
figure = Figure(figsize=(6, 3))
axes = figure.subplots()
axes.plot(metrics["step"], metrics["loss"])
axes.set(xlabel="step", ylabel="loss", title="The loss of flow matching")
figure

# %% [markdown]
# A falling loss does not say that samples are good. The evaluation has drawn samples of each digit and compared them
# with images: a classifier recognises a part of them as the digit that was wanted (`accuracy`), and the Fréchet distance
# compares the statistics of features. The page of the run (`report.html`) has all metrics, and how they were measured.

# %%
import json

evaluation = json.loads((Path("runs/first_model") / "evaluation.json").read_text())
print(f"accuracy {evaluation['accuracy']:.1%} of {evaluation['num_samples']} samples")
for name, number in evaluation["frechet_distance"].items():
    if isinstance(number, float):
        print(f"Fréchet distance, {name}: {number:.3g}")

# %% [markdown]
# ## Samples
#
# One sample for each label that is wanted. They depend on the seed, their label and their number alone, so the same call
# returns the same images.

# %%
labels = np.tile(np.arange(10), 4)
images = run.sample(labels, seed=1)
print(images.shape, images.dtype)
Image.fromarray(image_grid(images, columns=10).squeeze())

# %% [markdown]
# ## Next
#
# - [Sampling and guidance](sampling_and_guidance.ipynb): other solvers, fewer steps, stronger labels, on this run.
# - [Your own objective](your_own_objective.ipynb): write a loss, and verify it before anything is trained.
# - [Configs](../configs.md): all parts, and how to write a config of your own.
