r"""CIFAR-10 in one or two evaluations, without labels: few-step objectives as published.

    python -m experiments.train --config=configs/cifar10_few_steps.py --config.init_from=FILE
    python -m experiments.train --config=configs/cifar10_few_steps.py:objective=mean_flow

Not yet run: no such machine was available. `docs/data.md` explains how the set is prepared.
Published, FID-50K of one and two evaluations, each with the file that its settings are from:

    ect          3.86, 2.15   run_ecm.sh, ct_train.py of locuslab/ect; FILE is EDM's unconditional
                              DDPM++, edm-cifar10-32x32-uncond-vp.pkl (Geng et al. 2024)
    consistency  8.70, 5.83   configs/cifar10_ve_ct_adaptive.py and launch.sh of
                              openai/consistency_models_cifar10 (Song et al. 2023)
    ict          2.51, 2.24   no public code: the paper (Song & Dhariwal 2023) by summaries of it,
                              and the table in ECT's README; its deep network
    scm          2.85         config_sct_cifar10.py of NVlabs/FastGen, which has 3.23 itself (Lu &
                              Song 2024); it starts from EDM's weights
    mean_flow    2.92         scripts/cifar10_v0.sh of Gsunshine/py-meanflow (Geng et al. 2025)
    soflow       2.86, 2.28   cifar.yaml, models.py of zlab-princeton/SoFlow (Luo et al. 2025)

IMM's training settings are not public as code, and it has no row.

What differs from them: levels are drawn between the ends of EDM's path, where ECT's have no ends;
`consistency` compares pixels and not LPIPS, and its average for the target has the decay that
theirs ends with (it begins at 0.9); `scm` begins with drawn weights, divides by the norm of the
whole tangent and not by its root mean square, and has learned weights; the networks of `mean_flow`
and `soflow` embed both times with weights of their own and add them, where theirs join them;
images of `mean_flow` are flipped once, by the augmentation, where theirs are flipped before it too.
A gradient that is not finite leaves the step out.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffjax.data import Augment, tfds_images
from diffjax.defaults import experiment
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.lookup import chosen_on_axes
from diffjax.models.edm import SongUNet
from diffjax.models.edm.network import NCSNPP, POSITIONAL, RANDOM
from diffjax.models.layers.common import Fourier
from diffjax.models.layers.resampling import SMOOTH
from diffjax.models.unet import Resampling
from diffjax.objectives.augmentation import NonLeaky
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.radam import RAdam
from diffjax.optimizers.schedules import Constant, RiseFromZero
from diffjax.process.precond import LogSNRLabel
from diffjax.process.times import LogitNormal
from diffjax.sampling.grids import Sigmas
from diffjax.spec import as_spec, spec

NCSN = {name: as_spec(value) for name, value in NCSNPP.items()}
WIDE = {
    "embedding": as_spec(replace(POSITIONAL, width=2)),
    "resampling": as_spec(Resampling(SMOOTH, projected=True)),
}
CALM = as_spec(replace(RANDOM, frequencies=Fourier(0.02)))
NETWORKS = {
    "DDPM++": spec(SongUNet, dropout=0.2),
    "NCSN++": spec(SongUNet, dropout=0.0, **NCSN),
    "NCSN++-deep": spec(SongUNet, dropout=0.3, num_res_blocks=8, **{**NCSN, "embedding": CALM}),
    "DDPM++-wide": spec(SongUNet, dropout=0.2, **WIDE),
    "DDPM++-wide-0.3": spec(SongUNet, dropout=0.3, **WIDE),
}
AUGMENTED = (spec(NonLeaky, vertical_flips=0.0, rotations=0.0),)
TWO_LEVELS = spec(Sigmas, sigmas=(80.0, 0.821))


class Published(NamedTuple):
    """A training as its authors, or those named above, ran it."""

    model: str
    batch_size: int
    num_steps: int
    rate: float
    rule: ConfigDict = spec(RAdam)
    schedule: ConfigDict = spec(Constant)
    loss: Mapping[str, Any] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})  # others of the config
    ema: float = 0.9999
    evaluated: tuple[int, ...] = (1, 2)


LOG_SIGMA = {"noise_label": spec(LogSNRLabel, scale=-0.125)}
PUBLISHED = {
    "ect": Published("DDPM++", 128, 200_000, 1e-4, settings={"precond": LOG_SIGMA}),
    "consistency": Published(
        *("NCSN++", 512, 800_000, 4e-4),
        schedule=spec(RiseFromZero, steps=10_000_000 // 512),
        settings={
            "precond": LOG_SIGMA,
            "augment": spec(Augment, flip_probability=0.5),
            "ema_decays": (0.9986, 0.9999),  # 0.9^(2/150) is the first
            "teacher": "ema-0.9986",
        },
    ),
    "ict": Published(
        *("NCSN++-deep", 1024, 400_000, 1e-4), settings={"precond": LOG_SIGMA}, ema=0.99993
    ),
    "scm": Published(
        *("DDPM++", 512, 350_000, 1e-4),
        rule=spec(RAdam, b2=0.99),
        loss={"warm_up": 10_000 / 350_000},
    ),
    "mean_flow": Published(
        *("DDPM++-wide", 1024, 800_000, 6e-4),
        rule=spec(Adam),
        schedule=spec(RiseFromZero, steps=200 * 50_000 // 1024),
        loss={
            "times": spec(LogitNormal, mean=-2.0, std=2.0),
            "between": 0.75,
            "power": 0.75,
            "floor": 1e-3,
        },
        settings={"wrappers": AUGMENTED},
        evaluated=(1,),
    ),
    "soflow": Published(
        *("DDPM++-wide-0.3", 1024, 800_000, 1e-4),
        loss={
            "between": 1.0,
            "begins": spec(LogitNormal, mean=-0.9, std=1.6),
            "ends": spec(LogitNormal, mean=-4.0, std=1.6),
            "first": 1.0,
            "last": 0.0003125,
            "power": 0.75,
            "floor": 1e-3,
        },
        settings={"wrappers": AUGMENTED},
    ),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Objectives: ect, consistency, ict, scm, mean_flow, soflow. Models: DDPM++, NCSN++, NCSN++-deep,
    DDPM++-wide, DDPM++-wide-0.3.

    Raises:
        UserError: another objective.
    """
    chosen = chosen_on_axes(arguments)
    objective = chosen.get("objective", "ect")
    if objective not in PUBLISHED:
        raise UserError(
            f"configs/cifar10_few_steps.py has no published settings of {objective!r}; "
            f"{nearest(objective, PUBLISHED)} configs/cifar10.py takes any objective"
        )
    published = PUBLISHED[objective]
    config = experiment(
        "cifar10-few-steps",
        arguments,
        data=spec(tfds_images, name="cifar10", labelled=False),
        extractor=spec(pixel_features, size=8),
        models=NETWORKS,
        model=published.model,
        objective="ect",
        optimizer=spec(
            descent,
            learning_rate=published.rate,
            warmup_steps=0,
            schedule=published.schedule,
            rule=published.rule,
            clip_norm=float("inf"),
        ),
    )
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 3), "num_classes": 0, "num_images": 50_000}
    )
    config.batch_size = published.batch_size
    config.num_steps = published.num_steps
    config.condition_dropout = 0.0
    config.ema_decays = (published.ema,)
    config.weights = f"ema-{published.ema}"
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.sampling.num_steps = 1
    config.evaluation.num_samples = 50_000
    config.evaluation.num_steps = published.evaluated
    if "consistency" in config.evaluation.solvers:
        config.sampling.grid = TWO_LEVELS
    else:
        config.evaluation.solvers = ("flow_map",)
    config.update({k: v for k, v in published.settings.items() if k not in chosen})
    if "loss" not in chosen:
        config.objective.update({k: v for k, v in published.loss.items() if k not in chosen})
    return config
