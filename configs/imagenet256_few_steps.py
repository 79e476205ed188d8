r"""ImageNet at 256x256 in one to four evaluations: few-step objectives as published, on latents.

    python -m experiments.plan --config=configs/imagenet256_few_steps.py --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet256_few_steps.py:objective=soflow \
        --config.data.path=FOLDER

FOLDER is that of configs/imagenet256.py, latents of 32x32x4. Not yet run: no such machine was
available. Published, FID-50K at 1, 2 and 4 evaluations, with the file that the settings are from:

    mean_flow    3.43, 2.93        DiT-XL/2; the authors' code (run_b4.yml, default.py of
                                   Gsunshine/meanflow) is for B/4, with omega=1, kappa=0.5 and
                                   guided_below=1 (FID 11.4); those of XL/2 are of AlphaFlow's
    imf          3.39              B/2; train_config.yml, imfDiT.py of Lyy-iiis/imeanflow
    alpha_flow   2.58, 2.15        XL/2+; experiments-alphaflow.yaml of snap-research/alphaflow has
                                   this row for XL/2
    soflow       2.96, 2.66        XL/2; imagenet.yaml and readme.md of zlab-princeton/SoFlow
    shortcut     10.6, -, 7.8      XL/2, 128: 3.8; README.md, train.py of kvfrans/shortcut-models
    tvm          3.29              XL/2 with 18 heads; im256_w2.yaml of lumalabs/tvm

`imm`'s training settings are not public as code, and `drifting` was published with features of a
masked autoencoder and memories of earlier batches, which are not here: they have no row. `pmf` is
in configs/imagenet256_pixel_mean_flow.py. Guidance is in the objective, so none is added when
samples are drawn; of `imf` its scale is an input of the network.

What differs from them, beside what docs/objectives.md says of each loss: the network is DiT, where
`imf` has a transformer with tokens for the condition, a second head, and the interval of guidance
as an input beside its scale (here from t = 0.4 to 0.65, at which it is sampled), and `tvm`
normalises its modulation; `alpha_flow` takes MeanFlow itself under 0.005, clips targets to ±4, and
does not state the decay of its average; `shortcut` guides the targets of its shortest steps by 1.5;
`tvm` does not state its length, which here is MeanFlow's number of images; bfloat16 where theirs
may be float32. `alpha_flow` and `soflow` need float32 for small α: `--config.model.dtype=float32`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffjax.data import latents
from diffjax.defaults import experiment
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.lookup import chosen_on_axes
from diffjax.models import DiT, dit
from diffjax.objectives.wrappers import EmbeddedGuidance
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Constant, RiseFromZero
from diffjax.sampling.guidance import Embedded
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

POD = {"dtype": "bfloat16", "scan": True, "remat": "products"}
MODELS = {name: spec(DiT, **{**size.settings, **POD}) for name, size in dit.SIZES.items()}
MODELS["DiT-XL/2-18"] = spec(DiT, **{**dit.SIZES["DiT-XL/2"].settings, **POD, "num_heads": 18})


class Published(NamedTuple):
    """A training as its authors ran it, where they say so."""

    loss: Mapping[str, Any] = MappingProxyType({})
    model: str = "DiT-XL/2"
    batch_size: int = 256
    num_steps: int = 1_201_000  # 240 epochs
    rule: ConfigDict = spec(AdamW, b2=0.95)
    schedule: ConfigDict = spec(Constant)
    settings: Mapping[str, Any] = MappingProxyType({})  # others of the config
    evaluated: tuple[int, ...] = (1, 2)


GUIDED = {"omega": 0.2, "kappa": 0.92, "guided_below": 0.75}
PUBLISHED = {
    "mean_flow": Published(GUIDED),
    "imf": Published(
        # sample_cfg_scale of imf.py: p(w) ∝ 1/w from 1 to 8; eval_config.yml samples with 8.
        {"guided_above": 0.4, "guided_below": 0.65},
        model="DiT-B/2",
        batch_size=1024,
        num_steps=640 * 1_251,
        schedule=spec(RiseFromZero, steps=10 * 1_251),
        settings={
            "wrappers": (spec(EmbeddedGuidance, power=1.0),),
            "sampling": {"guidance_scale": 8.0, "against": spec(Embedded)},
        },
        evaluated=(1,),
    ),
    "alpha_flow": Published(
        # α is ½ after 800,000 steps, and falls within 400,000.
        {**GUIDED, "between": 0.5, "middle": 2.0 / 3.0, "steepness": 75.0},
        num_steps=1_200_000,
    ),
    "soflow": Published(
        {"omega": 0.75, "kappa": 0.75, "guided_below": 0.8},
        num_steps=1_200_000,
        rule=spec(AdamW, b2=0.99),
    ),
    "shortcut": Published(
        {"between": 0.125},
        num_steps=810_000,
        rule=spec(AdamW, weight_decay=0.1),
        settings={"ema_decays": (0.999,), "teacher": "ema-0.999", "weights": "live"},
        evaluated=(1, 4, 128),
    ),
    "tvm": Published(
        {"guidance_scale": 2.0},
        model="DiT-XL/2-18",
        batch_size=2048,
        num_steps=150_000,
        settings={"ema_decays": (0.99, 0.9999), "teacher": "ema-0.99"},
        evaluated=(1, 2, 4),
    ),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, times, model, optimizer, schedule.

    Objectives: mean_flow, imf, alpha_flow, soflow, shortcut, tvm. Models: DiT-S/2 … DiT-XL/8,
    DiT-XL/2-18.

    Raises:
        UserError: another objective.
    """
    chosen = chosen_on_axes(arguments)
    objective = chosen.get("objective", "mean_flow")
    if objective not in PUBLISHED:
        raise UserError(
            f"configs/imagenet256_few_steps.py has no published settings of {objective!r}; "
            f"{nearest(objective, PUBLISHED)} configs/imagenet256.py takes any objective"
        )
    published = PUBLISHED[objective]
    config = experiment(
        "imagenet256_few_steps",
        arguments,
        data=spec(latents, scale=0.18215, name="ImageNet latents"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model=published.model,
        objective="mean_flow",
        optimizer=spec(
            descent,
            learning_rate=1e-4,
            rule=published.rule,
            schedule=published.schedule,
            warmup_steps=0,
            clip_norm=float("inf"),
        ),
    )
    if "loss" not in chosen:
        config.objective.update(published.loss)
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 4), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = published.num_steps
    config.batch_size = published.batch_size
    config.ema_decays = (0.9999,)
    config.weights = "ema-0.9999"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 1
    config.sampling.guidance_scale = 1.0
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("flow_map",)
    config.evaluation.num_steps = published.evaluated
    config.update(published.settings)
    return config
