"""Trajectories of solvers against those of diffusers' schedulers, step by step.

Both are given the same closed-form model, noise levels and random numbers. Without diffusers
(`pip install -e '.[parity]'`) these tests are skipped.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.process import analytic
from diffjax.process.beta_tables import LinearBetas
from diffjax.process.paths import Linear, LinearBeta, Pair, time_of_log_snr
from diffjax.process.schedules import EDM
from diffjax.sampling import adams, dpm_solver, runge_kutta, solvers, unipc
from diffjax.sampling.grids import Karras, Linspace, Trailing

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

DATA = analytic.GaussianMixture(
    jnp.array([0.3, 0.7]), jnp.array([[0.8, -0.5], [-0.6, 0.9]]), 0.05 * jnp.stack([jnp.eye(2)] * 2)
)
N = 10
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
ZERO_END = {**TABLE, "final_sigmas_type": "zero", "lower_order_final": False}
NOISE = np.random.default_rng(0).standard_normal((N + 1, 6, 2)).astype(np.float32)


def trajectory(solver, path, times, x):
    """`x` at every time of a grid, with the given random numbers."""
    predict = DATA.predict(path)

    def denoise(x, t):
        return predict(x, jnp.full(len(x), t), None)

    memory, xs = solver.init(x), [x]
    for i, (t, t_next) in enumerate(pairwise(times[:-1])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solvers, "normal", lambda keys, shape, i=i: jnp.asarray(NOISE[i]))
            x, memory = solver.step(
                denoise, path, memory, x, jnp.float32(t), jnp.float32(t_next), jnp.zeros(())
            )
        xs.append(x)
    return np.stack([*xs, denoise(x, jnp.float32(times[-2])).x0])


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch):
    draws = iter(NOISE)
    for module in ("ddpm", "ddim"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda *args, **kwargs: torch.tensor(next(draws)),
        )


def theirs(scheduler, path, times, output, *, calls=1, scaled=False, to_end=True, **each):
    """`x` at every time of a grid, as diffusers walks it.

    Args:
        scheduler: with its steps set.
        path: on which its noise levels are `times`.
        times: the same as the scheduler's, from noise to 0.
        output: `(x, t, pair) -> what its model predicts`.
        calls: of `step` for each interval.
        scaled: whether its samples are `x/a`.
        to_end: whether it also takes the last step, to clean data.
        each: lists of further arguments of `step`, one for each call.
    """
    predict = DATA.predict(path)
    a, s = (np.asarray(of(jnp.asarray(times, jnp.float32))) for of in (path.alpha, path.sigma))
    scale = a if scaled else np.ones_like(a)
    xs = [s[0] * NOISE[-1]]
    now = torch.tensor(xs[0] / scale[0])
    count = len(scheduler.timesteps)
    for k, step in enumerate(scheduler.timesteps[: count if to_end else count - 1]):
        level = (k + calls - 1) // calls
        x, t = now.numpy() * scale[level], times[level]
        pair = predict(jnp.asarray(x), jnp.full(len(x), t, jnp.float32), None)
        scheduler.scale_model_input(now, step) if hasattr(scheduler, "scale_model_input") else None
        arguments = {name: _tensor(values[k]) for name, values in each.items()}
        predicted = torch.tensor(np.array(output(x, t, pair), np.float32))
        now = scheduler.step(predicted, step, now, **arguments).prev_sample
        if (k + 1) % calls == 0 or k + 1 == count:
            xs.append(now.numpy() * scale[len(xs)])
    return np.stack(xs)


def _tensor(value):
    return value if isinstance(value, float) else torch.tensor(value)


def noise(x, t, pair):
    return pair.eps


def check(solver, scheduler, path, times, output, **how):
    expected = theirs(scheduler, path, times, output, **how)
    ours = trajectory(solver, path, times, jnp.asarray(expected[0]))[: len(expected)]
    np.testing.assert_allclose(ours, expected, rtol=5e-6, atol=1e-5)


def dpm(**settings):
    return diffusers.DPMSolverMultistepScheduler(**ZERO_END, **settings)


def uni(**settings):
    return diffusers.UniPCMultistepScheduler(**ZERO_END, **settings)


def deis(**settings):
    return diffusers.DEISMultistepScheduler(**TABLE, lower_order_final=False, **settings)


@pytest.mark.parametrize(
    ("solver", "scheduler", "how"),
    [
        (solvers.ddim(), lambda: diffusers.DDIMScheduler(**TABLE, clip_sample=False), {}),
        (
            solvers.ddim(eta=0.6),
            lambda: diffusers.DDIMScheduler(**TABLE, clip_sample=False),
            {"eta": [0.6] * N},
        ),
        (solvers.ddpm(), lambda: diffusers.DDPMScheduler(**TABLE, clip_sample=False), {}),
        (solvers.ddim(), lambda: diffusers.EulerDiscreteScheduler(**TABLE), {"scaled": True}),
        (
            runge_kutta.edm_heun(),
            lambda: diffusers.HeunDiscreteScheduler(**TABLE),
            {"scaled": True, "calls": 2},
        ),
        (
            adams.lms(4),
            lambda: diffusers.LMSDiscreteScheduler(**TABLE),
            {"scaled": True, "to_end": False},
        ),
        (adams.deis(2), lambda: deis(solver_order=2), {"to_end": False}),
        (adams.deis(3), lambda: deis(solver_order=3), {"to_end": False}),
        (dpm_solver.dpmpp_multistep(2), lambda: dpm(solver_order=2), {}),
        (dpm_solver.dpmpp_multistep(3), lambda: dpm(solver_order=3), {}),
        (adams.exp_ab(2), lambda: dpm(solver_order=2, solver_type="heun"), {}),
        (
            dpm_solver.dpmpp_multistep(2, eta=1.0),
            lambda: dpm(solver_order=2, algorithm_type="sde-dpmsolver++"),
            {"variance_noise": NOISE},
        ),
        *(
            (
                unipc.unipc(order, scale),
                lambda p=order, b=scale.__name__: uni(solver_order=p, solver_type=b),
                {"to_end": False},
            )
            for order in (1, 2, 3)
            for scale in (unipc.bh1, unipc.bh2)
        ),
    ],
)  # fmt: skip
def test_on_ddpms_table(solver, scheduler, how):
    scheduler = scheduler()
    scheduler.set_timesteps(N)
    steps = np.unique(scheduler.timesteps.numpy())[::-1]
    check(solver, scheduler, LinearBetas(), np.append((steps + 1.0) / 1000, 0.0), noise, **how)


@pytest.mark.parametrize(("grid", "name"), [(Trailing(), "trailing"), (Linspace(), "linspace")])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_grids_of_ddpms_table(grid, name, n):
    scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing=name)
    scheduler.set_timesteps(n)
    times = np.append((scheduler.timesteps.numpy() + 1.0) / 1000, 0.0)
    if (name, n) == ("linspace", 1):
        times[0] = 1.0  # theirs would begin, and end, at the cleanest step
    np.testing.assert_allclose(grid(LinearBetas(), n), times, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "name", "calls"),
    [
        (solvers.euler(), "FlowMatchEulerDiscreteScheduler", 1),
        (solvers.ddim(), "FlowMatchEulerDiscreteScheduler", 1),
        (solvers.heun(), "FlowMatchHeunDiscreteScheduler", 2),
    ],
)
def test_on_the_linear_path(solver, name, calls):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(N)
    times = np.unique(scheduler.sigmas.numpy())[::-1]
    check(solver, scheduler, Linear(), times, lambda x, t, pair: pair.eps - pair.x0, calls=calls)


@pytest.mark.parametrize(
    ("solver", "name", "settings"),
    [
        (solvers.ddim(), "EDMEulerScheduler", {}),
        *(
            (
                dpm_solver.dpmpp_multistep(order),
                "EDMDPMSolverMultistepScheduler",
                {"solver_order": order, "lower_order_final": False},
            )
            for order in (2, 3)
        ),
    ],
)
def test_on_edms_path_and_grid(solver, name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(N)
    times = Karras()(EDM(), N)
    np.testing.assert_allclose(times, scheduler.sigmas, rtol=1e-5)

    def output(x, sigma, pair):
        data = scheduler.config.sigma_data
        spread = np.sqrt(sigma**2 + data**2)
        return (pair.x0 - data**2 / spread**2 * x) * spread / (sigma * data)

    check(solver, scheduler, EDM(), np.asarray(times), output)


def test_two_singlesteps_of_diffusers_are_one_step_of_ours():
    """Diffusers asks at times of its grid; every second one is half-way in log-SNR here."""
    path, levels = LinearBeta(), np.linspace(-6.0, 6.0, 2 * N + 1)
    times = np.asarray(time_of_log_snr(path, jnp.asarray(levels, jnp.float32)))
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **TABLE, solver_order=2, lower_order_final=False
    )
    scheduler.set_timesteps(2 * N)
    scheduler.sigmas = torch.tensor(np.exp(-0.5 * levels))
    predict = DATA.predict(path)
    now, xs = torch.tensor(NOISE[-1]), [NOISE[-1]]
    for k, step in enumerate(scheduler.timesteps):
        t = jnp.full(len(now), times[k])
        eps = np.array(predict(jnp.asarray(now.numpy(), jnp.float32), t, None).eps)
        now = scheduler.step(torch.tensor(eps), step, now).prev_sample
        xs.append(now.numpy())
    ours = trajectory(dpm_solver.dpmpp_2s(), path, [*times[::2], 0.0], jnp.asarray(NOISE[-1]))
    # The last but one of diffusers' calls is of first order, whatever it is asked for.
    np.testing.assert_allclose(ours[:-2], xs[:-2:2], atol=2e-5)


def test_the_third_order_sde_step_against_its_integral():
    """Where x0 is the square of λ, a third-order step is exact; diffusers' has a wrong sign.

    The solution is `x' = (s'/s)·e^{-h}·x + 2a'·∫ e^{-2(λ' - u)}·x0(u) du` plus noise.
    """
    path, levels = LinearBeta(), np.array([-0.6, -0.2, 0.1, 0.3, 0.5])  # λ = log(a/s), and an end
    times = np.asarray(time_of_log_snr(path, jnp.asarray(2.0 * levels, jnp.float32)))
    a, s = (np.asarray(of(jnp.asarray(times)), np.float64) for of in (path.alpha, path.sigma))
    u = np.linspace(levels[2], levels[3], 20_001)
    integral = np.trapezoid(2.0 * a[3] * np.exp(-2.0 * (levels[3] - u)) * u**2, u)
    exact = s[3] / s[2] * np.exp(levels[2] - levels[3]) * 0.7 + integral

    def last_step(solver):
        memory, x = solver.init(jnp.zeros((1, 1))), jnp.zeros(())
        for i in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(solvers, "normal", lambda keys, shape: jnp.zeros((1, 1)))
                square = Pair(jnp.full((1, 1), levels[i] ** 2), jnp.zeros((1, 1)))
                x, memory = solver.step(
                    lambda x, t, square=square: square, path, memory, jnp.full((1, 1), 0.7),
                    jnp.asarray(times[i]), jnp.asarray(times[i + 1]), jnp.zeros(()),
                )  # fmt: skip
        return float(x[0, 0])

    scheduler = dpm(solver_order=3, algorithm_type="sde-dpmsolver++")
    scheduler.sigmas = torch.tensor(s / a)
    scheduler._step_index = 2
    theirs = scheduler.multistep_dpm_solver_third_order_update(
        [torch.full((1, 1), level**2, dtype=torch.float64) for level in levels[:3]],
        sample=torch.full((1, 1), 0.7, dtype=torch.float64), noise=torch.zeros(1, 1),
    )  # fmt: skip
    of_third_order = abs(last_step(adams.exp_ab(3, eta=1.0)) - exact)
    as_published = abs(last_step(dpm_solver.dpmpp_multistep(3, eta=1.0)) - exact)
    assert of_third_order < 1e-6
    assert 1e-4 < as_published < 0.1 * abs(float(theirs) - exact)
