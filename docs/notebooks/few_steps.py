# %% [markdown]
# # Few steps: a network that is evaluated once
#
# An ordinary model predicts where the flow goes *now*; a sampler follows it in many small steps. Mean flow
# ([Geng et al. 2025](https://arxiv.org/abs/2505.13447)) trains the network to predict the *average* velocity `u(x, t, r)`
# from time t to time r, so that one evaluation goes all the way:
#
#     x_r = x_t − (t − r)·u(x_t, t, r)
#
# No other model is distilled; it is trained from nothing, by an identity between the average velocity and its derivative.

# %%
import diffjax
import numpy as np
from configs import digits, digits_mean_flow
from diffjax.reports.pictures import image_grid
from PIL import Image


AVERAGE_STEPS = 400  # in tests: 8
FLOW_STEPS = 300  # in tests: 12


def short(config, num_steps, nfe):
    config.num_steps = num_steps
    config.batch_size = 64
    config.sample_every_steps = config.num_steps
    config.checkpoint_every_steps = config.num_steps
    config.evaluation.num_samples = 200  # in tests: 20
    config.evaluation.num_steps = nfe
    return config


config = short(digits_mean_flow.get_config(), AVERAGE_STEPS, (1,))
print(config.objective)

# %%
diffjax.train(config, "runs/few_steps")
run = diffjax.load("runs/few_steps")
run

# %% [markdown]
# ## One step against one step
#
# For comparison an ordinary model, that of [a first model](first_model.ipynb). From above: the ordinary model in 1 and in
# 20 steps, then mean flow in 1 and in 2 steps. There is no guidance, and each column has the same noise.

# %%
config = short(digits.get_config("objective=flow,model=dit"), FLOW_STEPS, (9,))
diffjax.train(config, "runs/first_model")
ordinary = diffjax.load("runs/first_model")

labels = np.arange(10)
rows = [
    ordinary.sample(labels, solver="ddim", num_steps=1, guidance_scale=1.0, seed=2),
    ordinary.sample(labels, solver="ddim", num_steps=20, guidance_scale=1.0, seed=2),
    run.sample(labels, num_steps=1, seed=2),
    run.sample(labels, num_steps=2, seed=2),
]
Image.fromarray(image_grid(np.concatenate(rows), columns=10).squeeze())

# %% [markdown]
# One step of the ordinary model is the mean of all images that the noise may become, so it is blurred, and the same for
# each noise. One step of mean flow is one image: with other noise another one.

# %%
one = [
    ordinary.sample([3] * 10, solver="ddim", num_steps=1, guidance_scale=1.0, seed=4),
    run.sample([3] * 10, num_steps=1, seed=4),
]
for name, images in zip(("ordinary", "mean flow"), one, strict=True):
    print(f"{name}: standard deviation between ten samples {images.std(axis=0).mean():.3f}")
Image.fromarray(image_grid(np.concatenate(one), columns=10).squeeze())

# %% [markdown]
# ## Next
#
# - [Objectives](../objectives.md): consistency models, shortcut models, flow maps and their distillation, each compared with
#   the exact maps.
# - `configs/digits_mean_flow.py` trains this model for 2,400 steps of 128 images.
