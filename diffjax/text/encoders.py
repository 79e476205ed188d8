"""A text encoder with its tokenizer: from texts to the states that a network attends to."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.compiling import jit
from diffjax.conditions import TokenStates
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.models.bert.network import Bert
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import OPENCLIP, encoders_in
from diffjax.models.families import Found, find_published, found_in
from diffjax.models.layers.common import compute_type
from diffjax.models.loras import with_loras
from diffjax.models.qwen3.network import Qwen3
from diffjax.models.t5.network import T5Encoder
from diffjax.pretrained.downloads import sha256_of_file
from diffjax.pretrained.folders import CONFIG, KINDS, read_weights
from diffjax.pretrained.lora import read_lora
from diffjax.text.tokenizers import FILES, Tokenizer, read_tokenizer

_NETWORKS = (ClipText, T5Encoder, Bert, Qwen3)


class Sizes(NamedTuple):
    """The sizes of the states of a text.

    Attributes:
        length: the number of tokens.
        width: the width of a token's state.
        pooled_width: the width of the pooled vector; 0 for none.
    """

    length: int
    width: int
    pooled_width: int


class Encodes(Protocol):
    """What encodes texts: a `FolderEncoder`, or a combination of several.

    They have `sha256` too, a hex digest of all that states depend on.
    """

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns."""
        ...

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        """The states of each text, as NumPy arrays."""
        ...

    def release(self) -> None:
        """Frees the weights; the next text reads them again."""
        ...


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A tokenizer, a network and its weights in memory: `texts -> TokenStates`.

    A program is compiled for each length of texts, and few numbers of them. A text that occurs
    several times in a call is encoded once.

    | model | encoder | `layer` | `normed` | `padding` |
    |---|---|---|---|---|
    | Stable Diffusion 1 | CLIP L | -1 | true | true |
    | Stable Diffusion 2, a folder of diffusers | 23 layers of OpenCLIP H | -1 | true | true |
    | Stable Diffusion 2, one file | OpenCLIP H, 24 layers | -2 | true | true |
    | SDXL, SD 3 | CLIP L and bigG | -2 | false | true |
    | Flux | CLIP L, pooled; T5 XXL, states | -1 | true | true |
    | Flux.2 Klein | Qwen3 | (9, 18, 27) | false | false |

    Attributes:
        tokenizer: for the same vocabulary.
        network: a `ClipText`, `T5Encoder`, `Bert` or `Qwen3`.
        params: its parameters.
        layer: the layer whose states are returned: 0 is the embedded tokens, -1 the last layer, -2
            the one before it ("clip skip" 2). The states of several layers are concatenated along
            the features.
        normed: whether the final norm is applied to the states.
        padding: whether padding counts as tokens, in the encoder and for networks that attend to
            the states, as published models were trained.
        chunks: the number of parts of `tokenizer.length` tokens in which a text is read. The states
            of all parts follow each other; the pooled vector is that of the first.
        around: texts that are put before and after each text, such as the marks of a chat.
    """

    tokenizer: Tokenizer
    network: Any
    params: Any
    layer: int | tuple[int, ...] = -1
    normed: bool = True
    padding: bool = False
    chunks: int = 1
    around: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        depth = self.network.depth
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
            raise UserError(f"layer={self.layer}: this encoder has layers from 0 to {depth}")
        if self.chunks < 1:
            raise UserError(f"chunks={self.chunks}: a text is read in one part at least")
        most = getattr(self.network, "length", None)
        if most is not None and self.tokenizer.length > most:
            raise UserError(
                f"texts of {self.tokenizer.length} tokens are longer than this encoder reads: set "
                f"length to {most} or less"
            )

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns."""
        length = self.tokenizer.length
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        how = functools.partial(_states, self.network, self.layer, self.normed)
        states, pooled = jax.eval_shape(how, self.params, ids, mask)
        return Sizes(self.chunks * length, states.shape[-1], pooled.shape[-1])

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        """The states of texts, as NumPy arrays, one row each.

        Raises:
            UserError: one is no text.

        Example:
            `encoder(["a red apple", ""]).states.shape` is `(2, 77, 768)` for CLIP L.
        """
        distinct = list(dict.fromkeys(texts))
        before, after = self.around
        whole = [f"{before}{text}{after}" for text in distinct] if any(self.around) else distinct
        ids, mask = self.tokenizer(whole, self.chunks)
        count, chunks, length = ids.shape
        states, pooled = self._evaluated(
            ids.reshape(-1, length), None if self.padding else mask.reshape(-1, length)
        )
        if self.padding:
            mask = np.ones_like(mask)
        found = (
            states.reshape(count, chunks * length, states.shape[-1]),
            mask.reshape(count, chunks * length),
            pooled.reshape(count, chunks, pooled.shape[-1])[:, 0],
        )
        places = {text: row for row, text in enumerate(distinct)}
        rows = np.array([places[text] for text in texts], int)
        return TokenStates._make(part[rows] for part in found)

    def _evaluated(self, ids: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """States and pooled vectors; texts are filled up to a power of two, so few are compiled."""
        count = len(ids)
        if not count:
            sizes = self.sizes
            return (
                np.zeros((0, ids.shape[1], sizes.width), np.float32),
                np.zeros((0, sizes.pooled_width), np.float32),
            )
        rows = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)
        filled = None if mask is None else mask[rows]
        program = _program()
        found = program(self.network, self.layer, self.normed, self.params, ids[rows], filled)
        states, pooled = (np.asarray(x)[:count] for x in found)
        return states, pooled


def _states(
    network: Any,
    layer: int | tuple[int, ...],
    normed: bool,
    params: Any,
    ids: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    found = network.apply({"params": params}, ids, mask)
    each = found.normed if normed else found.hidden
    if not isinstance(layer, tuple):
        return each[layer], found.pooled
    return jnp.concatenate([each[number] for number in layer], axis=-1), found.pooled


@functools.cache
def _program() -> Any:
    """`_states`, compiled once for equal networks, layers and shapes."""
    return jit(_states, static_argnums=(0, 1, 2))


@dataclass(frozen=True)
class FolderEncoder:
    """The text encoder in a folder of transformers, which is read when the first text is encoded.

    Equal ones have equal settings, which a run records with its condition.

    Attributes:
        folder: with `config.json` and weights, such as `text_encoder` of a folder of diffusers; or
            a file of a whole model, with `part`.
        tokenizer_folder: with the files of the tokenizer; by default `folder` itself, or the folder
            beside it whose name has `tokenizer` for `text_encoder`.
        length: the number of tokens of a text; by default that of the tokenizer.
        dtype: the compute type, in which the weights are stored too; `bfloat16` halves the memory.
        layer: see `TextEncoder`, also for the others.
        normed: whether states are after the final norm.
        padding: whether padding counts as tokens.
        chunks: the number of parts in which a text is read.
        around: what a text stands between.
        loras: files of LoRA with their weights; what they have for a text encoder of the name of
            the folder, or of `part`, is added.
        part: the name of the text encoder in a file of a whole model: `text_encoder`, or
            `text_encoder_2` of SDXL.
    """

    folder: str
    tokenizer_folder: str = ""
    length: int | None = None
    dtype: str = "float32"
    layer: int | tuple[int, ...] = -1
    normed: bool = True
    padding: bool = False
    chunks: int = 1
    around: tuple[str, str] = ("", "")
    loras: tuple[tuple[str, float], ...] = ()
    part: str = ""

    @functools.cached_property
    def loaded(self) -> TextEncoder:
        """The encoder in memory, until `release`.

        Raises:
            UserError: files are missing, damaged or of another network.
        """
        found, encoder = self._opened
        kind = compute_type(self.dtype)

        def stored(path: str, array: Any) -> jax.Array:
            del path
            return jnp.array(np.asarray(array), kind)  # A copy: the file may change.

        return replace(encoder, params=found.params(stored))

    def release(self) -> None:
        """Frees the weights; the next text reads them again."""
        self.__dict__.pop("loaded", None)

    @property
    def _opened(self) -> tuple[Found, TextEncoder]:
        """The weights, not read yet, and the encoder with their shapes alone."""
        place = place_of(self.folder)
        loras = [read_lora(*lora) for lora in self.loras]
        found = with_loras(_found(place, self.part), loras, self.part or place.name)
        network = found.network
        if not isinstance(network, _NETWORKS):
            raise UserError(f"{self.folder} has a {type(network).__name__}, no text encoder")
        words = read_tokenizer(self.tokenizer_folder or _tokenizer_of(place), self.length)
        if found.family is OPENCLIP:
            words = replace(words, pad=0)  # whatever token CLIP's tokenizer pads with
        count = words.library.get_vocab_size()
        if network.vocabulary < count:
            raise UserError(
                f"the tokenizer has {count} tokens, and the text encoder {self.folder} reads "
                f"{network.vocabulary}: they are of different models"
            )
        found.family.check(found.state, network, found.source)
        how = self.layer, self.normed, self.padding, self.chunks, self.around
        shapes = found.family.shapes(network)
        encoder = TextEncoder(words, network.clone(dtype=self.dtype), shapes, *how)
        return found, encoder

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns, from the shapes of its weights.

        Raises:
            UserError: as `loaded`.
        """
        return self._sizes

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return self._opened[1].sizes

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the files and of the settings that states depend on, wherever they lie.

        The compute type is left out: it rounds.

        Raises:
            UserError: a file can't be read.
        """
        place = place_of(self.folder)
        words = place_of(self.tokenizer_folder) if self.tokenizer_folder else _tokenizer_of(place)
        weights = [file.name for kind in KINDS for file in sorted(place.glob(f"*.{kind}"))]
        files = [(place, name) for name in (CONFIG, *weights)] + [(words, name) for name in FILES]
        loras = [(place_of(file), weight) for file, weight in self.loras]
        how = self.length, self.layer, self.normed, self.padding, self.chunks, self.around
        try:
            hashes = [
                (name, sha256_of_file(folder / name))
                for folder, name in files
                if (folder / name).is_file()
            ]
            added = [(sha256_of_file(file), weight) for file, weight in loras]
        except OSError as error:
            raise UserError(f"can't read {error.filename}: {error.strerror}") from None
        return hashlib.sha256(repr((how, hashes, added)).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        """The states of each text; see `TextEncoder`."""
        return self.loaded(texts)


def read_text_encoder(
    folder: str | Path,
    tokenizer: str | Path = "",
    length: int | None = None,
    dtype: str = "float32",
    **how: Any,
) -> FolderEncoder:
    """Reads a text encoder and its tokenizer from folders of transformers.

    Args:
        folder: with `config.json` and weights.
        tokenizer: the folder of the tokenizer.
        length: the number of tokens of a text; by default that of the tokenizer.
        dtype: the compute type.
        **how: `layer`, `normed`, `padding`, `chunks`, `around`, `loras` and `part`, as
            `FolderEncoder` has them.

    Raises:
        UserError: files are missing, damaged or of another network; a setting is unknown.

    Example:
        `encoder = read_text_encoder("stable-diffusion-v1-5/text_encoder", padding=True)`
    """
    known = [field.name for field in fields(FolderEncoder)]
    for name in how:
        if name not in known:
            raise UserError(f"a text encoder has no setting {name!r}; {nearest(name, known)}")
    encoder = FolderEncoder(str(folder), str(tokenizer or ""), length, dtype, **how)
    _ = encoder.sizes  # Found, or refused.
    return encoder


def _found(place: Path, part: str) -> Found:
    """The weights of a text encoder in a folder, or of a part of a file."""
    if not part:
        return find_published(place)
    contents = read_weights(place)
    there = encoders_in(contents.state)
    if part not in there:
        raise UserError(f"{place} has no {part}: it has {', '.join(there) or 'no text encoder'}")
    return found_in(contents.part(there[part]), ClipText.__name__)


def _tokenizer_of(folder: Path) -> Path:
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return beside if beside != folder and beside.is_dir() else folder
