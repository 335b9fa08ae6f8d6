"""Samples on the way: what the averaged weights write into held-out documents, read back from the recordings; training does not notice."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_tokens
import torch
from recorded import bars, pixels, rows
from rerun.chunk import RrdReader

from emu3_vla.checkpoint import load
from emu3_vla.documents import ActionChunk, Image, OpenAction, OpenImage, Text, Video, collate, length_of
from emu3_vla.training.gaps import Gapper
from emu3_vla.training.loop import ModelSizes, TrainConfig
from emu3_vla.training.mixture import MixtureConfig
from emu3_vla.training.optimizer import OptimizerConfig
from emu3_vla.training.preference import PreferenceConfig
from emu3_vla.training.samples import Sampler
from emu3_vla.training.source import open_source
from emu3_vla.vision_tokenizer.images import to_images
from envs.spec import ACTION_COMPONENTS, RGB_GRIPPER, RGB_STATIC

OPTIONS = {"steps": 4, "precision": "fp32", "asked_fraction": 0.5, "questions": 1}
SAMPLED = {"samples_every": 2, "samples": 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("store"), episodes_per_shard=4, asked=True, felt=True)


@pytest.fixture(scope="module")
def sampled(store, tmp_path_factory):
    """A run with samples."""
    folder = tmp_path_factory.mktemp("sampled")
    tiny_tokens.train(store.path, folder, **OPTIONS, **SAMPLED)
    return folder


def _held_out(store, **options):
    config = tiny_tokens.config(store.path, Path("unused"), **options)
    source = open_source(config.tokens, config.model.block_size)
    return source, source.streams(config)[1]


def _images(document):
    return [segment for segment in document if isinstance(segment, Image)]


def test_training_does_not_notice(store, sampled, tmp_path):
    tiny_tokens.train(store.path, tmp_path, **OPTIONS)
    timed = ("chunks_per_s", "positions_per_s", "step_s", "data_wait", "of_peak", "memory_gb")
    with_samples, without = (
        [{key: value for key, value in json.loads(line).items() if key not in timed} for line in (folder / "metrics.jsonl").open()]
        for folder in (sampled, tmp_path)
    )
    assert with_samples == without and len(without) == 5
    left, right = (load(folder / "policy").model.state_dict() for folder in (sampled, tmp_path))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (tmp_path / "samples").exists()


def test_every_sampled_step_is_a_file_of_one_recording(sampled):
    files = sorted((sampled / "samples").iterdir())
    assert [path.name for path in files] == ["step-000002.rrd", "step-000004.rrd"]
    entries = [entry for path in files for entry in RrdReader(str(path)).recordings()]
    assert len({(entry.application_id, entry.recording_id) for entry in entries}) == 1
    for path, step in zip(files, (2, 4), strict=True):
        assert {at for values in rows(path).values() for at, _ in values} == {step}


def test_recordings_show_the_streams_own_documents(store, sampled):
    """Images of now and of next, decoded; the demonstrated actions; the instruction, questions and answers."""
    source, held_out = _held_out(store, **OPTIONS)
    documents, tokenizers = held_out.shown(3), store.tokenizers()
    found = rows(sampled / "samples" / "step-000004.rrd")
    assert (
        {name.partition("/")[0] + "/" + name.split("/")[1] for name in found}
        == set(documents)
        == {f"{kind}/{number}" for kind in ("act", "ask") for number in range(3)}
    )
    tasks = {found[f"act/{number}/said"][0][1] for number in range(3)}
    assert tasks <= {sentence for wordings in tiny_tokens.WORDINGS.values() for sentence in wordings} and len(tasks) == 2, "of both tasks"
    for number in range(3):
        document = documents[f"act/{number}"]
        now, after = _images(document)[-4:-2], _images(document)[-2:]
        for images, entity in ((now, "act/{}/now/{}"), (after, "act/{}/next/{}/true")):
            for image in images:
                expected = to_images(tokenizers.vision.decode(torch.from_numpy(image.codes.astype(np.int64))[None]))[0]
                shown = pixels(found[entity.format(number, image.name)][0][1])
                assert np.array_equal(shown, expected)
        chunk = [segment for segment in document if isinstance(segment, ActionChunk)][-2]
        demonstrated = tokenizers.normalizer.denormalize(tokenizers.action.decode([list(chunk.ids)], horizon=10, action_dim=7)[0])
        errors = []
        for component, values in zip(ACTION_COMPONENTS, demonstrated.T, strict=True):
            (shown,), (predicted,) = (found[f"act/{number}/action/{component}/{which}"] for which in ("demonstrated", "predicted"))
            np.testing.assert_allclose(bars(shown[1]), values)
            assert bars(predicted[1]).shape == (10,)
            errors.append(np.abs(bars(predicted[1]) - values).mean())
            assert found[f"act/{number}/action/{component}/error"][0][1] == pytest.approx(errors[-1])
        assert max(errors) > 0, "after four steps it does not act as demonstrated yet"
        answers = found[f"ask/{number}/answers"][0][1].splitlines()
        question, written, true = (cell.strip() for cell in answers[-1].strip("|").split("|"))
        (answer,) = [segment for segment in documents[f"ask/{number}"] if isinstance(segment, Text) and segment.supervised]
        assert (question, true) == ("how fast?", tokenizers.text.decode(list(answer.ids))) and written


def test_samples_are_what_the_policy_writes(store, sampled):
    """At the last step, against a slow greedy reference with the exported weights: whole passes, an item at a time."""
    source, held_out = _held_out(store, **OPTIONS)
    model, vocabulary = load(sampled / "policy", dtype=torch.float32).model, source.vocabulary
    tokenizers, found = store.tokenizers(), rows(sampled / "samples" / "step-000004.rrd")
    document = held_out.shown(3)["act/0"]
    *_, at, _ = [number for number, segment in enumerate(document) if isinstance(segment, ActionChunk)]
    grammar, ids = tokenizers.action.grammar(horizon=10, action_dim=7), []
    while True:
        written = [*document[:at], ActionChunk(ids) if ids else OpenAction()]
        batch, before_next = collate([written], vocabulary), length_of(written, vocabulary) - (2 if ids else 1)
        logits = model.lm_head(_states(model, batch)[before_next])[vocabulary.action_start : vocabulary.end_of_chunk + 1]
        chosen = int(logits.masked_fill(torch.from_numpy(~grammar.allowed(ids)), -torch.inf).argmax())
        if chosen == vocabulary.action_size:
            break
        ids.append(chosen)
    actions = tokenizers.normalizer.denormalize(tokenizers.action.decode([ids], horizon=10, action_dim=7)[0])
    for component, values in zip(ACTION_COMPONENTS, actions.T, strict=True):
        np.testing.assert_allclose(bars(found[f"act/0/action/{component}/predicted"][0][1]), values)
    *_, first, second = [number for number, segment in enumerate(document) if isinstance(segment, Image)]
    blank = [Image(image.name, np.zeros_like(image.codes)) for image in document[first : second + 1]]
    batch = collate([[*document[:first], *blank]], vocabulary)
    for number in range(len(batch.codes_NC) - 25, len(batch.codes_NC)):
        state = _states(model, batch)[batch.block_at_N[number] - 1][None]
        context = batch.block_context(slice(number, number + 1))
        batch.codes_NC[number] = model.depth.write(state, context, lambda logits: logits.argmax(-1))[0]
    codes = batch.codes_NC[-25:-9].view(4, 4, 4, 4).transpose(1, 2).reshape(16, 16)
    true = document[first].codes
    assert found[f"act/0/next/{RGB_STATIC}/codes_right"][0][1] == pytest.approx(float((codes.numpy() == true).mean()))
    written = pixels(found[f"act/0/next/{RGB_STATIC}/written"][0][1])
    assert np.array_equal(written, to_images(tokenizers.vision.decode(codes[None]))[0])


@torch.no_grad()
def _states(model, batch):
    return model.states(batch)


def test_a_run_that_goes_on_neither_loses_nor_doubles_samples(store, sampled, tmp_path, monkeypatch):
    """Cut off after a step's samples and before its state: they are written again, the same."""
    write, calls = Sampler.write, []

    def write_and_fall(sampler, step, model):
        path = write(sampler, step, model)
        calls.append(step)
        if calls == [2, 4]:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(Sampler, "write", write_and_fall)
    options = OPTIONS | SAMPLED | {"validate_every": 2, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        tiny_tokens.train(store.path, tmp_path, **options)
    tiny_tokens.train(store.path, tmp_path, **options)
    assert calls == [2, 4, 4]
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["step-000002.rrd", "step-000004.rrd"]
    for path in files:
        assert rows(path) == rows(sampled / "samples" / path.name)


def test_adapters_are_sampled_with_what_they_adapt(store, sampled, tmp_path):
    """As the policy that they are merged into; and their training does not notice either."""
    options = {"init_from": str(sampled / "policy"), "lora_rank": 4, "optimizer": OptimizerConfig(learning_rate=0.3, warmup_steps=1)}
    runs = [tmp_path / "with", tmp_path / "without"]
    for folder, more in zip(runs, ({"samples_every": 9, "samples": 1}, {}), strict=True):
        folder.mkdir()
        tiny_tokens.train(store.path, folder, **OPTIONS, **options, **more)
    left, right = (load(folder / "policy").model.state_dict() for folder in runs)
    assert all(torch.equal(left[name], right[name]) for name in left)
    source, held_out = _held_out(store, **OPTIONS)
    sampler = Sampler(tmp_path / "again", held_out.shown(1), source)
    found = rows(runs[0] / "samples" / "step-000004.rrd")
    assert found == rows(sampler.write(4, load(runs[0] / "policy", dtype=torch.float32).model.eval()))
    assert found != rows(sampler.write(4, load(sampled / "policy", dtype=torch.float32).model.eval())), "the adapters count"


def test_emu3s_own_vocabulary_is_sampled(tmp_path):
    store = tiny_tokens.emu3_store(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {"batch_size": 1, "context": 192, "validation_fraction": 0.5, "validation_documents": 1}
    options |= {"mixture": MixtureConfig(act=1, film=1), "model": ModelSizes(block_size=1, max_position_embeddings=256, **sizes)}
    tiny_tokens.train(store.path, tmp_path / "run", steps=1, samples_every=1, samples=1, **options)
    found = rows(tmp_path / "run" / "samples" / "step-000001.rrd")
    source, held_out = _held_out(store, **options)
    documents, tokenizers = held_out.shown(1), store.tokenizers()
    (film,) = [segment for segment in documents["film/0"] if isinstance(segment, Video)]
    frames = to_images(tokenizers.vision.decode(torch.from_numpy(film.codes[-2:].astype(np.int64))))
    for expected, entity in zip(frames, ("film/0/now/film", "film/0/next/film/true"), strict=True):
        assert np.array_equal(pixels(found[entity][0][1]), expected)
    for camera in (RGB_STATIC, RGB_GRIPPER):
        assert pixels(found[f"act/0/next/{camera}/written"][0][1]).shape == (32, 32, 3)
    assert bars(found["act/0/action/dz/predicted"][0][1]).shape == (10,)


@pytest.mark.parametrize(
    ("kind", "images", "chunk", "answers"),
    [
        ("text", 0, False, 1),
        ("draw", 2, False, 0),
        ("describe", 0, False, 1),
        ("film", 1, False, 0),
        ("world", 2, False, 0),
        ("ask", 0, False, 1),
        ("act", 2, True, 0),
        ("interleave", 1, False, 3),
    ],
)
def test_every_kind_of_document_asks_for_what_it_teaches(store, kind, images, chunk, answers):
    """And what is asked for comes after what is shown."""
    options = {"context": 512, "batch_size": 3, "chunks": 2, "questions": 1, "mixture": MixtureConfig(**{kind: 1.0}, moments=3)}
    source, held_out = _held_out(store, **options)
    tokenizers = store.tokenizers()
    gapper = Gapper(source.vocabulary, tokenizers.action.grammar(horizon=10, action_dim=7), tokenizers.text)
    documents = held_out.shown(4)
    assert list(documents) == [f"{kind}/{number}" for number in range(4)] and documents == held_out.shown(4)
    for document in documents.values():
        gaps = gapper.gaps(document)
        assert len(gaps.images.true if gaps.images else []) == images
        assert (gaps.chunk is not None) == chunk and len(gaps.answers) == answers
        assert (gaps.said is not None) == (kind not in ("describe", "ask"))
        assert len(gaps.now) == {"text": 0, "draw": 0, "film": 1, "interleave": 1}.get(kind, 2)
        if images:
            place = len(gaps.images.prompt) - 1
            assert gaps.images.true == document[place : place + images] and isinstance(gaps.images.prompt[-1], OpenImage)
            assert gaps.images.prompt[:-1] == document[:place]
            assert all(image in document[:place] for image in gaps.now)
        for gap in gaps.answers:
            assert gap.prompt == document[: len(gap.prompt)] and gap.true == [document[len(gap.prompt)]]


def test_options_of_samples_are_checked():
    with pytest.raises(ValueError, match="samples_every is -1, expected steps, or 0"):
        TrainConfig(tokens="x", samples_every=-1)
    with pytest.raises(ValueError, match="samples is 0, expected at least 1"):
        TrainConfig(tokens="x", samples=0)
    with pytest.raises(ValueError, match="samples_every=5 writes into held-out documents, and preference.pairs has pairs"):
        TrainConfig(tokens="x", samples_every=5, context=64, init_from="y", preference=PreferenceConfig(pairs="z"))
