"""A checkpoint is complete and what was saved, or it is named and refused; the right ones are kept."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_run import MODEL

from retro_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig
from retro_jax.errors import UserError
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.checkpoint import Checkpoints, load_params
from retro_jax.training.digest import digests
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import initialise, plan_model, plan_state

DATA = {"examples_seen": 40, "weights": [0.25, 0.75], "fingerprints": ["0123456789abcdef"]}
PASSING = 0x10  # the bit that is flipped


@pytest.fixture(scope="module")
def run():
    """A state on a 2x2x2 mesh, its abstract form, and the plan of its model."""
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    plan = plan_model(MODEL, mesh)
    optimizer = create_optimizer(OptimizerConfig(warmup_steps=2), 10, plan.axes)
    return initialise(MODEL, plan, optimizer, mesh, seed=3), plan_state(plan, optimizer, mesh), plan


@pytest.fixture(scope="module")
def one(run):
    """The same on one device: state, abstract state, plan."""
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(MODEL, mesh)
    optimizer = create_optimizer(OptimizerConfig(warmup_steps=2), 10, plan.axes)
    return run[0], plan_state(plan, optimizer, mesh), plan


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """Checkpoints of steps 10 and 20."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(10, run[0], DATA)
        checkpoints.save(20, run[0], DATA, validation_loss=0.1 + 0.2)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def equal(tree, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def test_state_data_and_validation_loss_come_back_bit_for_bit(run, saved):
    state, abstract, _ = run
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        assert checkpoints.steps == [10, 20] and checkpoints.latest_step == 20
        restored = checkpoints.restore(abstract, 20)
    assert equal(restored.state, state)
    assert restored.data == DATA and restored.validation_loss == 0.1 + 0.2


def test_a_checkpoint_is_read_on_another_mesh(run, saved):
    mesh = create_mesh(MeshConfig(data=1, fsdp=8))
    params, step = load_params(saved, plan_model(MODEL, mesh).params)
    assert step == 20 and equal(params, run[0].params)


def test_a_flipped_bit_in_any_file_is_named_or_harmless(one, copied):
    state, abstract, plan = one
    files = [path for path in sorted((copied / "20").rglob("*")) if path.is_file() and path.stat().st_size]
    refused = set()
    for path in files:
        content = path.read_bytes()
        for position in (len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[position] ^= PASSING
            path.write_bytes(damaged)
            try:
                with Checkpoints(copied, CheckpointConfig()) as checkpoints:
                    restored = checkpoints.restore(abstract, 20)
                assert equal(restored.state, state) and restored.data == DATA, path
                assert restored.validation_loss == 0.1 + 0.2
            except UserError as error:
                assert f"{copied / '20'}: damaged checkpoint (" in str(error), path
                assert "--resume_from=10 takes the one before it" in str(error) and "\n" not in str(error)
                refused.add(path.relative_to(copied / "20").parts[0])
        path.write_bytes(content)
    assert refused == {"params", "optimizer", "_CHECKPOINT_METADATA"}
    largest = max((copied / "20" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= PASSING  # Orbax reads this without a word
    largest.write_bytes(damaged)
    with pytest.raises(UserError, match=r"20: damaged checkpoint \(params\..* --step=10 takes the one before it"):
        load_params(copied, plan.params)
    assert load_params(copied, plan.params, 10)[1] == 10


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_file_cut_short_or_missing_is_named_or_harmless(one, copied, damage):
    state, abstract, _ = one
    refused = 0
    for path in [path for path in sorted((copied / "20").rglob("*")) if path.is_file() and path.stat().st_size]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2]) if damage == "cut" else path.unlink()
        try:
            with Checkpoints(copied, CheckpointConfig()) as checkpoints:
                restored = checkpoints.restore(abstract, 20)
            assert equal(restored.state, state) and restored.data == DATA, path
        except UserError as error:
            assert f"{copied / '20'}: damaged checkpoint (" in str(error) and "\n" not in str(error), path
            refused += 1
        path.write_bytes(content)
    assert refused >= 5


@pytest.mark.parametrize("left", ["params", "optimizer", "nothing"])
def test_a_partly_deleted_checkpoint_is_named(one, copied, left):
    for path in (copied / "20").iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(copied, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest_step == 20
        with pytest.raises(UserError, match=r"20: damaged checkpoint \(.*--resume_from=10"):
            checkpoints.restore(one[1], 20)
        assert checkpoints.discard_after(10) == [20]
        assert equal(checkpoints.restore(one[1], 10).state, one[0])
    assert {path.name for path in copied.iterdir()} == {"10"}


def test_the_only_checkpoint_damaged_says_that_there_is_none_before(one, copied):
    shutil.rmtree(copied / "10")
    (copied / "20" / "params" / "manifest.ocdbt").unlink()
    with Checkpoints(copied, CheckpointConfig()) as checkpoints, pytest.raises(UserError, match="there is none before"):
        checkpoints.restore(one[1], 20)


def test_a_checkpoint_of_another_model_names_the_arrays_and_both_shapes(run, saved):
    mesh = create_mesh(MeshConfig())
    wider = plan_model(dataclasses.replace(MODEL, ffw_width=64), mesh)
    with pytest.raises(
        UserError, match=r"20: checkpoint of another configuration; it has params\.\S+ float32 \[.*32.*"
    ):
        load_params(saved, wider.params)
    baseline = plan_model(dataclasses.replace(MODEL, cca_layers=()), mesh)
    with pytest.raises(UserError, match=r"\(the configuration: not there\).* and \d+ more; give the configuration"):
        load_params(saved, baseline.params)


def kept(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def test_the_newest_every_kth_and_the_best_are_kept_also_by_a_resumed_run(run, tmp_path):
    config = CheckpointConfig(keep_last=1, keep_every=4, keep_best=2)
    losses = {1: 5.0, 2: 1.0, 3: 3.0, 4: float("nan"), 5: 2.0, 6: None, 7: 4.0}
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, run[0], DATA, losses[step])
    assert kept(tmp_path) == [2, 3, 4]  # 2 and 3 are the best, 4 is the newest and a multiple of 4
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in (5, 6, 7):
            checkpoints.save(step, run[0], DATA, losses[step])
    assert kept(tmp_path) == [2, 4, 5, 7]


def test_a_loss_counts_for_the_state_it_was_measured_on(run, tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) as checkpoints:

        def kept_after(step, loss=None):
            checkpoints.save(step, run[0], DATA, loss)
            checkpoints.wait()
            return checkpoints.steps

        assert [kept_after(step, loss) for step, loss in ((1, 2.0), (3, 1.0))] == [[1], [1, 3]]
        assert checkpoints.discard_after(1) == [3]
        assert kept_after(3) == [1, 3]  # as at a stop: without a validation
        assert kept_after(4, 4.0) == [1, 4]
        checkpoints.note_loss(5, 0.1)  # of a step that was validated, but not saved before the kill
        assert kept_after(5) == [1, 4, 5]
        assert kept_after(6, 5.0) == [1, 4, 6]
        checkpoints.note_loss(6, 0.5)  # made up for
        assert kept_after(7) == [1, 6, 7]


def test_damage_says_another_way_out_where_going_back_is_used_up(one, copied):
    (copied / "20" / "params" / "manifest.ocdbt").unlink()
    with Checkpoints(copied, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match="--resume_from=10 takes the one before it"):
            checkpoints.restore(one[1], 20, went_back_to=5)
        way_out = rf"remove {copied / '20'}, and the run goes on from the one before it, step 10$"
        with pytest.raises(UserError, match=way_out):
            checkpoints.restore(one[1], 20, went_back_to=10)


def test_digests_are_equal_on_every_mesh_and_see_any_change():
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(16, 24)).astype(np.float32),
        "scalar": np.array(7, np.int32),
        "half": jax.numpy.asarray(rng.normal(size=(8, 5)), jax.numpy.bfloat16),
        "flags": rng.integers(0, 2, 9).astype(bool),
        "bytes": rng.integers(0, 255, 9).astype(np.uint8),
    }
    expected = digests({name: jax.device_put(array) for name, array in arrays.items()})
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = {"matrix": P("fsdp", ("data", "tensor")), "half": P("data")}
    placed = {name: jax.device_put(array, NamedSharding(mesh, split.get(name, P()))) for name, array in arrays.items()}
    assert digests(placed) == expected
    for name, array in arrays.items():
        flat = np.array(array).reshape(-1)
        for position in range(flat.size):
            changed = flat.copy().view(np.uint8)
            changed[position * flat.itemsize] ^= 1
            changed = jax.device_put(changed.view(flat.dtype).reshape(array.shape))
            if name != "flags":  # a bool has one bit, and np.bool_ of 0 ^ 1 is the other value
                assert digests({name: changed})[name] != expected[name]
    swapped = arrays["matrix"][::-1]
    assert digests({"matrix": jax.device_put(swapped)})["matrix"] != expected["matrix"]


def test_the_record_is_in_the_checkpoint_and_covers_all_of_it(saved):
    metadata = json.loads((saved / "20" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert metadata["data"] == DATA
    assert {name.split(".")[0] for name in metadata["arrays"]} == {"params", "optimizer"}
    assert any(name.startswith("optimizer.health") for name in metadata["arrays"])
