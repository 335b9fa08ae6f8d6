"""Messages: everything that openpi's client packs comes back; nothing else is believed."""

import msgpack
import numpy as np
import pytest

from policies import wire
from policies.codes import checked_codes, pack_codes, unpack_codes
from policies.wire import InvalidRequest, TokenizerMismatch, WireError, pack, unpack

RANDOM = np.random.default_rng(0)

# The bytes that openpi-client 0.1.2's Packer makes of {"x": float32 [[1, 2]], "n": np.int8(-3), "prompt": "go", "t": (1, None, True)}.
VECTOR = bytes.fromhex(
    "84a17884c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f00000040c4056474797065a33c6634c405736861706592"
    "0102a16e83c40d5f5f6e7067656e657269635f5fc3c40464617461fdc4056474797065a37c6931a670726f6d7074a2676fa1749301c0c3"
)


def test_bytes_are_those_of_openpis_client():
    content = {"x": np.array([[1, 2]], np.float32), "n": np.int8(-3), "prompt": "go", "t": (1, None, True)}
    assert pack(content) == VECTOR
    back = unpack(VECTOR)
    np.testing.assert_array_equal(back["x"], content["x"])
    assert (back["n"], type(back["n"]), back["prompt"], back["t"]) == (-3, np.int8, "go", [1, None, True])


ARRAYS = {
    **{f"dtype {code}": RANDOM.integers(0, 2, (2, 3)).astype(code) for code in "?bBhHiIlLqQefdg"},
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "big-endian float": np.arange(6, dtype=">f8"),
    "zero dimensions": np.array(3.5),
    "empty": np.zeros((0, 3), np.float32),
    "empty in the middle": np.zeros((2, 0, 3), np.uint8),
    "every other column": np.arange(12).reshape(3, 4)[:, ::2],
    "backwards": np.arange(5)[::-1],
    "column-major": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "broadcast": np.broadcast_to(np.float32(2), (3, 2)),
    "text": np.array(["ab", "c"]),
    "bytes": np.array([b"x", b"yz"]),
    "moments": np.array(["2020-01-01T00:00:01"], "M8[ns]"),
    "durations": np.array([5], "m8[s]"),
    "not a number": np.array([np.nan, np.inf, -0.0]),
    "image": RANDOM.integers(0, 256, (200, 200, 3), dtype=np.uint8),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back(array):
    back = unpack(pack({"a": [array]}))["a"][0]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    assert back.flags.writeable and back.flags.owndata | (back.base is not None)


@pytest.mark.parametrize("scalar", [np.float32(1.5), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.float16(2), np.int64(-(2**63))])
def test_scalars_come_back(scalar):
    back = unpack(pack(scalar))
    assert back == scalar and type(back) is type(scalar)


@pytest.mark.parametrize(
    "content",
    [
        np.array([object()]),
        np.zeros(2, complex),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, "V4"),
        np.longdouble(1),
        {1, 2},
        object(),
        2**70,
    ],
    ids=["object", "complex", "structured", "void", "longdouble", "set", "thing", "huge integer"],
)
def test_what_has_no_form_is_refused(content):
    with pytest.raises(WireError, match="cannot be packed"):
        pack({"x": content})


def _array(**changes):
    return msgpack.packb(
        {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]} | {k.encode(): v for k, v in changes.items()}
    )


@pytest.mark.parametrize(
    "message,said",
    [
        (b"", "not a whole msgpack message"),
        (b"\x93\x01\x02", "not a whole msgpack message"),
        (pack({"a": 1}) + b"\x00", "not a whole msgpack message"),
        (b"\xc1", "not a whole msgpack message"),
        (b"\xa1\xff", "not a whole msgpack message"),
        (b"\x91" * 100_000, "not a whole msgpack message"),
        (b"\x81\x01\x02", "not a whole msgpack message"),  # a number as a key
        (b"\xdd\xff\xff\xff\xff", "not a whole msgpack message"),
        (b"\xd4\x05\x00", "not a whole msgpack message"),  # an extension type
        (msgpack.packb([[]] * 40_000 + [[[]] * 9_999]), "more than 50000 items"),
        (msgpack.packb([{}] * 49_000), "more than 50000 items"),
        (_array(dtype="|O"), "dtype str '|O' is not carried"),
        (_array(dtype="<c8"), "dtype str '<c8' is not carried"),
        (_array(dtype="i4,i4"), "dtype str 'i4,i4' is not carried"),
        (_array(dtype="|V8"), "is not carried"),
        (_array(dtype="<f5"), "no dtype '<f5'"),
        (_array(dtype="<U9999999"), "takes"),
        (_array(dtype="|S0"), "no dtype|has no size"),
        (_array(dtype=b"<f4"), "is not carried"),
        (_array(dtype=None), "is not carried"),
        (_array(shape=[3]), "takes 12 bytes, but 8 came"),
        (_array(shape=[-1]), "an array's shape"),
        (_array(shape=[2.0]), "an array's shape"),
        (_array(shape=[True, 2]), "an array's shape"),
        (_array(shape=2), "an array's shape"),
        (_array(shape=[1] * 65), "an array's shape"),
        (_array(shape=[2**39, 2**39]), "takes"),
        (_array(shape=[2**39, 0, 2**39], data=b""), "no array has the shape"),
        (_array(data="text"), "an array's data is bytes"),
        (msgpack.packb({b"__ndarray__": True}), "dtype"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "|i1", b"data": 300}), "300.* is no int8|out of bounds"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "|i1", b"data": [1]}), "a scalar's data"),
        (msgpack.packb({b"__npgeneric__": True, b"dtype": "<M8[s]", b"data": 1}), "is not carried"),
    ],
)
def test_hostile_messages_are_refused(message, said):
    with pytest.raises(WireError, match=said):
        unpack(message)


def test_errors_keep_their_names_and_words():
    for kind in wire.ANSWERED.values():
        back = wire.error_of(wire.error_text(kind("the words: all of them")))
        assert type(back) is kind and str(back) == "the words: all of them"
    strange = wire.error_of("Traceback (most recent call last): ...")
    assert type(strange) is wire.PolicyFailed and "Traceback" in str(strange)


# -- code ids

TOKENIZER = {"fingerprint": "abc", "codebook_size": 1024, "grids": {"rgb_static": [16, 16], "rgb_gripper": [12, 12]}}


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1024, 32768, 2**17])
@pytest.mark.parametrize("shape", [(16, 16), (3, 5), (1, 1)])
def test_packed_codes_come_back(size, shape):
    codes = RANDOM.integers(0, size, shape)
    codes.flat[0], codes.flat[-1] = 0, size - 1
    packed = pack_codes(codes, size)
    np.testing.assert_array_equal(unpack_codes(unpack(pack(packed)), shape, size), codes)
    assert packed["packed"].nbytes == -(-codes.size * packed["bits"] // 8)


def test_codes_are_checked():
    grid = RANDOM.integers(0, 1024, (16, 16)).astype(np.uint16)
    good = {"codes": {"rgb_static": grid}, "tokenizer": "abc"}
    assert checked_codes({}, TOKENIZER) == {} and checked_codes({}, None) == {}
    np.testing.assert_array_equal(checked_codes(good, TOKENIZER)["rgb_static"], grid)
    packed = pack_codes(grid, 1024)
    np.testing.assert_array_equal(checked_codes(good | {"codes": {"rgb_static": packed}}, TOKENIZER)["rgb_static"], grid)
    with pytest.raises(TokenizerMismatch, match="of tokenizer str 'abd', this policy's is 'abc'"):
        checked_codes(good | {"tokenizer": "abd"}, TOKENIZER)
    for codes, said in (
        ({"rgb_static": grid[:8]}, r"uint16 of shape \(8, 16\), expected integers of shape \(16, 16\)"),
        ({"rgb_static": grid.astype(np.float32)}, "float32 of shape"),
        ({"rgb_static": grid.tolist()}, "are list, expected integers"),
        ({"rgb_static": grid.astype(np.int64) - 2000}, r"lie in \[-\d+, -\d+\], expected \[0, 1024\)"),
        ({"rgb_static": np.full_like(grid, 1024)}, r"lie in \[1024, 1024\]"),
        ({"rgb_left": grid}, "camera str 'rgb_left', expected one of rgb_static, rgb_gripper"),
        ({"rgb_static": packed | {"bits": 11}}, r"int '11' bits and shape \[16, 16\], expected 10 bits"),
        ({"rgb_static": packed | {"shape": [256]}}, r"shape \[256\], expected 10 bits and \[16, 16\]"),
        ({"rgb_static": packed | {"packed": packed["packed"][:-1]}}, "need 320 bytes"),
        ({"rgb_static": {}}, "packed codes of NoneType bits"),
        ([grid], "'codes' is list, expected a map"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            checked_codes(good | {"codes": codes}, TOKENIZER)
    with pytest.raises(InvalidRequest, match="no vision tokenizer; send images"):
        checked_codes(good, None)
    with pytest.raises(ValueError, match=r"expected integers in \[0, 100\)"):
        pack_codes(grid, 100)
