"""Classes are drawn in the proportions of the real images, unless another mix is set."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diffjax
from diffjax.comparison.provenance import check_comparable
from diffjax.data import ArraySource, DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.metrics import compare, reference
from diffjax.evaluation.scores.distances import frechet_distance
from diffjax.evaluation.scores.label_mix import label_mix, proportional_labels
from diffjax.runs.measuring import measure
from diffjax.runs.measuring.measure import Wanted, check_evaluation
from experiments import evaluate
from experiments.flags import cli

OLD_RUN = Path(__file__).parents[1] / "runs" / "old_runs" / "0.1.0"
DARK, LIGHT = 60.0, 200.0


def pictures(labels, seed):
    """8×8×3 of one grey, 60 or 200, with a deviation of 20 a picture and of 5 a pixel.

    That of the pictures of a class is 20 exactly, and their mean 60 or 200: what is left is what
    the mix of the classes makes.
    """
    rng = np.random.default_rng(seed)
    grey = np.where(labels == 0, DARK, LIGHT)
    for label in (0, 1):
        own = rng.normal(size=np.sum(labels == label))
        if len(own) > 1:
            grey[labels == label] += 20.0 * (own - own.mean()) / own.std()
    pixels = grey[:, None, None, None] + 5.0 * rng.normal(size=(len(labels), 8, 8, 3))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def split(labels, seed):
    return ArraySource(pictures(labels, seed), labels)


@pytest.fixture(scope="module")
def unbalanced():
    """900 dark and 100 light ones."""
    train = np.repeat(np.array([0, 1], np.int32), (900, 100))
    test = np.repeat(np.array([0, 1], np.int32), (180, 20))
    return DataSet("greys", split(train, 1), split(test, 2), (8, 8, 3), 2, ("dark", "light"))


def exact_generator(run, recipes, asked, begun, batch_size):
    """In the place of a network: draws from the distribution of each class itself."""

    def draw(named):
        return (pictures(asked.labels, seed=3) / 127.5 - 1.0).astype(np.float32), 1

    return draw


@pytest.fixture(scope="module")
def evaluated(unbalanced, tmp_path_factory):
    """The evaluation of the exact conditional generator, once for equal wishes."""
    folder = shutil.copytree(OLD_RUN, tmp_path_factory.mktemp("mix") / "run")
    run = diffjax.load(folder)
    wired = run.parts.wired._replace(condition=unbalanced.condition)
    run = replace(run, parts=replace(run.parts, wired=wired))

    @functools.cache
    def evaluate_it(**wanted):
        how = Wanted(
            num_samples=1000, solvers=(), num_steps=(), extractors=[pixel_features(2)], **wanted
        )
        found = measure.measure(run, unbalanced, how)
        assert json.loads((folder / "evaluation.json").read_text()) == found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "drawer", exact_generator)
        yield evaluate_it


def by_hand():
    """Twelve equal features: the distance of equal shares from those of the data."""
    dark, light = (grey / 127.5 - 1.0 for grey in (DARK, LIGHT))
    moments = []
    for share in (0.9, 0.5):  # of dark ones
        mean = share * dark + (1 - share) * light
        between = share * (1 - share) * (light - dark) ** 2
        shared = (20 / 127.5) ** 2 + between
        own = (5 / 127.5) ** 2 / 16  # a feature is the mean of 16 pixels
        moments.append((np.full(12, mean), np.full((12, 12), shared) + own * np.eye(12)))
    return moments


def test_the_distance_of_equal_shares_is_the_one_derived_by_hand():
    (mean, cov), (balanced_mean, balanced_cov) = by_hand()
    assert (mean[0], balanced_mean[0]) == pytest.approx((-0.42, 0.02), abs=0.005)
    assert np.linalg.eigvalsh(cov)[-1] == pytest.approx(1.60, abs=0.005)
    assert np.linalg.eigvalsh(balanced_cov)[-1] == pytest.approx(3.91, abs=0.005)
    means = 12 * 0.44**2
    spreads = (np.sqrt(3.91) - np.sqrt(1.60)) ** 2
    assert (means, spreads) == pytest.approx((2.32, 0.51), abs=0.005)
    found = frechet_distance(balanced_mean, balanced_cov, mean, cov)
    assert found == pytest.approx(2.83, abs=0.02)


@pytest.mark.thorough(tenth=False)
def test_an_exact_generator_of_unbalanced_classes_is_at_its_floor(evaluated):
    """It was 2.97 from labels spread evenly, with a floor of 0.0063."""
    entry = evaluated()["frechet_distance"]
    assert entry["provenance"]["labels"] == "data"
    assert entry["value"] < 0.0023
    balanced = evaluated(labels="balanced")["frechet_distance"]
    assert balanced["value"] == pytest.approx(2.83, abs=0.02)
    assert balanced["provenance"]["labels"] == "balanced"
    assert entry["floor"] == balanced["floor"]


@pytest.mark.thorough(tenth=False)
def test_unlike_labels_are_not_compared_and_old_ones_were_balanced(evaluated):
    own, balanced = evaluated(), evaluated(labels="balanced")
    listed = evaluated(labels="light,0,0")
    for number in ("frechet_distance", "kernel_distance", "recall"):
        with pytest.raises(UserError, match="labels is data and balanced"):
            check_comparable({"a": own, "b": balanced}, number)
    with pytest.raises(UserError, match="labels is balanced and 0: 667, 1: 333"):
        check_comparable({"a": balanced, "b": listed}, "frechet_distance")
    assert own["neighbours"]["provenance"]["labels"] == "data"
    # Labels with a class as often as the data's, by whatever name, are alike.
    same = evaluated(labels=",".join(["dark"] * 9 + ["light"]))
    check_comparable({"a": own, "b": same}, "frechet_distance")
    old = json.loads(json.dumps(balanced))
    del old["frechet_distance"]["provenance"]["labels"]
    check_comparable({"a": balanced, "b": old}, "frechet_distance")
    with pytest.raises(UserError, match="labels is data and balanced"):
        check_comparable({"a": own, "b": old}, "frechet_distance")


def test_samples_without_a_condition_have_the_mix_that_was_learned(unbalanced):
    real = reference(unbalanced, pixel_features(2))
    assert real.class_counts.tolist() == [900, 100]
    found = compare(pictures(np.zeros(20, int), 5) / 127.5 - 1.0, None, real, all_metrics=False)
    assert found["frechet_distance"]["provenance"]["labels"] == "data"
    even = replace(unbalanced, num_classes=0, label_names=())
    real = reference(even, pixel_features(2))
    assert real.class_counts.tolist() == [1000]
    found = compare(pictures(np.zeros(20, int), 5) / 127.5 - 1.0, None, real, all_metrics=False)
    assert found["frechet_distance"]["provenance"]["labels"] == "balanced"


@pytest.mark.parametrize("num_classes", [1, 2, 7, 10])
def test_of_equal_counts_labels_are_what_they_were(num_classes):
    for n in range(40):
        for each in (1, 1000):
            found = proportional_labels(n, np.full(num_classes, each))
            np.testing.assert_array_equal(found, np.arange(n) % num_classes)
            assert found.dtype == np.int32
            if n:
                assert label_mix(found, np.full(num_classes, each)) == "balanced"


def test_seats_are_those_of_a_textbook():
    """Ten seats for 100,000 votes by the method of largest remainders."""
    votes = [47_000, 16_000, 15_800, 12_000, 6_100, 3_100]
    assert np.bincount(proportional_labels(10, votes), minlength=6).tolist() == [5, 2, 1, 1, 1, 0]


def test_no_class_is_off_its_quota_by_one_and_any_stretch_has_the_mix():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 2000, rng.integers(2, 12))
        n = int(rng.integers(3, 3000))
        quotas = n * counts / counts.sum()
        labels = proportional_labels(n, counts)
        assert len(labels) == n
        assert np.abs(np.bincount(labels, minlength=len(counts)) - quotas).max() < 1
        half = np.bincount(labels[: n // 2], minlength=len(counts))
        assert np.abs(half - quotas / 2).max() <= 1.5


def test_digits_are_hardly_unbalanced_and_change_by_two_in_a_hundred():
    """142 to 146 of 1,438 but for 139: of 1,000 labels at most 3 of a class are others."""
    counts = np.array([142, 146, 142, 146, 145, 146, 145, 143, 139, 144])
    np.testing.assert_array_equal(np.bincount(diffjax.data.digits().train.labels), counts)
    found = np.bincount(proportional_labels(1000, counts))
    assert np.abs(found - 1000 * counts / 1438).max() < 1
    assert np.abs(found - 100).max() == 3


def test_what_is_no_label_is_refused_before_anything_is_drawn(evaluated, old_run, monkeypatch):
    with pytest.raises(UserError, match=r"labels=ligth is neither data nor balanced.*'light'"):
        evaluated(labels="ligth")
    run = old_run
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluation.labels = "0,99"
    parts = replace(run.parts, config=config)
    with pytest.raises(UserError, match="no label is called '99'"):
        check_evaluation(parts, diffjax.data.digits())
    wanted = []
    monkeypatch.setattr(evaluate, "measure", lambda run, data, how, **_: wanted.append(how))
    monkeypatch.setattr(evaluate, "make_writable", lambda workdir: None)
    monkeypatch.setattr(evaluate, "is_first", lambda: False)
    flags = (f"--workdir={OLD_RUN}", "--labels=3,7")
    assert cli.run(evaluate.main, evaluate.FLAGS, usage=evaluate.USAGE, argv=flags) == 0
    assert wanted[0].labels == "3,7"
