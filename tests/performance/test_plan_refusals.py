"""Plans that are refused: their error messages, and whether the proposed settings work."""

import re

import pytest

from diffjax.errors import UserError
from diffjax.performance.planning import compiled, search, topologies
from diffjax.performance.planning.roofline import estimate
from diffjax.training.sharding import filled
from experiments import plan
from tests.performance.test_planning import fake, planner, tiny


@pytest.fixture
def run_plan(monkeypatch, capsys):
    return planner(monkeypatch, capsys, "--config.model.depth=1", "--analytic")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.mesh.data=-2", "--config.mesh.fsdp=-2"], "data=-2 x fsdp=-2 .* does not fit"),
        (["--config.expected.image_shape=(8,8)"], r"image_shape=\(8, 8\) must be \(height, width"),
        (["--config.expected.image_shape=(0,8,4)"], "each at least 1"),
        (["--search", "--largest_batch"], "two searches"),
        (["--search_over=mesh"], "--search_over needs --search"),
        (["--libtpu=/nowhere"], "--libtpu=/nowhere contains no libtpu"),
    ],
)
def test_what_can_not_be_is_one_line(arguments, said, run_plan):
    status, output = run_plan("--topology=v5e:2x2", *arguments)
    assert status == 2
    assert re.search(f"^error: .*{said}", output.err, re.MULTILINE), output.err


def test_a_search_on_several_slices_keeps_groups_within_them(run_plan, monkeypatch):
    monkeypatch.setattr(plan, "model_of", lambda *asked: fake(8, peak=2**31))
    two = topologies.topology_called("2xv5e:2x2")
    tried = [config.mesh for _, config in search.candidate_plans(tiny(), two, ("mesh",))]
    assert {(mesh.data, mesh.fsdp) for mesh in tried} >= {(2, 4), (4, 2), (8, 1)}
    assert all(mesh.data % 2 == 0 for mesh in tried)
    status, output = run_plan("--topology=2xv5e:1x1", "--search", "--search_over=mesh")
    assert status == 0
    rows = re.findall(r"^\| data=(\d+) fsdp=(\d+)", output.out, re.MULTILINE)
    assert rows == [("2", "1")]


def test_a_search_keeps_the_configs_own_axes_and_leaves_out_what_is_refused(run_plan, monkeypatch):
    def model(config, topology, program):
        del topology, program
        if config.mesh.fsdp == 4:
            raise UserError("not four")
        return fake(8, peak=2**31)

    monkeypatch.setattr(plan, "model_of", model)
    own = ["--config.mesh.tensor=2", "--config.mesh.data=1", "--config.mesh.fsdp=8"]
    status, output = run_plan(
        "--topology=v5e:4x4", "--config.batch_size=8", *own, "--search", "--search_over=mesh"
    )
    assert status == 0
    rows = re.findall(r"^\| data=(\d+) fsdp=(\d+) tensor=2 ", output.out, re.MULTILINE)
    assert output.out.count("\n| data=") == len(rows)
    # All over fsdp, or copies; groups of four, no fewer than there are of them, are refused here.
    assert rows == [("1", "8"), ("8", "1")]


def test_sampling_is_not_searched_over_what_a_backward_pass_keeps(run_plan, monkeypatch):
    monkeypatch.setattr(plan, "model_of", lambda *of: fake(256, peak=2**31))
    status, output = run_plan("--topology=v5e:2x2", "--sampling", "--search")
    assert status == 0
    labels = [line for line in output.out.splitlines() if line.startswith("| data=")]
    assert (
        len(labels)
        == len(set(labels))
        == 2 * len(search.meshes(4, 256) + search.meshes(4, 256, tensor=2)[:1])
    )


def test_batches_that_are_proposed_can_be_cut_into_parts():
    topology = topologies.topology_called("v5e:2x2")
    config = tiny(batch_size=1024, accumulation_steps=32, mesh__data=1, mesh__fsdp=4)
    tried = search.largest_batch(
        config, topology, lambda c: fake(c.batch_size, peak=2**30 + c.batch_size * 2**23)
    )
    assert all(needs.batch_size % (4 * 32) == 0 for _, needs in tried)
    would = search.what_would_fit(config, fake(1024, peak=2**37, fits=False))
    proposed = re.findall(r"batch_size=(\d+)", would)
    assert all(int(batch) % (4 * 32) == 0 for batch in proposed)


@pytest.mark.parametrize(("name", "mesh"), [
    ("v5e:2x2", {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}),
    ("2xv5e:2x2", {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}),
])  # fmt: skip
def test_a_mesh_that_is_proposed_fits_the_chips(name, mesh):
    topology = topologies.topology_called(name)
    config = tiny(**{f"mesh__{axis}": size for axis, size in mesh.items()})
    needs = compiled.Needs(
        "training", name, mesh, 256, 1, True, False, {"parameters": 2**30}, 2**36, 1.0, 1.0, (),
        0.0, None,
    )  # fmt: skip
    (pair,) = re.findall(r"mesh.data=(\d+) --config.mesh.fsdp=(\d+)",
                         search.what_would_fit(config, needs))  # fmt: skip
    proposed = {**mesh, "data": int(pair[0]), "fsdp": int(pair[1])}
    assert filled(proposed, topology.num_chips, topology.num_slices) == proposed
    assert proposed["data"] % topology.copies == 0


def test_float32_on_gpus_takes_twice_as_long_and_memory_is_what_jax_takes():
    def seconds(compute_type, name):
        needs = compiled.Needs(
            "training", name, {}, 8, 1, True, True, {}, 0, 1e15, 1e15, (), 0.0, None,
            compute_type=compute_type,
        )  # fmt: skip
        return estimate(needs, topologies.topology_called(name)).parts["matrix products"]

    assert seconds("float32", "h100:8") == pytest.approx(2 * seconds("bfloat16", "h100:8"))
    assert seconds("float32", "v5e:2x2") == seconds("bfloat16", "v5e:2x2")
    assert topologies.topology_called("h100:8").usable_bytes == 60e9


def test_sizes_of_axes_are_positive_or_free():
    with pytest.raises(UserError, match="does not fit"):
        filled({"data": -2, "fsdp": -2, "tensor": 1, "sequence": 1}, 4)
