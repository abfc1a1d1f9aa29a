"""Loops, matrix products and collectives read from compiled programs whose answers are known."""

import gzip
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.parallel.costs import collectives, group_size, matrix_flops, memory_bytes, traffic, work
from retro_jax.parallel.hlo import Shape, executions, parse, trip_counts

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])


def compiled(function, *arguments):
    return parse(jax.jit(function).lower(*arguments).compile().as_text())


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def scanned(x, weights):
    return jax.lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, weights)[0]


@settings(max_examples=8, deadline=None)
@given(trips=st.integers(2, 50), inner=st.integers(2, 9), rows=st.integers(2, 40))
def test_products_in_nested_loops_count_with_all_their_trips(trips, inner, rows):
    def twice(x, weights):
        return jax.lax.scan(lambda x, _: (scanned(x, weights), None), x, length=inner)[0]

    module = compiled(twice, floats(rows, 16), floats(trips, 16, 16))
    assert matrix_flops(module) == 2 * rows * 16 * 16 * trips * inner
    assert sorted(trip_counts(module).values()) == sorted((trips, inner))


def test_the_trip_count_is_read_from_the_condition_when_the_compiler_does_not_state_it():
    text = jax.jit(scanned).lower(floats(4, 16), floats(7, 16, 16)).compile().as_text()
    assert '"known_trip_count":{"n":"7"}' in text
    module = parse(text.replace('"known_trip_count":{"n":"7"}', ""))
    assert list(trip_counts(module).values()) == [7]
    assert matrix_flops(module) == 7 * 2 * 4 * 16 * 16


def test_a_loop_without_a_constant_trip_count_is_reported_and_counts_once():
    def until_large(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x)

    module = compiled(until_large, floats(16, 16))
    assert list(trip_counts(module).values()) == [None]
    assert matrix_flops(module) == 2 * 16**3


def test_products_over_several_axes_count_all_they_contract():
    def products(x, y, z):
        return jnp.einsum("bij,bjk->bik", x, y), jnp.einsum("bij,kj->bik", x, z), jnp.einsum("bij,cij->bc", y, y)

    arguments = floats(3, 20, 30), floats(3, 30, 40), floats(50, 30)
    expected = 2 * 3 * 20 * 30 * 40 + 2 * 3 * 20 * 30 * 50 + 2 * 3 * 3 * 30 * 40
    assert matrix_flops(compiled(products, *arguments)) == expected


@settings(max_examples=8, deadline=None)
@given(
    size=st.integers(3, 12),
    window=st.integers(1, 3),
    stride=st.integers(1, 2),
    low=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_convolutions_count_the_products_with_elements_only(size, window, stride, low, dilation):
    """As XLA counts them: neither padding nor the zeros between dilated elements."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, 1), ((low, 1), (0, 0)), (dilation, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    lowered = jax.jit(convolve).lower(floats(2, size, 5, 3), floats(window, 1, 3, 4))
    module = parse(lowered.compile().as_text())
    outputs = (dilation * (size - 1) + 1 + low + 1 - window) // stride + 1
    pairs = sum(
        0 <= place < dilation * (size - 1) + 1 and place % dilation == 0
        for output in range(outputs)
        for place in range(output * stride - low, output * stride - low + window)
    )
    assert matrix_flops(module) == 2 * pairs * 5 * 2 * 3 * 4


def test_an_all_reduce_in_a_loop_counts_with_its_trips(mesh):
    split = NamedSharding(mesh, P(None, "x", None))

    def reduced(x, weights):  # contracts the split dimension: a sum over the devices in every trip
        return jax.lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, weights)[0]

    arguments = floats(24, 64, sharding=NamedSharding(mesh, P())), floats(5, 64, 64, sharding=split)
    module = compiled(reduced, *arguments)
    (each,) = collectives(module)
    assert (each.kind, each.group_size, each.times) == ("all-reduce", 8, 5)
    assert each.bytes == 2 * 7 / 8 * 24 * 64 * 4
    assert "while/body" in each.op_name
    assert traffic([each]) == {"all-reduce": (1, 5.0, 5 * each.bytes)}
    assert matrix_flops(module) == 5 * 2 * 24 * 8 * 64  # of one device


@pytest.mark.parametrize(
    "kind, function, before, after, sent",
    [
        ("all-gather", lambda x: x, P("x"), P(), 7 * 64 * 32 / 8 * 4),
        ("all-to-all", lambda x: x, P("x"), P(None, "x"), 7 / 8 * 64 * 32 / 8 * 4),
        ("all-reduce", lambda x: x.sum(0), P("x"), P(), 2 * 7 / 8 * 32 * 4),
    ],
)
def test_bytes_sent_by_each_device_are_those_of_ring_algorithms(mesh, kind, function, before, after, sent):
    def placed(x):
        return jax.lax.with_sharding_constraint(function(x), NamedSharding(mesh, after))

    found = collectives(compiled(placed, floats(64, 32, sharding=NamedSharding(mesh, before))))
    assert [(each.kind, each.bytes, each.group_size) for each in found] == [(kind, sent, 8)]


def test_explicit_collectives_are_found(mesh):
    def body(x):
        scattered = jax.lax.psum_scatter(x, "x", tiled=True)
        moved = jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])
        return scattered.sum() + moved.sum()

    function = jax.shard_map(body, mesh=mesh, in_specs=P(None, "x"), out_specs=P(), check_vma=False)
    sums = traffic(collectives(compiled(function, floats(64, 16))))
    assert sums["reduce-scatter"] == (1, 1.0, 7 / 8 * 64 * 2 * 4)
    assert sums["collective-permute"] == (1, 1.0, 64 * 2 * 4)


@pytest.mark.parametrize(
    "text, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=8] {'b','c'}, x", 32),
        ("source_target_pairs={{0,1},{1,0}}, x", 2),
        ("replica_groups={}, x", 8),
        ("no groups at all", 8),
    ],
)
def test_group_sizes_of_every_notation(text, size):
    assert group_size(text, devices=8) == size


@given(
    dtype=st.sampled_from([("f32", 32), ("bf16", 16), ("s4", 4), ("pred", 8), ("f8e4m3fn", 8), ("token", 0)]),
    dims=st.lists(st.integers(0, 40), max_size=4),
)
def test_bytes_of_a_shape(dtype, dims):
    name, bits = dtype
    assert Shape(name, tuple(dims)).bytes == math.prod(dims) * bits / 8


def test_a_program_of_the_tpu_compiler_is_read():
    """Products as convolutions, loops without a stated length, reduce-scatter as a fusion.

    Compiled by libtpu 0.0.42 for v5e:2x4, shortened: three layers x + attention(x, x @ w) on [16, 256, 512] in bfloat16
    with one w [512, 512] each, batch and weights split over the 8 chips, and the gradient of the weights.
    """
    module = parse(gzip.decompress((DATA / "tpu_scan.hlo.txt.gz").read_bytes()).decode())
    assert list(trip_counts(module).values()) == [3, 3]
    rows, length, width = 16 // 8, 256, 512
    forward = 2 * rows * length * width * width + 4 * rows * length * length * width
    assert matrix_flops(module) == 3 * 3 * forward
    gathered, scattered = collectives(module)
    sent = 7 / 8 * width * width * 2
    assert (gathered.kind, gathered.bytes, gathered.times, gathered.group_size) == ("all-gather", sent, 3, 8)
    assert (scattered.kind, scattered.bytes, scattered.times, scattered.group_size) == ("reduce-scatter", sent, 3, 8)
    assert "transpose" in scattered.op_name


ASYNCHRONOUS = """HloModule step, is_scheduled=true

%begin (p: f32[4,8]) -> (f32[4,8], f32[32,8]) {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, CONFIG
  ROOT %start = (f32[4,8]{1,0}, f32[32,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (q: f32[4,8], x: f32[16,16]) -> (f32[16,16], f32[32,8]) {
  %q = f32[4,8]{1,0} parameter(0)
  %x = f32[16,16]{1,0} parameter(1)
  %dot.1 = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = f32[32,8]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, CONFIG
  ROOT %both = (f32[16,16]{1,0}, f32[32,8]{1,0}) tuple(%dot.1, %all-gather.2)
}

%end (r: f32[4,8]) -> f32[32,8] {
  %r = f32[4,8]{1,0} parameter(0)
  %all-gather.3 = f32[32,8]{1,0} all-gather(%r), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, CONFIG
  ROOT %done = f32[32,8]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[4,8], b: f32[16,16]) -> f32[32,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[16,16]{1,0} parameter(1)
  %first = (f32[4,8]{1,0}, f32[32,8]{1,0}) fusion(%a), kind=kCustom, calls=%begin, metadata={op_name="jit(step)/gather"}
  %second = (f32[16,16]{1,0}, f32[32,8]{1,0}) fusion(%a, %b), kind=kOutput, calls=%middle
  %moved = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %arrived = f32[4,8]{1,0} collective-permute-done(%moved)
  ROOT %third = f32[32,8]{1,0} fusion(%a), kind=kCustom, calls=%end
}
""".replace("CONFIG", 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}')


def test_an_asynchronous_collective_counts_once():
    module = parse(ASYNCHRONOUS)
    gathered, moved = collectives(module)
    assert (gathered.kind, gathered.bytes, gathered.op_name) == ("all-gather", 7 * 4 * 8 * 4, "jit(step)/gather")
    assert (moved.kind, moved.bytes) == ("collective-permute", 4 * 8 * 4)
    assert matrix_flops(module) == 2 * 16**3
    (product,) = [each for each in work(module) if each.flops]
    assert product.times == 1 and not product.asynchronous


def test_every_instruction_of_a_program_is_walked_with_its_fusion():
    runs = list(executions(parse(ASYNCHRONOUS)))
    assert {run.frame for run in runs} == {"main"}
    assert [run.instruction.name for run in runs if not run.fused] == [
        "a", "b", "first", "second", "moved", "arrived", "third"
    ]  # fmt: skip


def test_memory_traffic_of_a_loop_counts_slices_not_whole_arrays():
    module = compiled(scanned, floats(64, 64), floats(32, 64, 64))
    matrix = 64 * 64 * 4
    # In each trip a weight is sliced out and used and x read and written, a few times each, but never all 32 weights.
    assert 32 * 3 * matrix < memory_bytes(module) < 32 * 12 * matrix
    assert {each.times for each in work(module) if each.flops} == {32.0}


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing\n")
