"""Trajectories of solvers against diffusers' schedulers and k-diffusion's samplers, step by step.

All are given the same closed-form model, noise levels and random numbers. Without diffusers
(`pip install -e '.[parity]'`) these tests are skipped; without k-diffusion
(`pip install --no-deps k-diffusion`) those that need it are.
"""

import importlib
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.oracle import analytic
from diffjax.process.beta_tables import LinearBetas
from diffjax.process.paths import Linear, LinearBeta, Pair, time_of_log_snr
from diffjax.process.schedules import EDM
from diffjax.sampling import adams, dpm_solver, runge_kutta, solvers, unipc
from diffjax.sampling.grids import Karras, Linspace, Trailing
from diffjax.sampling.sample import sample
from diffjax.sampling.solvers import Interval
from tests.support.later import Later, needs
from tests.support.peers import k_diffusion

diffusers: Any = Later("diffusers")
torch: Any = Later("torch")
pytestmark = [pytest.mark.parity, needs("diffusers"), needs("torch")]

DATA = analytic.GaussianMixture(
    jnp.array([0.3, 0.7]), jnp.array([[0.8, -0.5], [-0.6, 0.9]]), 0.05 * jnp.stack([jnp.eye(2)] * 2)
)
N = 10
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
ZERO_END = {**TABLE, "final_sigmas_type": "zero", "lower_order_final": False}
NOISE = np.random.default_rng(0).standard_normal((N + 1, 6, 2)).astype(np.float32)


@cache
def denoiser(path):
    predict = DATA.predict(path)
    return jax.jit(lambda x, t: predict(x, jnp.full(len(x), t, jnp.float32), None))


def trajectory(solver, path, times, x):
    """`x` at every time of a grid, with the given random numbers."""
    memory, xs = solver.init(x), [x]
    for i in range(len(times) - 2):
        x, memory = step(solver, path, memory, x, times[i : i + 2], NOISE[i])
        xs.append(x)
    return np.stack([*xs, denoiser(path)(x, jnp.float32(times[-2])).x0])


def follow(solver, path, times, xs):
    """Where each step ends that begins on another's trajectory, all but the last."""
    memory, ends = solver.init(jnp.asarray(xs[0])), []
    for i in range(len(times) - 2):
        end, memory = step(solver, path, memory, jnp.asarray(xs[i]), times[i : i + 2], NOISE[i])
        ends.append(end)
    return np.stack(ends)


def step(solver, path, memory, x, ends, noise):
    t, t_next = jnp.asarray(ends, jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "normal", lambda keys, shape: jnp.asarray(noise))
        return solver.step(denoiser(path), Interval(path, t, t_next, jnp.zeros(())), memory, x)


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch):
    draws = iter(NOISE)
    for module in (
        "ddpm", "ddim", "euler_ancestral_discrete", "sasolver", "edm_dpmsolver_multistep"
    ):  # fmt: skip
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
    a, s = (np.asarray(of(jnp.asarray(times, jnp.float32))) for of in (path.alpha, path.sigma))
    scale = a if scaled else np.ones_like(a)
    xs = [s[0] * NOISE[-1]]
    now = torch.tensor(xs[0] / scale[0])
    count = len(scheduler.timesteps)
    for k, step in enumerate(scheduler.timesteps[: count if to_end else count - 1]):
        level = (k + calls - 1) // calls
        x, t = now.numpy() * scale[level], times[level]
        pair = denoiser(path)(x, t)
        scheduler.scale_model_input(now, step) if hasattr(scheduler, "scale_model_input") else None
        arguments = {name: _tensor(values[k]) for name, values in each.items()}
        predicted = torch.tensor(np.array(output(x, t, pair), np.float32))
        now = scheduler.step(predicted, step, now, **arguments).prev_sample
        if (k + 1) % calls == 0 or k + 1 == count:
            xs.append(now.numpy() * scale[len(xs)])
    return np.stack(xs)


def _tensor(value):
    return value if isinstance(value, float | int) else torch.tensor(value)


def noise(x, t, pair):
    return pair.eps


def check(solver, scheduler, path, times, output, **how):
    expected = theirs(scheduler, path, times, output, **how)
    ours = trajectory(solver, path, times, jnp.asarray(expected[0]))[: len(expected)]
    assert_close(path, times, ours, expected)


def assert_close(path, times, ours, expected):
    """To float tolerance, in units of `√(a² + s²)`."""
    t = jnp.asarray(times, jnp.float32)[: len(expected)]
    scale = np.hypot(path.alpha(t), path.sigma(t))[:, None, None]
    np.testing.assert_allclose(ours / scale, expected / scale, rtol=5e-6, atol=1e-5)


def dpm(**settings):
    return diffusers.DPMSolverMultistepScheduler(**{**ZERO_END, **settings})


def uni(**settings):
    return diffusers.UniPCMultistepScheduler(**ZERO_END, **settings)


def deis(**settings):
    return diffusers.DEISMultistepScheduler(**TABLE, lower_order_final=False, **settings)


def single(**settings):
    return diffusers.DPMSolverSinglestepScheduler(**ZERO_END, solver_order=1, **settings)


def sa(order):
    """SA-Solver's predictor, with as much noise as DDPM; its corrector leaves all as it is."""
    scheduler = diffusers.SASolverScheduler(
        **TABLE, predictor_order=order, tau_func=lambda t: 1.0, lower_order_final=False
    )
    scheduler.stochastic_adams_moulton_update = lambda this_sample, **rest: this_sample
    return scheduler


@cache
def pndm():
    """As if the second evaluation of its first step returned the same as the first."""

    class PNDM(diffusers.PNDMScheduler):
        def set_timesteps(self, n):
            super().set_timesteps(n)
            self.timesteps = self.timesteps.unique().flip(0)

        def step(self, output, step, x):
            if self.counter == 0:
                super().step(output, step, x)
                step = self.timesteps[1]
            return super().step(output, step, x)

    return PNDM


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
        (
            solvers.ddpm(share=1.0),
            lambda: diffusers.DDPMScheduler(
                **TABLE, clip_sample=False, variance_type="fixed_large"
            ),
            {},
        ),
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
        (
            adams.lms(2),
            lambda: diffusers.LMSDiscreteScheduler(**TABLE),
            {"scaled": True, "to_end": False, "order": [2] * N},
        ),
        (
            solvers.ddpm(),
            lambda: diffusers.EulerAncestralDiscreteScheduler(**TABLE),
            {"scaled": True},
        ),
        (adams.plms(), lambda: pndm()(**TABLE, skip_prk_steps=True), {"to_end": False}),
        (
            adams.deis(2),
            lambda: dpm(
                algorithm_type="dpmsolver", solver_type="heun", final_sigmas_type="sigma_min"
            ),
            {"to_end": False},
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
        (
            adams.exp_ab(2, eta=1.0),
            lambda: dpm(solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="heun"),
            {"variance_noise": NOISE},
        ),
        (
            solvers.ddpm(),
            lambda: dpm(solver_order=1, algorithm_type="sde-dpmsolver++"),
            {"variance_noise": NOISE},
        ),
        (solvers.ddim(), single, {}),
        (adams.exp_ab(1, eta=1.0), lambda: sa(1), {"to_end": False}),
        *(
            (
                unipc.unipc(order, scale),
                lambda p=order, b=name: uni(solver_order=p, solver_type=b),
                {"to_end": False},
            )
            for order in (1, 2, 3)
            for scale, name in ((unipc.BH1(), "bh1"), (unipc.BH2(), "bh2"))
        ),
        *(
            (
                unipc.unipc(order, corrector=False),
                lambda p=order: uni(solver_order=p, disable_corrector=list(range(N))),
                {"to_end": False},
            )
            for order in (2, 3)
        ),
    ],
)  # fmt: skip
def test_on_ddpms_table(solver, scheduler, how):
    scheduler = scheduler()
    scheduler.set_timesteps(N)
    steps = np.unique(scheduler.timesteps.numpy())[::-1]
    check(solver, scheduler, LinearBetas(), np.append((steps + 1.0) / 1000, 0.0), noise, **how)


def test_three_evaluations_of_sa_solver():
    """Diffusers adds a term to each step of two, which all but the second of these do without."""
    scheduler = sa(3)
    scheduler.set_timesteps(N)
    times = np.append((scheduler.timesteps.numpy() + 1.0) / 1000, 0.0)
    path, solver = LinearBetas(), adams.exp_ab(3, eta=1.0)
    xs = theirs(scheduler, path, times, noise, to_end=False)
    ends = follow(solver, path, times, xs)
    assert_close(path, times[3:], ends[2:], xs[3:])


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
        *(
            (dpm_solver.dpmpp_multistep(p), "DPMSolverMultistepScheduler", {"solver_order": p})
            for p in (2, 3)
        ),
        (
            dpm_solver.dpmpp_multistep(2, eta=1.0),
            "DPMSolverMultistepScheduler",
            {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        ),
        (unipc.unipc(2), "UniPCMultistepScheduler", {"solver_order": 2}),
    ],
)  # fmt: skip
def test_the_schedulers_of_tables_on_the_linear_path(solver, name, settings):
    scheduler = getattr(diffusers, name)(
        **ZERO_END, **settings, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(N)
    noises = {"variance_noise": NOISE} if solver.fresh_noise else {}
    check(
        solver, scheduler, Linear(), scheduler.sigmas.numpy(),
        lambda x, t, pair: pair.eps - pair.x0, to_end=False, **noises,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "name", "settings"),
    [
        (solvers.ddim(), "EDMEulerScheduler", {}),
        (
            dpm_solver.dpmpp_multistep(2, eta=1.0),
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False},
        ),
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
    now, xs = torch.tensor(NOISE[-1]), [NOISE[-1]]
    for k, step in enumerate(scheduler.timesteps):
        eps = np.array(denoiser(path)(now.numpy().astype(np.float32), times[k]).eps)
        now = scheduler.step(torch.tensor(eps), step, now).prev_sample
        xs.append(now.numpy())
    ours = trajectory(dpm_solver.dpmpp_2s(), path, [*times[::2], 0.0], jnp.asarray(NOISE[-1]))
    # The last but one of diffusers' calls is of first order, whatever order is set.
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
                ends = jnp.asarray(times[i]), jnp.asarray(times[i + 1])
                x, memory = solver.step(
                    lambda x, t, square=square: square,
                    Interval(path, *ends, jnp.zeros(())),
                    memory,
                    jnp.full((1, 1), 0.7),
                )
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


def linear_end(scheduler, n, deviation):
    """Mean and deviation of diffusers' samples of data `N(0.8, deviation²)`.

    Its samples are linear in the noise that they begin with: two of them say all.
    """
    scheduler.set_timesteps(n)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for step in scheduler.timesteps:
        a = scheduler.alphas_cumprod[step].double() ** 0.5
        s = (1.0 - a**2) ** 0.5
        eps = s * (x - a * 0.8) / ((a * deviation) ** 2 + s**2)
        x = scheduler.step(eps, step, x).prev_sample
    return float(x[0, 0]), float(x[1, 0] - x[0, 0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("PNDMScheduler", {"skip_prk_steps": True}), ("DEISMultistepScheduler", {})],
)
def test_diffusers_schedulers_that_leave_noise(name, settings):
    """Data of one point: by default they end at the table's first step, whose noise is 0.01."""
    mean, left = linear_end(getattr(diffusers, name)(**TABLE, **settings), 20, 0.0)
    assert mean == pytest.approx(0.8, abs=1e-3)
    assert left == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("n", [100, 400])
def test_diffusers_ddim_steps_elsewhere_than_its_grid(n):
    """It goes down by `1000 // n` where its grid does by 1000/n: 2, not 2.5, of 400 steps."""
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing")
    theirs = linear_end(scheduler, n, 0.5)
    path, data = LinearBetas(), analytic.Gaussian(jnp.array([0.8]), jnp.array([[0.25]]))
    predict, keys = data.predict(path), jax.random.split(jax.random.key(0), 2)
    ours = sample(
        lambda x, t: predict(x, jnp.full(2, t), None), solvers.ddim(), path,
        Trailing()(path, n), keys, jnp.array([[0.0], [1.0]]),
    )  # fmt: skip
    ours = float(ours[0, 0]), float(ours[1, 0] - ours[0, 0])
    assert ours == pytest.approx((0.8, 0.5), abs=0.02)
    if n == 100:
        assert theirs == pytest.approx(ours, abs=1e-4)
    else:  # nothing that more steps would mend
        assert theirs == pytest.approx((0.69, 0.57), abs=0.01)


@pytest.fixture(scope="module")
def sampling():
    """k-diffusion's samplers alone: its other modules ask for libraries that these never call."""
    with k_diffusion():
        return importlib.import_module("k_diffusion.sampling")


def by_k_diffusion(sampler, times, **settings):
    """`x` at every time of a grid on EDM's path, as one of k-diffusion's samplers walks it."""
    xs = []

    def model(x, sigma):
        return torch.tensor(np.array(denoiser(EDM())(x.numpy(), sigma.numpy()[0]).x0))

    start = torch.tensor(times[0] * NOISE[-1])
    keep = lambda now: xs.append(now["x"].numpy())  # noqa: E731
    end = sampler(model, start, torch.tensor(times), callback=keep, disable=True, **settings)
    return np.stack([*xs, end.numpy()])


def given_noise():
    draws = iter(NOISE)
    return lambda sigma, sigma_next: torch.tensor(next(draws))


@cache
def karras_times():
    return np.asarray(Karras()(EDM(), N))


@pytest.mark.parametrize(
    ("solver", "name", "settings"),
    [
        (solvers.ddim(), "sample_euler", {}),
        (solvers.euler(), "sample_euler", {}),
        (solvers.ddpm(), "sample_euler_ancestral", {}),
        (solvers.ddim(eta=0.6), "sample_euler_ancestral", {"eta": 0.6}),
        (runge_kutta.edm_heun(), "sample_heun", {}),
        (solvers.heun(), "sample_heun", {}),
        (adams.lms(4), "sample_lms", {}),
        (adams.lms(2), "sample_lms", {"order": 2}),
        (adams.ab(3), "sample_lms", {"order": 3}),  # σ is the time
        (dpm_solver.dpmpp_2s(), "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
        (dpm_solver.dpmpp_multistep(2), "sample_dpmpp_2m", {}),
        (unipc.unipc(2, corrector=False), "sample_dpmpp_2m", {}),
        (dpm_solver.dpmpp_multistep(2, eta=1.0), "sample_dpmpp_2m_sde", {}),
        (dpm_solver.dpmpp_multistep(2, eta=0.4), "sample_dpmpp_2m_sde", {"eta": 0.4}),
        (adams.exp_ab(2, eta=0.4), "sample_dpmpp_2m_sde", {"eta": 0.4, "solver_type": "heun"}),
    ],
)
def test_k_diffusions_samplers(sampling, solver, name, settings):
    if solver.fresh_noise:
        settings = {**settings, "noise_sampler": given_noise()}
    # The last step of its LMS is of high order; here it is x0, as everywhere.
    times = karras_times()[:-1] if name == "sample_lms" else karras_times()
    expected = by_k_diffusion(getattr(sampling, name), times, **settings)
    ours = trajectory(solver, EDM(), karras_times(), jnp.asarray(expected[0]))
    assert_close(EDM(), times, ours[: len(expected)], expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_k_diffusions_third_order_sampler(sampling, eta):
    """From the third step on; in the second, of order 2, it has exp_ab's weight."""
    sampler = sampling.sample_dpmpp_3m_sde
    xs = by_k_diffusion(sampler, karras_times(), eta=eta, noise_sampler=given_noise())
    for solver, steps in (
        (dpm_solver.dpmpp_multistep(3, eta), slice(2, None)),
        (adams.exp_ab(2, eta), slice(0, 2)),
    ):
        ends = follow(solver, EDM(), karras_times(), xs)
        assert_close(EDM(), karras_times()[1:-1][steps], ends[steps], xs[1:-1][steps])


@pytest.mark.parametrize("steps", [3, 6, N - 1])
def test_k_diffusions_churn(sampling, steps, monkeypatch):
    """Ends of walks, since its callback has `x` with the noise that was added."""
    draws = iter(NOISE)
    monkeypatch.setattr("torch.randn_like", lambda x: torch.tensor(next(draws)))
    times = karras_times()[: steps + 1]
    limits = {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    xs = by_k_diffusion(sampling.sample_heun, times, s_churn=0.1 * steps, **limits)
    solver = runge_kutta.edm_heun(churn=0.1, low=0.05, high=50.0, noise=1.003)
    ours = trajectory(solver, EDM(), [*times, 0.0], jnp.asarray(xs[0]))
    assert_close(EDM(), times[-1:], ours[[-2]], xs[[-1]])
