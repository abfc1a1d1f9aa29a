import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.tfrecord import FRAME_BYTES, FixedStrideReader, RecordWriter, masked_crc, read_records
from retro_jax.errors import UserError


def write(path, payloads):
    with RecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    assert writer.records == len(payloads)
    return path


def test_checksum_is_the_masked_castagnoli_one():
    # Check value of CRC-32C, and the mask of the format by its definition.
    crc = 0xE3069283
    assert masked_crc(b"123456789") == (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


@settings(deadline=None, max_examples=50)
@given(payloads=st.lists(st.binary(max_size=50), max_size=6))
def test_records_of_any_size_come_back_in_order(tmp_path_factory, payloads):
    path = write(tmp_path_factory.getbasetemp() / "any.tfrecord", payloads)
    assert list(read_records(path)) == payloads
    assert path.stat().st_size == sum(map(len, payloads)) + FRAME_BYTES * len(payloads)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), size=st.integers(0, 40), count=st.integers(0, 6))
def test_fixed_records_are_read_in_any_order(tmp_path_factory, data, size, count):
    payloads = [data.draw(st.binary(min_size=size, max_size=size)) for _ in range(count)]
    reader = FixedStrideReader(write(tmp_path_factory.getbasetemp() / "fixed.tfrecord", payloads), size)
    assert len(reader) == count
    for record in data.draw(st.permutations(range(count))):
        assert reader.read(record) == payloads[record]
    for record in (-1, count):
        with pytest.raises(IndexError):
            reader.read(record)


def test_file_cut_anywhere_is_named_with_its_record(tmp_path):
    payloads = [bytes([i]) * 10 for i in range(3)]
    whole = write(tmp_path / "whole.tfrecord", payloads).read_bytes()
    path = tmp_path / "cut.tfrecord"
    for size in range(1, len(whole)):
        if size % (10 + FRAME_BYTES) == 0:
            continue
        path.write_bytes(whole[:size])
        record = size // (10 + FRAME_BYTES)
        with pytest.raises(UserError, match=rf"cut\.tfrecord: cut short in record {record}"):
            list(read_records(path))
        with pytest.raises(UserError, match=rf"cut\.tfrecord: cut short in record {record}"):
            FixedStrideReader(path, 10)


def test_any_flipped_bit_is_named_with_its_record(tmp_path):
    payloads = [bytes([i]) * 10 for i in range(3)]
    whole = write(tmp_path / "whole.tfrecord", payloads).read_bytes()
    path = tmp_path / "flipped.tfrecord"
    stride = 10 + FRAME_BYTES
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        reader = FixedStrideReader(path, 10)
        for record in range(3):
            if record == place // stride:
                with pytest.raises(UserError, match=rf"flipped\.tfrecord: wrong checksum of .*record {record}"):
                    reader.read(record)
            else:
                assert reader.read(record) == payloads[record]
        with pytest.raises(UserError, match=rf"flipped\.tfrecord: .*record {place // stride}"):
            list(read_records(path))


def test_file_cut_under_an_open_reader_is_an_error(tmp_path):
    path = write(tmp_path / "file.tfrecord", [b"0123456789"] * 3)
    reader = FixedStrideReader(path, 10)
    with open(path, "r+b") as file:
        file.truncate(60)
    for verify in (True, False):
        with pytest.raises(UserError, match=r"file\.tfrecord: cut short in record 2"):
            reader.read(2, verify=verify)


def test_records_of_another_size_are_refused(tmp_path):
    path = write(tmp_path / "file.tfrecord", [b"0" * 36])  # as long as two records of 10
    with pytest.raises(UserError, match=r"file\.tfrecord: record 0 has 36 bytes, expected 10"):
        FixedStrideReader(path, 10).read(0)
    with pytest.raises(UserError, match=r"missing\.tfrecord: no such file"):
        FixedStrideReader(tmp_path / "missing.tfrecord", 10)
