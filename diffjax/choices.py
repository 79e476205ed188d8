"""The named choices of a config, as tables of specs, one table for each axis.

The names of `--config=configs/digits.py:objective=ddpm,path=cosine` are keys of these tables. To
add a choice, add a row; nothing else in the library depends on the names. The equation and the
paper of each choice are in the docstring of the class or function that its row names.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from diffjax.codecs import (
    SpaceToDepth,
    autoencoder_kl,
    autoencoders,
    dc_ae,
    embeddings,
    movq,
    rae,
    taesd,
)
from diffjax.models import EDM2, DiT, UNet
from diffjax.models.autoencoder_kl.sizes import WEIGHTS as AUTOENCODERS
from diffjax.objectives import (
    augmentation,
    couplings,
    derivatives,
    interpolant,
    learned_variance,
    repa,
    wrappers,
)
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.distances import PseudoHuber
from diffjax.objectives.distillation.adversarial import LatentAdversarial
from diffjax.objectives.distillation.coupled_ends import CoupledEnds
from diffjax.objectives.distillation.denoisers import GuidanceDistillation, ProgressiveDistillation
from diffjax.objectives.distillation.distribution_matching import DistributionMatching
from diffjax.objectives.distillation.flow_anchored import FlowAnchored
from diffjax.objectives.distillation.latent_consistency import LatentConsistency
from diffjax.objectives.distillation.score_regularised import ScoreRegularised
from diffjax.objectives.few_step import (
    drifting,
    flow_maps,
    mean_flow,
    moments,
    solution_flow,
    terminal_velocity,
)
from diffjax.objectives.few_step.consistency import (
    Consistency,
    Doubling,
    FromTeacher,
    Neighbours,
    Shrinking,
)
from diffjax.objectives.few_step.continuous_consistency import ContinuousConsistency
from diffjax.optimizers import schedules as rates
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.lion import Lion
from diffjax.optimizers.muon import Muon
from diffjax.optimizers.normalised import NormalisedAdam
from diffjax.optimizers.radam import RAdam
from diffjax.optimizers.schedule_free import ScheduleFreeAdamW
from diffjax.process import (
    beta_tables,
    bridges,
    paths,
    precond,
    schedules,
    shifts,
    targets,
    times,
    uniforms,
    weights,
)
from diffjax.sampling import (
    adams,
    adaptive,
    consistency,
    dpm_solver,
    grids,
    guidance,
    pndm,
    restart,
    runge_kutta,
    sde,
    solvers,
    unipc,
)
from diffjax.spec import spec

Table = Mapping[str, ConfigDict]

# What encoded a data set of latents, and decodes them.
CODECS: Table = MappingProxyType(
    {
        "space_to_depth": spec(SpaceToDepth),
        "taef2": spec(taesd.TAESD),
        "autoencoder_tiny": spec(taesd.AutoencoderTiny),
        "autoencoder_kl": spec(autoencoder_kl.AutoencoderKL),
        "movq": spec(movq.MOVQ),
        "dc_ae": spec(dc_ae.DCAE),
        "rae": spec(rae.RAE),
        "autoencoder": spec(autoencoders.AutoencoderFolder),
        "embeddings": spec(embeddings.Embeddings),
        **{
            name: spec(
                autoencoder_kl.AutoencoderKL,
                path=weights.address,
                size=weights.size,
                file_sha256=weights.sha256,
            )
            for name, weights in AUTOENCODERS.items()
        },
    }
)
# The path from data to noise: x_t = a(t)·x0 + s(t)·eps.
PATHS: Table = MappingProxyType(
    {
        "linear": spec(paths.Linear),
        "linear_imm": spec(paths.Linear, t_noise=0.994),
        "linear_shifted": spec(shifts.TimeShift, path=spec(paths.Linear)),
        "linear_twice_noise": spec(shifts.ScaledNoise, path=spec(paths.Linear)),
        "cosine": spec(paths.Cosine),
        "cosine_shifted": spec(shifts.LogSNRShift, path=spec(paths.Cosine)),
        "ddpm": spec(paths.LinearBeta),
        "ddpm_table": spec(beta_tables.LinearBetas),
        "ddpm_table_zero_snr": spec(shifts.ZeroTerminalSNR, path=spec(beta_tables.LinearBetas)),
        "scaled_linear_table": spec(beta_tables.ScaledLinearBetas),
        "kandinsky_table": spec(beta_tables.LinearBetas, beta_start=0.00085, beta_end=0.012),
        "cosine_table": spec(beta_tables.CosineBetas),
        "sigmoid": spec(schedules.Sigmoid),
        "sub_vp": spec(schedules.SubVP),
        "ve": spec(schedules.VarianceExploding),
        "edm": spec(schedules.EDM),
        "linear_log_snr": spec(schedules.LinearLogSNR),
        "brownian_bridge": spec(bridges.BrownianBridge),
    }
)
# What the network predicts: k_x·x0 + k_e·eps.
TARGETS: Table = MappingProxyType(
    {
        "noise": spec(targets.Noise),
        "clean": spec(targets.Clean),
        "v": spec(targets.V),
        "velocity": spec(targets.Velocity),
        "velocity_to_data": spec(targets.VelocityToData),
        "score": spec(targets.Score),
        "scaled_score": spec(targets.ScaledScore),
        "f": spec(targets.F),
    }
)
# The weight w(t) of the squared error of the prediction.
WEIGHTS: Table = MappingProxyType(
    {
        "constant": spec(weights.Constant),
        "constant_noise": spec(weights.ConstantIn, space=spec(targets.Noise)),
        "constant_clean": spec(weights.ConstantIn, space=spec(targets.Clean)),
        "constant_v": spec(weights.ConstantIn, space=spec(targets.V)),
        "constant_velocity": spec(weights.ConstantIn, space=spec(targets.Velocity)),
        "constant_velocity_jit": spec(
            weights.Capped, weight=spec(weights.ConstantIn, space=spec(targets.Velocity))
        ),
        "constant_score": spec(weights.ConstantIn, space=spec(targets.Score)),
        "constant_f": spec(weights.ConstantIn, space=spec(targets.F)),
        "snr": spec(weights.SNR),
        "snr_plus_one": spec(weights.SNRPlusOne),
        "truncated_snr": spec(weights.TruncatedSNR),
        "min_snr": spec(weights.MinSNR),
        "soft_min_snr": spec(weights.SoftMinSNR),
        "p2": spec(weights.P2),
        "debiased": spec(weights.Debiased),
        "edm": spec(weights.EDM),
        "elbo": spec(weights.ELBO),
        "sigmoid": spec(weights.Sigmoid),
        "sigmoid_low": spec(weights.Sigmoid, bias=-1.0),
    }
)
# The density of the training times.
TIMES: Table = MappingProxyType(
    {
        "uniform": spec(times.Uniform),
        "discrete": spec(times.DiscreteUniform),
        "logit_normal": spec(times.LogitNormal),
        "logit_normal_mean_flow": spec(times.LogitNormal, mean=-0.4),
        "logit_normal_soflow": spec(times.LogitNormal, mean=-0.2),
        "logit_normal_facm": spec(times.LogitNormal, mean=-0.8, std=1.6),
        "logit_normal_jit": spec(times.LogitNormal, mean=0.8, std=0.8),
        "logit_normal_ladd": spec(times.LogitNormal, mean=1.0),
        "mode": spec(times.Mode),
        "cos_map": spec(times.CosMap),
        "log_normal": spec(times.LogNormal),
        "log_normal_edm2": spec(times.LogNormal, mean=-0.4, std=1.0),
        "log_normal_ict": spec(times.LogNormal, mean=-1.1, std=2.0),
        "log_normal_scm": spec(times.LogNormal, mean=-1.0, std=1.4),
        "log_normal_rcm": spec(times.LogNormal, mean=-0.8, std=1.6),
        "uniform_root": spec(times.UniformRoot),
        "uniform_log_snr": spec(times.UniformLogSNR),
        "beta": spec(times.Beta),
    }
)
# The uniform random numbers from which a batch's times are computed.
UNIFORMS: Table = MappingProxyType(
    {
        "independent": spec(uniforms.Independent),
        "stratified": spec(uniforms.Stratified),
        "low_discrepancy": spec(uniforms.LowDiscrepancy),
        "antithetic": spec(uniforms.Antithetic),
    }
)
# Which noise is paired with which image of a batch.
COUPLINGS: Table = MappingProxyType(
    {
        "independent": spec(couplings.Independent),
        "ot": spec(couplings.OptimalTransport),
        "ot_within_class": spec(couplings.OptimalTransportWithin),
        "entropic_ot": spec(couplings.EntropicTransport),
        "given": spec(couplings.Given),
        "translation": spec(couplings.Translation),
    }
)
# The class of the objective: what is computed from the network's predictions.
LOSSES: Table = MappingProxyType(
    {
        "denoising": spec(Denoising),
        "interpolant": spec(interpolant.Interpolant, gamma=spec(bridges.SineSquared)),
        "interpolant_brownian": spec(interpolant.Interpolant, gamma=spec(bridges.Brownian)),
        "source_bridge": spec(interpolant.SourceBridge),
        "mean_flow": spec(mean_flow.MeanFlow),
        "improved_mean_flow": spec(mean_flow.MeanFlow, own_velocity=True, between=0.5),
        "alpha_flow": spec(flow_maps.AlphaFlow),
        "shortcut": spec(flow_maps.Shortcut),
        "flow_map": spec(flow_maps.SelfDistilled, rule=spec(flow_maps.Lagrangian)),
        "flow_map_eulerian": spec(flow_maps.SelfDistilled, rule=spec(flow_maps.Eulerian)),
        "flow_map_progressive": spec(flow_maps.SelfDistilled, rule=spec(flow_maps.Progressive)),
        "inductive_moment_matching": spec(moments.InductiveMomentMatching),
        "solution_flow": spec(solution_flow.SolutionFlow),
        "terminal_velocity": spec(terminal_velocity.TerminalVelocity),
        "drifting": spec(drifting.Drifting),
        "flow_anchored_consistency": spec(FlowAnchored),
        "flow_anchored_consistency_distillation": spec(
            FlowAnchored, prediction=spec(FromTeacher, guidance_scale=1.75)
        ),
        "consistency": spec(Consistency, averaged_target=True),
        "improved_consistency": spec(
            Consistency,
            pairs=spec(Neighbours, levels=spec(Doubling)),
            metric=spec(PseudoHuber),
            power=1.0,
        ),
        "easy_consistency": spec(
            Consistency, pairs=spec(Shrinking), metric=spec(PseudoHuber, factor=0.0), power=1.0
        ),
        "consistency_distillation": spec(Consistency, prediction=spec(FromTeacher)),
        "continuous_consistency": spec(ContinuousConsistency),
        "continuous_consistency_distillation": spec(
            ContinuousConsistency, prediction=spec(FromTeacher)
        ),
        "score_regularised_consistency": spec(ScoreRegularised),
        "latent_consistency_distillation": spec(LatentConsistency),
        "distribution_matching": spec(DistributionMatching),
        "latent_adversarial_distillation": spec(LatentAdversarial),
        "coupled_ends": spec(CoupledEnds),
        "progressive_distillation": spec(ProgressiveDistillation),
        "guidance_distillation": spec(
            GuidanceDistillation, prediction=spec(FromTeacher, guidance_scale=2.0)
        ),
    }
)
# How a loss computes its derivative of the network, where it has one.
DERIVATIVES: Table = MappingProxyType(
    {
        "exact": spec(derivatives.Exact),
        "central": spec(derivatives.CentralDifference),
    }
)
# The noise level as the second input of the network.
NOISE_LABELS: Table = MappingProxyType(
    {
        "time": spec(precond.TimeLabel),
        "time_unit": spec(precond.TimeLabel, scale=1.0),
        "time_to_data": spec(precond.TimeLabel, scale=-1.0, offset=1.0),
        "step": spec(precond.TimeLabel, offset=-1.0),
        "log_snr": spec(precond.LogSNRLabel),
        "log_sigma": spec(precond.LogSNRLabel, scale=-0.125),
        "log_half_sigma": spec(precond.LogSNRLabel, scale=-0.5, offset=-math.log(2.0)),
    }
)
# The factor of the noisy image as the first input of the network.
INPUT_SCALES: Table = MappingProxyType(
    {
        "none": spec(precond.Unscaled),
        "unit_variance": spec(precond.UnitVariance),
    }
)
# Objectives around an objective; several are joined by "+", the innermost first.
WRAPPERS: Table = MappingProxyType(
    {
        "learned_variance": spec(learned_variance.LearnedVariance),
        "uncertainty": spec(wrappers.Uncertainty),
        "uncertainty_fourier": spec(wrappers.FourierUncertainty),
        "embedded_guidance": spec(wrappers.EmbeddedGuidance),
        "embedded_guidance_lcm": spec(wrappers.EmbeddedGuidance, lowest=3.0, highest=15.0),
        "embedded_guidance_imf": spec(wrappers.EmbeddedGuidance, power=1.0),
        "embedded_guidance_drifting": spec(wrappers.EmbeddedGuidance, highest=4.0, power=3.0),
        "second_moment": spec(wrappers.Adaptive, power=2.0),
        "adaptive": spec(wrappers.Adaptive, power=1.0),
        "importance": spec(wrappers.Importance, proposal=spec(times.LogitNormal)),
        "contrastive": spec(wrappers.Contrastive),
        "dispersive": spec(wrappers.Dispersive),
        "non_leaky": spec(augmentation.NonLeaky),
        "repa": spec(repa.REPA),
        "irepa": spec(repa.REPA, scale=1.0, spatial=True),
    }
)
# Samplers: how x is stepped from one time of the grid to the next.
SOLVERS: Table = MappingProxyType(
    {
        "ddim": spec(solvers.ddim),
        "ddpm": spec(solvers.ddpm),
        "ddpm_large": spec(solvers.ddpm, share=1.0),
        "ddpm_learned": spec(solvers.ddpm_learned),
        "flow_map": spec(solvers.flow_map),
        "consistency": spec(consistency.consistency),
        "one_step": spec(consistency.one_step),
        "euler": spec(solvers.euler),
        "heun": spec(solvers.heun),
        "midpoint": spec(runge_kutta.midpoint),
        "rk4": spec(runge_kutta.rk4),
        "edm_heun": spec(runge_kutta.edm_heun),
        "edm_heun_churn": spec(runge_kutta.edm_heun, churn=0.1),
        "dpmpp_2s": spec(dpm_solver.dpmpp_2s),
        "dpmpp_2m": spec(dpm_solver.dpmpp_multistep),
        "dpmpp_3m": spec(dpm_solver.dpmpp_multistep, order=3),
        "dpmpp_2m_sde": spec(dpm_solver.dpmpp_multistep, eta=1.0),
        "dpmpp_3m_sde": spec(dpm_solver.dpmpp_multistep, order=3, eta=1.0),
        "unipc": spec(unipc.unipc),
        "unipc_3": spec(unipc.unipc, order=3),
        "deis": spec(adams.deis),
        "lms": spec(adams.lms),
        "plms": spec(adams.plms),
        "pndm": spec(pndm.pndm),
        "ab": spec(adams.ab),
        "exp_ab": spec(adams.exp_ab),
        "sa": spec(adams.exp_ab, eta=1.0),
        "euler_maruyama": spec(sde.euler_maruyama),
        "stochastic_heun": spec(sde.stochastic_heun),
        "restart": spec(restart.restart, solver=spec(runge_kutta.edm_heun)),
        "adaptive": spec(adaptive.adaptive),
        "adaptive_sde": spec(adaptive.adaptive_sde),
    }
)
# The times of the sampling steps, from t_noise down to 0.
GRIDS: Table = MappingProxyType(
    {
        "uniform": spec(grids.Power),
        "quadratic": spec(grids.Power, exponent=2.0),
        "uniform_root": spec(grids.UniformRoot),
        "cosine": spec(grids.Cosine),
        "log_snr": spec(grids.UniformLogSNR),
        "karras": spec(grids.Karras),
        "shifted": spec(grids.Shifted),
        "beta": spec(grids.Beta),
        "leading": spec(grids.Leading),
        "trailing": spec(grids.Trailing),
        "linspace": spec(grids.Linspace),
        "ays_sd15": spec(
            grids.Sigmas,
            sigmas=(14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        ),
        "ays_sdxl": spec(
            grids.Sigmas,
            sigmas=(14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
        ),
    }
)
# How two predictions are combined to one; several are joined by "+", the innermost first.
GUIDANCE: Table = MappingProxyType(
    {
        "cfg": spec(guidance.ClassifierFree),
        "cfg_pp": spec(guidance.PlusPlus),
        "zero_star": spec(guidance.ZeroStar),
        "projected": spec(guidance.Projected),
        "limited": spec(guidance.Limited),
        # Where t on the linear path is below 0.9: log-SNR 2·log((1 - t)/t).
        "limited_jit": spec(guidance.Limited, low=-4.394, high=float("inf")),
        "limited_jit_512": spec(guidance.Limited, low=-5.781, high=float("inf")),
        "first_channels": spec(guidance.FirstChannels),
        "rescaled": spec(guidance.Rescaled),
        "clipped": spec(guidance.Clipped),
        "thresholded": spec(guidance.Thresholded),
    }
)
# The second prediction, from which guidance leads away; some take an argument: label:3 and
# prompt:TEXT are what the model's condition parses. Weights may have a condition of their own, as
# weights:runs/small+null.
AGAINST: Table = MappingProxyType(
    {
        "null": spec(guidance.NullCondition),
        "embedded": spec(guidance.Embedded),
        "label": spec(guidance.OtherCondition),
        "prompt": spec(guidance.OtherCondition),
        "weights": spec(guidance.OtherWeights),
        "classifier": spec(guidance.Classifier, file=""),
        "attention": spec(guidance.WithoutAttention),
        "blocks": spec(guidance.SkipLayers),
    }
)
# Default grids, for the paths on which equal steps in time do not work.
GRIDS_OF_PATHS: Mapping[str, str] = MappingProxyType({"edm": "karras", "cosine_table": "karras"})
# The same for jumps to the end with fresh noise after each. The last step of Karras' grid begins at
# the least noise, where nothing is left to jump over: two steps there are one. This one's begins at
# 0.63; consistency models were published with 0.66 to 0.82.
GRIDS_OF_JUMPS: Mapping[str, str] = MappingProxyType({"edm": "uniform_root"})
# Default solvers, for the paths on which Heun's steps in time leave noise in the samples: their
# σ = s/a falls exponentially or faster in time, and DDIM steps in σ.
SOLVERS_OF_PATHS: Mapping[str, str] = MappingProxyType({"ve": "ddim", "cosine_table": "ddim"})
# Default networks, for configs that train a few thousand steps. A transformer needs many more to
# predict noise: x0 = (x_t - s·eps)/a multiplies its error by s/a, so that it has to copy its input
# exactly, which it learns slowly (docs/recipes.md). Published ones train 400,000 steps.
MODELS_OF_TARGETS: Mapping[str, str] = MappingProxyType(
    {"noise": "unet", "score": "unet", "scaled_score": "unet"}
)
# Fréchet distances of one evaluation on digits, of losses that are far from done after a few
# thousand steps, for notes of dry runs; mean_flow has 0.65 (docs/objectives.md).
SLOW_LOSSES: Mapping[str, float] = MappingProxyType(
    {"improved_consistency": 2.9, "flow_map": 4.7, "drifting": 5.1, "terminal_velocity": 5.9}
)
OPTIMIZERS: Table = MappingProxyType(
    {
        "adamw": spec(descent),
        "adam": spec(descent, rule=spec(Adam)),
        "radam": spec(descent, rule=spec(RAdam), learning_rate=1e-4),
        "normalised_adam": spec(descent, rule=spec(NormalisedAdam), learning_rate=1e-2),
        "muon": spec(descent, rule=spec(Muon), learning_rate=0.02),
        "lion": spec(descent, rule=spec(Lion), learning_rate=1e-4),
        "schedule_free": spec(descent, rule=spec(ScheduleFreeAdamW), learning_rate=2.5e-3),
    }
)
SCHEDULES: Table = MappingProxyType(
    {
        "constant": spec(rates.Constant),
        "rise_from_zero": spec(rates.RiseFromZero),
        "cosine": spec(rates.Cosine),
        "inverse_sqrt": spec(rates.InverseSqrt),
    }
)
# Metrics during training; several are joined by "+". The rows are locations, `module:class`: these
# classes load runs, and so import this module.
EVALUATORS: Mapping[str, str] = MappingProxyType(
    {
        "samples": "diffjax.runs.measuring.evaluators:Samples",
        "validation": "diffjax.runs.measuring.evaluators:Validation",
    }
)
# Where numbers and pictures go besides the run's folder; several are joined by "+". Their libraries
# are imported when they are used.
TRACKERS: Mapping[str, str] = MappingProxyType(
    {
        "wandb": "diffjax.loop.trackers.wandb:Wandb",
        "mlflow": "diffjax.loop.trackers.mlflow:MLflow",
        "aim": "diffjax.loop.trackers.aim:Aim",
    }
)
# Schedules that come with an optimizer; with others a config keeps its own.
SCHEDULES_OF_OPTIMIZERS: Mapping[str, str] = MappingProxyType({"schedule_free": "constant"})
# Small networks for images of 8×8 and of 28×28 pixels.
MODELS_8X8: Table = MappingProxyType(
    {
        "dit": spec(DiT, patch_size=2, hidden_size=64, depth=4, num_heads=2),
        "unet": spec(
            UNet,
            channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            head_channels=32,
        ),
        "edm2": spec(
            EDM2,
            channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_levels=(1,),
            head_channels=32,
        ),
    }
)
MODELS_28X28: Table = MappingProxyType(
    {
        "dit": spec(DiT, patch_size=4, hidden_size=128, depth=4, num_heads=4),
        "unet": spec(
            UNet,
            channels=32,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(7,),
            head_channels=32,
        ),
        "edm2": spec(
            EDM2,
            channels=32,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            attention_levels=(2,),
            head_channels=32,
        ),
    }
)
# The choices on the axes that an objective does not name.
PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "weight": "constant",
        "times": "uniform",
        "uniforms": "independent",
        "coupling": "independent",
        "loss": "denoising",
        "noise_label": "time",
        "input_scale": "none",
        "wrappers": "none",
    }
)
_EDM = {
    "path": "edm",
    "target": "f",
    "times": "log_normal",
    "noise_label": "log_snr",
    "input_scale": "unit_variance",
}
_MEAN_FLOW = {
    "path": "linear",
    "target": "velocity",
    "times": "logit_normal_mean_flow",
    "noise_label": "time_unit",
    "loss": "mean_flow",
}
_SCM = {
    "path": "cosine",
    "target": "v",
    "times": "log_normal_scm",
    "noise_label": "time_unit",
    "loss": "continuous_consistency",
    "wrappers": "uncertainty_fourier",
}
# An objective is a choice on each axis. Each comment is its loss, to be averaged over images x0,
# noise eps and times t, with x_t = a·x0 + s·eps, a network `net`, and |·|² the mean square over
# pixels. λ is the log-SNR, log(a²/s²).
OBJECTIVES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        name: {**PLAIN, **parts}
        for name, parts in {
            # Flow matching: |net(x_t, t) - (eps - x0)|², x_t = (1 - t)·x0 + t·eps. Lipman et al.
            # 2023 (arXiv:2210.02747); Liu et al. 2023 (arXiv:2209.03003).
            "flow": {"path": "linear", "target": "velocity"},
            # DDPM in continuous time: |net(x_t, t) - eps|². Ho et al. 2020 (arXiv:2006.11239) on
            # the VP path of Song et al. 2021 (arXiv:2011.13456).
            "ddpm": {"path": "ddpm", "target": "noise"},
            # DDPM as published: |net(x_t, t) - eps|², t uniform over a table of 1,000 steps. Ho et
            # al. 2020 (arXiv:2006.11239), equation 14.
            "ddpm_table": {"path": "ddpm_table", "target": "noise", "times": "discrete"},
            # Improved DDPM: |net(x_t, t) - eps|² + 0.001·T·KL_t, t uniform over the T steps of the
            # cosine table; the term KL_t of the variational bound trains the variance alone. Nichol
            # & Dhariwal 2021 (arXiv:2102.09672), equation 16.
            "iddpm": {
                "path": "cosine_table",
                "target": "noise",
                "times": "discrete",
                "wrappers": "learned_variance",
            },
            # DiT: |net(x_t, t) - eps|² + 0.001·T·KL_t on DDPM's table, whose steps count from 0 in
            # the network. Peebles & Xie 2022 (arXiv:2212.09748), section 3.1.
            "dit": {
                "path": "ddpm_table",
                "target": "noise",
                "times": "discrete",
                "noise_label": "step",
                "wrappers": "learned_variance",
            },
            # v-prediction: |net(x_t, t) - (a·eps - s·x0)|² on the cosine path. Salimans & Ho 2022
            # (arXiv:2202.00512), section 4.
            "v": {"path": "cosine", "target": "v"},
            # Min-SNR: min(SNR, 5)/SNR·|net(x_t, t) - eps|². Hang et al. 2023 (arXiv:2303.09556).
            "min_snr": {"path": "ddpm", "target": "noise", "weight": "min_snr"},
            # P2: 1/(1 + SNR)·|net(x_t, t) - eps|². Choi et al. 2022 (arXiv:2204.00227), equation 8.
            "p2": {"path": "ddpm", "target": "noise", "weight": "p2"},
            # Denoising score matching with the weight s², VE path: |net(x_t/√(σ_data² + s²), λ)
            # - eps|², where the score is -eps/s. Song et al. 2021 (arXiv:2011.13456), equation 7.
            "score_ve": {
                "path": "ve",
                "target": "noise",
                "noise_label": "log_snr",
                "input_scale": "unit_variance",
            },
            # Denoising score matching with the weight s², sub-VP path: |net(x_t, t) - eps|². Song
            # et al. 2021 (arXiv:2011.13456), equation 7.
            "score_sub_vp": {"path": "sub_vp", "target": "noise"},
            # Zero terminal SNR: |net(x_t, t) - (a·eps - s·x0)|² on DDPM's table, rescaled to end in
            # pure noise. Lin et al. 2023 (arXiv:2305.08891).
            "zero_snr": {"path": "ddpm_table_zero_snr", "target": "v", "times": "discrete"},
            # EDM: |net(c_in·x_t, λ) - F|², F = (x0 - c_skip·x_t)/c_out, log σ ~ N(-1.2, 1.2²).
            # Karras et al. 2022 (arXiv:2206.00364), equation 8.
            "edm": _EDM,
            # EDM2: |net(c_in·x_t, λ) - F|²/e^u(λ) + u(λ) with a learned u, log σ ~ N(-0.4, 1).
            # Karras et al. 2024 (arXiv:2312.02696), equation 21.
            "edm2": {
                **_EDM,
                "times": "log_normal_edm2",
                "wrappers": "uncertainty_fourier",
            },
            # Simple diffusion: |net(x_t, t) - (a·eps - s·x0)|² on the cosine path, with log-SNR
            # shifted for the resolution. Hoogeboom et al. 2023 (arXiv:2301.11093).
            "simple": {"path": "cosine_shifted", "target": "v"},
            # VDM: -½·dλ/dt·|net(x_t, λ) - eps|², the variational bound in nats per pixel. Kingma et
            # al. 2021 (arXiv:2107.00630), equation 17; the path is not learned.
            "vdm": {
                "path": "linear_log_snr",
                "target": "noise",
                "weight": "elbo",
                "uniforms": "low_discrepancy",
                "noise_label": "log_snr",
            },
            # VDM++: sigmoid(2 - λ)·(-½·dλ/dt)·|eps_net - eps|² with a network of v, and times
            # sampled where the loss is large. Kingma & Gao 2023 (arXiv:2303.00848), section 4.
            "vdm_plus": {
                "path": "cosine",
                "target": "v",
                "weight": "sigmoid",
                "uniforms": "low_discrepancy",
                "noise_label": "log_snr",
                "wrappers": "adaptive",
            },
            # Simpler diffusion (SiD2): sigmoid(-1 - λ)·(-½·dλ/dt)·|eps_net - eps|² with a network
            # of v, on the shifted cosine path. Hoogeboom et al. 2024 (arXiv:2410.19324).
            "sid2": {
                "path": "cosine_shifted",
                "target": "v",
                "weight": "sigmoid_low",
                "noise_label": "log_snr",
            },
            # SD3's rectified flow: |net(x_t, t) - (eps - x0)|², logit(t) ~ N(0, 1). Esser et al.
            # 2024 (arXiv:2403.03206), section 3.1.
            "sd3": {"path": "linear", "target": "velocity", "times": "logit_normal"},
            # SiT: |net(x_t, 1 - t) - (x0 - eps)|², x_t = (1 - t)·x0 + t·eps, the flow of a network
            # whose time runs from noise to data. Ma et al. 2024 (arXiv:2401.08740), section 3.
            "sit": {
                "path": "linear",
                "target": "velocity_to_data",
                "noise_label": "time_to_data",
            },
            # JiT: |net(x_t, 1 - t) - x0|²·min(1/t², 400), the error of the velocity where t is over
            # 0.05, logit(t) ~ N(0.8, 0.8²). Li & He 2025 (arXiv:2511.13720), section 3 and table 9.
            "jit": {
                "path": "linear",
                "target": "clean",
                "weight": "constant_velocity_jit",
                "times": "logit_normal_jit",
                "noise_label": "time_to_data",
            },
            # OT-CFM: |net(x_t, t) - (eps - x0)|², noise paired with images by optimal transport
            # within the batch. Tong et al. 2024 (arXiv:2302.00482), section 3.3.
            "otcfm": {"path": "linear", "target": "velocity", "coupling": "ot"},
            # Contrastive flow matching: |net - (eps - x0)|² - 0.05·|net - (eps' - x0')|², where x0'
            # and eps' belong to another example. Stoica et al. 2025 (arXiv:2506.05350), equation 5.
            "contrastive": {"path": "linear", "target": "velocity", "wrappers": "contrastive"},
            # Dispersive loss: |net - (eps - x0)|² + 0.5·log mean_ij exp(-|z_i - z_j|²/0.5), with
            # hidden activations z of the batch. Wang & He 2025 (arXiv:2506.09027), equation 6.
            "dispersive": {"path": "linear", "target": "velocity", "wrappers": "dispersive"},
            # MeanFlow: ‖net(x_t, t, r) - sg(v - (t - r)·du/dt)‖², v = eps - x0, u = net, divided by
            # itself plus 0.01 without gradient. Geng et al. 2025 (arXiv:2505.13447), algorithm 1.
            "mean_flow": _MEAN_FLOW,
            # Improved MeanFlow: MeanFlow's loss with du/dt along the network's own velocity
            # u(x_t, t, t). Geng et al. 2025 (arXiv:2512.02012).
            "imf": {**_MEAN_FLOW, "loss": "improved_mean_flow"},
            # pMF: improved MeanFlow's loss with u = (x_t - net)/t. Lu et al. 2026
            # (arXiv:2601.22158), who have logit(t) ~ N(0.8, 0.8²) for patches of 16 pixels. On
            # small images such times never end near the data, where one step does.
            "pmf": {
                **_MEAN_FLOW,
                "target": "clean",
                "weight": "constant_velocity_jit",
                "loss": "improved_mean_flow",
            },
            # α-Flow: ‖u(x_t, t, r) - sg(α·v + (1 - α)·u(x_s, s, r))‖²/α, s = t - α·(t - r), with α
            # from 1 to 0.005 in training. Zhang et al. 2025 (arXiv:2510.20771).
            "alpha_flow": {**_MEAN_FLOW, "loss": "alpha_flow"},
            # SoFlow: α-Flow's loss with α from 0.1 to 0.002, logit(t) ~ N(0.2, 0.8²) and logit(r) ~
            # N(-1, 0.8²) for ¼ of the examples, flow matching for the others, of which logit(t) ~
            # N(-0.2, 1). Luo et al. 2025 (arXiv:2512.15657).
            "soflow": {**_MEAN_FLOW, "times": "logit_normal_soflow", "loss": "solution_flow"},
            # Shortcut models: |u(x_t, t, t - 2d) - sg(mean of two steps of length d)|² for ¼ of the
            # examples, flow matching for the others. Frans et al. 2024 (arXiv:2410.12557).
            "shortcut": {**_MEAN_FLOW, "times": "uniform", "loss": "shortcut"},
            # Flow maps by Lagrangian self-distillation: |∂X/∂r - sg v(X, r)|² with the end X of a
            # step from t to r, and flow matching. Boffi et al. 2025 (arXiv:2505.18825).
            "flow_map": {**_MEAN_FLOW, "times": "uniform", "loss": "flow_map"},
            # IMM: the squared maximum mean discrepancy of f(x_t, t, s) and f(x_r, r, s) in fours,
            # f = x_t - (t - s)·u, kernel exp(-‖y - y'‖/(D·(t - s))). Zhou et al. 2025
            # (arXiv:2503.07565), algorithm 1.
            "imm": {
                "path": "linear_imm",
                "target": "velocity",
                "loss": "inductive_moment_matching",
            },
            # Terminal velocity matching: |∂X/∂s - sg v_ema(X, s)|² with the end X of a step to s,
            # and |v(x_s', s') - (eps - x0)|². Zhou et al. 2025 (arXiv:2511.19797).
            "tvm": {**_MEAN_FLOW, "loss": "terminal_velocity"},
            # FACM: |u(x_t, t, t) - v|² + 1 - cos, and MeanFlow's identity from t to the end with a
            # target that is clipped and relaxed. Peng et al. 2025 (arXiv:2507.03738).
            "facm": {
                **_MEAN_FLOW,
                "times": "logit_normal_facm",
                "loss": "flow_anchored_consistency",
            },
            # Consistency training: |f(x_σ, σ) - sg f_ema(x_σ', σ')|² for neighbours σ' < σ of 2 to
            # 150 levels, uniformly. Song et al. 2023 (arXiv:2303.01469), algorithm 3.
            "consistency": {**_EDM, "times": "uniform_root", "loss": "consistency"},
            # iCT: (√(‖f - sg f'‖² + c²) - c)/(σ - σ') for neighbours of 11 to 1,281 levels,
            # log σ ~ N(-1.1, 2²). Song & Dhariwal 2023 (arXiv:2310.14189).
            "ict": {**_EDM, "times": "log_normal_ict", "loss": "improved_consistency"},
            # ECT: ‖f - sg f'‖/(σ - σ') for σ' = σ·(1 - n(σ)/2^(k+1)), k from 0 to 7 in training,
            # log σ ~ N(-1.1, 2²). Geng et al. 2024 (arXiv:2406.14548).
            "ect": {**_EDM, "times": "log_normal_ict", "loss": "easy_consistency"},
            # sCM: |F - sg(F + g/(‖g‖ + 0.1))|²/e^u(λ) + u(λ), g = a·df/dθ, f = a·x - s·F, on the
            # cosine path, log σ ~ N(-1, 1.4²). Lu & Song 2024 (arXiv:2410.11081).
            "scm": _SCM,
            # Consistency distillation: consistency training along a trained denoiser's prediction.
            # Song et al. 2023 (arXiv:2303.01469), algorithm 2.
            "cd": {**_EDM, "times": "uniform_root", "loss": "consistency_distillation"},
            # sCD: sCM along a trained denoiser's prediction. Lu & Song 2024 (arXiv:2410.11081).
            "scd": {**_SCM, "loss": "continuous_consistency_distillation"},
            # rCM: sCD's loss + 0.02·½·|x - sg(x - g)|², DMD2's loss of samples of 4 steps, on the
            # cosine path, log σ ~ N(-0.8, 1.6²). Zheng et al. 2025 (arXiv:2510.08431).
            "rcm": {
                **_SCM,
                "times": "log_normal_rcm",
                "loss": "score_regularised_consistency",
                "wrappers": "none",
            },
            # Drifting: |x - sg(x + V)|², x = net(eps), with the field V by a kernel from generated
            # samples to images of one condition. Deng et al. 2026 (arXiv:2602.04770).
            "drifting": {"path": "linear", "target": "clean", "loss": "drifting"},
            # LCM: mean (√(Δ² + c²) - c), Δ = f(x_t, t, w) - sg f(x_t', t', w), with x_t' the DDIM
            # step of a teacher guided with w, drawn from 3 to 15, over 20 of 1,000 steps. Luo et
            # al. 2023 (arXiv:2310.04378).
            "lcm": {
                "path": "scaled_linear_table",
                "target": "noise",
                "noise_label": "step",
                "loss": "latent_consistency_distillation",
                "wrappers": "embedded_guidance_lcm",
            },
            # DMD2: ½·|x - sg(x - g)|², g = (x0_fake - x0_T)/mean |x - x0_T| at noisy samples, and
            # EDM's loss of the fake score on samples. Yin et al. 2024 (arXiv:2405.14867).
            "dmd2": {**_EDM, "times": "uniform_root", "loss": "distribution_matching"},
            # LADD: -D(x_u) and the hinge loss of D, with ends x = f(x_t, t) of one step, noise of
            # another level u, logit(u) ~ N(1, 1), and heads D on a frozen teacher's hidden tokens.
            # Sauer et al. 2024 (arXiv:2403.12015).
            "ladd": {
                "path": "linear",
                "target": "velocity",
                "times": "logit_normal_ladd",
                "loss": "latent_adversarial_distillation",
            },
            # Progressive distillation: max(SNR, 1)·|x0_net - x0|², where x0 is such that one step
            # of DDIM ends where two of the teacher do. Salimans & Ho 2022 (arXiv:2202.00512).
            "progressive": {
                "path": "cosine",
                "target": "v",
                "weight": "truncated_snr",
                "loss": "progressive_distillation",
            },
            # Guidance distillation: max(SNR, 1)·|x0_net(x_t, t, w) - x0|², where x0 is a teacher's
            # with guidance of the scale w, which is drawn. Meng et al. 2023 (arXiv:2210.03142).
            "guidance": {
                "path": "cosine",
                "target": "v",
                "weight": "truncated_snr",
                "loss": "guidance_distillation",
                "wrappers": "embedded_guidance",
            },
            # Reflow: |net(x_t, t) - (eps - x0)|² on pairs of noise and the sample that a trained
            # model made from it. Liu et al. 2023 (arXiv:2209.03003).
            "reflow": {"path": "linear", "target": "velocity", "coupling": "given"},
            # InstaFlow's second stage: |eps - net(eps, 1) - x0|² on pairs of noise and the sample
            # that a reflowed model made from it. Liu et al. 2023 (arXiv:2309.06380).
            "instaflow": {
                "path": "linear",
                "target": "velocity",
                "coupling": "given",
                "loss": "coupled_ends",
            },
            # Stochastic interpolant: |net(x_t, t) - dx_t/dt|², x_t = (1 - t)·x0 + t·eps + γ(t)·z,
            # z ~ N(0, I), γ = ½·sin²(πt). Albergo et al. 2023 (arXiv:2303.08797).
            "interpolant": {"path": "linear", "target": "velocity", "loss": "interpolant"},
            # The same interpolant between two sets of images: eps is replaced by the source x1 of
            # the pair, from which sampling starts. Albergo et al. 2023 (arXiv:2303.08797).
            "translation": {
                "path": "linear",
                "target": "velocity",
                "coupling": "translation",
                "loss": "interpolant",
            },
            # Brownian bridge from a source x1: |net(x_t, x1, t) - x0|², x_t = (1 - t)·x0 + t·x1 +
            # √(t(1 - t))·eps. Chen et al. 2024 (arXiv:2403.13724), Li et al. (arXiv:2205.07680).
            "bridge": {"path": "brownian_bridge", "target": "clean", "loss": "source_bridge"},
        }.items()
    }
)
AXES: Mapping[str, Table] = MappingProxyType(
    {
        "path": PATHS,
        "target": TARGETS,
        "weight": WEIGHTS,
        "times": TIMES,
        "uniforms": UNIFORMS,
        "coupling": COUPLINGS,
        "loss": LOSSES,
        "noise_label": NOISE_LABELS,
        "input_scale": INPUT_SCALES,
    }
)
TRAINING_AXES: Mapping[str, Table] = MappingProxyType(
    {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
)


def copy(row: ConfigDict) -> ConfigDict:
    """A copy of a table's row, for a config, where flags may change its values."""
    return ConfigDict(row.to_dict())
