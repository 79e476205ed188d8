"""Classifiers of noisy images as what guidance leads away from."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffjax.exchange.classifiers import NoisyClassifier
from diffjax.process import targets
from diffjax.process.paths import Linear
from diffjax.process.precond import Precond, TimeLabel


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
