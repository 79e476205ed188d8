"""The layouts of published weights by the network that they are of, and which one a file has."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.errors import UserError, nearest
from diffjax.kinds import complaint
from diffjax.models.adm.network import ADM, ADMClassifier, ADMUpsampler
from diffjax.models.adm.published import CLASSIFIER, UPSAMPLER
from diffjax.models.adm.published import FAMILY as ADM_FAMILY
from diffjax.models.autoencoder_kl.network import AutoencoderKL, AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.published import FAMILY as AUTOENCODER_KL
from diffjax.models.autoencoder_kl.published import FLUX2, FLUX2_AUTHORS, LDM, OLD_DIFFUSERS
from diffjax.models.autoencoder_kl.published import PREFIXES as AUTOENCODER_PREFIXES
from diffjax.models.bert.network import Bert, MultilingualCLIP
from diffjax.models.bert.published import FAMILY as BERT
from diffjax.models.bert.published import MCLIP
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import BARE as BARE_CLIP_TEXT
from diffjax.models.clip_text.published import FAMILY as CLIP_TEXT
from diffjax.models.clip_text.published import OPENCLIP
from diffjax.models.dc_ae.network import DCAE
from diffjax.models.dc_ae.published import FAMILY as DC_AE
from diffjax.models.ddpm.network import DDPMUNet
from diffjax.models.ddpm.published import FAMILY as DDPM
from diffjax.models.ddpm.published import OLD as OLD_DDPM
from diffjax.models.ddt.network import DDT
from diffjax.models.ddt.published import FAMILY as DDT_FAMILY
from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import DIFFUSERS as DIT_OF_DIFFUSERS
from diffjax.models.dit.published import FAMILY as DIT_FAMILY
from diffjax.models.edm.network import DhariwalUNet, SongUNet
from diffjax.models.edm.published import DHARIWAL
from diffjax.models.edm.published import FAMILY as SONG
from diffjax.models.edm2.network import EDM2
from diffjax.models.edm2.published import FAMILY as EDM2_FAMILY
from diffjax.models.flux.network import Flux
from diffjax.models.flux.published import DIFFUSERS as FLUX_OF_DIFFUSERS
from diffjax.models.flux.published import FAMILY as FLUX_FAMILY
from diffjax.models.flux2.network import Flux2
from diffjax.models.flux2.published import DIFFUSERS as FLUX2_OF_DIFFUSERS
from diffjax.models.flux2.published import FAMILY as FLUX2_FAMILY
from diffjax.models.jit.network import JiT
from diffjax.models.jit.published import FAMILY as JIT_FAMILY
from diffjax.models.kandinsky.network import KandinskyUNet
from diffjax.models.kandinsky.published import FAMILY as KANDINSKY_DECODER
from diffjax.models.lightningdit.network import LightningDiT
from diffjax.models.lightningdit.published import FAMILY as LIGHTNINGDIT_FAMILY
from diffjax.models.movq.network import MOVQ
from diffjax.models.movq.published import FAMILY as MOVQ_FAMILY
from diffjax.models.movq.published import KANDINSKY
from diffjax.models.qwen3.network import Qwen3
from diffjax.models.qwen3.published import FAMILY as QWEN3
from diffjax.models.rae.network import RAE
from diffjax.models.rae.published import FAMILY as RAE_FAMILY
from diffjax.models.rae.published import OLD as OLD_RAE
from diffjax.models.sd3.network import MMDiT
from diffjax.models.sd3.published import DIFFUSERS as SD3_OF_DIFFUSERS
from diffjax.models.sd3.published import FAMILY as SD3_FAMILY
from diffjax.models.sit.network import SiT
from diffjax.models.sit.published import FAMILY as SIT_FAMILY
from diffjax.models.stable_diffusion.network import StableDiffusionUNet
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.models.stable_diffusion.published import LDM as STABLE_DIFFUSION_OF_LDM
from diffjax.models.stable_diffusion.published import PREFIXES as DENOISER_PREFIXES
from diffjax.models.t5.network import T5Encoder
from diffjax.models.t5.published import FAMILY as T5
from diffjax.models.taesd.network import TAESD
from diffjax.models.taesd.published import DIFFUSERS as TAESD_OF_DIFFUSERS
from diffjax.models.taesd.published import FAMILY as TAESD_FAMILY
from diffjax.models.unclip.network import UnclipPrior
from diffjax.models.unclip.published import FAMILY as UNCLIP_PRIOR
from diffjax.models.uvit.network import UViT
from diffjax.models.uvit.published import FAMILY as UVIT_FAMILY
from diffjax.pretrained.family import Family
from diffjax.pretrained.folders import Contents, read_weights
from diffjax.pretrained.tables import Place, in_memory

AUTHORS, DIFFUSERS = "authors", "diffusers"

LAYOUTS: Mapping[type[Any], Mapping[str, Family]] = {
    DiT: {AUTHORS: DIT_FAMILY, DIFFUSERS: DIT_OF_DIFFUSERS},
    SiT: {AUTHORS: SIT_FAMILY},
    LightningDiT: {AUTHORS: LIGHTNINGDIT_FAMILY},
    JiT: {AUTHORS: JIT_FAMILY},
    DDT: {AUTHORS: DDT_FAMILY},
    UViT: {AUTHORS: UVIT_FAMILY},
    ADM: {AUTHORS: ADM_FAMILY},
    ADMUpsampler: {AUTHORS: UPSAMPLER},
    ADMClassifier: {AUTHORS: CLASSIFIER},
    SongUNet: {AUTHORS: SONG},
    DhariwalUNet: {AUTHORS: DHARIWAL},
    KandinskyUNet: {DIFFUSERS: KANDINSKY_DECODER},
    DDPMUNet: {DIFFUSERS: DDPM, "old diffusers": OLD_DDPM},
    EDM2: {AUTHORS: EDM2_FAMILY},
    MMDiT: {AUTHORS: SD3_FAMILY, DIFFUSERS: SD3_OF_DIFFUSERS},
    Flux: {AUTHORS: FLUX_FAMILY, DIFFUSERS: FLUX_OF_DIFFUSERS},
    Flux2: {AUTHORS: FLUX2_FAMILY, DIFFUSERS: FLUX2_OF_DIFFUSERS},
    StableDiffusionUNet: {AUTHORS: STABLE_DIFFUSION_OF_LDM, DIFFUSERS: STABLE_DIFFUSION},
    UnclipPrior: {DIFFUSERS: UNCLIP_PRIOR},
    TAESD: {AUTHORS: TAESD_FAMILY, DIFFUSERS: TAESD_OF_DIFFUSERS},
    # Before the one whose names their files have too.
    AutoencoderKLFlux2: {AUTHORS: FLUX2_AUTHORS, DIFFUSERS: FLUX2},
    MOVQ: {AUTHORS: KANDINSKY, DIFFUSERS: MOVQ_FAMILY},
    DCAE: {DIFFUSERS: DC_AE},
    RAE: {DIFFUSERS: RAE_FAMILY, "transformers 4": OLD_RAE},
    AutoencoderKL: {AUTHORS: LDM, DIFFUSERS: AUTOENCODER_KL, "old diffusers": OLD_DIFFUSERS},
    ClipText: {AUTHORS: OPENCLIP, DIFFUSERS: CLIP_TEXT, "transformers 5": BARE_CLIP_TEXT},
    T5Encoder: {DIFFUSERS: T5},
    MultilingualCLIP: {DIFFUSERS: MCLIP},
    Bert: {DIFFUSERS: BERT},
    Qwen3: {DIFFUSERS: QWEN3},
}
"""By the class of the network. A file of SiT is taken for one of DiT, whose names it has."""


def layout_of(state: Mapping[str, Any], layouts: Mapping[str, Family]) -> str | None:
    """The first layout whose names and axes published tensors have; None if no layout has them.

    Example:
        >>> import numpy as np
        >>> layout_of({"pos_embed": np.zeros((1, 4, 8))}, LAYOUTS[DiT]) is None
        True
    """
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    for name, family in layouts.items():
        try:
            family.recognise(shapes)
        except (ArithmeticError, LookupError, ValueError):
            continue
        return name
    return None


def _states(whole: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The tensors of a file, and those of the parts of a whole model; the denoiser comes first."""
    yield whole
    for prefix in (*DENOISER_PREFIXES, *AUTOENCODER_PREFIXES):
        if part := {x.removeprefix(prefix): whole[x] for x in whole if x.startswith(prefix)}:
            yield part


class Found(NamedTuple):
    """Published weights whose network and layout were recognised.

    Attributes:
        network: the network, or a `Denoiser`.
        layout: the name of the layout, one of those of the network in `LAYOUTS`.
        family: the layout.
        state: the tensors by name, which are read when they are used.
        source: the file or folder, for errors.
    """

    network: Any
    layout: str
    family: Family
    state: Mapping[str, Any]
    source: str

    def params(self, place: Place = in_memory) -> Any:
        """The parameters; see `diffjax.pretrained.tables.to_ours`.

        Raises:
            UserError: tensors are missing, unknown, or of another shape or type.
        """
        return self.family.to_ours(self.state, self.network, self.source, place)


def networks_of(state: Mapping[str, Any]) -> list[str]:
    """The names of the networks that have a layout with names and axes of published tensors."""
    return [kind.__name__ for kind, layouts in LAYOUTS.items() if layout_of(state, layouts)]


def networks_in(contents: Contents) -> list[str]:
    """The names of the networks that have a layout with the names of what a file or folder has."""
    return next(filter(None, map(networks_of, _states(contents.state))), [])


def find_published(path: str | Path, part: str = "", network: str = "", **settings: Any) -> Found:
    """Recognises the network and the layout of a published file or folder.

    Args:
        path: the path of a file of torch or safetensors, a folder of diffusers, or a pipeline of
            it.
        part: the part of a torch file that has several, such as `ema`; see `read_state_dict`.
        network: the name of the network's class, where several have the names: `SiT`.
        **settings: further ones of the network, such as the number of heads of no published size.

    Raises:
        UserError: nothing can be read there, or it is of none of these networks.
    """
    return found_in(read_weights(path, part), network, **settings)


def found_in(contents: Contents, network: str = "", **settings: Any) -> Found:
    """Recognises the network and the layout of tensors, such as a part of a file of several.

    Args:
        contents: the tensors, with the entries of `config.json` if there is one.
        network: the name of the network's class, where several have the names: `SiT`.
        **settings: further ones of the network, such as the number of heads of no published size.

    Raises:
        UserError: they are of none of these networks.
    """
    known = {kind.__name__: (kind, layouts) for kind, layouts in LAYOUTS.items()}
    if network and network not in known:
        raise UserError(f"no published network is called {network!r}; {nearest(network, known)}")
    whole, config, place = contents
    for state in _states(whole):
        for kind, layouts in [known[network]] if network else known.values():
            if name := layout_of(state, layouts):
                family = layouts[name]
                _check_settings(settings, family, kind, str(place))
                found = family.network_of(state, str(place), config, **settings)
                return Found(found, name, family, state, str(place))
    names = ", ".join(list(whole)[:3]) or "none at all"
    raise UserError(
        f"{place} has the tensors of no network that is known ({', '.join(known)}); its names: "
        f"{names}{', …' if len(whole) > 3 else ''}"
    )


def settings_of(network: Any) -> list[str]:
    """The names of the settings of a Flax module, or of the class of one."""
    return [field.name for field in fields(network) if field.name not in ("parent", "name")]


def _check_settings(given: Mapping[str, Any], family: Family, kind: type[Any], source: str) -> None:
    """Refuses settings that neither the network nor what builds it has, or of another type."""
    builds = inspect.signature(family.network).parameters.values()
    own = {field.name: field.type for field in fields(kind)}
    named = {x.name: x.annotation for x in builds if x.kind is not inspect.Parameter.VAR_KEYWORD}
    known = {**{name: own[name] for name in settings_of(kind)}, **named}
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"{source} has a network of {family.name}, which has no setting {name!r}; "
                f"{nearest(name, known)}"
            )
        if wrong := complaint(name, value, known[name]):
            raise UserError(f"{source}: {wrong}")
    if min(given.get("image_shape", (1,))) < 1 or given.get("num_classes", 0) < 0:
        raise UserError(f"{source}: sizes of images are above 0, and num_classes is at least 0")
