"""Settings for a machine: the fastest that fit by a plan whose numbers are made up."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.fitting import attached, fitted, multiplies_bfloat16
from diffjax.performance.planning.topologies import GIB, topology_called

V5E = topology_called("v5e:1x1")  # 15.74 GiB, of which 14.17 may be planned
KEPT = {"none": 1.0, "products": 0.5, "full": 0.125}  # GiB of activations of an image


def config(**values):
    return ConfigDict(
        {
            "name": "study",
            "batch_size": 64,
            "accumulation_steps": 1,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "model": {"dtype": "float32", "remat": "none", "attention": "auto"},
            **values,
        }
    )


@dataclass
class Plan:
    """A network of `state` GiB, moments included, and gradients of a quarter of that."""

    state: float = 2.0
    kept: dict = field(default_factory=lambda: KEPT)

    def __call__(self, config, topology):
        rows = topology.num_chips
        fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else 1
        halves = 1 if config.model.get("dtype") == "bfloat16" else 2
        each = self.kept[config.model.get("remat", "none")] * halves / 2
        memory = {
            "parameters": int(self.state * GIB / fsdp),
            "gradients": int(self.state * GIB / 4 / fsdp),
            "activations": int(each * config.batch_size / rows * GIB),
        }
        return Needs("training", topology.name, {}, 64, 1, False, True, memory, 0, 1, 1, (), 0, 0)


def test_a_batch_that_fits_is_not_split():
    found = fitted(config(batch_size=16), V5E, plan=Plan())
    assert (found.config.model.dtype, found.config.model.remat) == ("bfloat16", "none")
    assert found.config.accumulation_steps == 1
    assert (found.config.mesh.data, found.config.mesh.fsdp) == (1, 1)
    assert found.peak_bytes == int(2.5 * GIB) + 8 * GIB
    assert found.reasons["model.attention"] == "auto: xla on a tpu"


def test_a_batch_that_does_not_fit_is_split_into_as_few_parts_as_fit():
    # 32 GiB of activations beside 3 GiB: 2 parts have 16, 4 have 8.
    found = fitted(config(), V5E, plan=Plan())
    assert (found.config.model.remat, found.config.accumulation_steps) == ("none", 4)
    assert found.reasons["accumulation_steps"] == "4: 11.0 of 15.7 GiB a device by plan"


def test_rematerialisation_comes_before_parts_of_fewer_than_eight_images():
    # An image takes 2 GiB: eight of them do not fit with none, and do with products.
    plan = Plan(kept={"none": 4.0, "products": 2.0, "full": 0.5})
    found = fitted(config(), V5E, plan=plan)
    assert (found.config.model.remat, found.config.accumulation_steps) == ("products", 8)
    huge = Plan(kept={"none": 16.0, "products": 12.0, "full": 4.0})
    found = fitted(config(), V5E, plan=huge)
    assert (found.config.model.remat, found.config.accumulation_steps) == ("none", 64)


def test_parameters_are_sharded_if_a_copy_takes_more_than_half_of_a_device():
    found = fitted(config(), topology_called("v5e:2x4"), plan=Plan(state=20.0))
    # 30 GiB with twice the gradients, of which a quarter is below half of 15.74.
    assert (found.config.mesh.data, found.config.mesh.fsdp) == (2, 4)
    alone = fitted(config(), topology_called("v5e:2x4"), plan=Plan(state=1.0))
    assert (alone.config.mesh.data, alone.config.mesh.fsdp) == (8, 1)
    own = fitted(
        config(mesh={"data": -1, "fsdp": -1, "tensor": 1, "sequence": 1}), V5E, plan=Plan()
    )
    assert "mesh" not in own.reasons


def test_what_the_user_has_set_stays():
    given = ["config.model.dtype", "config.accumulation_steps", "config.mesh.data"]
    found = fitted(config(batch_size=8), V5E, given=given, plan=Plan())
    assert found.config.model.dtype == "float32"
    assert set(found.reasons) == {"model.remat", "accumulation_steps", "model.attention"}
    found = fitted(config(), V5E, given=["config.model.remat"], plan=Plan(kept={"none": 2.0}))
    assert found.config.model.remat == "none"


def test_what_fits_by_nothing_is_refused_and_other_devices_have_their_type_chosen():
    with pytest.raises(UserError, match="study at batch 64 fits 1 x v5e by no mesh"):
        fitted(config(), V5E, plan=Plan(state=30.0))
    found = fitted(config(), None, bfloat16=False)
    assert found.reasons == {"model.dtype": "float32: bfloat16 is not faster here"}
    plain = fitted(config(model={"width": 8}), V5E, plan=Plan())
    assert set(plain.reasons) == {"mesh", "accumulation_steps"}


def device(platform, limit=None, **about):
    stats = {"bytes_limit": limit} if limit else None
    return SimpleNamespace(
        platform=platform, device_kind="kind", process_index=0, memory_stats=lambda: stats, **about
    )


def test_the_topology_of_attached_devices_has_their_memory():
    gpus = [device("gpu", 60 * GIB) for _ in range(4)]
    topology = attached(gpus)
    assert topology is not None
    assert (topology.num_chips, topology.num_slices, topology.shape) == (4, 1, (1, 4))
    assert abs(topology.usable_bytes - 60 * GIB) <= 1
    slices = [device("tpu", 15 * GIB, slice_index=i // 4) for i in range(8)]
    several = attached(slices)
    assert several is not None
    assert (several.num_chips, several.num_slices) == (8, 2)
    assert attached([device("cpu")]) is None


@pytest.mark.parametrize(
    ("of", "faster"),
    [
        (device("cpu"), False),
        (device("tpu"), True),
        (device("gpu", compute_capability="7.5"), False),
        (device("gpu", compute_capability="8.9"), True),
        (device("gpu", compute_capability="gfx942"), True),
    ],
)
def test_bfloat16_is_faster_on_tpus_and_recent_gpus(of, faster):
    assert multiplies_bfloat16(of) is faster
