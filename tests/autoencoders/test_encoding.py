"""Latents that are written once: what the files hold, stops at any place, and draws in training."""

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import config_files
from diffjax.autoencoders import encoding as module
from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import Codec, Posterior, SpaceToDepth
from diffjax.conditions.tokens import Tokens
from diffjax.data import ArraySource, DataSet, GivenSource, all_images, batches, digits, latents
from diffjax.data.latents import LOG_VARIANCE, latents_in
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop.device_batches import device_batches
from diffjax.runs.setup import set_up
from diffjax.training.posterior import drawn, posterior_key
from diffjax.training.sharding import batch_sharding, local_rows, make_mesh
from tests.support.patches import patches


@dataclass(frozen=True)
class Noisy(Codec):
    """Squares of pixels as channels, with a known deviation each."""

    stochastic: ClassVar[bool] = True
    name: ClassVar[str] = "noisy"
    sha256: ClassVar[str] = "ab12"
    base: ClassVar[Codec] = SpaceToDepth(2)
    deviations: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)

    def latent_shape(self, image_shape):
        return self.base.latent_shape(image_shape)

    def image_shape(self, latent_shape):
        return self.base.image_shape(latent_shape)

    def encode(self, params, images):
        return self.posterior(params, images).mean

    def decode(self, params, latents):
        return self.base.decode(params, latents)

    def posterior(self, params, images):
        mean = self.base.encode(params, images)
        log_variance = 2 * jnp.log(jnp.asarray(self.deviations, jnp.float32))
        return Posterior(mean, jnp.broadcast_to(log_variance[None, None, None], mean.shape))


RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (30, 4, 6, 1), np.uint8)
LABELS = (np.arange(30) % 3).astype(np.int32)
FLOATS = IMAGES.astype(np.float32) / 127.5 - 1
NAMES = ("cat", "dog", "owl")


def data_set(**changes: Any) -> DataSet:
    train, test = (ArraySource(IMAGES[rows], LABELS[rows]) for rows in (slice(22), slice(22, 30)))
    return replace(DataSet("animals", train, test, (4, 6, 1), 3, NAMES), **changes)


def squares(images: np.ndarray) -> np.ndarray:
    parts = images.reshape(len(images), 2, 2, 3, 2, 1)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), 2, 3, 4)


def files_of(folder):
    return {file.name: np.load(file) for file in folder.glob("*.npy")}


def test_the_files_hold_each_image_once_in_order_and_mirrored(tmp_path):
    assert encode(data_set(), SpaceToDepth(2), tmp_path, Stored(flips=True, dtype="float32"))
    found = files_of(tmp_path)
    np.testing.assert_allclose(found["latents.npy"], squares(FLOATS), atol=1e-6)
    np.testing.assert_allclose(found["latents_flipped.npy"], squares(FLOATS[:, :, ::-1]), atol=1e-6)
    np.testing.assert_array_equal(found["labels.npy"], LABELS)
    assert sorted(found) == ["labels.npy", "latents.npy", "latents_flipped.npy"]
    data = latents(str(tmp_path), codec=SpaceToDepth(2))
    assert (len(data.train), len(data.test), data.label_names) == (22, 8, NAMES)
    np.testing.assert_allclose(all_images(data.test)[0], squares(FLOATS[22:]), atol=1e-6)
    assert not encode(data_set(), SpaceToDepth(2), tmp_path, Stored(flips=True, dtype="float32"))


@pytest.mark.parametrize("name", ["latents.npy", "latents_flipped.npy"])
def test_a_finished_folder_that_lost_a_file_is_neither_complete_nor_trained_on(tmp_path, name):
    data, how = digits(), Stored(flips=True)
    encode(data, SpaceToDepth(2), tmp_path, how)
    assert not encode(data, SpaceToDepth(2), tmp_path, how)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"there is no .*{name}"):
        latents(str(tmp_path), codec=SpaceToDepth(2))
    with pytest.raises(UserError, match=f"{name} was finished and can't be read any more"):
        encode(data, SpaceToDepth(2), tmp_path, how)
    (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{name} was finished and can't be read any more"):
        encode(data, SpaceToDepth(2), tmp_path, how)


def test_features_of_images_are_stored_beside_them_and_go_with_the_mirrored_ones(tmp_path):
    extractor = patches(2, 3, 4)
    how = Stored(flips=True, dtype="float32", extractor=extractor)
    encode(data_set(), SpaceToDepth(2), tmp_path, how)
    found = files_of(tmp_path)
    both = extractor.features(FLOATS), extractor.features(FLOATS[:, :, ::-1])
    np.testing.assert_allclose(found["features.npy"], both[0], atol=1e-6)
    np.testing.assert_allclose(found["features_flipped.npy"], both[1], atol=1e-6)
    train = latents(str(tmp_path), codec=SpaceToDepth(2)).train
    rows, uniforms = np.array([3, 7]), np.array([0.9, 0.1])  # The second one is mirrored.
    batch: Any = train.draw(rows, uniforms)
    expected = np.stack([both[0][3], both[1][7]])
    np.testing.assert_allclose(batch["features"], expected, atol=1e-6)
    plain: Any = train.gather(rows)
    np.testing.assert_allclose(plain["features"], both[0][rows], atol=1e-6)
    assert json.loads((tmp_path / "latents.json").read_text())["features"] == "patches:2x3x4"
    other = replace(extractor, sha256="1" * 64)
    with pytest.raises(UserError, match="holds latents of features_sha256=0000"):
        encode(data_set(), SpaceToDepth(2), tmp_path, replace(how, extractor=other))
    (tmp_path / "features_flipped.npy").rename(tmp_path / "away.npy")
    with pytest.raises(UserError, match=r"but no features_flipped\.npy of the mirrored images"):
        latents(str(tmp_path), codec=SpaceToDepth(2))
    np.save(tmp_path / "features.npy", both[0][:5])
    with pytest.raises(UserError, match=r"features.npy in .* is \[5, 2, 3, 4\], and features of"):
        latents(str(tmp_path), codec=SpaceToDepth(2))
    with pytest.raises(UserError, match=r"pixels:2x2 returns \[4\] for an image"):
        encode(data_set(), SpaceToDepth(2), tmp_path / "x", Stored(extractor=pixel_features(2)))


@pytest.mark.parametrize("spread", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_moments_and_samples_are_of_the_posterior_and_statistics_of_what_is_drawn(tmp_path, spread):
    place = local_rows() if spread else None
    how = Stored("moments", dtype="float32", flips=True)
    encode(data_set(), Noisy(), tmp_path / "moments", how, batch_size=4, place=place)
    found = files_of(tmp_path / "moments")
    np.testing.assert_allclose(found["latents.npy"], squares(FLOATS), atol=1e-6)
    expected = np.broadcast_to(np.log(np.square(Noisy().deviations)), (30, 2, 3, 4))
    for name in ("log_variances.npy", "log_variances_flipped.npy"):
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    both = np.concatenate([squares(FLOATS[:22]), squares(FLOATS[:22, :, ::-1])]).reshape(-1, 4)
    facts = json.loads((tmp_path / "moments/latents.json").read_text())["statistics"]
    variance = both.var(0) + np.square(Noisy().deviations)
    np.testing.assert_allclose(facts["mean"], both.mean(0), atol=1e-6)
    np.testing.assert_allclose(facts["std"], np.sqrt(variance), rtol=1e-5)
    all_elements = both.var() + np.square(Noisy().deviations).mean()
    assert facts["scalar_std"] == pytest.approx(np.sqrt(all_elements), rel=1e-5)

    encode(data_set(), Noisy(), tmp_path / "samples", Stored("samples", dtype="float32"))
    drawn = files_of(tmp_path / "samples")["latents.npy"] - squares(FLOATS)
    normal = (drawn / np.asarray(Noisy().deviations)).ravel()  # 720 of them
    assert abs(normal.mean()) < 4 / 720**0.5
    assert normal.std() == pytest.approx(1.0, abs=4 / 1440**0.5)
    encode(
        data_set(), Noisy(), tmp_path / "again", Stored("samples", dtype="float32"), batch_size=7
    )
    np.testing.assert_array_equal(
        files_of(tmp_path / "again")["latents.npy"], files_of(tmp_path / "samples")["latents.npy"]
    )


@pytest.mark.parametrize(
    "stops", [(0, 3), *(pytest.param(n, marks=pytest.mark.thorough) for n in ((1,), (2, 2, 2)))]
)
def test_a_stop_anywhere_loses_one_shard_at_most(tmp_path, monkeypatch, stops):
    """Shards of 7, 7, 7, 1, 7 and 1; batches of 3. Each stop follows so many batches."""
    how = Stored("samples", flips=True, shard_images=7)
    encode(data_set(), Noisy(), tmp_path / "whole", how, batch_size=3)
    encoded, written = Counter(), []
    on_device, put = module._Job._on_device, module._Job._put

    def counting(self, images, rows, size):
        encoded.update(rows)
        return on_device(self, images, rows, size)

    def stopping(self, files, rows, batch):
        if len(written) >= left:
            raise KeyboardInterrupt
        written.append(rows)
        put(self, files, rows, batch)

    monkeypatch.setattr(module._Job, "_on_device", counting)
    monkeypatch.setattr(module._Job, "_put", stopping)
    folder = tmp_path / "stopped"
    for stop in stops:
        left = stop
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            encode(data_set(), Noisy(), folder, how, batch_size=3)
        with pytest.raises(UserError, match="are not finished: run the same"):
            latents(str(folder))
    finished = {0, 1, 2, 3, 4, 5, 6} if max(stops) >= 3 else set()
    encoded.clear()
    left = 100
    assert encode(data_set(), Noisy(), folder, how, batch_size=3)
    assert set(encoded) == set(range(30)) - finished
    assert max(encoded.values()) == 1
    whole = files_of(tmp_path / "whole")
    for name, array in files_of(folder).items():
        np.testing.assert_array_equal(array, whole[name], name)
    assert json.loads((folder / "latents.json").read_text()) == json.loads(
        (tmp_path / "whole/latents.json").read_text()
    )
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize(
    "call", [2, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 3))]
)
def test_a_stop_while_the_files_are_moved_loses_nothing(tmp_path, monkeypatch, call):
    calls, replace_file = [], os.replace

    def stopping(source, target):
        if str(target).startswith(str(tmp_path / "latents")) or str(target).endswith("labels.npy"):
            calls.append(target)
            if len(calls) == call:
                raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(module.os, "replace", stopping)
    monkeypatch.setattr(module._Job, "begin", counted(module._Job.begin, calls))
    with pytest.raises(KeyboardInterrupt):
        encode(data_set(), SpaceToDepth(2), tmp_path)
    monkeypatch.undo()
    assert encode(data_set(), SpaceToDepth(2), tmp_path)
    np.testing.assert_allclose(files_of(tmp_path)["latents.npy"], squares(FLOATS), atol=1e-3)
    np.testing.assert_array_equal(files_of(tmp_path)["labels.npy"], LABELS)


def counted(begin, calls):
    """Counts from where the arrays are there."""

    def begun(self, facts):
        begin(self, facts)
        calls.clear()

    return begun


def test_processes_share_the_shards(tmp_path):
    how = Stored(shard_images=4, dtype="float32")
    with pytest.raises(UserError, match=r"4 of 8 shards .* are not finished, such as 2"):
        encode(data_set(), SpaceToDepth(2), tmp_path, how, part=(0, 2))
    assert encode(data_set(), SpaceToDepth(2), tmp_path, how, part=(1, 2))
    np.testing.assert_allclose(files_of(tmp_path)["latents.npy"], squares(FLOATS), atol=1e-6)


def test_other_conditions_are_kept(tmp_path):
    states = RANDOM.normal(size=(30, 5, 6)).astype(np.float32)
    pooled = RANDOM.normal(size=(30, 4)).astype(np.float32)
    kind = Tokens(length=5, width=6, pooled_width=4)
    arrays = dict(zip(kind.shapes(1), (states, np.ones((30, 5), bool), pooled), strict=False))
    assert set(arrays) == set(kind.shapes(1))
    plain = data_set()
    data = data_set(
        train=GivenSource(plain.train, {k: x[:22] for k, x in arrays.items()}),
        test=GivenSource(plain.test, {k: x[22:] for k, x in arrays.items()}),
        given=kind,
    )
    encode(data, SpaceToDepth(2), tmp_path, Stored(flips=True))
    read = latents(str(tmp_path), codec=SpaceToDepth(2), given=kind)
    batch: Any = read.test.gather([3])
    for name, array in arrays.items():
        np.testing.assert_array_equal(batch[name], array[[25]])
    stream: Any = next(batches(read.train, batch_size=4, seed=0))
    assert set(arrays) < set(stream)


def test_channels_are_normalised_by_the_recorded_statistics(tmp_path):
    """EDM2: mean 0 and standard deviation 0.5 of each channel; decoding inverts it."""
    encode(data_set(), Noisy(), tmp_path, Stored("means", dtype="float32"))
    data = latents(str(tmp_path), codec=Noisy(), normalisation="channels", scale=0.5)
    found = all_images(data.train)[0]
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.std((0, 1, 2)), 0.5, rtol=1e-5)
    np.testing.assert_allclose(data.codec.decoder()(found), FLOATS[:22], atol=1e-5)
    np.testing.assert_allclose(data.codec.encoder()(FLOATS[:22]), found, atol=1e-5)
    scalar = latents(str(tmp_path), codec=Noisy(), normalisation="scalar")
    assert all_images(scalar.train)[0].std() == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(UserError, match="no normalisation of latents is called 'channel'; did"):
        latents(str(tmp_path), normalisation="channel")


def test_training_draws_orientation_and_latent_by_seed_step_and_place(tmp_path):
    encode(data_set(), Noisy(), tmp_path, Stored("moments", flips=True, dtype="float32"))
    config = config_files.load("configs/digits.py")
    config.batch_size, config.num_steps, config.model.patch_size = 8, 12, 1
    config.augment.flip_probability = 1.0  # Changes no latents.
    data = latents(str(tmp_path), codec=Noisy(), scale=2.0)
    setup = set_up(config, data.image_shape, data.condition, codec=data.codec)
    made = [jax.device_get(batch) for batch in device_batches(setup, data, 0)]
    again = [jax.device_get(batch) for batch in device_batches(setup, data, 7)]
    for one, other in zip(made[7:], again, strict=True):
        assert one.keys() == other.keys() == {"image", "label"}
        np.testing.assert_array_equal(one["image"], other["image"])
    both = np.stack([squares(FLOATS[:22]), squares(FLOATS[:22, :, ::-1])])  # [2, 22, …]
    noise, mirrored = [], []
    for batch in made:
        for image, label in zip(batch["image"], batch["label"], strict=True):
            left = (image / 2 - both) / np.asarray(Noisy().deviations)
            size = np.square(left).mean((2, 3, 4))
            flip, row = np.unravel_index(size.argmin(), size.shape)
            assert label == LABELS[row]
            noise.append(left[flip, row].ravel())
            mirrored.append(flip)
    normal = np.concatenate(noise)  # 96 images of 24 elements
    assert abs(normal.mean()) < 4 / normal.size**0.5
    assert normal.std() == pytest.approx(1.0, abs=4 / (2 * normal.size) ** 0.5)
    assert abs(np.mean(mirrored) - 0.5) < 2 / 96**0.5
    assert np.unique(normal.round(4)).size > 0.9 * normal.size  # no draw is used twice
    means = latents(str(tmp_path), codec=Noisy(), sample=False)
    batch: Any = next(batches(means.train, batch_size=4, seed=0))
    assert LOG_VARIANCE not in batch


@pytest.mark.thorough(tenth=False)
def test_a_draw_depends_on_neither_mesh_nor_ensemble():
    mean, log_variance = (RANDOM.normal(size=(8, 2, 3, 4)).astype(np.float32) for _ in range(2))
    key = posterior_key(3)
    alone = drawn({"image": jnp.asarray(mean), LOG_VARIANCE: log_variance}, key, 5)["image"]
    place = batch_sharding(make_mesh())
    spread = {
        "image": jax.device_put(mean, place),
        LOG_VARIANCE: jax.device_put(log_variance, place),
    }
    together = drawn(spread, key, 5)["image"]
    assert together.sharding == place
    np.testing.assert_allclose(together, alone, atol=1e-6)
    stacked = {"image": jnp.asarray(mean)[None], LOG_VARIANCE: jnp.asarray(log_variance)[None]}
    np.testing.assert_allclose(drawn(stacked, key[None], 5)["image"][0], alone, atol=1e-6)


def test_a_folder_names_its_codec_for_a_config(tmp_path):
    encode(data_set(), SpaceToDepth(2), tmp_path)
    config = config_files.load(f"configs/digits.py:latents={tmp_path}")
    assert config.data.path == str(tmp_path)
    assert config.data.codec["_target_"].endswith(":SpaceToDepth")
    config.data.codec.block = 1  # A flag may change it, and then it is refused.
    with pytest.raises(UserError, match="encoded the latents in"):
        latents(str(tmp_path), codec=SpaceToDepth(1))
    with pytest.raises(UserError, match=r"no .*codec\.json"):
        latents_in(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": SpaceToDepth(1)}, "holds latents of codec=space_to_depth:2, not"),
        ({"dataset": data_set(name="plants")}, "data=animals, not plants"),
        ({"stored": Stored(flips=True)}, "flips=False, not True"),
    ],
)
@pytest.mark.parametrize("finished", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_other_latents_in_the_folder_are_refused(tmp_path, monkeypatch, change, message, finished):
    given: dict[str, Any] = {"dataset": data_set(), "codec": SpaceToDepth(2), "folder": tmp_path}
    if finished:
        encode(**given)
    else:
        monkeypatch.setattr(module._Job, "write", lambda self, part: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(**given)
    with pytest.raises(UserError, match=message):
        encode(**(given | change))


def test_what_can_not_be_encoded_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refused(message, dataset=None, codec: Any = None, **stored: Any):
        with pytest.raises(UserError, match=message):
            encode(
                dataset or data_set(),
                codec or SpaceToDepth(2),
                tmp_path / "out",
                Stored(**stored),
            )

    refused("has no posterior to store moments of", kind="moments")
    refused("no kind of latents is called 'mean'; did you mean 'means'", kind="mean")
    refused("float16 or float32, not 'int8'", dtype="int8")
    refused("does not divide images of 4x6", codec=SpaceToDepth(4))
    refused("are latents already", data_set(codec=SpaceToDepth(2)))
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other/latents.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"latents\.npy of another origin"):
        encode(data_set(), SpaceToDepth(2), tmp_path / "other")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage(1))
    refused("the latents take .* GB, and .* has room for 0.0 GB")
    assert not list(tmp_path.glob("out/**/*.npy"))


@dataclass(frozen=True)
class Usage:
    free: int


def test_a_full_disk_is_one_line_and_the_rest_follows_later(tmp_path, monkeypatch):
    def full(self, files, rows, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Job, "_put", full)
    with pytest.raises(UserError, match=r"can't be written any more: No space .* run the same"):
        encode(data_set(), SpaceToDepth(2), tmp_path)
    monkeypatch.undo()
    assert encode(data_set(), SpaceToDepth(2), tmp_path)
    assert len(files_of(tmp_path)["latents.npy"]) == 30


def test_latents_that_are_not_finite_are_named(tmp_path):
    """float16 ends at 65,504."""

    class Large(SpaceToDepth):
        def encode(self, params, images):
            return super().encode(params, images) * 1e6

    with pytest.raises(UserError, match="image 0 is not finite in float16; float32 may hold it"):
        encode(data_set(), Large(2), tmp_path)
