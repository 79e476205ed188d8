"""Numbers on the same features against torch-fidelity, torchmetrics and prdc.

Each test is skipped where its package is not installed (`pip install -e '.[parity]'`).
"""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from diffjax.evaluation.moments import Moments
from diffjax.evaluation.scores.distances import frechet_distance, kernel_distance, statistics
from diffjax.evaluation.scores.inception_score import ScoreSums, inception_score
from diffjax.evaluation.scores.manifolds import manifold_scores
from tests.support.later import Later, needs

torch: Any = Later("torch")
pytestmark = [pytest.mark.parity, needs("torch")]


def package(name):
    """A module of another library; skips where it, or what it needs, is not installed."""
    how = "pip install -e '.[parity]' && pip install --no-deps torch-fidelity torchvision"
    return pytest.importorskip(name, reason=how)


def like_features(n, width, seed, shift=0.0):
    """Not negative, skewed and correlated, as what comes out of a pooling layer is."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return np.maximum(rng.normal(size=(n, width)) @ mixing + 0.3 + shift, 0.0).astype(np.float32)


REAL, OURS = like_features(700, 48, 0), like_features(500, 48, 1, shift=0.1)


def by_batches(features):
    return Moments.of(np.array_split(features, 7)).statistics()


class TestFrechet:
    @pytest.mark.parametrize("of", [statistics, by_batches])
    def test_is_torchmetrics(self, of):
        peer = package("torchmetrics.image.fid")
        ours, real = of(OURS), of(REAL)
        numbers = [torch.tensor(x) for x in (ours.mean, ours.cov, real.mean, real.cov)]
        exact = float(peer._compute_fid(*numbers))
        found = frechet_distance(ours.mean, ours.cov, real.mean, real.cov)
        assert found == pytest.approx(exact, rel=1e-7)

    @pytest.mark.parametrize("of", [statistics, by_batches])
    def test_is_torchmetrics_from_features_on(self, of):
        """Its metric object adds sums up; the features pass through it as they are."""
        peer = package("torchmetrics.image.fid")

        class AsTheyAre(torch.nn.Module):
            num_features = 48

            def forward(self, x):
                return x.flatten(1)

        metric = peer.FrechetInceptionDistance(
            AsTheyAre(), normalize=True, input_img_size=(1, 6, 8)
        ).set_dtype(torch.float64)
        for features, real in ((REAL, True), (OURS, False)):
            metric.update(torch.tensor(features).reshape(-1, 1, 6, 8).double(), real=real)
        (mean_1, cov_1, _), (mean_2, cov_2, _) = of(OURS), of(REAL)
        found = frechet_distance(mean_1, cov_1, mean_2, cov_2)
        assert found == pytest.approx(float(metric.compute()), rel=1e-5)

    @pytest.mark.parametrize("of", [statistics, by_batches])
    def test_is_torch_fidelitys(self, of):
        peer = package("torch_fidelity.metric_fid")
        both = [peer.fid_features_to_statistics(torch.tensor(x)) for x in (OURS, REAL)]
        exact = peer.fid_statistics_to_metric(*both, False)["frechet_inception_distance"]
        (mean_1, cov_1, _), (mean_2, cov_2, _) = of(OURS), of(REAL)
        assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(exact, rel=1e-6)


class TestKernel:
    def test_all_pairs_are_torchmetrics(self):
        peer = package("torchmetrics.image.kid")
        real, ours = REAL[:500].astype(np.float64), OURS.astype(np.float64)
        exact = float(peer.poly_mmd(torch.tensor(real), torch.tensor(ours)))
        assert kernel_distance(ours, real).value == pytest.approx(exact, rel=1e-9)

    def test_subsets_are_torch_fidelitys(self):
        """The mean over random subsets, as published: here each subset by itself."""
        peer = package("torch_fidelity.metric_kid")
        exact = peer.kid_features_to_metric(
            torch.tensor(OURS).double(), torch.tensor(REAL).double(),
            kid_subsets=6, kid_subset_size=100, rng_seed=5, verbose=False,
        )  # fmt: skip
        rng, found = np.random.RandomState(5), []
        for _ in range(6):
            ours, real = (x[rng.choice(len(x), 100, replace=False)] for x in (OURS, REAL))
            found.append(kernel_distance(ours, real).value)
        assert np.mean(found) == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-9)
        assert np.std(found) == pytest.approx(exact["kernel_inception_distance_std"], rel=1e-9)
        # The two estimate one number: all pairs lie within the scatter of the subsets.
        whole = kernel_distance(OURS, REAL)
        assert abs(whole.value - np.mean(found)) < 3 * np.std(found) / np.sqrt(6)


def score_of_batches(logits, num_splits, seed):
    sums = ScoreSums.none(len(logits), logits.shape[1], num_splits, seed)
    for start in range(0, len(logits), 64):
        sums = sums.add(start, logits[start : start + 64])
    return sums.score()


def score_of_whole(logits, num_splits, seed):
    return inception_score(logits, num_splits=num_splits, seed=seed)


@pytest.mark.parametrize("score", [score_of_whole, score_of_batches])
class TestInceptionScore:
    LOGITS = np.random.default_rng(0).normal(size=(200, 7)) * 2

    @pytest.mark.parametrize("num_splits", [1, 4])
    def test_is_torch_fidelitys(self, score, num_splits):
        peer = package("torch_fidelity.metric_isc")
        order = np.random.default_rng(3).permutation(200)
        shuffled = torch.tensor(self.LOGITS[order])
        exact = peer.isc_features_to_metric(shuffled, num_splits, False)
        found = score(self.LOGITS, num_splits, 3)
        assert found == pytest.approx(tuple(exact.values()), rel=1e-9)

    def test_is_torchmetrics(self, score):
        peer = package("torchmetrics.image.inception")
        metric = peer.InceptionScore(torch.nn.Flatten(), splits=1)
        metric.update(torch.tensor(self.LOGITS).reshape(200, 7, 1, 1))
        assert score(self.LOGITS, 1, 0).value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


class TestManifolds:
    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_are_prdcs(self, k):
        peer = package("prdc")
        with contextlib.redirect_stdout(io.StringIO()):
            exact = peer.compute_prdc(REAL, OURS, nearest_k=k)
        found = manifold_scores(REAL, OURS, k=k, block_size=130)
        assert found._asdict() == pytest.approx(exact, abs=1e-12)

    def test_are_torch_fidelitys(self):
        peer = package("torch_fidelity.metric_prc")
        ours, real = torch.tensor(OURS), torch.tensor(REAL)
        exact = peer.prc_features_to_metric(ours, real, prc_neighborhood=3, verbose=False)
        found = manifold_scores(REAL, OURS, k=3)
        assert found.precision == pytest.approx(exact["precision"], abs=1e-6)
        assert found.recall == pytest.approx(exact["recall"], abs=1e-6)
