"""Published networks as runs: read from their files, with the recipe of their authors."""

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.codecs import Codec, Identity, Unstated
from diffjax.codecs.autoencoder_kl import AutoencoderKL
from diffjax.codecs.autoencoders import codec_at
from diffjax.conditions import Condition, ImageEmbeddings, Images, Several
from diffjax.conditions.classes import Unconditional, of_classes
from diffjax.data import DataSet, image_folder, latents
from diffjax.data.imagenet import label_names
from diffjax.defaults import experiment
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.exchange.classifiers import read_classifier
from diffjax.exchange.few_steps import FewSteps, few_steps
from diffjax.exchange.own_folders import is_own
from diffjax.exchange.pipelines import (
    NO_COMPONENTS,
    SCHEDULER,
    Components,
    check_components,
    codec_of,
    components_of,
    is_pipeline,
    part_of,
    prompts_of,
    sets_times,
    shift_depends_on_steps,
    texts_of,
)
from diffjax.exchange.priors import ImagePrior, prior_prompts
from diffjax.exchange.schedulers import Schedule, schedule_of
from diffjax.exchange.single_files import components_in, prompts_in, scheduler_of, texts_in
from diffjax.host.files import place_of
from diffjax.models.autoencoder_kl.published import has_autoencoder
from diffjax.models.families import Found, found_in, networks_in, settings_of
from diffjax.models.layers.common import compute_type
from diffjax.models.loras import with_loras
from diffjax.models.stable_diffusion.network import StableDiffusionUNet
from diffjax.objectives.distillation.distilled import Distilled
from diffjax.pretrained.family import Denoiser, Family, Published
from diffjax.pretrained.folders import CONFIG, Contents, denoiser_of, read_object, read_weights
from diffjax.pretrained.lora import NETWORK, Lora, read_lora
from diffjax.pretrained.placing import placed_like
from diffjax.runs.initial import is_run, weights_sha256
from diffjax.runs.load import Run, load
from diffjax.runs.parts import build_parts
from diffjax.runs.samples.model import Model
from diffjax.sampling.guidance import CLASSIFIER
from diffjax.spec import TARGET, as_spec, check_arguments, choose, spec, to_json
from diffjax.training.sharding import make_mesh
from diffjax.training.state import LIVE, TrainState


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a published file, in the place of a run's checkpoint.

    Attributes:
        file: where they are from.
        params: the parameters.
        step: training steps made here: none.
    """

    file: Path
    params: Any
    step: int = 0

    def weights(self, name: str) -> Any:
        """The parameters by name, which is `live`.

        Raises:
            UserError: another name.
        """
        if name != LIVE:
            raise UserError(f"{self.file} has no weights {name!r}: a published file has live ones")
        return self.params

    def read(self, abstract: TrainState) -> TrainState:
        """Refuses: a published file has no optimizer's state.

        Raises:
            UserError: always.
        """
        del abstract
        raise UserError(
            f"{self.file} has weights alone, no state of a training: begin one with "
            f"--config.init_from={self.file}"
        )


@dataclass(frozen=True, repr=False)
class Pretrained(Run):
    """A published network, as a run that others have trained.

    Attributes:
        file: the file or folder that it was read from.
        family: the name of its family, such as `DiT`.
        published: how it was trained, and how its authors sample it.
        components: what was given in the place of components of a pipeline.
    """

    file: Path = Path()
    family: str = ""
    published: Published | None = None
    components: Components = field(default_factory=dict)

    trained_here: ClassVar[bool] = False

    @property
    def params(self) -> Any:
        """The parameters, `weights()`."""
        return self.weights()

    def dataset(self, path: str | None = None) -> DataSet:
        """What samples are compared with: a folder of latents, or of pictures of any size.

        Args:
            path: the folder. Pictures are cut and resized to those that the model draws, which are
                square.

        Raises:
            UserError: there is no such folder, or it has neither latents of this codec nor
                pictures.
        """
        codec = self.parts.codec
        height, width, channels = codec.image_shape(self.parts.wired.image_shape)
        of_pictures = codec.bounded and not codec.pixels and height == width
        if path is None or not of_pictures or (place_of(path) / "latents.npy").exists():
            return super().dataset(path)
        return image_folder(path, image_size=height, channels=channels)

    def _find(self, name: str) -> Model:
        if name.startswith(CLASSIFIER):
            return self._classifier(name.removeprefix(CLASSIFIER))
        return super()._find(name)

    @cached_property
    def _classifier(self) -> Callable[[str], Model]:
        parts = self.parts
        return cache(lambda file: read_classifier(Path(file), parts.wired, parts.mesh))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its samples depend on beside the arguments of `sample`."""
        wired, codec = self.parts.wired, self.parts.codec
        return {
            "file": str(self.file),
            "sha256": weights_sha256(self.weights()),
            "family": self.family,
            "num_params": wired.num_params,
            "objective": type(wired.objective).__name__,
            "path": type(wired.path).__name__,
            "target": repr(wired.precond.target),
            "noise_label": repr(wired.precond.noise_label),
            "learned_variance": wired.objective.traits.learned_variance,
            "network": json.loads(to_json(ConfigDict(as_spec(_settings(wired.network))))),
            "guidance": repr(wired.recipe.guidance),
            "loras": [lora.facts for lora in self.loras],
            "components": {
                name: dict(value) if name == SCHEDULER else str(value)
                for name, value in self.components.items()
            },
            **codec.facts,
        }

    def describe(self) -> str:
        """The facts, one in a line."""
        return "\n".join(f"{name}: {value}" for name, value in self.facts.items())

    def __repr__(self) -> str:
        wired = self.parts.wired
        return (
            f"Pretrained({str(self.file)!r}: {self.config.name} of "
            f"{wired.num_params:,} parameters, {self.parts.codec.describe(wired.image_shape)}, "
            f"{wired.condition.describe()})"
        )


def from_pretrained(
    path: str | Path,
    *,
    codec: str | Path | Codec | None = None,
    family: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    loras: Mapping[str, float] | None = None,
    components: Components | None = None,
    prior: str | Path | ImagePrior | None = None,
    texts: bool = True,
    mesh: Mesh | None = None,
    **settings: Any,
) -> Pretrained:
    """Reads a published network from its file, as a run that others have trained.

        model = diffjax.from_pretrained("DiT-XL-2-256x256.pt", codec="sd-vae-ft-mse")
        images = model.sample(["golden retriever"] * 4, solver="unipc", num_steps=20)

    Family and size are recognised by the names and shapes of the tensors. Path, target, noise
    label, learned variance, solver, grid, guidance and its scale are those of the publication
    (`Published`); arguments of `sample` change the latter. No code of a file is run.

    Args:
        path: the path of a file of torch or safetensors, or of a folder or a pipeline of diffusers.
            Of a checkpoint with several sets of weights, averages are read.
        codec: what decodes samples: a name in `diffjax.choices.CODECS`, perhaps with settings
            (`taef2:path=FOLDER`); a file of an AutoencoderKL, or a folder of diffusers, here or
            beside the network's file; or a value. With None it is that of the pipeline, or of a
            file of a whole model, or else samples are latents, or images of a network of pixels.
        family: `DiT` or `SiT`, whose tensors are the same; by default the one that the name of the
            file has.
        image_size: height and width of samples in pixels, or both as one number; by default those
            that the network was trained with. For networks that take images of any size.
        loras: files of LoRA with their weights, as `{"style.safetensors": 0.8}`, in the dialect of
            peft, of older diffusers, or of kohya. Their changes are added to the weights of the
            network, and of the text encoders of a pipeline.
        components: what is in the place of components of a pipeline, or of those that a file lacks:
            paths by name, such as `{"network": "sdxl_lightning_4step_unet.safetensors"}` or
            `{"tokenizer": FOLDER}`, and entries of the scheduler's config, as
            `{"scheduler": {"timestep_spacing": "trailing"}}`.
        prior: what makes image embeddings of texts, for a decoder that makes pictures of them, as
            Kandinsky's: the folder of its pipeline, or an `ImagePrior` with a recipe and a seed.
        texts: whether the text encoders of a pipeline are read. If not, the condition is what they
            return, `TokenStates`, and their folders need not be there.
        mesh: from `diffjax.training.sharding.make_mesh`; by default all devices split the batch.
        **settings: settings of the network, as `dtype="bfloat16"` or `attention="chunked"`. A
            network of texts keeps its kernels in `dtype`, and so do the text encoders of its
            pipeline.

    Raises:
        UserError: the file can't be read, or is of no known family or of several; no such codec,
            one for other latents, or without weights; no such setting; a LoRA of another model.

    References:
        Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv:2212.09748
        Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
        Interpolant Transformers", 2024, arXiv:2401.08740
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685
    """
    check_arguments(from_pretrained, path=path, codec=codec, family=family, mesh=mesh)
    added = _loras(loras or {}, Path(path))
    components = components or NO_COMPONENTS
    there = described(
        path, Options(codec, family, image_size, added, components, prior, texts, settings)
    )
    mesh, codec = mesh or make_mesh(), there.codec
    parts = build_parts(
        there.config.lock(), there.denoiser.image_shape, there.condition, mesh, codec
    )
    found = there.found._replace(network=parts.denoiser)  # whose blocks are stacked
    stored = _stored(parts.abstract.weights(LIVE), parts.denoiser)
    return Pretrained(
        parts,
        Weights(there.path, found.params(placed_like(stored))),
        there.path,
        _others(mesh, codec),
        added,
        there.path,
        found.family.name,
        there.published,
        components,
    )


class Options(NamedTuple):
    """What `from_pretrained` is given beside a path, and explains.

    Attributes:
        codec: what decodes samples.
        family: the network's class, where the name of the file does not tell.
        image_size: height and width of samples, or both as one number.
        loras: files of LoRA, read.
        components: in the place of components of a pipeline.
        prior: what makes image embeddings of texts.
        texts: whether text encoders are read.
        settings: settings of the network.
    """

    codec: str | Path | Codec | None = None
    family: str | None = None
    image_size: int | tuple[int, int] | None = None
    loras: Sequence[Lora] = ()
    components: Components = NO_COMPONENTS
    prior: str | Path | ImagePrior | None = None
    texts: bool = True
    settings: Mapping[str, Any] = MappingProxyType({})


class Described(NamedTuple):
    """A published network before its weights are read.

    Attributes:
        path: the file or folder.
        found: its tensors, with the changes of files of LoRA.
        denoiser: the network and the shape of its images.
        published: how it was trained, and how its authors sample it.
        codec: what decodes its samples.
        condition: the kind of its condition.
        config: that it would have been trained with here; not locked.
    """

    path: Path
    found: Found
    denoiser: Denoiser
    published: Published
    codec: Codec
    condition: Condition
    config: ConfigDict


def described(path: str | Path, options: Options = Options(), arguments: str = "") -> Described:
    """What a published network is, without reading its weights.

    Args:
        path: the path of its file or folder.
        options: what is in the place of its own.
        arguments: choices on the axes of a config, as `target=v`, in the place of those that the
            network was trained with.

    Raises:
        UserError: as `from_pretrained`; there is no such choice.
    """
    path, components, loras = Path(path), options.components, options.loras
    if components:
        known = components_of(path) if is_pipeline(path) else components_in(path)
        check_components(components, known, path)
    found = _network(path, options)
    denoiser, layout = found.network, found.family
    found = with_loras(found, loras, NETWORK)
    if layout.published is None:
        kind = type(getattr(denoiser, "network", denoiser)).__name__
        place = components.get(NETWORK, path)
        use = {"ADMClassifier": f"; guide by it, against='classifier:{place}'"}
        use |= dict.fromkeys(("AutoencoderKL", "AutoencoderKLFlux2"), f"; it is a codec={place}")
        raise UserError(
            f"{place} has a network of {layout.name}, which draws no samples{use.get(kind, '')}"
        )
    published, name = layout.published(denoiser), _name(layout, denoiser)
    decoder = _codec(options.codec, path, published, denoiser)
    if options.image_size is not None:
        denoiser = _of_size(denoiser, decoder, options.image_size)
    _ = decoder.image_shape(denoiser.image_shape), decoder.params  # Refused, if they do not fit.
    condition = _condition(layout, denoiser, decoder, path, options)
    if options.prior is not None:
        condition = _by_prior(condition, options.prior, path)
    names = (path, components.get(NETWORK, ""), *(lora.file for lora in loras))
    few = few_steps(Path(each).name for each in names)
    schedule = _schedule(path, denoiser, few, components)
    config = _config(denoiser, published, name, schedule, arguments)
    if few and not arguments:
        config.sampling.num_steps, config.sampling.guidance_scale = few.num_steps, 1.0
    if published.codec and not isinstance(decoder, Unstated):
        config.data.codec = as_spec(decoder)
    return Described(path, found, denoiser, published, decoder, condition, config)


def _stored(weights: Any, denoiser: Denoiser) -> Any:
    """Shapes of weights as they are kept: kernels of networks of texts in their compute type.

    There they are rounded to it at each use, so results are the same, in half the memory.
    """
    if not _is_of_texts(denoiser):
        return weights
    dtype = compute_type(denoiser.network.dtype)

    def kept(path: Any, leaf: Any) -> Any:
        return leaf.update(dtype=dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(kept, weights)


def _loras(given: Mapping[str, float], path: Path) -> tuple[Lora, ...]:
    """Reads the files of LoRA.

    Raises:
        UserError: one is of a part that the pipeline lacks.
    """
    if not isinstance(given, Mapping):
        raise UserError(f'loras={given!r} is to be files and weights, as {{"FILE": 0.8}}')
    loras = tuple(read_lora(file, weight) for file, weight in given.items())
    known = [NETWORK, *texts_of(path), *texts_in(path)] if given else []
    for lora in loras:
        if lacking := [part for part in lora.parts if part not in known]:
            raise UserError(f"the LoRA {lora.file} is of {lacking[0]} too, which {path} lacks")
    return loras


def _others(mesh: Mesh, codec: Codec) -> Callable[[str, str | None], Run]:
    """Runs and published networks that guidance leads away from, the last few of them again."""

    def read(place: str, weights: str | None) -> Run:
        if is_run(Path(place)):
            return load(place, mesh, weights=weights)
        return from_pretrained(place, mesh=mesh, codec=codec)

    return lru_cache(4)(read)


def _network(path: Path, options: Options) -> Found:
    """The network of a file, a folder or a pipeline, or the one in the place of the pipeline's.

    A file alone shows no number of heads, which are then those that the pipeline has.
    """
    if NETWORK not in options.components:
        return recognised(path, options.family, options.settings)
    contents = read_weights(options.components[NETWORK])
    if not contents.config:
        contents = contents._replace(config=read_object(denoiser_of(path) / CONFIG))
    return found_in(contents, options.family or "", **options.settings)


def recognised(
    path: Path, family: str | None, settings: Mapping[str, Any], part: str = ""
) -> Found:
    """The network that a file or a folder has; DiT and SiT differ by its name alone.

    Args:
        path: the path of the file or folder.
        family: the name of the network's class, where the name of the file does not tell.
        settings: further ones of the network, such as the number of heads of no published size.
        part: the part of a torch file that has several, such as `ema`.

    Raises:
        UserError: it has none that is known, or the name does not tell.
    """
    if is_run(place_of(str(path))):
        raise UserError(
            f"{path} is the folder of a run, not a published network: diffjax.load and --workdir "
            "read it"
        )
    if is_own(place_of(str(path))):
        raise UserError(
            f"{path} is a folder that convert wrote by --to=diffjax: convert it from there to "
            f"another layout, or begin a run with --config.init_from={path}"
        )
    contents = read_weights(path, part)
    if family is not None:
        return found_in(contents, family, **settings)
    fitting = networks_in(contents)
    if len(fitting) < 2:
        return found_in(contents, **settings)
    fitting = [name for name in fitting if _fits(contents, name, settings)] or fitting
    named = [name for name in fitting if name.lower() in path.name.lower()]
    if len(fitting) > 1 and len(named) != 1:
        choices = " or ".join(f"family={name!r}" for name in fitting)
        raise UserError(
            f"{path} has the tensors of {' and '.join(fitting)}, which are the same: pass {choices}"
        )
    return found_in(contents, *(named if len(fitting) > 1 else fitting), **settings)


def _fits(contents: Contents, network: str, settings: Mapping[str, Any]) -> bool:
    """Whether tensors are those of a network, to the last one."""
    try:
        found = found_in(contents, network, **settings)
        found.family.check(found.state, found.network, found.source)
    except UserError:
        return False
    return True


def _name(family: Family, denoiser: Denoiser) -> str:
    """The published size of the same settings, as `DiT-XL/2`, or the family."""
    own = _settings(denoiser.network)
    for name, size in family.sizes.items():
        if all(own.get(key) == value for key, value in size.settings.items()):
            return name
    return family.name


def _settings(network: Any) -> dict[str, Any]:
    """The settings of a Flax module."""
    return {name: getattr(network, name) for name in settings_of(network)}


def _config(
    denoiser: Denoiser, published: Published, name: str, schedule: Schedule | None, arguments: str
) -> ConfigDict:
    """The config that such a network would have been trained with here, or that has other axes."""
    network = denoiser.network
    own = _settings(network)
    if "scan" in own:
        own["scan"] = True  # compiled in the time of one block
    num_classes = own.pop("num_classes")
    chosen = {pair.partition("=")[0] for pair in arguments.split(",")}
    kept = [
        pair
        for pair in published.objective.split(",")
        if pair.partition("=")[0] not in chosen and "objective" not in chosen
    ]
    config = experiment(
        name,
        ",".join(filter(None, [*kept, arguments])),
        data=_data(denoiser, published, num_classes),
        extractor=spec(pixel_features, size=8),
        models={name: spec(type(network), **{key: as_spec(x) for key, x in own.items()})},
        model=name,
        objective="flow",
    )
    config.name = name
    config.ema_decays = ()
    config.weights = LIVE
    config.condition_dropout = published.condition_dropout
    config.sampling.num_steps = published.num_steps
    config.sampling.guidance_scale = published.guidance_scale
    if not chosen & {"objective", "path", "loss"}:
        config.sampling.solver = choices.copy(choose(choices.SOLVERS, published.solver, "solver"))
        config.sampling.grid = choices.copy(choose(choices.GRIDS, published.grid, "grid"))
        config.sampling.guidance = lookup.guidance_called(published.guidance)
        if schedule:
            _scheduled(config, schedule, chosen)
    return config


def _data(denoiser: Denoiser, published: Published, num_classes: int) -> ConfigDict:
    """The spec of data that such a network would be evaluated on, without their path."""
    if published.codec:
        return spec(latents, path="", num_classes=num_classes)
    height, _, channels = denoiser.image_shape
    return spec(image_folder, path="", image_size=height, channels=channels)


def _condition(
    family: Family,
    denoiser: Denoiser,
    codec: Codec,
    path: Path,
    options: Options,
) -> Condition:
    """The kind of a network's condition: classes, or texts if it lies in a pipeline with them."""
    if not _is_of_texts(denoiser):
        return _of_classes(family, denoiser)
    condition = denoiser.condition
    several = condition if isinstance(condition, Several) else None
    parts: dict[str, Any] = dict(several.parts) if several else {"text": condition}
    by_prior = isinstance(parts["text"], ImageEmbeddings)
    if options.texts and not by_prior:
        read = prompts_of if is_pipeline(path) else prompts_in
        how = (options.loras, options.components, denoiser.network.dtype)
        parts["text"] = read(path, parts["text"], *how) or parts["text"]
    if "size" in parts:
        height, width, _ = codec.image_shape(denoiser.image_shape)
        sides = {"height": height, "width": width}
        kind = parts["size"]
        named = zip(kind.names, kind.usual, strict=True)
        usual = tuple(float(sides.get(name.rpartition("_")[2]) or x) for name, x in named)
        parts["size"] = replace(kind, usual=usual)
    return replace(several, parts=parts) if several else parts["text"]


def _by_prior(condition: Condition, prior: str | Path | ImagePrior, path: Path) -> Condition:
    """The condition with a prior, which makes image embeddings of texts.

    Raises:
        UserError: the network takes no image embeddings, or the prior makes others.
    """
    several = condition if isinstance(condition, Several) else None
    kind = several.parts["text"] if several and "text" in several.parts else condition
    if not isinstance(kind, ImageEmbeddings):
        raise UserError(f"{path} takes no image embeddings: leave prior= out")
    if not isinstance(prior, ImagePrior):
        prior = ImagePrior(from_pretrained(prior))
    found = prior_prompts(kind, prior, path)
    return replace(several, parts={**several.parts, "text": found}) if several else found


def _of_classes(family: Family, denoiser: Denoiser) -> Condition:
    """Classes, and for an upsampler the small image as well, which is always there."""
    names, num_classes = label_names(), denoiser.network.num_classes
    classes = of_classes(num_classes, names if num_classes == len(names) else ())
    _, _, inputs = family.inputs(denoiser)
    if not isinstance(inputs, dict):
        return classes
    small = Images(inputs["small"].shape[1:], "small")
    return Several({"label": classes, "small": small}, kept=("small",))


def _of_size(denoiser: Denoiser, codec: Codec, image_size: int | tuple[int, int]) -> Denoiser:
    """The network for images of another size, where its tensors do not depend on the size."""
    if not _is_of_texts(denoiser):
        raise UserError("image_size= is for networks of texts: this one has one size")
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image_size={image_size!r} is to be height and width in pixels")
    height, width, channels = *sides, codec.image_shape(denoiser.image_shape)[2]
    shape = codec.latent_shape((height, width, channels))
    condition = denoiser.condition
    if isinstance(condition, Several):
        parts = {
            name: replace(part, shape=(*shape[:2], part.shape[2]))
            if isinstance(part, Images)
            else part
            for name, part in condition.parts.items()
        }
        condition = replace(condition, parts=parts)
    return replace(denoiser, image_shape=shape, condition=condition)


def _schedule(
    path: Path, denoiser: Denoiser, few: FewSteps | None, components: Components
) -> Schedule | None:
    """What the scheduler of a pipeline or of a whole model means; None of another network."""
    if not _is_of_texts(denoiser):
        return None
    given = {**(few.scheduler if few else {}), **components.get(SCHEDULER, {})}
    if not is_pipeline(path):
        if not (texts_in(path) or SCHEDULER in components):
            return None
        usual = scheduler_of(denoiser) if isinstance(denoiser.network, StableDiffusionUNet) else {}
        return schedule_of({**usual, **given}, str(path))
    file = part_of(path, SCHEDULER) / "scheduler_config.json"
    height, width, _ = denoiser.image_shape
    side = getattr(denoiser.network, "patch_size", 2)
    num_tokens = (height // side) * (width // side)
    entries, timing = (
        {**read_object(file), **given},
        (sets_times(path), shift_depends_on_steps(path)),
    )
    return schedule_of(entries, str(file), num_tokens, *timing)


def _is_of_texts(denoiser: Denoiser) -> bool:
    return denoiser.condition != Unconditional()


def _scheduled(config: ConfigDict, schedule: Schedule, chosen: Set[str]) -> None:
    """Sets what a scheduler decides, but for axes that are chosen."""
    config.path = schedule.path
    for name, part in (("target", schedule.target), ("noise_label", schedule.noise_label)):
        if name not in chosen:
            config.precond[name] = part
    if "times" not in chosen:
        _shifted(config.objective.times, schedule)
    config.sampling.solver, config.sampling.grid = schedule.solver, schedule.grid
    config.sampling.unit_start = schedule.unit_start
    config.sampling.guidance = schedule.guidance
    if schedule.distilled:
        loss = {name: x for name, x in config.objective.items() if name != TARGET}
        config.objective = spec(Distilled, **loss)
        config.sampling.num_steps, config.sampling.guidance_scale = 4, 1.0


def _shifted(times: ConfigDict, schedule: Schedule) -> None:
    """Gives the training times the number of steps of a scheduler, or its shift.

    A shift `t' = s t/(1 + (s - 1) t)` adds log s to the logit of t.
    """
    if "gap" in times:
        times.gap = 1.0 / schedule.noise_label.scale
    if "mean" in times and "shift" in schedule.grid:
        times.mean = times.mean + math.log(schedule.grid.shift)


def _codec(
    given: str | Path | Codec | None, path: Path, published: Published, denoiser: Denoiser
) -> Codec:
    """The codec of a name, a path or a value.

    Raises:
        UserError: nothing has that name or path.
    """
    if given is None:
        if not published.codec:
            return Identity()
        if _is_of_texts(denoiser) and is_pipeline(path):
            return codec_of(path)
        if (path / "vae").is_dir():
            return codec_at(path / "vae")
        # A file of a whole model has its autoencoder too.
        whole = path.is_file() and has_autoencoder(read_weights(path).state)
        return codec_at(path, choices.CODECS[published.codec].size) if whole else Unstated()
    if isinstance(given, Codec):
        return given
    if str(given) in ("", "."):
        raise UserError(
            f"codec={given!r} is empty: leave it out, or name a codec, a file or folder"
        )
    size = choices.CODECS[published.codec].get("size", "sd-vae") if published.codec else "sd-vae"
    for place in (Path(given), path.parent / given):
        if place.exists():
            return codec_at(place, size)
    called = str(given)
    if called.partition(":")[0] not in choices.CODECS:
        raise UserError(
            f"codec={called!r} is neither a file or folder nor the name of a codec; "
            f"{nearest(called, choices.CODECS)}"
        )
    codec = lookup.codec_called(called)
    if isinstance(codec, AutoencoderKL) and not codec.file_sha256:
        raise UserError(
            f"codec={called!r} is not downloaded, because its hash is not known here: pass the "
            f"path of its file{f', from {codec.path}' if codec.path else ''}"
        )
    return codec
