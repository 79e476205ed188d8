"""Priors: diffusion models of image embeddings, as what reads the texts of a decoder."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.compiling import jit
from diffjax.conditions import ImageEmbeddings, TokenStates
from diffjax.conditions.images import read_image
from diffjax.errors import UserError
from diffjax.evaluation.extractors.clip import MEAN, STD, Preprocessing
from diffjax.exchange.pipelines import is_pipeline, part_of
from diffjax.models.clip.published import FAMILY as CLIP
from diffjax.models.unclip.network import UnclipPrior
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.text import FolderEncoder, read_text_encoder

_FILE = "image:"
"""What a prompt begins with that is the path of an image file."""
_PART = re.compile(r"(-?\d*\.?\d+)\s*\*\s*(.+)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class ImagePrior:
    """A prior and CLIP's image encoder: texts or images -> embeddings `[n, D]`.

        prior = ImagePrior(diffjax.from_pretrained("PRIOR"), Chosen(num_steps=10), seed=3)
        model = diffjax.from_pretrained("DECODER", prior=prior)
        model.sample(["a red apple", "image:photo.png", "0.3*a red apple + 0.7*image:photo.png"])

    The embedding of a text is a sample of the prior, so it depends on the seed and on the number of
    the prompt. That of an image is exact.

    Attributes:
        run: the prior, of `from_pretrained`.
        chosen: what of its recipe is another than its own: 25 steps at a guidance scale of 4.
        seed: the seed of its noise.

    Raises:
        UserError: the run is no prior in a folder of a pipeline.

    References:
        Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022,
        arXiv:2204.06125
    """

    run: Run
    chosen: Chosen = Chosen()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.run, Run):
            raise UserError(
                f"ImagePrior({str(self.run)!r}): pass the run, diffjax.from_pretrained(FOLDER)"
            )
        network = self.run.parts.denoiser.network
        if not isinstance(network, UnclipPrior):
            raise UserError(f"{self.run.workdir} is no prior, but a {type(network).__name__}")
        if not is_pipeline(self.run.workdir):
            raise UserError(
                f"{self.run.workdir} is a prior alone: name the folder above it, which has the "
                "text encoder as well"
            )

    @property
    def width(self) -> int:
        """The width of an embedding."""
        return self.run.parts.wired.image_shape[-1]

    def of_texts(self, texts: Sequence[str], rows: np.ndarray | None = None) -> np.ndarray:
        """The embeddings of texts `[n, D]`.

        Args:
            texts: n of them.
            rows: `[n]`, the numbers of the samples, on which their noise depends; 0, 1, … by
                default.
        """
        condition = self.run.parts.wired.condition.parse(list(texts))
        recipe = named_recipe(self.run, self.chosen).recipe
        request = Request(condition, self.seed, rows=rows)  # pyright: ignore[reportArgumentType]
        return self.run.model().sample(recipe, request).reshape(len(texts), self.width)

    def of_images(self, images: np.ndarray) -> np.ndarray:
        """The embeddings of images `[n, H, W, 3]` in [-1, 1].

        The shorter side is resized to that of the encoder by Pillow's bicubic filter, and the
        middle square is taken, as in CLIP.
        """
        network, _ = self._encoder
        side = network.vit.grid * network.vit.patch
        levels = Preprocessing(side, side, MEAN, STD).resize(np.asarray(images))
        mean, std = (np.asarray(each, np.float32) for each in (MEAN, STD))
        return self._of_pixels((levels / np.float32(255) - mean) / std)

    @functools.cached_property
    def nothing(self) -> np.ndarray:
        """The null embedding `[D]`: that of pixels which are 0 after CLIP's own scaling."""
        network, _ = self._encoder
        side = network.vit.grid * network.vit.patch
        return self._of_pixels(np.zeros((1, side, side, 3), np.float32))[0]

    def __call__(self, prompts: Sequence[Any]) -> np.ndarray:
        """The embeddings of prompts `[n, D]`.

        Args:
            prompts: each a text, `image:FILE`, or several of them with weights: a dict of weights
                by prompt, or `"0.3*a red apple + 0.7*image:FILE"`.

        Raises:
            UserError: one is something else, or a file can't be read.
        """
        parts = [_weights_of(prompt) for prompt in prompts]
        found = np.zeros((len(parts), self.width), np.float32)
        rows = {name: [] for name in dict.fromkeys(name for part in parts for name in part)}
        for row, part in enumerate(parts):
            for name in part:
                rows[name].append(row)
        texts = [(name, row) for name in rows if not name.startswith(_FILE) for row in rows[name]]
        if texts:
            names, numbers = zip(*texts, strict=True)
            for name, row, each in zip(
                names, numbers, self.of_texts(names, np.array(numbers)), strict=True
            ):
                found[row] += parts[row][name] * each
        for name in rows:
            if name.startswith(_FILE):
                each = self.of_images(_picture(name.removeprefix(_FILE))[None])[0]
                for row in rows[name]:
                    found[row] += parts[row][name] * each
        return found

    @functools.cached_property
    def _encoder(self) -> tuple[Any, Any]:
        network, params = CLIP.read(part_of(self.run.workdir, "image_encoder"))
        if network.num_features != self.width:
            raise UserError(
                f"{self.run.workdir}: its image encoder has embeddings of {network.num_features}, "
                f"and its prior makes those of {self.width}"
            )
        return network.clone(unit_length=False), params

    def _of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        network, params = self._encoder
        return np.asarray(_program()(network, params, jnp.asarray(pixels, jnp.float32)))


@functools.cache
def _program() -> Any:
    """The image encoder, compiled once for equal networks and shapes."""

    def encoded(network: Any, params: Any, pixels: jax.Array) -> jax.Array:
        return network.apply({"params": params}, pixels)

    return jit(encoded, static_argnums=0)


def _weights_of(prompt: Any) -> dict[str, float]:
    """The weights of the parts of a prompt, by text or `image:FILE`; 1 of one alone.

    Example:
        >>> _weights_of("0.3*a cat + 0.7*image:dog.png"), _weights_of("1 + 1")
        ({'a cat': 0.3, 'image:dog.png': 0.7}, {'1 + 1': 1.0})
    """
    if isinstance(prompt, Mapping):
        found = {name: prompt[name] for name in prompt}
    elif isinstance(prompt, str):
        matches = [_PART.fullmatch(part.strip()) for part in prompt.split(" + ")]
        if any(match is None for match in matches):
            return {prompt: 1.0}
        found = {match[2]: float(match[1]) for match in matches if match}
    else:
        raise UserError(f"a prompt is a text, and {prompt!r} is not one: put it in quotes")
    for name, weight in found.items():
        if not isinstance(name, str) or not isinstance(weight, int | float):
            raise UserError(f"{prompt!r} is to be texts with weights, as {{'a cat': 0.3}}")
    if not found:
        raise UserError("a prompt without any part: name a text, or image:FILE")
    return {name: float(weight) for name, weight in found.items()}


def _picture(path: str) -> np.ndarray:
    return read_image(path, 3).astype(np.float32) / 127.5 - 1.0


@dataclass(frozen=True)
class PriorPrompts(ImageEmbeddings):
    """Embeddings of images that a prior makes of texts.

    The null condition is `ImagePrior.nothing`.

    Attributes:
        prior: makes them.
        text: the encoder of a text's states, which follow the embedding; None without, as in
            Kandinsky 2.2.
    """

    prior: Any = None
    text: Any = None

    def parse(self, given: Sequence[Any] | np.ndarray) -> TokenStates:
        return self._together(self.prior(given), given)

    def null(self, n: Any) -> TokenStates:
        parts = (jnp.asarray(part) for part in self._null)
        return TokenStates(*(jnp.broadcast_to(part, (n, *part.shape[1:])) for part in parts))

    @functools.cached_property
    def _null(self) -> TokenStates:
        # A first use may be within a program that is being traced.
        with jax.ensure_compile_time_eval():
            return self._together(self.prior.nothing[None], [""])

    def _together(self, embeddings: np.ndarray, texts: Sequence[Any] | np.ndarray) -> TokenStates:
        count = len(embeddings)
        states = np.zeros((count, self.length, self.width), np.float32)
        mask, pooled = np.ones(states.shape[:2], bool), np.zeros((count, self.pooled_width))
        states[:, 0, : self.embedding_width] = embeddings
        if self.text is not None:
            found = self.text([text if isinstance(text, str) else "" for text in texts])
            states[:, 1:, : found.states.shape[-1]], pooled = found.states, found.pooled
        return TokenStates._make((states, mask, pooled.astype(np.float32)))


def prior_prompts(kind: ImageEmbeddings, prior: ImagePrior, decoder: Path) -> PriorPrompts:
    """The condition of a decoder's texts.

    Args:
        kind: what the decoder takes.
        prior: makes embeddings of texts.
        decoder: the folder of the decoder, with a text encoder where it takes a text's states.

    Raises:
        UserError: the prior makes embeddings of another width.
    """
    if prior.width != kind.embedding_width:
        raise UserError(
            f"the prior {prior.run.workdir} makes embeddings of width {prior.width}, and {decoder} "
            f"takes those of {kind.embedding_width}: they are of different models"
        )
    sizes = kind.length, kind.width, kind.pooled_width, kind.name, kind.embedding_width
    return PriorPrompts(*sizes, prior, _text_of(kind, decoder) if kind.length > 1 else None)


def _text_of(kind: ImageEmbeddings, decoder: Path) -> FolderEncoder:
    """The encoder of a decoder's texts, where padding is hidden."""
    if not is_pipeline(decoder):
        raise UserError(
            f"{decoder} takes the states of a text as well: name the folder of its pipeline, which "
            "has the text encoder"
        )
    folders = part_of(decoder, "text_encoder"), part_of(decoder, "tokenizer")
    encoder = read_text_encoder(*folders, length=kind.length - 1)
    found, wanted = encoder.sizes, (kind.width, kind.pooled_width)
    if found.width > kind.width or found.pooled_width != kind.pooled_width:
        raise UserError(
            f"{decoder}: its text encoder has states of width {found.width} and pooled vectors of "
            f"{found.pooled_width}, and its network takes {wanted[0]} and {wanted[1]}"
        )
    return encoder
