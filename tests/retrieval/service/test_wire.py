"""Messages say what they mean: the checked-in code is that of the .proto, arrays survive, merging is exact."""

import re

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import ROOT

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service import wire
from retro_jax.retrieval.service.wire import Found, Limits, RefusedError


def test_the_generated_code_is_of_the_proto():
    text = (ROOT / "retro_jax/retrieval/service/retrieval_v1.proto").read_text()
    text = re.sub(r"//[^\n]*", "", text)
    written = {}
    for name, body in re.findall(r"message (\w+) \{(.*?)\n\}", text, re.DOTALL):
        fields = re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", body)
        written[name] = {(bool(repeated), kind, field, int(number)) for repeated, kind, field, number in fields}
    generated = {}
    types = {value: name.removeprefix("TYPE_").lower() for name, value in _types().items()}
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        generated[name] = {
            (
                field.is_repeated,
                field.message_type.name if field.message_type else types[field.type],
                field.name,
                number,
            )
            for number, field in message.fields_by_number.items()
        }
    assert written == generated and len(written) == 13
    calls = re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\);", text)
    service = pb.DESCRIPTOR.services_by_name["Retrieval"]
    assert calls == [(method.name, method.input_type.name, method.output_type.name) for method in service.methods]
    assert wire.SERVICE == "retro_jax.retrieval.v1.Retrieval"


def _types() -> dict[str, int]:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

    return dict(FieldDescriptorProto.Type.items())


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_merged_parts_are_the_nearest_of_all_by_distance_and_id(seed, parts, n, k):
    rng = np.random.default_rng(seed)
    size = 12
    distances = rng.integers(0, 4, (n, size)).astype(np.float32)  # many are equal
    owner = rng.integers(0, parts, size)
    found = []
    for part in range(parts):
        ids = np.full((n, k), -1, np.int64)
        squares = np.full((n, k), np.inf, np.float32)
        mine = np.flatnonzero(owner == part)
        for i in range(n):
            order = mine[np.lexsort((mine, distances[i, mine]))][:k]
            ids[i, : len(order)], squares[i, : len(order)] = order, distances[i, order]
        found.append(Found(ids, squares, dropped=part))
    merged = wire.merge(found, k)
    for i in range(n):
        order = np.lexsort((np.arange(size), distances[i]))[:k]
        assert merged.ids[i].tolist() == order.tolist()
        assert merged.distances[i].tolist() == distances[i, order].tolist()
    assert merged.dropped == sum(range(parts))
    read = wire.read_found(wire.found_message(merged, pb.Version(), None), n, k)
    np.testing.assert_array_equal(read.ids, merged.ids)
    np.testing.assert_array_equal(read.distances, merged.distances)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.SearchRequest(k=1), "0 queries"),
        (pb.SearchRequest(k=0), "k is 0"),
        (pb.SearchRequest(k=1001), "k is 1001; it is 1 to 1000"),
        (pb.SearchRequest(k=2**32 - 1), "k is 4294967295"),
        (pb.SearchRequest(k=1, exclude_keys=b"1234567"), "exclude_keys has 7 bytes"),
        (pb.SearchRequest(k=1, exclude_keys=bytes(8 * 65 * 2)), "65 excluded keys"),
    ],
)
def test_counts_out_of_range_are_named(request_, reason):
    with pytest.raises(RefusedError, match=reason) as refused:
        wire.check_counts(request_, 0 if "queries" in reason else 2, Limits())
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_results_of_all_queries_together_are_bounded():
    with pytest.raises(RefusedError, match="4096 queries for 1000 neighbours"):
        wire.check_counts(pb.SearchRequest(k=1000), 4096, Limits())
    with pytest.raises(RefusedError, match="would pass"):
        wire.check_answer_size(1 << 20, 1024, Limits())
