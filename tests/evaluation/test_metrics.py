"""Manifolds, extrapolation, scores, kernels and copying against closed forms and other code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from diffjax.errors import UserError
from diffjax.evaluation.scores.copying import data_copying, inauthentic
from diffjax.evaluation.scores.distances import (
    Statistics,
    frechet_distance,
    gaussian_kernel_distance,
    statistics,
)
from diffjax.evaluation.scores.extrapolation import extrapolated_distance, fewest_samples
from diffjax.evaluation.scores.inception_score import inception_score
from diffjax.evaluation.scores.manifolds import manifold_scores
from diffjax.evaluation.scores.mixtures import (
    mode_weights,
    sliced_wasserstein,
    sliced_wasserstein_to,
)
from diffjax.evaluation.scores.neighbours import nearest_neighbours
from diffjax.oracle.analytic import GaussianMixture
from diffjax.process.paths import Linear


def two_clouds(n=300, m=250, width=5, shift=0.4, dtype: Any = np.float32):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(n, width)).astype(dtype)
    return real, (0.8 * rng.normal(size=(m, width)) + shift).astype(dtype)


class TestManifolds:
    def test_on_a_line_they_are_counted_by_hand(self):
        # Balls of the real 0, 1, 3, 7 reach 1, 1, 2, 4 far; those of the samples 0.5, 5, 20 reach
        # 4.5, 4.5, 15. Balls are open: 5 is not in that of 3, which ends there.
        real, samples = np.array([[0.0], [1], [3], [7]]), np.array([[0.5], [5], [20]])
        found = manifold_scores(real, samples, k=1)
        assert found.precision == pytest.approx(2 / 3)
        assert found.density == pytest.approx((2 + 1 + 0) / 3)
        assert found.coverage == pytest.approx(3 / 4)
        assert found.recall == 1.0

    def test_one_mode_of_two_is_precise_but_recalls_and_covers_half(self):
        rng = np.random.default_rng(0)
        left, right, samples = rng.normal(size=(3, 300, 4)) * 0.1
        found = manifold_scores(np.concatenate([left, right + 50]), samples)
        assert found.precision > 0.9
        assert found.density == pytest.approx(1.0, abs=0.1)
        assert found.recall == pytest.approx(0.5, abs=0.05)
        assert found.coverage == pytest.approx(0.5, abs=0.05)

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_for_equal_distributions_density_is_1_and_coverage_its_closed_form(self, k):
        # A ball holds no sample if the k nearest of n - 1 real vectors and n samples are all real.
        n = 1000
        real, samples = np.random.default_rng(k).normal(size=(2, n, 3))
        found = manifold_scores(real, samples, k=k)
        none = np.prod([(n - 1 - i) / (2 * n - 1 - i) for i in range(k)])
        assert found.coverage == pytest.approx(1 - none, abs=0.04)
        assert found.density == pytest.approx(1.0, abs=0.08)

    def test_the_block_size_changes_memory_alone_and_units_nothing(self):
        real, samples = two_clouds(dtype=np.float64)
        whole = manifold_scores(real, samples, block_size=10_000)
        assert manifold_scores(real, samples, block_size=7) == whole
        assert manifold_scores(8.0 * real, 8.0 * samples) == whole

    def test_the_same_set_twice_is_perfect_and_a_far_one_is_nothing(self):
        real, _ = two_clouds()
        assert manifold_scores(real, real)[:2] == (1.0, 1.0)
        assert manifold_scores(real, real).coverage == 1.0
        assert manifold_scores(real, real + 100) == (0, 0, 0, 0)

    @pytest.mark.parametrize(
        ("real", "samples", "k", "message"),
        [
            (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k=0"),
            (np.zeros((5, 2)), np.zeros((9, 2)), 5, "5 images are too few: at least 6"),
            (np.zeros((9, 2)), np.zeros((9, 3)), 2, "different widths, 2 and 3"),
            (np.zeros((9, 2)), np.full((9, 2), np.inf), 2, "9 of 9 feature vectors"),
        ],
    )
    def test_what_has_no_scores_is_refused(self, real, samples, k, message):
        with pytest.raises(UserError, match=message):
            manifold_scores(real, samples, k=k)


class TestExtrapolation:
    WIDTH, COUNT = 12, 600

    def draws(self, num_sets):
        """Sets of samples of a Gaussian, the reference, and their exact distance."""
        rng, width = np.random.default_rng(0), self.WIDTH
        variances = np.linspace(0.1, 2.0, width)
        reference = Statistics(np.full(width, 0.1), np.diag(1.2 * variances), 1)
        exact = frechet_distance(np.zeros(width), np.diag(variances), *reference[:2])
        sets = rng.normal(size=(num_sets, self.COUNT, width)) * np.sqrt(variances)
        return sets, reference, exact

    def test_the_bias_falls_and_the_error_is_as_stated(self):
        sets, reference, exact = self.draws(60)
        found = [
            extrapolated_distance(features, reference, seed=i) for i, features in enumerate(sets)
        ]
        values = np.array([one.value for one in found])
        plain = np.array([one.distances[0] for one in found])
        bias, plain_bias = values.mean() - exact, plain.mean() - exact
        assert plain_bias > 5 * plain.std() / np.sqrt(60)  # or there is nothing to mend
        assert abs(bias) < 0.15 * plain_bias
        scores = (values - exact) / [one.standard_error for one in found]
        assert 0.5 < scores.std() < 1.4
        assert np.abs(scores).max() < 4

    def test_distances_of_smaller_parts_are_larger(self):
        sets, reference, _ = self.draws(1)
        found = extrapolated_distance(sets[0], reference)
        assert found.sizes == (600, 300, 150)
        assert found.value < found.distances[0] < found.distances[1] < found.distances[2]

    def test_the_first_distance_is_the_plain_one_and_the_seed_decides_the_rest(self):
        sets, reference, _ = self.draws(1)
        one, same, other = (extrapolated_distance(sets[0], reference, seed=s) for s in (0, 0, 1))
        mean, cov, _ = statistics(sets[0])
        assert one.distances[0] == pytest.approx(frechet_distance(mean, cov, *reference[:2]))
        assert one == same
        assert one.value != other.value

    def test_too_few_samples_are_refused(self):
        sets, reference, _ = self.draws(1)
        needed = fewest_samples(self.WIDTH)
        extrapolated_distance(sets[0][:needed], reference)
        with pytest.raises(UserError, match=f"needs at least {needed} samples, not {needed - 1}"):
            extrapolated_distance(sets[0][: needed - 1], reference)


class TestInceptionScore:
    @pytest.mark.parametrize("num_classes", [2, 10])
    def test_sure_and_even_is_the_number_of_classes(self, num_classes):
        logits = 100.0 * np.eye(num_classes)[np.arange(600) % num_classes]
        assert inception_score(logits, num_splits=1).value == pytest.approx(num_classes)

    def test_what_tells_no_sample_from_another_is_1(self):
        assert inception_score(np.tile([3.0, 1.0, 0.0], (50, 1))) == pytest.approx((1.0, 0.0))

    def test_of_two_kinds_of_samples_has_a_closed_form(self):
        # p(y | x) is (q, 1 - q) or the reverse, half and half: log IS = log 2 - H(q).
        q = 0.8
        logits = np.log([[q, 1 - q], [1 - q, q]] * 30) + 5.0
        entropy = -q * np.log(q) - (1 - q) * np.log(1 - q)
        exact = np.exp(np.log(2) - entropy)
        assert inception_score(logits, num_splits=1).value == pytest.approx(exact)

    def test_fewer_samples_than_splits_are_refused(self):
        with pytest.raises(UserError, match="9 images are too few: at least 10"):
            inception_score(np.zeros((9, 3)))


class TestKernels:
    def test_a_gaussian_kernels_expectation_has_a_closed_form(self):
        # x ~ N(0, s²), y ~ N(m, s²) in d dimensions: x - y ~ N(-m, 2 s²), and
        # E exp(-|x - y|²/2σ²) = (1 + 2 s²/σ²)^(-d/2) exp(-|m|² / (2σ² + 4 s²)).
        d, s, sigma, m, n = 3, 2.0, 4.0, 2.0, 3000
        rng = np.random.default_rng(0)
        x, y = s * rng.normal(size=(2, n, d))
        y[:, 0] += m
        same = (1 + 2 * s**2 / sigma**2) ** (-d / 2)
        exact = 2 * same * (1 - np.exp(-(m**2) / (2 * sigma**2 + 4 * s**2)))
        bias = (1 - same) * 2 / n
        found = gaussian_kernel_distance(x, y, sigma=sigma, scale=1.0, block_size=700)
        assert found == pytest.approx(exact + bias, rel=0.1)

    def test_equals_a_double_loop_at_the_constants_of_the_paper(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(4, 6)) * 5, rng.normal(size=(7, 6)) * 5

        def distance(x, y, sigma):
            def mean(a, b):
                return np.mean([[np.exp(-np.sum((v - w) ** 2) / d) for w in b] for v in a])

            d = 2 * sigma**2
            return mean(x, x) + mean(y, y) - 2 * mean(x, y)

        exact = 1000 * distance(x, y, 10)
        for rows in (1, 3):
            found = gaussian_kernel_distance(x, y, block_size=rows)
            assert found == pytest.approx(exact, rel=1e-10)
        one = gaussian_kernel_distance(x[:1], y[:1])
        assert one == pytest.approx(1000 * distance(x[:1], y[:1], 10), rel=1e-10)
        found = gaussian_kernel_distance(x / 9, y / 9, sigma=0.5, scale=2.0)
        assert found == pytest.approx(2 * distance(x / 9, y / 9, 0.5), rel=1e-10)

    def test_widths_that_differ_are_refused(self):
        with pytest.raises(UserError, match=r"^features of different widths, 2 and 3$"):
            gaussian_kernel_distance(np.zeros((2, 2)), np.zeros((2, 3)))
        with pytest.raises(UserError, match=r"^gaussian_kernel_distance\(sigma=0\.0, block"):
            gaussian_kernel_distance(np.zeros((2, 2)), np.zeros((2, 2)), sigma=0.0)
        with pytest.raises(UserError, match="block_size=0"):
            gaussian_kernel_distance(np.zeros((2, 2)), np.zeros((2, 2)), block_size=0)


class TestCopying:
    @staticmethod
    def draws(seed=0, width=8):
        train, test, fresh = np.random.default_rng(seed).normal(size=(3, 600, width))
        return train.astype(np.float32), test.astype(np.float32), fresh.astype(np.float32)

    def test_fresh_samples_are_as_far_as_test_images(self):
        found = []
        for seed in range(12):
            train, test, fresh = self.draws(seed)
            found.append(data_copying(fresh, train, test, seed=seed))
        values = np.array([one.value for one in found], float)
        # The mean of five unit normals in shares of about a fifth deviates by about √(1/5).
        assert abs(values.mean()) < 0.5
        assert 0.2 < values.std() < 0.8
        assert min(one.tested_share for one in found) == 1.0

    def test_in_one_cell_it_is_the_mann_whitney_test(self):
        train, test, fresh = self.draws()
        ours, others = (
            np.linalg.norm(images[:, None] - train, axis=-1).min(1) for images in (fresh, test)
        )
        exact = scipy.stats.mannwhitneyu(ours, others, method="asymptotic", use_continuity=False)
        found = data_copying(fresh, train, test, num_cells=1)
        assert 2 * scipy.stats.norm.sf(abs(found.value or 0)) == pytest.approx(
            exact.pvalue, rel=1e-6
        )

    @pytest.mark.parametrize("share", [0.3, 1.0])
    def test_planted_copies_are_seen(self, share):
        train, test, fresh = self.draws()
        planted = int(share * 600)
        fresh[:planted] = train[:planted] + 0.01
        assert float(data_copying(fresh, train, test).value or 0) < -2
        indices, distances = nearest_neighbours(fresh, train)
        rest = inauthentic(indices[planted:], distances[planted:], train) if share < 1 else 0.0
        assert rest < 0.5
        found = inauthentic(indices, distances, train)
        assert found == pytest.approx(share + (1 - share) * rest)

    def test_of_fresh_samples_on_a_line_two_thirds_are_inauthentic(self):
        train, fresh = np.random.default_rng(0).uniform(size=(2, 3000, 1))
        assert inauthentic(*nearest_neighbours(fresh, train), train) == pytest.approx(
            2 / 3, abs=0.03
        )

    def test_copies_in_one_cell_and_distance_in_another_are_told_apart(self):
        train, test, fresh = self.draws()
        for images in (train, test, fresh):
            images[:300] += 30
        fresh[:300] = train[:300] + 0.01
        one_test = data_copying(fresh, train, test, num_cells=1).value
        found = data_copying(fresh, train, test, num_cells=2)
        # Each cell: -21 for 300 copies, 0 for the rest; the mean is near half of the first.
        assert found.value == pytest.approx(-np.sqrt(300 * 300 * 12 / 601) / 4, rel=0.1)
        assert found.value != one_test

    def test_cells_without_samples_are_left_out_and_said(self):
        train, test, fresh = self.draws()
        for images in (train, test):
            images[:150] += 30
        assert data_copying(fresh, train, test, num_cells=2).tested_share == 0.75

    def test_an_inauthentic_sample_lies_in_its_images_own_ball(self):
        train = np.array([[0.0], [1], [3], [3]])
        samples = np.array([[-0.9], [-1.1], [1.9], [3.0], [3.1]])
        # 0.9 < 1; 1.1 > 1; 0.9 < 1; a copy; 0.1 > 0, the distance of the two at 3.
        assert inauthentic(*nearest_neighbours(samples, train), train) == pytest.approx(3 / 5)

    def test_too_few_samples_for_any_cell_are_no_number(self):
        train, test, fresh = self.draws()
        assert data_copying(fresh[:19], train, test) == (None, 0.0)
        with pytest.raises(UserError, match="differ in shape"):
            data_copying(fresh[:, :3], train, test)


_SHARES: Any = np.array([0.2, 0.5, 0.3], np.float32)
_MEANS: Any = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, 6.0]], np.float32)
_COVARIANCES: Any = np.array([np.eye(2), 0.5 * np.eye(2), [[1.0, 0.6], [0.6, 1.0]]], np.float32)
MIXTURE = GaussianMixture(_SHARES, _MEANS, _COVARIANCES)


@pytest.fixture(scope="module")
def of_mixture():
    """4000 samples of `MIXTURE`."""
    draw = jax.jit(lambda mixture, key: mixture.draw(key, 4000))
    return np.asarray(draw(MIXTURE, jax.random.key(0)))


class TestMixtures:
    def test_a_shift_is_its_part_along_each_direction(self):
        x = np.random.default_rng(0).normal(size=(200, 3))
        shift = np.array([1.0, -2.0, 0.5])
        found = sliced_wasserstein(x, x[::-1] + shift, num_directions=40)
        np.testing.assert_allclose(found.squared, (found.directions @ shift) ** 2, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(found.directions, axis=1), 1.0)

    def test_over_all_directions_a_shift_is_its_length_over_the_root_of_the_dimension(self):
        x = np.random.default_rng(0).normal(size=(50, 4))
        found = sliced_wasserstein(x, x + 3.0, num_directions=4000)
        assert found.value == pytest.approx(6.0 / np.sqrt(4), rel=0.03)

    def test_of_gaussians_it_approaches_the_closed_form(self):
        rng, deviations = np.random.default_rng(0), np.array([1.0, 2.0])
        x, y = rng.normal(size=(20_000, 2)), rng.normal(size=(15_000, 2)) * deviations + 1.0
        found = sliced_wasserstein(x, y, num_directions=20)
        u = found.directions
        exact = (u.sum(1)) ** 2 + (1 - np.sqrt((u * deviations) ** 2 @ np.ones(2))) ** 2
        np.testing.assert_allclose(found.squared, exact, atol=0.1)

    @pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 8), (12, 4), (1, 6)])
    def test_unequal_counts_are_exact(self, n, m):
        rng = np.random.default_rng(n)
        x, y = rng.normal(size=(n, 2)), rng.normal(size=(m, 2))
        # Repeating each sample changes no empirical distribution, and makes counts equal.
        found = sliced_wasserstein(x, y, num_directions=5)
        equal = np.sort(np.repeat(x, m, 0) @ found.directions.T, axis=0)
        gaps = equal - np.sort(np.repeat(y, n, 0) @ found.directions.T, axis=0)
        np.testing.assert_allclose(found.squared, (gaps**2).mean(0), rtol=1e-10)

    def test_to_a_mixture_itself_it_is_the_integral_over_its_quantiles(self):
        weights, means, deviations = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), [0.05, 0.8]
        data = GaussianMixture(
            jnp.asarray(weights),
            jnp.asarray(means)[:, None],
            jnp.square(jnp.asarray(deviations))[:, None, None],
        )
        x = np.array([0.3, -2.0, 5.0, 1.0])
        levels = (np.arange(4000) + 0.5) / 4000
        low, high = np.full(4000, -9.0), np.full(4000, 9.0)
        for _ in range(60):
            ends = (low + high) / 2
            below = scipy.special.ndtr((ends[:, None] - means) / deviations) @ weights < levels
            low, high = np.where(below, ends, low), np.where(below, high, ends)
        ends = (low + high) / 2
        exact = np.mean((np.repeat(np.sort(x), 1000) - ends) ** 2)
        found = sliced_wasserstein_to(data, x[:, None], num_directions=3)
        np.testing.assert_allclose(found.squared, exact, rtol=1e-3)

    def test_to_a_mixture_it_is_what_endless_draws_approach(self, of_mixture):
        found = sliced_wasserstein_to(MIXTURE, of_mixture[:50] + 1.0, num_directions=7, seed=2)
        drawn = sliced_wasserstein(of_mixture[:50] + 1.0, of_mixture, num_directions=7, seed=2)
        np.testing.assert_array_equal(found.directions, drawn.directions)
        np.testing.assert_allclose(found.squared, drawn.squared, rtol=0.1)
        # Draws of its own are near, and the more the nearer.
        own = [sliced_wasserstein_to(MIXTURE, of_mixture[:n]).value for n in (100, 4000)]
        assert own[1] < 0.4 * own[0] < 0.3

    def test_samples_of_another_shape_than_the_mixtures_are_refused(self):
        with pytest.raises(UserError, match=r"samples of this mixture are \[2\], not \[3\]"):
            sliced_wasserstein_to(MIXTURE, np.zeros((4, 3)))

    def test_in_one_dimension_it_is_an_assignment_of_least_cost(self):
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(2, 9, 1))
        costs = (x - y.T) ** 2
        exact = costs[scipy.optimize.linear_sum_assignment(costs)].mean()
        assert sliced_wasserstein(x, y, num_directions=2).value ** 2 == pytest.approx(exact)

    def test_the_mixtures_own_samples_have_its_weights_though_modes_overlap(self, of_mixture):
        found = mode_weights(of_mixture, MIXTURE)
        assert found.found.sum() == pytest.approx(1.0)
        assert (np.abs(found.found - found.exact) < 4 * found.standard_error).all()
        assert found.total_variation < 0.03

    def test_a_lost_mode_is_missed(self, of_mixture):
        found = mode_weights(of_mixture[of_mixture[:, 1] < 3.5], MIXTURE)
        assert found.found[2] < 0.01
        np.testing.assert_allclose(
            found.found[:2] / found.found[:2].sum(), [2 / 7, 5 / 7], atol=0.03
        )
        assert found.total_variation == pytest.approx(0.3, abs=0.02)

    def test_responsibilities_are_bayes_rule(self):
        x = np.array([[0.5, 0.2], [1.0, 4.0], [-2.0, 1.0]])
        density = [
            w * scipy.stats.multivariate_normal(m, c).pdf(x)
            for w, m, c in zip(*map(np.asarray, jax.tree.leaves(MIXTURE)), strict=True)
        ]
        exact = np.stack(density, 1) / np.sum(density, 0)[:, None]
        found = jax.jit(MIXTURE.responsibilities)(Linear(), jnp.asarray(x), jnp.zeros(3))
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-7)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UserError, match=r"samples \[2\], not \[5, 3\]"):
            mode_weights(np.zeros((5, 3)), MIXTURE)
        with pytest.raises(UserError, match="not finite"):
            mode_weights(np.full((5, 2), np.nan), MIXTURE)
        with pytest.raises(UserError, match="different widths, 2 and 3"):
            sliced_wasserstein(np.zeros((5, 2)), np.zeros((5, 3)))
