"""Prompts with weights as sums of embeddings, and the middle squares that images are read by."""

import numpy as np
import pytest
from PIL import Image

from diffjax.errors import UserError
from diffjax.exchange.priors import ImagePrior, PriorPrompts

NUMBERS = {"a cat": 1.0, "a dog": 10.0}


class Known(ImagePrior):
    """Embeddings of four numbers: those of texts are known, those of images their mean level."""

    width = 4  # pyright: ignore[reportAssignmentType]
    nothing = np.full(4, -1.0, np.float32)  # pyright: ignore[reportAssignmentType]

    def __init__(self):
        self.__dict__["seen"] = []

    def of_texts(self, texts, rows=None):
        self.__dict__["seen"].append((list(texts), list(rows)))
        return np.stack([np.full(4, NUMBERS[text]) for text in texts])

    def of_images(self, images):
        return np.repeat(images.mean(axis=(1, 2, 3))[:, None], 4, axis=1)


def test_a_prompt_with_weights_is_the_sum_of_its_parts(tmp_path):
    Image.new("RGB", (6, 4), (255, 255, 255)).save(tmp_path / "white.png")
    white = f"image:{tmp_path / 'white.png'}"
    prior = Known()
    found = prior(["a cat", f"0.5*a cat + 2*{white}", {"a dog": 0.25, "a cat": 1.0}, white])
    np.testing.assert_allclose(found[:, 0], [1.0, 0.5 + 2.0, 2.5 + 1.0, 1.0])
    # Noise depends on the number of the prompt.
    assert prior.__dict__["seen"] == [(["a cat", "a cat", "a cat", "a dog"], [0, 1, 2, 2])]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "a prompt is a text, and 3 is not one: put it in quotes"),
        ({}, "a prompt without any part: name a text, or image:FILE"),
        ({"a cat": "much"}, "is to be texts with weights, as {'a cat': 0.3}"),
        ("image:nowhere.png", "'nowhere.png' is no image file that can be read"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(UserError) as refused:
        Known()([prompt])
    assert message in str(refused.value)


def test_the_condition_is_one_token_and_its_null_the_embedding_of_nothing():
    kind = PriorPrompts(1, 6, 0, embedding_width=4, prior=Known())
    states = kind.parse(["a dog", "a cat"])
    np.testing.assert_array_equal(
        states.states[:, 0], [[10.0] * 4 + [0.0] * 2, [1.0] * 4 + [0.0] * 2]
    )
    assert states.mask.all()
    null = kind.null(3)
    np.testing.assert_array_equal(null.states[:, 0], [[-1.0] * 4 + [0.0] * 2] * 3)


def test_a_folder_is_not_a_prior():
    with pytest.raises(UserError, match=r"pass the run, diffjax\.from_pretrained"):
        ImagePrior("folder")  # pyright: ignore[reportArgumentType]
