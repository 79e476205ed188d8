"""Losses and gradients of the authors' few-step objectives for a tiny network, stored as arrays.

    git clone https://github.com/Gsunshine/meanflow /tmp/mean_flow
    git clone https://github.com/Lyy-iiis/imeanflow /tmp/imf
    git clone https://github.com/Lyy-iiis/pMF /tmp/pmf
    git clone https://github.com/kvfrans/shortcut-models /tmp/shortcut
    git clone https://github.com/openai/consistency_models_cifar10 /tmp/consistency
    git clone https://github.com/locuslab/ect /tmp/ect
    git clone https://github.com/lumalabs/tvm /tmp/tvm
    git clone https://github.com/zlab-princeton/SoFlow /tmp/soflow
    git clone https://github.com/lambertae/drifting /tmp/drifting
    git clone https://github.com/gnobitab/RectifiedFlow /tmp/instaflow
    python -m tests.references.few_steps mean_flow /tmp/mean_flow   # writes few_steps_mean_flow.npz

It needs torch for `ect`, `tvm`, `soflow` and `instaflow`, which are computed in double precision.
Each runs the authors' own loss function with the network, times and noise of this file. What they
import beside it and the loss does without (their networks, logs, haiku) is left out. IMM's
repository has no training code.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.references.dit import drawn

FOLDER = Path(__file__).parent
NUM_CLASSES, SIZE = 3, (6, 2, 3, 2)
_random = np.random.default_rng(22)
IMAGES, NOISE = (_random.normal(size=SIZE).astype(np.float32) for _ in range(2))
IMAGES = 0.5 * IMAGES
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
TIMES = np.array([0.95, 0.7, 0.5, 0.3, 0.02, 0.8], np.float32)
ENDS = np.array([0.1, 0.7, 0.2, 0.06, 0.02, 0.4], np.float32)
HERE = np.array([0.3, 0.9, 0.1, 0.5, 0.6, 0.25], np.float32)
SIGMAS = np.array([5.0, 0.7, 0.05, 0.3, 20.0, 1.5], np.float32)
SHAPES = {"in": (2, 8), "time": (8,), "second": (8,), "labels": (4, 8), "middle": (8, 8)}
PARAMS = drawn({**SHAPES, "out": (8, 2), "bias": (2,)})
AVERAGES = {name: 0.8 * value for name, value in PARAMS.items()}
# Of drifting: features of samples, negatives and positives of two conditions at one place.
DRIFTED = {
    name: np.random.default_rng(i).normal(size=(2, n, 5)).astype(np.float32)
    for i, (name, n) in enumerate({"samples": 3, "negatives": 2, "positives": 4}.items())
}
NEGATIVE_WEIGHT = np.array([0.5, 1.5], np.float32)
STAGE, LEVELS = 3, 12
PLACES = np.array([2, 0, 10, 5, 7, 9])  # of the levels, from the highest, in consistency training


def network(tanh: Callable, p: Mapping[str, Any], x: Any, t: Any, second: Any, label: Any) -> Any:
    """A network of NumPy, JAX or torch: `x[B, H, W, C]`, two times `[B]`, labels `[B]`."""

    def over(number: Any) -> Any:
        return number[:, None, None, None]

    wide = {name: p[name][None, None, None, :] for name in ("time", "second", "bias")}
    h = x @ p["in"] + over(t) * wide["time"] + over(second) * wide["second"]
    h = tanh(tanh(h + p["labels"][label][:, None, None, :]) @ p["middle"])
    return h @ p["out"] + wide["bias"]


def level(i: np.ndarray) -> np.ndarray:
    """Level i from the highest of EDM's."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (high + i / (LEVELS - 1) * (low - high)) ** 7


def without(*names: str) -> None:
    """Puts empty modules in the places of those that the loss does without."""
    for name in names:
        sys.modules[name] = ModuleType(name)


def clipping_as_before() -> None:
    """JAX had other names for the bounds of `clip` when these were written."""
    import jax.numpy as jnp

    clip = jnp.clip

    def named(x: Any, low: Any = None, high: Any = None, a_min: Any = None, a_max: Any = None):
        return clip(x, low if a_min is None else a_min, high if a_max is None else a_max)

    jnp.clip = named


def in_jax(loss: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """The loss and its gradient."""
    import jax

    value, gradient = jax.value_and_grad(loss)(PARAMS)
    return {"loss": value, **{f"d_{name}": x for name, x in gradient.items()}}


def velocity_head(u: Any, x: Any) -> Any:
    """The second output of a network of two, from the first."""
    return 0.5 * u + 0.3 * x


def _of_mean_flow(
    clone: str, module: str, heads: bool = False, **how: Any
) -> dict[str, np.ndarray]:
    """MeanFlow, improved MeanFlow and pixel MeanFlow are Flax modules with the network as `net`."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    sys.path.insert(0, clone)
    clipping_as_before()
    without("models")
    networks = {name: SimpleNamespace(**{name: Any}) for name in ("imfDiT", "pmfDiT")}
    sys.modules["models"].__dict__.update(models_dit=None, **networks)
    authors = importlib.import_module(module)
    name = {"meanflow": "MeanFlow", "imf": "iMeanFlow", "pmf": "pixelMeanFlow"}[module]
    kind = getattr(authors, name)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, t: Any, h: Any, *rest: Any, **_: Any) -> Any:
            p = {name: self.param(name, lambda *_: None) for name in PARAMS}
            label = rest[-1]

            def u_of(span: Any) -> Any:
                out = network(jnp.tanh, p, x, t, span, label)
                over = jnp.clip(t, 0.05, 1.0)[:, None, None, None]
                return (x - out) / over if module == "pmf" else out

            if heads:
                return u_of(h), velocity_head(u_of(h), x)
            # The head for the velocity, of which only the value counts here.
            v = jax.lax.stop_gradient(u_of(jnp.zeros_like(h)))
            return u_of(h) if module == "meanflow" else (u_of(h), v)

    def column(x: np.ndarray) -> Any:
        return jnp.asarray(x)[:, None, None, None]

    class Given(kind):
        def setup(self) -> None:
            self.net = Net(name="net")

        def sample_tr(self, bz: int) -> Any:
            both = column(TIMES), column(ENDS)
            return both if module == "meanflow" else (*both, column(TIMES) == column(ENDS))

        def sample_cfg_scale(self, bz: int, s_max: float = 7.0) -> Any:
            return jnp.ones((bz, 1, 1, 1))

    jax.random.normal = lambda *_, **__: jnp.asarray(NOISE)
    settings = {"num_classes": NUM_CLASSES, "class_dropout_prob": 0.0, "model_str": "", **how}
    flow = Given(**settings)

    def forward(params: Any) -> Any:
        rngs = {"gen": jax.random.key(0)}
        found = flow.apply(
            {"params": {"net": params}}, jnp.asarray(IMAGES), LABELS, method="forward", rngs=rngs
        )
        if module == "meanflow" or heads:
            return found[0]
        # Less the loss of the head, whose velocity is that over no time.
        t = column(TIMES)
        x_t = (1 - t) * IMAGES + t * NOISE
        net = Net()
        v: Any = net.apply({"params": params}, x_t, TIMES, 0 * TIMES, LABELS)
        target = (x_t - IMAGES) / jnp.clip(t, 0.05, 1.0) if module == "pmf" else NOISE - IMAGES
        head = jnp.sum(jnp.square(v[1] - target), axis=(1, 2, 3))
        return found[0] - jnp.mean(head / (head + 0.01))

    return in_jax(forward)


def mean_flow(clone: str) -> dict[str, np.ndarray]:
    """With guidance, as their configs have it (kappa ½) but for omega."""
    return _of_mean_flow(clone, "meanflow", model_config={}, omega=0.8, kappa=0.5)


def imf(clone: str) -> dict[str, np.ndarray]:
    """Without guidance and less the loss of the second head."""
    return _of_mean_flow(clone, "imf")


def imf_heads(clone: str) -> dict[str, np.ndarray]:
    """The same with the second head."""
    return _of_mean_flow(clone, "imf", heads=True)


def pmf(clone: str) -> dict[str, np.ndarray]:
    """Without guidance and perceptual losses and less the loss of the second head."""
    return _of_mean_flow(clone, "pmf")


def shortcut(clone: str) -> dict[str, np.ndarray]:
    """16 examples, half of them two steps; their draws are stored."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, clone)
    authors = importlib.import_module("targets_shortcut")
    images = jnp.concatenate([jnp.asarray(IMAGES)] * 3)[:16]
    labels = jnp.concatenate([jnp.asarray(LABELS)] * 3)[:16]

    def evaluate(params: Any) -> Callable:
        def call(x: Any, t: Any, base: Any, labels: Any, **_: Any) -> Any:
            span = jnp.where(base == 7, 0.0, 0.5**base)
            # Their time runs to the data, and so does their velocity.
            return -network(jnp.tanh, params, x, 1 - t, span, labels)

        return call

    flags = SimpleNamespace(
        batch_size=16,
        model={
            "bootstrap_every": 2,
            "denoise_timesteps": 128,
            "bootstrap_dt_bias": 0,
            "bootstrap_ema": 1,
            "bootstrap_cfg": 0,
            "class_dropout_prob": 0.0,
            "num_classes": NUM_CLASSES,
        },
    )
    state = SimpleNamespace(call_model=evaluate(PARAMS), call_model_ema=evaluate(AVERAGES))
    x, v, t, base, labels, _ = authors.get_targets(
        flags, jax.random.PRNGKey(0), state, images, labels
    )
    span = np.where(base == 7, 0.0, 0.5 ** np.asarray(base, np.float32))
    noise = (x - t[:, None, None, None] * jnp.concatenate([images[:8], images[:8]])) / (
        1 - (1 - 1e-5) * t[:, None, None, None]
    )

    def loss(params: Any) -> Any:
        out = evaluate(params)(x, t, base, labels)
        return jnp.mean(jnp.mean(jnp.square(out - v), axis=(1, 2, 3)))

    drawn = {"t": 1 - t, "ends": 1 - t - span, "noise": noise}
    return {**drawn, "labels": labels, **in_jax(loss)}


def consistency(clone: str) -> dict[str, np.ndarray]:
    """Consistency training with squares and an average as target; the denoiser is EDM's."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, clone)
    without("haiku", "jcm", "jcm.checkpoints", "jcm.models", "jcm.models.utils", "jcm.utils")
    without("jcm.sde_lib", "optax")
    modules = sys.modules
    modules["jcm"].__path__ = [f"{clone}/jcm"]  # type: ignore[attr-defined]
    for name in ("checkpoints", "models", "sde_lib"):
        setattr(modules["jcm"], name, modules[f"jcm.{name}"])
    modules["jcm.models"].utils = modules["jcm.models.utils"]  # type: ignore[attr-defined]
    sde = type("KVESDE", (), {"t_min": 0.002, "t_max": 80.0, "rho": 7.0, "N": LEVELS})
    modules["jcm.sde_lib"].KVESDE = sde  # type: ignore[attr-defined]
    modules["haiku"].PRNGSequence = lambda key: iter(jax.random.split(key, 9))  # type: ignore
    modules["jcm.utils"].batch_mul = jax.vmap(lambda a, b: a * b)  # type: ignore

    def denoiser(_: Any, model: Any, params: Any, states: Any, **__: Any) -> Callable:
        def evaluate(x: Any, sigma: Any, rng: Any = None) -> Any:
            return of_edm(jnp, params, x, sigma), states

        return evaluate

    modules["jcm.models.utils"].get_distiller_fn = denoiser  # type: ignore[attr-defined]
    modules["jcm.models.utils"].get_denoiser_fn = lambda *_, **__: None  # type: ignore
    authors = importlib.import_module("jcm.losses")
    jax.random.randint = lambda *_, **__: jnp.asarray(PLACES)
    jax.random.normal = lambda *_, **__: jnp.asarray(NOISE)
    loss_of = authors.get_consistency_loss_fn(
        sde(), None, None, None, None, True, "l2", solver="euler", dsm_target=True
    )
    batch = {"image": jnp.asarray(IMAGES), "mask": jnp.ones(len(IMAGES))}
    key = jax.random.PRNGKey(0)
    return in_jax(lambda params: loss_of(key, params, {}, batch, AVERAGES, LEVELS)[0])


def of_edm(xp: Any, params: Any, x: Any, sigma: Any) -> Any:
    """EDM's denoiser of `x[B, H, W, C]` at `sigma[B]` around the network."""
    s = sigma[:, None, None, None]
    unit = (s**2 + 0.25) ** 0.5
    second, label = 0 * sigma, xp.asarray(LABELS)
    out = network(xp.tanh, params, x / unit, xp.log(sigma) / 4, second, label)
    return 0.25 / unit**2 * x + 0.5 * s / unit * out


def in_torch(loss_of: Callable[[Any, Any], Any]) -> dict[str, np.ndarray]:
    """The losses of the examples and the gradient of their mean."""
    own = {name: _double(x).requires_grad_() for name, x in PARAMS.items()}
    loss = loss_of(own, {name: _double(x) for name, x in AVERAGES.items()})
    loss.mean().backward()
    found = {f"d_{name}": np.asarray(x.grad) for name, x in own.items() if x.grad is not None}
    return {"loss": loss.detach().numpy(), **found}


def first_channels(x: Any) -> Any:
    """`[B, H, W, C]` as `[B, C, H, W]`, in double precision."""
    return _double(x).permute(0, 3, 1, 2).contiguous()


def _double(x: Any) -> Any:
    import torch

    return torch.as_tensor(x).double()


def ect(clone: str) -> dict[str, np.ndarray]:
    """Stage 3 of the schedule with q = 2."""
    import torch

    sys.path.insert(0, clone)
    without("torch_utils", "torch_utils.persistence", "torch_utils.distributed")
    modules = sys.modules
    modules["torch_utils.persistence"].persistent_class = lambda kind: kind  # type: ignore
    modules["torch_utils.distributed"].print0 = print  # type: ignore[attr-defined]
    modules["torch_utils"].__dict__.update(
        persistence=modules["torch_utils.persistence"],
        distributed=modules["torch_utils.distributed"],
    )
    loss_of: Any = importlib.import_module("training.loss").ECMLoss()
    loss_of.update_schedule(STAGE)
    normal = (np.log(SIGMAS.astype(np.float64)) + 1.1) / 2.0
    torch.randn = lambda *_, **__: _double(normal)[:, None, None, None]
    torch.randn_like = lambda *_, **__: first_channels(NOISE)
    torch.cuda.get_rng_state = torch.cuda.set_rng_state = lambda *_: None
    xp = SimpleNamespace(tanh=torch.tanh, log=torch.log, asarray=_labels)

    def loss(own: Any, averages: Any) -> Any:
        del averages

        def net(x: Any, sigma: Any, labels: Any, **_: Any) -> Any:
            level = torch.clamp(sigma.flatten(), min=1e-6)
            return first_channels(of_edm(xp, own, x.permute(0, 2, 3, 1), level))

        return loss_of(net, first_channels(IMAGES))

    return in_torch(loss)


def _labels(labels: Any) -> Any:
    import torch

    return torch.as_tensor(labels).long()


def _torch_network(params: Any, x: Any, t: Any, second: Any, labels: Any) -> Any:
    import torch

    label = torch.full((len(x),), NUM_CLASSES) if labels is None else _labels(labels)
    out = network(torch.tanh, params, x.permute(0, 2, 3, 1), t.flatten(), second.flatten(), label)
    return first_channels(out)


def tvm(clone: str) -> dict[str, np.ndarray]:
    """With guidance of scale 2 (theirs is divided by its square) and without labels."""
    import torch

    sys.path.insert(0, clone)
    without("torch_utils", "torch_utils.persistence", "training.dit")
    modules = sys.modules
    modules["torch_utils.persistence"].persistent_class = lambda kind: kind  # type: ignore
    modules["torch_utils"].persistence = modules["torch_utils.persistence"]  # type: ignore
    authors: Any = importlib.import_module("training.wrapper").TVMWrapper

    def around(params: Any) -> Any:
        made = authors.__new__(authors)
        torch.nn.Module.__init__(made)
        made.dtype, made.label_dim = torch.float32, 0
        made.detach_jvp = made.do_scale_param = False

        def model(x: Any, t: Any, span: Any, class_labels: Any = None, *_: Any, **__: Any) -> Any:
            x, t, span = (_double(each) for each in (x, t, span))
            return _torch_network(params, x, t, span, class_labels)

        object.__setattr__(made, "model", model)
        return made

    def column(x: np.ndarray) -> Any:
        return _double(x)[:, None, None, None]

    t, s, here = column(TIMES), column(ENDS - 0.01), column(HERE)
    images, noise = first_channels(IMAGES), first_channels(NOISE)

    def loss(own: Any, averages: Any) -> Any:
        x_t, x_here = ((1 - time) * images + time * noise for time in (t, here))
        scale = torch.full_like(t, 0.5)
        parts = (x_t, x_here, t, s, here, None, scale, noise - images)
        return around(own).forward(*parts, teacher_model=around(averages))[0]

    return in_torch(loss)


def soflow(clone: str) -> dict[str, np.ndarray]:
    """Both losses with guidance of scale 3, mixed by ¼, for all examples."""
    import torch

    sys.path.insert(0, clone)
    without("unet", "dit")
    sys.modules["unet"].SongUNet = sys.modules["dit"].DiT = None  # type: ignore[attr-defined]
    models: Any = importlib.import_module("models")
    torch.randn_like = lambda *_, **__: first_channels(NOISE)
    torch.cuda.get_rng_state = torch.cuda.set_rng_state = lambda *_: None
    made = models.Soflow.__new__(models.Soflow)
    torch.nn.Module.__init__(made)
    made.scheduler, made.num_classes = models.Scheduler(), NUM_CLASSES
    labels = torch.tensor(LABELS).long()
    shared = {"labels": labels, "cfg_mask": torch.zeros(len(labels), dtype=torch.bool)}
    shared |= {"cfg_scale": 3.0, "cfg_decay_time": 1.0, "p": 1.0, "eps": 0.01, "mix_ratio": 0.25}
    images, t = first_channels(IMAGES), _double(TIMES)[:, None, None, None]
    s = _double(ENDS - 0.01)[:, None, None, None]
    middle = made.get_middle_time(t, s, 1, 2)

    def of(which: Callable) -> dict[str, np.ndarray]:
        def loss(own: Any, averages: Any) -> Any:
            del averages

            def net(x: Any, t: Any, s: Any, labels: Any = None, *_: Any) -> Any:
                return _torch_network(own, x, t, t.flatten() - s.flatten(), labels)

            object.__setattr__(made, "network", net)
            return which()[0]

        return in_torch(loss)

    flow = of(lambda: made.get_velocity_loss(images, t, **shared))
    steps = of(lambda: made.get_consistency_loss(images, t, middle, s, **shared))
    return {**{f"flow_{k}": v for k, v in flow.items()}, **steps}


def drifting(clone: str) -> dict[str, np.ndarray]:
    """The loss and the gradient of features of samples."""
    import jax

    sys.path.insert(0, clone)
    clipping_as_before()
    without("einops")
    sys.modules["einops"].repeat = None  # type: ignore[attr-defined]
    authors = importlib.import_module("drift_loss")
    weight = np.broadcast_to(NEGATIVE_WEIGHT[:, None], (2, 2))

    def loss(samples: Any) -> Any:
        rest = DRIFTED["positives"], DRIFTED["negatives"]
        return authors.drift_loss(samples, *rest, weight_neg=weight)[0]

    gradient = jax.grad(lambda samples: loss(samples).mean())(DRIFTED["samples"])
    return {"loss": loss(DRIFTED["samples"]), "d_samples": gradient}


def instaflow(clone: str) -> dict[str, np.ndarray]:
    """The second stage with the mean square, by its authors' code for CIFAR-10 from pure noise."""
    sys.path.insert(0, f"{clone}/ImageGeneration")
    without("models", "models.utils", "sde_lib")
    sys.modules["models"].utils = sys.modules["models.utils"]  # type: ignore[attr-defined]
    sys.modules["sde_lib"].__dict__.update(VESDE=int, VPSDE=int, RectifiedFlow=int)
    losses: Any = importlib.import_module("losses")
    flow = SimpleNamespace(reflow_flag=True, reflow_t_schedule="t0", reflow_loss="l2", T=1.0)

    def loss(own: Any, averages: Any) -> Any:
        del averages

        def model(x: Any, label: Any) -> Any:
            """Their time is from noise to data, times 999, and so is their velocity."""
            t = 1.0 - label / 999
            return -_torch_network(own, x, t, 0 * t, LABELS)

        losses.mutils.get_model_fn = lambda *_, **__: model
        of = losses.get_rectified_flow_loss_fn(flow, train=True, eps=0.0)
        return of(None, (first_channels(NOISE), first_channels(IMAGES)))

    return in_torch(loss)


def main(name: str, clone: str) -> None:
    """Runs the authors' loss of this name."""
    found = globals()[name](clone)
    arrays = {key: np.asarray(value, np.float32) for key, value in found.items()}
    np.savez_compressed(FOLDER / f"few_steps_{name}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
