"""Classifiers of noisy images as what guidance leads away from."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.exchange.classifiers import NoisyClassifier, read_classifier
from diffjax.models.adm.published import CLASSIFIER
from diffjax.models.adm.published import FAMILY as ADM
from diffjax.process import targets
from diffjax.process.paths import Linear
from diffjax.process.precond import Precond, TimeLabel
from tests.exchange.test_pretrained import small_adm
from tests.models.published.test_families import SMALL, drawn
from tests.support.tiny_run import one_device


def test_near_data_a_classifier_adds_its_gradient_and_no_rounding():
    """Of logits W·x, whose log-probability has the gradient W[label] - Σ p·W."""
    random = np.random.default_rng(0)
    weights, x = random.normal(size=(5, 4)), random.normal(size=(3, 2, 2, 1))
    labels, t = np.array([4, 0, 2]), np.array([1e-4, 3e-3, 0.5])

    def apply(variables, x, noise_label):
        del noise_label
        return x.reshape(len(x), -1) @ variables["params"].T

    precond = Precond(targets.Velocity(), TimeLabel(1.0))
    classifier = NoisyClassifier(SimpleNamespace(apply=apply), Linear(), precond)
    predict = classifier.predict(jnp.asarray(weights, jnp.float32))
    added = predict(*(jnp.asarray(each, jnp.float32) for each in (x, t)), jnp.asarray(labels))
    powers = np.exp(x.reshape(3, 4) @ weights.T)
    probabilities = powers / powers.sum(1, keepdims=True)
    slope = (weights[labels] - probabilities @ weights).reshape(x.shape)
    s = t[:, None, None, None]
    np.testing.assert_allclose(added.eps, -s * slope, rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(added.x0, s**2 / (1 - s) * slope, rtol=1e-5, atol=1e-12)


def test_a_classifier_is_read_for_images_and_classes_that_it_has_seen(tmp_path, monkeypatch):
    file = small_adm(tmp_path, monkeypatch, CLASSIFIER, "classifier.safetensors", num_classes=5)
    guided = ADM.network(**{**SMALL["ADM"], "image_shape": (8, 8, 3), "num_classes": 5})
    precond = Precond(targets.Velocity(), TimeLabel(1.0))
    parts = {"network": guided.network, "path": Linear(), "precond": precond}

    def read(image_shape=(8, 8, 3), classes=5, **others):
        condition = Classes(classes)
        wired = {**parts, "image_shape": image_shape, "condition": condition, **others}
        return read_classifier(file, SimpleNamespace(**wired), one_device())

    expected = drawn(CLASSIFIER, CLASSIFIER.size("small"))
    jax.tree.map(np.testing.assert_array_equal, read().params, expected)
    for wrong, said in (
        ({"classes": 3}, "its number of classes is 5, not 3"),
        ({"image_shape": (4, 4, 3)}, r"its image shape is \(8, 8, 3\), not \(4, 4, 3\)"),
        ({"network": None}, "guides networks of ADM"),
    ):
        with pytest.raises(UserError, match=said):
            read(**wrong)
