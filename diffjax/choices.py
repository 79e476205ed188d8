"""The choices that have names, as tables of specs.

A config's axes are looked up here: `--config=configs/digits.py:objective=ddpm,path=cosine`. To add
a choice, add a row; nothing else knows the names.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from diffjax.models import DiT, UNet
from diffjax.objectives import couplings, interpolant, learned_variance, mean_flow, wrappers
from diffjax.objectives.denoising import Denoising
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
    dpm_solver,
    grids,
    guidance,
    restart,
    runge_kutta,
    sde,
    solvers,
    unipc,
)
from diffjax.spec import spec

Table = Mapping[str, ConfigDict]

PATHS: Table = MappingProxyType(
    {
        "linear": spec(paths.Linear),
        "linear_shifted": spec(shifts.TimeShift, path=spec(paths.Linear)),
        "cosine": spec(paths.Cosine),
        "cosine_shifted": spec(shifts.LogSNRShift, path=spec(paths.Cosine)),
        "ddpm": spec(paths.LinearBeta),
        "ddpm_table": spec(beta_tables.LinearBetas),
        "ddpm_table_zero_snr": spec(shifts.ZeroTerminalSNR, path=spec(beta_tables.LinearBetas)),
        "scaled_linear_table": spec(beta_tables.ScaledLinearBetas),
        "cosine_table": spec(beta_tables.CosineBetas),
        "sigmoid": spec(schedules.Sigmoid),
        "sub_vp": spec(schedules.SubVP),
        "ve": spec(schedules.VarianceExploding),
        "edm": spec(schedules.EDM),
        "linear_log_snr": spec(schedules.LinearLogSNR),
        "brownian_bridge": spec(bridges.BrownianBridge),
    }
)
TARGETS: Table = MappingProxyType(
    {
        "noise": spec(targets.Noise),
        "clean": spec(targets.Clean),
        "v": spec(targets.V),
        "velocity": spec(targets.Velocity),
        "score": spec(targets.Score),
        "f": spec(targets.F),
    }
)
WEIGHTS: Table = MappingProxyType(
    {
        "constant": spec(weights.Constant),
        "constant_noise": spec(weights.ConstantIn, space=spec(targets.Noise)),
        "constant_clean": spec(weights.ConstantIn, space=spec(targets.Clean)),
        "constant_v": spec(weights.ConstantIn, space=spec(targets.V)),
        "constant_velocity": spec(weights.ConstantIn, space=spec(targets.Velocity)),
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
TIMES: Table = MappingProxyType(
    {
        "uniform": spec(times.Uniform),
        "discrete": spec(times.DiscreteUniform),
        "logit_normal": spec(times.LogitNormal),
        "logit_normal_mean_flow": spec(times.LogitNormal, mean=-0.4),
        "mode": spec(times.Mode),
        "cos_map": spec(times.CosMap),
        "log_normal": spec(times.LogNormal),
        "log_normal_edm2": spec(times.LogNormal, mean=-0.4, std=1.0),
        "uniform_log_snr": spec(times.UniformLogSNR),
        "beta": spec(times.Beta),
    }
)
UNIFORMS: Table = MappingProxyType(
    {
        "independent": spec(uniforms.Independent),
        "stratified": spec(uniforms.Stratified),
        "low_discrepancy": spec(uniforms.LowDiscrepancy),
        "antithetic": spec(uniforms.Antithetic),
    }
)
COUPLINGS: Table = MappingProxyType(
    {
        "independent": spec(couplings.Independent),
        "ot": spec(couplings.OptimalTransport),
        "entropic_ot": spec(couplings.EntropicTransport),
        "given": spec(couplings.Given),
        "translation": spec(couplings.Translation),
    }
)
# What stands between the two ends, beside their mix.
BRIDGES: Table = MappingProxyType(
    {
        "none": spec(Denoising),
        "sine_squared": spec(interpolant.Interpolant, gamma=spec(bridges.SineSquared)),
        "brownian": spec(interpolant.Interpolant, gamma=spec(bridges.Brownian)),
        "source": spec(interpolant.SourceBridge),
    }
)
NOISE_LABELS: Table = MappingProxyType(
    {
        "time": spec(precond.TimeLabel),
        "time_unit": spec(precond.TimeLabel, scale=1.0),
        "log_snr": spec(precond.LogSNRLabel),
    }
)
INPUT_SCALES: Table = MappingProxyType(
    {
        "none": spec(precond.Unscaled),
        "unit_variance": spec(precond.UnitVariance),
    }
)
# Joined by "+", the innermost first.
WRAPPERS: Table = MappingProxyType(
    {
        "learned_variance": spec(learned_variance.LearnedVariance),
        "uncertainty": spec(wrappers.Uncertainty),
        "second_moment": spec(wrappers.Adaptive, power=2.0),
        "adaptive": spec(wrappers.Adaptive, power=1.0),
        "importance": spec(wrappers.Importance, proposal=spec(times.LogitNormal)),
        "contrastive": spec(wrappers.Contrastive),
        "dispersive": spec(wrappers.Dispersive),
        "mean_flow": spec(mean_flow.MeanFlow),
    }
)
SOLVERS: Table = MappingProxyType(
    {
        "ddim": spec(solvers.ddim),
        "ddpm": spec(solvers.ddpm),
        "ddpm_large": spec(solvers.ddpm, share=1.0),
        "ddpm_learned": spec(solvers.ddpm_learned),
        "flow_map": spec(solvers.flow_map),
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
GRIDS: Table = MappingProxyType(
    {
        "uniform": spec(grids.Power),
        "quadratic": spec(grids.Power, exponent=2.0),
        "cosine": spec(grids.Cosine),
        "log_snr": spec(grids.UniformLogSNR),
        "karras": spec(grids.Karras),
        "shifted": spec(grids.Shifted),
        "beta": spec(grids.Beta),
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
# What to make of the two predictions; joined by "+", the innermost first.
GUIDANCE: Table = MappingProxyType(
    {
        "cfg": spec(guidance.ClassifierFree),
        "cfg_pp": spec(guidance.PlusPlus),
        "zero_star": spec(guidance.ZeroStar),
        "projected": spec(guidance.Projected),
        "limited": spec(guidance.Limited),
        "rescaled": spec(guidance.Rescaled),
        "clipped": spec(guidance.Clipped),
        "thresholded": spec(guidance.Thresholded),
    }
)
# Where the second prediction comes from; some take an argument, as label:3.
AGAINST: Table = MappingProxyType(
    {
        "null": spec(guidance.NullLabel),
        "label": spec(guidance.OtherLabel),
        "weights": spec(guidance.OtherWeights),
        "attention": spec(guidance.WithoutAttention),
    }
)
# Where samplers step by default, for the paths on which equal steps in time will not do.
GRIDS_OF_PATHS: Mapping[str, str] = MappingProxyType({"edm": "karras"})
# What samples are drawn by by default, for networks that are about more than one time.
SOLVERS_OF_WRAPPERS: Mapping[str, str] = MappingProxyType({"mean_flow": "flow_map"})
# Small networks, for images of these sizes.
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
    }
)
# What every objective is unless it says otherwise.
PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "weight": "constant",
        "times": "uniform",
        "uniforms": "independent",
        "coupling": "independent",
        "bridge": "none",
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
# What a paper's name stands for on each axis.
OBJECTIVES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        name: {**PLAIN, **parts}
        for name, parts in {
            "flow": {"path": "linear", "target": "velocity"},
            "ddpm": {"path": "ddpm", "target": "noise"},
            "ddpm_table": {"path": "ddpm_table", "target": "noise", "times": "discrete"},
            "iddpm": {
                "path": "cosine_table",
                "target": "noise",
                "times": "discrete",
                "wrappers": "learned_variance",
            },
            "v": {"path": "cosine", "target": "v"},
            "min_snr": {"path": "ddpm", "target": "noise", "weight": "min_snr"},
            "p2": {"path": "ddpm", "target": "noise", "weight": "p2"},
            "score_ve": {
                "path": "ve",
                "target": "noise",
                "noise_label": "log_snr",
                "input_scale": "unit_variance",
            },
            "score_sub_vp": {"path": "sub_vp", "target": "noise"},
            "zero_snr": {"path": "ddpm_table_zero_snr", "target": "v", "times": "discrete"},
            "edm": _EDM,
            "edm2": {**_EDM, "times": "log_normal_edm2", "wrappers": "uncertainty"},
            "simple": {"path": "cosine_shifted", "target": "v"},
            "vdm": {
                "path": "linear_log_snr",
                "target": "noise",
                "weight": "elbo",
                "uniforms": "low_discrepancy",
                "noise_label": "log_snr",
            },
            "vdm_plus": {
                "path": "cosine",
                "target": "v",
                "weight": "sigmoid",
                "uniforms": "low_discrepancy",
                "noise_label": "log_snr",
                "wrappers": "adaptive",
            },
            "sid2": {
                "path": "cosine_shifted",
                "target": "v",
                "weight": "sigmoid_low",
                "noise_label": "log_snr",
            },
            "sd3": {"path": "linear", "target": "velocity", "times": "logit_normal"},
            "otcfm": {"path": "linear", "target": "velocity", "coupling": "ot"},
            "contrastive": {"path": "linear", "target": "velocity", "wrappers": "contrastive"},
            "dispersive": {"path": "linear", "target": "velocity", "wrappers": "dispersive"},
            "mean_flow": {
                "path": "linear",
                "target": "velocity",
                "times": "logit_normal_mean_flow",
                "noise_label": "time_unit",
                "wrappers": "mean_flow",
            },
            "reflow": {"path": "linear", "target": "velocity", "coupling": "given"},
            "interpolant": {"path": "linear", "target": "velocity", "bridge": "sine_squared"},
            "translation": {
                "path": "linear",
                "target": "velocity",
                "coupling": "translation",
                "bridge": "sine_squared",
            },
            "bridge": {"path": "brownian_bridge", "target": "clean", "bridge": "source"},
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
        "bridge": BRIDGES,
        "noise_label": NOISE_LABELS,
        "input_scale": INPUT_SCALES,
    }
)


def copy(row: ConfigDict) -> ConfigDict:
    """A row of a table to put into a config, where flags may change it."""
    return ConfigDict(row.to_dict())
