import io
import os
import struct
import zipfile

import numpy as np
import pytest
from sdgm_edge.runtime.container import (
    MAX_ENTRIES,
    Folder,
    StoredZip,
    check_name,
    open_source,
    shown,
    write_zip,
)

from sdgm_edge.runtime import BundleError, decode_arrays, encode_arrays


def zip_bytes(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def stored(data):
    return StoredZip(lambda: io.BytesIO(data), "x.sdgm")


def test_a_zip_gives_back_what_was_put_in_and_the_same_bytes_each_time():
    files = {"b.json": b"2" * 3_000_000, "a": b""}
    buffers = io.BytesIO(), io.BytesIO()
    for buffer in buffers:
        write_zip(buffer, files)
    assert buffers[0].getvalue() == buffers[1].getvalue()
    source = stored(buffers[0].getvalue())
    assert {name: source.read(name) for name in source.sizes} == files
    assert source.path("a") is None


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "", "a" * 101, "C:x", "é", "a\n"]
)
def test_names_that_could_leave_the_bundle_are_refused(name):
    with pytest.raises(BundleError, match="unsafe file name"):
        check_name(name, "here")


def test_a_zip_with_a_path_is_refused():
    with pytest.raises(BundleError, match=r"unsafe file name.*'\.\./x'"):
        stored(zip_bytes([("../x", b"")]))


def test_a_zip_with_a_name_twice_is_refused():
    with pytest.warns(UserWarning, match="Duplicate"):
        data = zip_bytes([("a", b"1"), ("a", b"2")])
    with pytest.raises(BundleError, match="a: expected one entry of that name, got two"):
        stored(data)


def test_a_compressed_entry_is_refused():
    noise = np.random.default_rng(0).bytes(100)
    with pytest.raises(BundleError, match="a: expected an entry stored as it is, got a compressed one"):
        stored(zip_bytes([("a", noise)], zipfile.ZIP_DEFLATED))


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zip_bytes([("a", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match=f"entries of at most {len(bomb)} bytes, got 50000000 bytes"):
        stored(bomb)


def test_a_declared_size_beyond_the_file_is_refused():
    data = bytearray(zip_bytes([("a", b"123")]))
    directory = data.index(b"PK\1\2")
    data[directory + 20 : directory + 28] = struct.pack("<2L", 2**31, 2**31)
    with pytest.raises(BundleError, match="entries of at most"):
        stored(bytes(data))


def test_too_many_entries_are_refused():
    with pytest.raises(BundleError, match=f"at most {MAX_ENTRIES} entries"):
        stored(zip_bytes([(f"f{i}", b"") for i in range(MAX_ENTRIES + 1)]))


def test_records_of_zip64_are_refused():
    many = zip_bytes([(f"f{i}", b"") for i in range(MAX_ENTRIES + 1)])
    directory, end = many.index(b"PK\1\2"), many.index(b"PK\5\6")
    count, size = MAX_ENTRIES + 1, end - directory
    large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, directory)
    large += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    small = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 0, end + len(large), 0)
    data = many[:end] + large + small
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == count, "the record of zip64 counts, and the other one does not"
    with pytest.raises(BundleError, match="expected a zip of less than 4 GiB, got records of zip64"):
        stored(data)


def test_a_zip_with_more_entries_than_it_tells_is_refused():
    data = bytearray(zip_bytes([(f"f{i}", b"") for i in range(MAX_ENTRIES + 1)]))
    data[-14:-10] = struct.pack("<2H", 1, 1)
    with pytest.raises(BundleError, match=f"expected as many entries as it tells, 1, got {MAX_ENTRIES + 1}"):
        stored(bytes(data))


@pytest.mark.parametrize("cut", [0, 1, 21, 22, 40, 90])
def test_a_cut_zip_is_refused(cut):
    with pytest.raises(BundleError, match="damaged or not a bundle"):
        stored(zip_bytes([("a", b"123")])[:cut])


def test_trailing_bytes_are_refused():
    with pytest.raises(BundleError, match="end record"):
        stored(zip_bytes([("a", b"123")]) + b"more")


def test_a_wrong_checksum_is_refused_when_read():
    data = zip_bytes([("a", b"123456")]).replace(b"123456", b"123457", 1)
    with pytest.raises(BundleError, match="readable zip"):
        stored(data).read("a")


def test_an_encrypted_entry_is_refused():
    data = bytearray(zip_bytes([("a", b"123")]))
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1
    with pytest.raises(BundleError, match="readable zip"):
        stored(bytes(data)).read("a")


def test_an_entry_that_went_away_after_the_zip_was_looked_at_is_told(tmp_path):
    path = tmp_path / "x.sdgm"
    path.write_bytes(zip_bytes([("a", b"1"), ("b", b"2")]))
    source = open_source(path)
    path.write_bytes(zip_bytes([("a", b"1")]))
    with pytest.raises(BundleError, match=r"expected a readable zip, got .*There is no item named"):
        source.read("b")


def test_a_folder_reads_regular_files_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    source = Folder(tmp_path)
    assert source.read("a") == b"1"
    assert source.path("a") == tmp_path / "a"
    assert "sub" not in source.sizes
    for name in ("link", "pipe"):
        with pytest.raises(BundleError, match="a link or device"):
            source.read(name)


def test_what_is_neither_folder_nor_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no such bundle"):
        open_source(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="a folder or a file"):
        open_source(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_what_no_path_can_hold_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match=r"cannot be read: .*; check the path"):
        open_source(tmp_path / name)


def test_what_the_system_refuses_is_a_bundle_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        BundleError, match="cannot be read: Permission denied; check the path, its permissions"
    ):
        open_source(tmp_path)


def test_arrays_survive_and_give_the_same_bytes():
    arrays = {
        "b": np.arange(6, dtype=np.float64).reshape(2, 3),
        "a": np.float32([1]),
        "scalar": np.float32(2),
    }
    data = encode_arrays(arrays)
    assert data == encode_arrays(dict(reversed(arrays.items())))
    back = decode_arrays(data, "gmm.npz")
    for name, array in arrays.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], array)


def test_numpys_own_uncompressed_files_are_read():
    buffer = io.BytesIO()
    np.savez(buffer, means=np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(decode_arrays(buffer.getvalue(), "x")["means"], np.ones((2, 3)))


def test_a_pickle_in_an_npz_is_refused_and_never_loaded():
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    buffer = io.BytesIO()
    np.savez(buffer, means=np.array([Bomb()], dtype=object))
    with pytest.raises(BundleError, match="array means: expected plain float32 in C order"):
        decode_arrays(buffer.getvalue(), "gmm.npz")


@pytest.mark.parametrize(
    "array", [np.float64([1]), np.asfortranarray(np.ones((2, 2), np.float32)), np.int32([1])]
)
def test_other_kinds_of_arrays_are_refused(array):
    buffer = io.BytesIO()
    np.savez(buffer, means=array)
    with pytest.raises(BundleError, match="plain float32"):
        decode_arrays(buffer.getvalue(), "gmm.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(BundleError, match="finite numbers, got NaN or infinity"):
        decode_arrays(encode_arrays({"means": np.array([1, value])}), "gmm.npz")


def test_an_array_shorter_or_longer_than_its_shape_is_refused():
    entry = io.BytesIO()
    np.save(entry, np.ones((2, 2), np.float32))
    data = entry.getvalue()
    for wrong in (data[:-4], data + bytes(4), data.replace(b"(2, 2)", b"(999999999, 999999999)")[:-16]):
        with pytest.raises(BundleError, match="array means"):
            decode_arrays(zip_bytes([("means.npy", wrong)]), "gmm.npz")


@pytest.mark.parametrize("shape", ["5 6", "5 6, ", "0, 999999999, 999999999, 999999999", "0, ", "01, ", ", "])
def test_a_shape_that_numpy_does_not_write_is_refused(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    member = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    with pytest.raises(BundleError, match="array means: expected plain float32 in C order, no size of 0"):
        decode_arrays(zip_bytes([("means.npy", member)]), "gmm.npz")


def test_shown_is_one_short_line():
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 1000)) == 60
