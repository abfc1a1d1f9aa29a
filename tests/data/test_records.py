import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.records import SequenceSchema
from retro_jax.data.tfrecord import RecordWriter
from retro_jax.errors import UserError


def random_example(schema, rng):
    example = {}
    for name, (dtype, shape) in schema.features.items():
        if dtype.kind == "f":
            example[name] = rng.standard_normal(shape).astype(dtype)
        else:
            bounds = np.iinfo(dtype)
            example[name] = rng.integers(bounds.min, bounds.max, shape, dtype=dtype.type, endpoint=True)
    example["distances"][0, 0] = np.inf
    return example


SCHEMAS = st.builds(
    lambda chunks, chunk, k, vocab: SequenceSchema(chunks * chunk, chunk, k, 2 * chunk, vocab),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 4),
    st.sampled_from([300, 65_536, 65_537, 128_000]),
)


@settings(deadline=None, max_examples=40)
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_record_is_byte_for_byte_a_tensorflow_example(schema, seed):
    example = random_example(schema, np.random.default_rng(seed))
    payload = schema.encode(example)
    assert len(payload) == schema.payload_bytes
    message = tf.train.Example.FromString(payload)
    assert list(message.features.feature) and set(message.features.feature) == set(schema.features)
    for name, feature in message.features.feature.items():
        assert feature.bytes_list.value == [example[name].tobytes()]
    assert message.SerializeToString(deterministic=True) == payload
    decoded = schema.decode(payload)
    for name, (dtype, shape) in schema.features.items():
        assert decoded[name].dtype == dtype and decoded[name].shape == shape
        assert np.array_equal(decoded[name], example[name])


def test_tf_data_reads_the_file(tmp_path):
    schema = SequenceSchema(12, 4, 2, 8, 1000)
    rng = np.random.default_rng(0)
    examples = [random_example(schema, rng) for _ in range(5)]
    with RecordWriter(tmp_path / "file.tfrecord") as writer:
        for example in examples:
            writer.write(schema.encode(example))
    description = {name: tf.io.FixedLenFeature([], tf.string) for name in schema.features}
    dataset = tf.data.TFRecordDataset([str(tmp_path / "file.tfrecord")])
    parsed = [tf.io.parse_single_example(record, description) for record in dataset]
    assert len(parsed) == len(examples)
    for row, example in zip(parsed, examples, strict=True):
        for name, (dtype, shape) in schema.features.items():
            readable = np.dtype("<i4") if dtype == "<u4" else dtype  # decode_raw knows no uint32
            array = tf.reshape(tf.io.decode_raw(row[name], tf.dtypes.as_dtype(readable)), shape)
            assert np.array_equal(array.numpy(), example[name].view(readable))


def test_record_of_another_schema_is_refused():
    schema = SequenceSchema(12, 4, 2, 8, 1000)
    payload = schema.encode(random_example(schema, np.random.default_rng(0)))
    for other in (SequenceSchema(12, 4, 1, 16, 1000), SequenceSchema(12, 4, 2, 8, 128_000)):
        with pytest.raises(UserError, match="not of the schema"):
            other.decode(payload)
    with pytest.raises(UserError, match="not of the schema"):
        schema.decode(payload[:-1] + b"xx")
    with pytest.raises(UserError, match="not of the schema"):
        schema.decode(payload.replace(b"tokens", b"tokans"))


def test_values_and_shapes_that_do_not_fit_are_refused():
    schema = SequenceSchema(12, 4, 2, 8, 1000)
    example = random_example(schema, np.random.default_rng(0))
    with pytest.raises(ValueError, match="tokens does not fit uint16"):
        schema.encode({**example, "tokens": np.full(13, 70_000)})
    with pytest.raises(ValueError, match="tokens has shape"):
        schema.encode({**example, "tokens": np.zeros(12)})
    with pytest.raises(ValueError, match="the schema has"):
        schema.encode({"tokens": example["tokens"]})


def test_impossible_schema_is_refused():
    with pytest.raises(UserError, match="length 10 is no multiple of chunk_length 4"):
        SequenceSchema(10, 4, 2, 8, 1000)
    with pytest.raises(UserError, match="neighbours must be at least 1"):
        SequenceSchema(12, 4, 0, 8, 1000)
