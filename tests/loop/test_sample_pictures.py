"""The picture of samples that a run draws: how many, of which classes, and where each is."""

import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffjax.data import ArraySource, DataSet
from diffjax.loop import recorder
from diffjax.runs.samples.model import Model
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from tests.support.tiny_network import Tiny


def drawn(monkeypatch, folder, num_classes: int, **settings) -> tuple[list[int], tuple[int, int]]:
    """The labels that are drawn, and the picture's size; a sample's grey is its label."""
    names = tuple("abcdefghijklmnop"[:num_classes])
    source = ArraySource(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int32))
    data = DataSet("some", source, source, (8, 8, 1), num_classes, names)
    config = digits.get_config()
    config.model = spec(Tiny)
    config.update(settings)
    if not num_classes:
        config.sampling.guidance_scale = 1.0
    setup = set_up(config, (8, 8, 1), data.condition)
    asked = []

    def sample(model, recipe, request, batch_size):
        labels = request.condition
        asked.extend(labels.tolist())
        return np.ones((len(labels), 8, 8, 1)) * labels[:, None, None, None] / 16

    monkeypatch.setattr(Model, "sample", sample)
    draw = recorder.grid_drawer(setup.parts, data, folder)
    draw(setup.abstract._replace(step=3))
    with Image.open(folder / "samples/step_00000003.png") as picture:
        return asked, picture.size


@pytest.mark.parametrize(
    ("num_classes", "columns", "rows"),
    [(0, 8, 8), (1, 8, 8), (2, 8, 8), (3, 9, 7), (10, 10, 6), (16, 10, 6)],
)
def test_pictures_in_training_are_nearly_square_and_columns_are_of_one_class(
    monkeypatch, tmp_path, num_classes, columns, rows
):
    labels, size = drawn(monkeypatch, tmp_path, num_classes)
    assert len(labels) == columns * rows
    by_column = np.reshape(labels, (rows, columns))
    assert (by_column == by_column[0]).all()
    shown = max(min(num_classes, 10), 1)
    assert by_column[0].tolist() == [i % shown for i in range(columns)]
    band = 16 if num_classes else 0  # of names
    assert size == (50 * columns - 2, band + 50 * rows - 2)


def test_how_many_is_a_setting(monkeypatch, tmp_path):
    for i, (num_images, found) in enumerate([(36, 36), (40, 36), (1, 1)]):
        labels, _ = drawn(monkeypatch, tmp_path / str(i), 3, sample_images=num_images)
        assert len(labels) == found
