# %% [markdown]
# # Published weights
#
# A published network is a run that others have trained: one line reads its file, and it is sampled like a run of your own.
# Published files are gigabytes, so this notebook writes one with the same layout, DiT's, as small as it can be, with random
# numbers in it. With the real file only the name in `from_pretrained` changes.

# %%
import diffjax
import jax
import numpy as np
from diffjax.exchange.convert import convert
from diffjax.models.dit.published import FAMILY
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.reports.pictures import image_grid
from PIL import Image

# %% [markdown]
# ## A file in the authors' layout
#
# `FAMILY` has the table between the authors' names and ours, in both directions.

# %%
denoiser = FAMILY.network(
    (8, 8, 4), 10, out_channels=8, patch_size=2, hidden_size=32, depth=2, num_heads=2
)
rng = np.random.default_rng(0)
params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), FAMILY.shapes(denoiser)
)
write_safetensors("tiny-dit.safetensors", FAMILY.to_theirs(params, denoiser))
theirs = read_state_dict("tiny-dit.safetensors")
for name in list(theirs)[:6]:
    print(name, theirs[name].shape)
print(f"… {len(theirs)} tensors")

# %% [markdown]
# ## One line to a model
#
# Family and size are recognised by names and shapes. What shapes don't show is the number of heads: of a published size it
# is known, of ours it has to be passed. What samples depend on, without the settings of the network:

# %%
model = diffjax.from_pretrained("tiny-dit.safetensors", num_heads=2)
about = model.describe().splitlines()
print("\n".join(line for line in about if not line.startswith("network:")))

# %% [markdown]
# How the authors trained and sample their network is recorded beside the table: path, target, learned variance, the grid of
# 250 steps, guidance of three of four channels. Any of it can be another one:

# %%
labels = [0, 1, 2, 3]
latents = model.sample(labels, solver="unipc", num_steps=8, guidance_scale=2.0, seed=0)
print(latents.shape)
Image.fromarray(image_grid(latents, columns=4))

# %% [markdown]
# Random weights make noise, of course. These are latents; `from_pretrained(…, codec="sd-vae-ft-mse")` would decode them to
# pictures.
#
# ## Into another layout and back
#
# The same weights as a folder of diffusers, and again as a file of the authors: no bit changes.

# %%
convert("tiny-dit.safetensors", "diffusers", "tiny-dit-diffusers", settings={"num_heads": 2})
convert("tiny-dit-diffusers", "authors", "tiny-dit-again", file_format="safetensors")
again = read_state_dict("tiny-dit-again/weights.safetensors")
print(all(np.array_equal(np.asarray(theirs[name]), np.asarray(again[name])) for name in theirs))

# %% [markdown]
# ## Next
#
# - [Published weights](../pretrained.md): all layouts that are read and written, what published numbers depend on.
# - [Text to image](../text_to_image.md): pipelines, from a prompt to a picture.
# - [Fine-tuning](../fine_tuning.md): a published pipeline on your own pictures.
