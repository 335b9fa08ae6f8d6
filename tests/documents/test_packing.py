"""Packed documents: none is cut, none sees another, and each is computed as if it stood alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_vla import attention
from emu3_vla.documents import IGNORE, KINDS, ActionChunk, DocumentError, End, Image, Text, Video, collate, length_of, pack, plan_rows
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, block_losses, build_config, build_plain_config, token_losses
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid

COMPACT = CompactVocabulary(
    text_size=30, action_size=20, codebook_size=64, images=(ImageGrid(name="a", rows=4, columns=4),), block_size=2
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONTEXT = 96


def _model(vocabulary):
    torch.manual_seed(0)
    if isinstance(vocabulary, Emu3Vocabulary):
        model = PlainEmu3ForCausalLM(build_plain_config(vocabulary, **SIZES, initializer_range=0.3))
    else:
        sizes = SIZES | {"code_dim": 8, "depth_size": 16, "depth_heads": 2}
        model = BlockEmu3ForCausalLM(build_config(vocabulary, **sizes, initializer_range=0.3))
    attention.confine(model)
    return model.eval()


@pytest.fixture(scope="module", params=[COMPACT, Emu3Vocabulary(action_size=20)], ids=["compact", "emu3"])
def vocabulary(request):
    return request.param


@pytest.fixture(scope="module")
def model(vocabulary):
    return _model(vocabulary)


def _documents(count=7, seed=0):
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        image = Image("a", random.integers(0, 64, (4, 4)))
        documents.append([Text(random.integers(0, 30, 1 + number % 5)), image, ActionChunk(random.integers(0, 20, 3)), End()])
    return documents


def _rows(documents, vocabulary):
    planned, left_out = plan_rows([length_of(document, vocabulary) for document in documents], CONTEXT)
    assert not left_out
    return [[documents[number] for number in row] for row in planned], [number for row in planned for number in row]


def _losses_by_document(model, batch):
    """Every loss of every document, in order: tokens, then codes."""
    states = model.states(batch)
    targets = batch.targets_BL.flatten()
    tokens, *_ = token_losses(model, states, targets)
    owner = batch.document_at((targets != IGNORE).nonzero().squeeze(1).numpy())
    parts = [[loss for loss, document in zip(tokens, owner, strict=True) if document == number] for number in range(batch.documents)]
    if len(batch.codes_NC):
        blocks = block_losses(model, states, batch, torch.arange(len(batch.codes_NC)))
        for losses, document in zip(blocks, batch.document_at(batch.block_at_N.numpy()), strict=True):
            parts[document] += losses
    return [torch.stack(part) for part in parts]


def _other(document):
    """The same length, other content everywhere."""
    text, image, chunk, end = document
    return [Text((np.array(text.ids) + 7) % 30), Image("a", (image.codes + 11) % 64), ActionChunk((np.array(chunk.ids) + 5) % 20), end]


@pytest.mark.parametrize("plain_up_to", [attention.PLAIN_UP_TO, 0], ids=["products", "fused"])
def test_no_token_sees_another_document(model, vocabulary, monkeypatch, plain_up_to):
    monkeypatch.setattr(attention, "PLAIN_UP_TO", plain_up_to)
    documents = _documents(5)
    rows, order = _rows(documents, vocabulary)
    assert len(rows) < len(documents), "some row holds several documents"
    with torch.no_grad():
        before = _losses_by_document(model, pack(rows, vocabulary, CONTEXT))
    for changed in range(len(documents)):
        others = [_other(document) if number == changed else document for number, document in enumerate(documents)]
        changed_rows, _ = _rows(others, vocabulary)
        with torch.no_grad():
            after = _losses_by_document(model, pack(changed_rows, vocabulary, CONTEXT))
        for number, one, other in zip(order, before, after, strict=True):
            if number == changed:
                assert not torch.equal(one, other), "the test would not see a leak"
            else:
                assert torch.equal(one, other), f"document {number} sees document {changed}"


def test_the_mask_test_can_fail(model, vocabulary):
    """Without spans every position sees all before it in the row: that is what the test above would find."""
    documents = _documents()
    rows, _ = _rows(documents, vocabulary)
    batch = pack(rows, vocabulary, CONTEXT)
    leaky = dataclasses.replace(batch, spans=None)
    with torch.no_grad():
        apart, together = model.states(batch), model.states(leaky)
    second = batch.spans.starts_D[1]
    assert not torch.allclose(apart[second : second + 5], together[second : second + 5])


def test_packed_as_alone(model, vocabulary):
    documents = _documents()
    rows, order = _rows(documents, vocabulary)
    packed = _losses_by_document(model, pack(rows, vocabulary, CONTEXT))
    for number, losses in zip(order, packed, strict=True):
        (alone,) = _losses_by_document(model, collate([documents[number]], vocabulary))
        torch.testing.assert_close(losses, alone, atol=1e-5, rtol=1e-5)


def test_gradients_as_alone(model, vocabulary):
    documents = _documents(4)
    rows, _ = _rows(documents, vocabulary)

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            torch.cat(_losses_by_document(model, batch)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = gradients([pack(rows, vocabulary, CONTEXT)])
    alone = gradients([collate([document], vocabulary) for document in documents])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_unconfined_attention_is_refused(vocabulary):
    fresh = _model(vocabulary)
    fresh.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="several documents a row.*attention.confine"):
        fresh.states(pack([_documents(2)], vocabulary, CONTEXT))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), rows=st.none() | st.integers(1, 12))
def test_rows_hold_whole_documents_once(lengths, rows):
    planned, left_out = plan_rows(lengths, 40, rows)
    assert sorted([number for row in planned for number in row] + left_out) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 40 for row in planned)
    if rows is None:
        assert not left_out and len(planned) <= 1 + 2 * sum(lengths) // 40
    else:
        assert len(planned) == rows
        room = max((40 - sum(lengths[number] for number in row) for row in planned), default=0)
        assert all(lengths[number] > room for number in left_out), "whoever is left out fits nowhere"


def test_a_document_longer_than_the_context_is_named():
    with pytest.raises(DocumentError, match="a document has 41 positions, expected at most context=40: documents are never cut"):
        plan_rows([3, 41], 40)
    with pytest.raises(DocumentError, match="row 1 of a batch has 27 positions, expected at most context=20"):
        pack([[], _documents(2)], COMPACT, 20)


def test_images_and_chunks_lie_whole_in_one_row(vocabulary):
    documents = _documents(20)
    rows, _ = _rows(documents, vocabulary)
    batch = pack(rows, vocabulary, CONTEXT)
    assert batch.chunks == 20 and batch.documents == 20
    for start, length in zip(batch.spans.starts_D, batch.spans.lengths_D, strict=True):
        assert start // CONTEXT == (start + length - 1) // CONTEXT
        ids = batch.ids_BL.flatten()[start : start + length]
        assert ids[0] == vocabulary.bos and ids[-1] == vocabulary.eos
        assert batch.spans.positions_BL.flatten()[start : start + length].tolist() == list(range(length))


def test_rows_without_documents_can_be_learnt_from(model, vocabulary):
    """As one of many processes may meet: nothing is learnt there, and nothing breaks."""
    batch = pack([[], []], vocabulary, CONTEXT)
    assert (batch.documents, batch.positions, len(batch.codes_NC)) == (0, 0, 0) and batch.ids_BL.shape == (2, CONTEXT)
    losses, *_ = token_losses(model, model.states(batch), batch.targets_BL.flatten())
    assert losses.shape == (0,)


def test_kinds_are_told_by_place():
    v = Emu3Vocabulary(action_size=20)
    document = [Text([5, 6]), ActionChunk([0, 1]), Video(np.zeros((1, 2, 2), int)), End()]
    batch = collate([document], v)
    kinds = [KINDS[kind] for kind in batch.kinds_BL[0][batch.targets_BL[0] != IGNORE]]
    picture = ["special"] * 7 + ["vision"] * 4 + ["special"] * 2
    assert kinds == ["text"] * 2 + ["special"] + ["action"] * 3 + picture + ["text"]
