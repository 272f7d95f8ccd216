"""Files of tensors from elsewhere: arrays come back as they were, everything else is refused in one line."""

import contextlib
import pickle
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, boolean_dtypes, floating_dtypes, integer_dtypes

from dimaskdino.utils.errors import UserError
from dimaskdino.utils.serialization import read_pkl, read_pt, read_state_dict

DTYPES = st.one_of(floating_dtypes(), integer_dtypes(), boolean_dtypes())


@given(arrays(DTYPES, array_shapes(min_side=0)), st.sampled_from([2, 3, 4]), st.booleans())
def test_arrays_of_numbers_come_back_as_they_were(tmp_path_factory, array, protocol, fortran):
    array = np.asfortranarray(array) if fortran else array
    file = tmp_path_factory.mktemp("pkl") / "x.pkl"
    scalar = array.ravel()[0] if array.size else 1
    file.write_bytes(pickle.dumps({"model": {"a": array}, "list": [(1, "x"), scalar]}, protocol))
    content = read_pkl(file)
    np.testing.assert_array_equal(content["model"]["a"], array)
    assert content["model"]["a"].dtype == array.dtype
    assert content["list"][0] == (1, "x")


def test_a_file_of_python_2(tmp_path):
    # protocol 2 with the raw bytes as a text in latin-1, as Python 2 wrote it
    raw = pickle.dumps(np.arange(5, dtype=np.float32), 2)
    (tmp_path / "x.pkl").write_bytes(raw.replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(read_pkl(tmp_path / "x.pkl"), np.arange(5, dtype=np.float32))


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithState(Call):
    """Pickles as a call followed by a state."""

    def __init__(self, state, function, *arguments):
        super().__init__(function, *arguments)
        self.state = state

    def __reduce__(self):
        return (*self.call, self.state)


RECONSTRUCT = np._core.multiarray._reconstruct
HARMFUL = {
    "a call of ndarray with an address": Call(np.ndarray, (4,), "f4", None, 0),
    "an array of objects": np.array([object()], dtype=object),
    "an object type": Call(np.dtype, "O8"),
    "an array of records": np.zeros(2, [("a", "f4")]),
    "fields smuggled into a type": WithState(
        (3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 0), np.dtype, "V8"
    ),
    "text": np.array(["x"]),
    "dates": np.zeros(2, "M8[s]"),
    "too few values": WithState((1, (9,), np.dtype("f4"), False, b"1234"), RECONSTRUCT, np.ndarray, (0,), b"b"),
    "another class": Call(RECONSTRUCT, np.matrix, (0,), b"b"),
    "a function": Call(print, "run"),
    "eval": Call(eval, "1"),
    "a scalar of objects": Call(np._core.multiarray.scalar, np.dtype("O"), b"12345678"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_pickles_are_refused_in_one_line(name, tmp_path, capsys):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": HARMFUL[name]}, 4))
    with pytest.raises(UserError, match=r"x.pkl cannot be read as a pickle of arrays") as caught:
        read_state_dict(tmp_path / "x.pkl")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
@example(place=10, value=128)  # a frame longer than the address space
@example(place=76, value=142)  # bytes longer than the memory
def test_damaged_pickles_are_refused_or_read(tmp_path_factory, place, value):
    file = tmp_path_factory.mktemp("pkl") / "x.pkl"
    raw = bytearray(pickle.dumps({"model": {"a": np.arange(50, dtype=np.float32)}}, 4))
    raw[place % len(raw)] = value
    file.write_bytes(raw)
    with contextlib.suppress(UserError):
        read_pkl(file)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x80\x04", pickletools.optimize(pickle.dumps([1])), b"PK\x03\x04 cut"]
)
def test_other_files_are_refused_in_one_line_without_torchs_advice(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt cannot be read as a checkpoint") as caught:
        read_pt(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run_and_not_advertised(tmp_path, capsys):
    torch.save({"model": Call(print, "run")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"whose code is not run") as caught:
        read_pt(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [28, 138])
def test_damaged_files_of_an_old_torch_are_refused_or_read(value, tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.arange(50.0)}}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            read_pt(file)


def test_a_truncated_checkpoint(tmp_path):
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "x.pt")
    raw = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(raw[: len(raw) // 2])
    assert not zipfile.is_zipfile(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"may be truncated|is truncated"):
        read_pt(tmp_path / "x.pt")
