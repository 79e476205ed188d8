"""Encoding and decoding by AutoencoderKL here and in diffusers: `--autoencoders=sd-vae`."""

import functools
from typing import Any

import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.models.autoencoder_kl.published import FAMILY
from diffjax.performance.throughput import timed
from experiments.benchmark.against_torch import Pair, Rounds, measure_in_turns, torch_device
from experiments.flags import cli


def measure_autoencoder(size: str, *, pixels: int, num_images: int, rounds: int) -> list[Pair]:
    """Measures both libraries in turns, with random weights.

    Args:
        size: a published size, such as `sd-vae`.
        pixels: height and width of the images.
        num_images: images of a batch.
        rounds: number of rounds.

    Raises:
        UserError: diffusers is missing.
    """
    arguments = {"size": size, "shape": (num_images, pixels, pixels, 3)}
    ours, theirs = (functools.partial(make, **arguments) for make in (_ours, _theirs))
    return measure_in_turns(f"{size} at {pixels}x{pixels}", ours, theirs, rounds)


def check_autoencoder(size: str) -> None:
    """Refuses what `measure_autoencoder` can't measure.

    Raises:
        UserError: no such size, or diffusers is missing.
    """
    FAMILY.size(size)
    torch_device()
    _diffusers()


def _ours(size: str, shape: tuple[int, ...]) -> Rounds:
    cli.keep_freed_memory()
    network = FAMILY.size(size)
    images = np.zeros(shape, np.float32)
    params = jax.jit(network.init)(jax.random.key(0), images)
    encode = jax.jit(lambda params, x: network.apply(params, x, method="encode").mean)
    decode = jax.jit(lambda params, z: network.apply(params, z, method="decode"))
    latents = jax.block_until_ready(encode(params, images))
    jax.block_until_ready(decode(params, latents))

    def run(program: Any, x: Any) -> float:
        return timed(lambda: jax.block_until_ready(program(params, x)))

    return {"encoding": lambda: run(encode, images), "decoding": lambda: run(decode, latents)}


def _theirs(size: str, shape: tuple[int, ...]) -> Rounds:
    device, diffusers = torch_device(), _diffusers()
    import torch

    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as XLA multiplies
    ours = FAMILY.size(size)
    levels = len(ours.channels)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=ours.channels,
        layers_per_block=ours.num_res_blocks,
        latent_channels=ours.latent_channels,
        use_quant_conv=ours.quant_convs,
        use_post_quant_conv=ours.quant_convs,
    ).eval()
    if sum(p.numel() for p in network.parameters()) != FAMILY.sizes[size].num_parameters:
        raise UserError(f"--autoencoders={size}: diffusers' AutoencoderKL is another network")
    images = torch.zeros(shape[0], shape[3], *shape[1:3])

    @torch.inference_mode()
    def encode() -> Any:
        mean = network.encode(images).latent_dist.mean
        mean.flatten()[0].cpu()  # Waits until a GPU has finished.
        return mean

    latents = encode()

    @torch.inference_mode()
    def decode() -> None:
        network.decode(latents).sample.flatten()[0].cpu()

    decode()
    return {"encoding": lambda: timed(encode), "decoding": lambda: timed(decode)}


def _diffusers() -> Any:
    """The library, imported when it is needed.

    Raises:
        UserError: it is missing.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"--autoencoders needs diffusers: {error}") from None
    return diffusers
