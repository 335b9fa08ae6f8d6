"""Orders are permutations, and what is written in one comes back."""

import numpy as np
import pytest

from emu3_vla.documents import DocumentError, Image, lay_out, parse, write
from emu3_vla.documents.orders import ORDERS, completion_order, inverse, order_of
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (4, 4), (6, 9), (9, 6)])
def test_every_order_is_a_permutation_with_an_inverse(name, shape):
    order = order_of(name, *shape)
    assert sorted(order) == list(range(shape[0] * shape[1])) and order.dtype == np.int64
    codes = np.random.default_rng(0).integers(0, 100, shape)
    np.testing.assert_array_equal(codes.ravel()[order][inverse(order)].reshape(shape), codes)


def test_orders_by_hand():
    def grid(name, *shape):
        return inverse(order_of(name, *shape)).reshape(shape).tolist()

    assert grid("raster", 2, 3) == [[0, 1, 2], [3, 4, 5]]
    assert grid("diagonal", 3, 3) == [[0, 1, 3], [2, 4, 6], [5, 7, 8]]
    assert grid("spiral", 3, 4) == [[0, 1, 2, 3], [9, 10, 11, 4], [8, 7, 6, 5]]
    assert grid("block_raster", 4, 8)[1] == [4, 5, 6, 7, 20, 21, 22, 23]


def test_completion_knows_first_and_goes_inwards():
    missing = np.zeros((5, 5), bool)
    missing[1:4, 1:4] = True
    order = completion_order(missing)
    assert order[:16].tolist() == np.flatnonzero(~missing).tolist()
    assert order[16:].tolist() == [6, 7, 8, 13, 18, 17, 16, 11, 12]
    missing[2, 2] = False
    assert completion_order(missing)[-1] == 11, "a hole in the mask is known"


@pytest.mark.parametrize("name", ORDERS)
def test_documents_in_every_order(name):
    """Emu3's form: the same ends of lines and frame around codes in another order. Compact: blocks keep the numbers of their places."""
    codes = np.arange(24).reshape(4, 6)
    vocabulary = Emu3Vocabulary()
    ids = write([Image("", codes, order=name)], vocabulary)
    raster = write([Image("", codes)], vocabulary)
    assert ((ids >= vocabulary.vision_start) == (raster >= vocabulary.vision_start)).all()
    written = ids[ids >= vocabulary.vision_start] - vocabulary.vision_start
    np.testing.assert_array_equal(written, codes.ravel()[order_of(name, 4, 6)])
    assert parse(ids, vocabulary, order=name) == [Image("", codes, order=name)]

    images = (ImageGrid(name="b", rows=2, columns=2), ImageGrid(name="a", rows=4, columns=6))
    compact = CompactVocabulary(text_size=4, action_size=4, codebook_size=30, images=images, block_size=2)
    layout, plain = (lay_out([Image("a", codes, order=order)], compact) for order in (name, "raster"))
    order = order_of(name, 2, 3)
    np.testing.assert_array_equal(layout.codes, plain.codes[order])
    np.testing.assert_array_equal(layout.places, plain.places[order])
    assert parse(write([Image("a", codes, order=name)], compact), compact, order=name) == [Image("a", codes, order=name)]


def test_refusals():
    with pytest.raises(DocumentError, match="no order 'snake', only raster, diagonal, block_raster, spiral"):
        order_of("snake", 2, 2)
    with pytest.raises(DocumentError, match="order of 0×2 places"):
        order_of("raster", 0, 2)
    with pytest.raises(DocumentError, match=r"mask has shape \(4,\)"):
        completion_order(np.ones(4, bool))
    with pytest.raises(DocumentError, match="nothing is missing"):
        completion_order(np.zeros((2, 2), bool))
    with pytest.raises(DocumentError, match="no order 'snake'"):
        write([Image("", np.ones((2, 2), int), order="snake")], Emu3Vocabulary())
