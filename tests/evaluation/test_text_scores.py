"""CLIP score and retrieval accuracy: closed forms, provenance, and transformers' CLIP."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffjax.data import digits, to_float
from diffjax.errors import UserError
from diffjax.evaluation.evaluate import NamedRecipe, evaluate
from diffjax.evaluation.extractors.clip import clip_folder
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.extractors.named import extractor_called
from diffjax.evaluation.metrics import compare, reference
from diffjax.evaluation.scores import text_scores
from diffjax.host.run_files import read_json
from diffjax.loop import loop
from diffjax.models.dit import DiT
from diffjax.runs.measuring.evaluated_samples import own_prompts, wanted_samples
from diffjax.runs.measuring.evaluators import Samples
from diffjax.sampling import grids, solvers
from diffjax.sampling.sample import Recipe
from diffjax.spec import spec
from experiments import evaluate as evaluate_run
from experiments.flags import cli
from tests.support.later import Later
from tests.support.phrases import Phrases, phrases
from tests.support.tiny_clip import write_tiny_clip
from tests.support.tiny_run import on_one_device, tiny_config

FEW = {"max_images": 100, "max_neighbour_images": 10}
torch, transformers = Later("torch"), Later("transformers")


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_text_is_found_where_no_other_is_nearer_also_over_several_blocks(monkeypatch):
    monkeypatch.setattr(text_scores, "_ROWS", 3)
    rng = np.random.default_rng(0)
    images, texts, own = unit(rng, 10, 4), unit(rng, 5, 4), rng.integers(0, 5, 10)
    images[:4] = texts[own[:4]]
    found = text_scores.retrieved(images, texts, own)
    nearest = [int(np.argmin(np.linalg.norm(texts - x, axis=1))) for x in images]
    np.testing.assert_array_equal(found, nearest == own)
    assert found[:4].all()
    assert not found.all()


@pytest.fixture(scope="module")
def real():
    """Images by the means of their upper and lower half, and texts at two angles between them."""
    angles = {"top": 0.0, "both": np.pi / 4, "neither": np.pi}
    pixels = pixel_features(2)

    def apply(images):
        means, _ = pixels.apply(images)
        halves = means.reshape(-1, 2, 2).mean(2) + 1.0
        return halves / np.sqrt((halves**2).sum(1, keepdims=True)), None

    def texts(given):
        return np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in given])

    return reference(digits(), replace(pixels, name="halves", apply=apply, texts=texts), **FEW)


def halves(top, bottom):
    image = np.full((8, 8, 1), top, np.float32)
    image[4:] = bottom
    return image


SAMPLES = np.stack([halves(1, -1), halves(1, 1), halves(1, 1), halves(1, -1)])
TEXTS = ["top", "top", "both", "neither"]


def test_scores_are_means_of_cosines_and_shares_of_texts_that_are_nearest(real):
    found = compare(SAMPLES, None, real, texts=TEXTS)
    score, retrieval = found["clip_score"], found["retrieval_accuracy"]
    each = 100 * np.array([1.0, np.sqrt(0.5), 1.0, 0.0])  # the last cosine is -1
    assert score["value"] == pytest.approx(each.mean(), abs=1e-4)
    assert score["standard_error"] == pytest.approx(each.std(ddof=1) / 2, abs=1e-4)
    assert retrieval["value"] == 0.5  # the second is nearest to "both", the last to "top"
    assert retrieval["by_chance"] == pytest.approx(1 / 3)
    assert retrieval["provenance"]["among"] == 3
    assert score["floor"] is retrieval["floor"] is None  # digits have no captions
    facts = score["provenance"]
    assert (facts["extractor"], facts["num_samples"], facts["num_texts"]) == ("halves", 4, 3)
    others = compare(SAMPLES, None, real, texts=TEXTS[::-1])["clip_score"]["provenance"]
    assert facts["texts_sha256"] != others["texts_sha256"]


def test_the_floor_is_that_of_as_many_test_images_with_their_captions(real):
    """Test images are all bright above and dark below, and half of their captions say so."""
    features = np.tile([[1.0, 0.0]], (8, 1)).astype(np.float32)
    captions = ("top", "both") * 4
    captioned = replace(real, test_features=features, test_texts=captions)
    found = compare(SAMPLES, None, captioned, texts=TEXTS, all_metrics=False)
    rows = np.sort(np.random.default_rng(real.seed).choice(8, 4, replace=False))
    right = np.mean([captions[row] == "top" for row in rows])
    expected = 100 * (right + (1 - right) * np.sqrt(0.5))
    assert found["clip_score"]["floor"] == pytest.approx(expected, abs=1e-4)
    assert found["retrieval_accuracy"]["floor"] == pytest.approx(right)
    assert found["clip_score"]["provenance"]["num_floor_images"] == 4


def test_test_images_are_shown_with_their_captions():
    data = phrases(64)
    captions = [f"caption {i}" for i in range(len(data.test))]
    object.__setattr__(data.test, "captions", captions)
    found = wanted_samples(wired(), lambda: data, np.zeros(4, int))
    assert found.texts == ["caption 0", "caption 2", "caption 4", "caption 6"]  # of eight


def test_there_are_none_without_texts_and_their_number_is_checked(real):
    found = compare(SAMPLES, None, real, all_metrics=False)
    assert found["clip_score"] is found["retrieval_accuracy"] is None
    assert "num_texts" not in found["frechet_distance"]["provenance"]
    with pytest.raises(UserError, match="4 samples come with 3 texts"):
        compare(SAMPLES, None, real, texts=TEXTS[:3])


def test_an_evaluation_has_those_of_the_extractor_that_reads_texts_for_each_recipe(real):
    pixels = reference(digits(), pixel_features(2), **FEW)
    recipe = NamedRecipe("ddim", "uniform", Recipe(solvers.ddim(), grids.Power(), 3))
    other = replace(recipe, recipe=replace(recipe.recipe, num_steps=2))
    drawn = {3: SAMPLES, 2: SAMPLES[[0, 1, 2, 2]]}
    result = evaluate(
        lambda named: (drawn[named.recipe.num_steps], 1),
        [recipe, other],
        [pixels, real],
        labels=None,
        texts=TEXTS,
    ).summary
    assert result["clip_score"]["provenance"]["extractor"] == "halves"
    assert result["frechet_distance"]["provenance"]["extractor"] == "pixels:2x2"
    assert {row["num_steps"]: row["retrieval_accuracy"] for row in result["by_nfe"]} == {
        3: 0.5, 2: 0.5,
    }  # fmt: skip
    assert all(row["clip_score"] > 0 for row in result["by_nfe"])


def wired(starts_at_source=False):
    traits = SimpleNamespace(starts_at_source=starts_at_source)
    return SimpleNamespace(condition=Phrases(), objective=SimpleNamespace(traits=traits))


def test_prompts_are_shown_in_turn_in_the_place_of_test_images():
    asked = ["very dark", "light"]
    found = wanted_samples(wired(), lambda: pytest.fail("no data"), np.zeros(5, int), asked)
    assert found.texts == ["very dark", "light", "very dark", "light", "very dark"]
    assert found.labels is None
    np.testing.assert_array_equal(found.condition.states, Phrases().parse(found.texts).states)


def test_prompts_that_can_not_be_shown_are_refused():
    with pytest.raises(UserError, match=r"evaluation.prompts: no word 'drak'; did you mean 'dark'"):
        wanted_samples(wired(), digits, np.zeros(2, int), ["drak"])
    with pytest.raises(UserError, match="is a file: put @ before it, as in @README"):
        own_prompts(SimpleNamespace(evaluation=SimpleNamespace(prompts="README.md")))
    with pytest.raises(UserError, match="makes images from test images"):
        wanted_samples(wired(starts_at_source=True), digits, np.zeros(2, int), ["dark"])


class TestFolder:
    @pytest.mark.parametrize(
        ("preprocessing", "message"),
        [
            ({"resample": 2}, "has resample=2: only bicubic"),
            ({"do_center_crop": False}, "has do_center_crop=false: only bicubic"),
            ({"crop_size": 16}, "makes images of 16 pixels from 8, and the network reads 8"),
            ({"size": {"height": 8, "width": 8}}, "makes images of 8 pixels from None"),
        ],
    )
    def test_other_preprocessing_is_refused(self, tmp_path, preprocessing, message):
        pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
        with pytest.raises(UserError, match=message):
            clip_folder(str(write_tiny_clip(tmp_path, **preprocessing)))

    def test_what_is_missing_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="clip_folder needs weights: the folder of a CLIP"):
            extractor_called("clip_folder")
        with pytest.raises(UserError, match=r"caption='a photo' needs one \{\}"):
            clip_folder(str(tmp_path), caption="a photo")
        pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
        write_tiny_clip(tmp_path)
        (tmp_path / "config.json").write_text('{"hidden_size": 8}')
        with pytest.raises(UserError, match="is no CLIP of images and texts"):
            clip_folder(str(tmp_path))

    @pytest.mark.thorough(tenth=False)
    def test_the_record_has_hashes_and_a_caption_changes_texts_alone(self, tmp_path):
        pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
        plain = clip_folder(str(write_tiny_clip(tmp_path)), batch_size_images=2)
        described = clip_folder(str(tmp_path), 2, caption="a photo of {}")
        assert plain.sha256 != described.sha256
        assert len(plain.provenance["weights_sha256"]) == 64
        assert plain.provenance["weights_sha256"] != plain.provenance["tokenizer_sha256"]
        images = to_float(np.zeros((3, 20, 10, 1), np.uint8))
        np.testing.assert_array_equal(plain.features(images), described.features(images))
        both: Any = plain.texts, described.texts
        texts = both[0](["a photo of an apple", "an apple"])
        np.testing.assert_allclose(both[1](["an apple"]), texts[:1], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1.0, rtol=1e-6)

    @pytest.mark.parity
    @pytest.mark.parametrize(
        ("activation", "wide", "shortest"), [("quick_gelu", 128, 56), ("gelu", 80, 60)]
    )
    def test_scores_are_logits_of_transformers_from_files_to_numbers(
        self, tmp_path, activation, wide, shortest
    ):
        """With the published factor 100, for images that are not square."""
        pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
        both = clip_of_transformers(tmp_path, activation, wide, shortest)
        rng = np.random.default_rng(0)
        # Coarse, so that images differ after they were resized.
        levels = rng.integers(0, 256, (3, 9, 7, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        texts = ["a red apple", "naïve café, (really?)", "wow " * 20]
        processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
        pixels = processor([Image.fromarray(x) for x in levels], return_tensors="pt").pixel_values
        tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
            texts, padding=True, truncation=True, max_length=9, return_tensors="pt"
        )
        with torch.inference_mode():
            expected = both(pixel_values=pixels, **tokens).logits_per_image.numpy()
        extractor: Any = clip_folder(str(tmp_path), batch_size_images=2)
        images, embedded = extractor.features(to_float(levels)), extractor.texts(texts)
        np.testing.assert_allclose(100 * images @ embedded.T, expected, atol=1e-3)
        assert expected.std() > 1
        for place in range(3):
            found = text_scores.clip_scores(images, embedded[[place] * 3])
            np.testing.assert_allclose(found, np.maximum(expected[:, place], 0), atol=1e-3)


def clip_of_transformers(folder, activation, wide, shortest):
    """A CLIP with random weights, saved with its tokenizer and preprocessing."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", reason="pip install transformers")
    write_tiny_clip(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": activation}
    config = transformers.CLIPConfig(
        text_config={
            **sizes, "hidden_size": 32, "intermediate_size": wide, "vocab_size": len(tokenizer),
            "max_position_embeddings": 9, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **sizes, "hidden_size": 32, "intermediate_size": wide, "image_size": 56,
            "patch_size": 14,
        },
        projection_dim=24,
        logit_scale_init_value=float(np.log(100.0)),
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.CLIPModel(config).eval()
    for name, parameter in network.named_parameters():
        if name != "logit_scale":
            parameter.data += 0.1 * torch.randn(parameter.shape)
    network.save_pretrained(folder)
    size = {"size": {"shortest_edge": shortest}, "crop_size": 56, "resample": 3}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    return network


@pytest.mark.thorough(tenth=False)
def test_a_run_is_trained_and_evaluated_on_prompts(tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
    clip = write_tiny_clip(tmp_path / "clip")
    prompts, other = tmp_path / "prompts.txt", tmp_path / "other.txt"
    prompts.write_text("very dark\n\nlight left\ndark\n")
    other.write_text("drak\n")
    config = tiny_config("objective=flow").unlock()
    config.data = spec(phrases)
    config.model = spec(DiT, patch_size=1, hidden_size=16, depth=1, num_heads=2)
    config.evaluation.extractor = spec(pixel_features, size=1)
    config.evaluation.extractors = (spec(clip_folder, weights=str(clip)),)
    config.evaluation.prompts = f"@{other}"
    config.evaluators = {"samples": spec(Samples, metrics=("clip_score",), num_samples=6)}
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        with pytest.raises(UserError, match=r"evaluation.prompts: no word 'drak'"):
            loop.train(config.copy_and_resolve_references().lock(), tmp_path / "refused")
        config.evaluation.prompts = f"@{prompts}"
        with pytest.raises(UserError, match="no clip_score by pixels:1x1: it needs the extractor"):
            loop.train(config.copy_and_resolve_references().lock(), tmp_path / "refused")
        config.evaluators = {}
        loop.train(config.lock(), tmp_path / "run")
    evaluation: Any = read_json(tmp_path / "run" / "evaluation.json")
    score = evaluation["clip_score"]
    assert score == evaluation["extractors"]["clip_folder:clip"]["clip_score"]
    assert (score["provenance"]["num_texts"], score["provenance"]["num_samples"]) == (3, 20)
    assert evaluation["retrieval_accuracy"]["provenance"]["among"] == 3
    assert all(0 <= row["clip_score"] <= 100 for row in evaluation["by_nfe"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "CLIP score" in page
    argv = [f"--workdir={tmp_path / 'run'}", "--allowed_packages=tests", f"--prompts=@{other}"]
    assert cli.run(evaluate_run.main, evaluate_run.FLAGS, usage="", argv=argv) == 2
    assert "evaluation.prompts: no word 'drak'" in capsys.readouterr().err
