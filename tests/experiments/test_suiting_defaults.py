"""The defaults of a config follow its objective, and a name on the command line wins."""

import json

import pytest

from configs import digits, fashion_mnist
from diffjax import choices, config_files
from diffjax.runs.samples.recipes import name_in
from diffjax.spec import TARGET
from experiments.train import headline, note_on_loss


@pytest.mark.parametrize("get_config", [digits.get_config, fashion_mnist.get_config])
@pytest.mark.parametrize(
    ("arguments", "network"),
    [
        ("objective=flow", "DiT"),
        ("objective=ddpm", "UNet"),
        ("objective=ddpm,model=dit", "DiT"),
        ("objective=ddpm,target=v", "DiT"),
        ("objective=v,target=score", "UNet"),
    ],
)
def test_noise_is_predicted_by_a_unet_unless_a_network_is_named(get_config, arguments, network):
    assert get_config(arguments).model[TARGET].endswith(f":{network}")


def test_a_default_network_is_not_in_the_name_of_the_run_and_another_one_is():
    names = {text: digits.get_config(text).name for text in ("objective=ddpm", "model=unet")}
    assert names == {"objective=ddpm": "digits-ddpm", "model=unet": "digits-unet"}
    assert digits.get_config("objective=ddpm,model=unet").name == "digits-ddpm"
    assert digits.get_config("objective=ddpm,model=dit").name == "digits-ddpm-dit"


@pytest.mark.parametrize(
    ("objective", "recipe"),
    [
        ("flow", ("heun", "uniform", 9, 1.1)),
        ("edm", ("heun", "karras", 9, 1.1)),
        ("score_ve", ("ddim", "uniform", 9, 1.1)),
        ("iddpm", ("ddim", "karras", 9, 1.1)),
        ("imf", ("flow_map", "uniform", 2, 1.0)),
        ("ict", ("consistency", "uniform_root", 2, 1.0)),
    ],
)
def test_samples_are_drawn_as_suits_the_path_and_what_is_predicted(objective, recipe):
    sampling = digits.get_config(f"objective={objective}").sampling
    names = [
        name_in(table, part)
        for table, part in ((choices.SOLVERS, sampling.solver), (choices.GRIDS, sampling.grid))
    ]
    assert (*names, sampling.num_steps, sampling.guidance_scale) == recipe


def test_what_needs_many_more_steps_says_so():
    for objective, slow in {"mean_flow": 0, "tvm": 1, "drifting": 1, "ict": 1}.items():
        assert len(note_on_loss(digits.get_config(f"objective={objective}"))) == slow, objective


@pytest.mark.parametrize("name", ["captions", "digits_small", "emoji"])
def test_a_config_with_its_own_guidance_has_none_for_a_model_of_few_steps(name):
    """Guidance combines posterior means, which a consistency model does not predict."""
    assert config_files.load(name).sampling.guidance_scale > 1
    few = config_files.load(f"{name}:objective=cd")
    assert (few.sampling.guidance_scale, few.sampling.num_steps) == (1.0, 2)
    assert few.evaluation.num_steps == (1, 2, 4)


@pytest.mark.parametrize(("floor", "said"), [(0.5, " (floor 0.500)"), (None, "")])
def test_the_last_line_of_a_training_has_a_floor_where_there_is_one(tmp_path, floor, said):
    distance = {"value": 29.1, "floor": floor}
    of_run = {"num_samples": 12, "accuracy": None, "sampling": {"nfe": 100}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"frechet_distance": distance, **of_run}))
    assert headline(tmp_path) == (
        f"12 samples: Fréchet distance 29.1{said}, 100 network evaluations per sample"
    )
