"""Every path, with both vocabularies: what comes out has the right form, follows from the seed, and wrong input is named."""

import dataclasses

import numpy as np
import pytest
import tiny_tokens
import torch

from emu3_vla import pipelines
from emu3_vla.checkpoint import PolicySettings, load
from emu3_vla.documents import Image, parse, write
from emu3_vla.generation.engine import PromptTooLong
from emu3_vla.pipelines import Decoding, agreement, asking, base, filming, imagining
from emu3_vla.training.kinds import Material, anchors_of
from emu3_vla.training.kinds import write as train_document
from emu3_vla.training.mixture import MixtureConfig
from emu3_vla.training.stream import encoded_wordings
from emu3_vla.vocabulary import Emu3Vocabulary
from envs.spec import RGB_GRIPPER, RGB_STATIC

DRAWN = Decoding(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def compact(tiny_checkpoint):
    return pipelines.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def asked_store(tmp_path_factory):
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("asked"), shards=1, episodes_per_shard=2, asked=True)


@pytest.fixture(scope="module")
def felt_store(tmp_path_factory):
    """Of which the arm's state and what there is to see are known too."""
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("felt"), shards=2, episodes_per_shard=2, asked=True, felt=True)


@pytest.fixture(scope="module")
def foretelling(felt_store, tmp_path_factory):
    """Says what its pictures will show, before it makes them."""
    options = {"steps": 2, "context": 448, "validation_fraction": 0.5, "scene_first": True}
    options["mixture"] = MixtureConfig(draw=1, film=1, world=1)
    return pipelines.load(tiny_tokens.train(felt_store.path, tmp_path_factory.mktemp("foretelling"), **options))


@pytest.fixture(scope="module")
def published(published_folder):
    return pipelines.load(published_folder)


def _pictures(seed=0, sizes=((200, 200), (84, 84))):
    random = np.random.default_rng(seed)
    names = (RGB_STATIC, RGB_GRIPPER)
    return {name: random.integers(0, 256, (*size, 3)).astype(np.uint8) for name, size in zip(names, sizes, strict=True)}


def _small(monkeypatch):
    """Pictures for Emu3's vocabulary that a context of 600 has room for."""
    monkeypatch.setattr(base, "LEAST_PIXELS", 32)
    monkeypatch.setattr(base, "MOST_PIXELS", 256)
    monkeypatch.setattr(base.fitted_size, "__defaults__", (32, 256))


# -- drawing


def test_drawings_follow_from_the_seed(compact):
    one, two = compact.draw("goes.", count=2, decoding=DRAWN)
    assert {name: picture.shape for name, picture in one.items()} == {RGB_STATIC: (128, 128, 3), RGB_GRIPPER: (96, 96, 3)}
    assert all(picture.dtype == np.uint8 for picture in one.values())
    again = compact.draw("goes.", decoding=dataclasses.replace(DRAWN, seed=4))[0]
    assert any((one[name] != two[name]).any() for name in one)
    assert all((two[name] == again[name]).all() for name in two), "the second of seed 3 is the first of seed 4"


def test_guidance_moves_away_from_the_negative_prompt(compact):
    guided = [
        compact.draw("goes.", decoding=Decoding(temperature=1.0, guidance=30.0, negative=negative))[0][RGB_STATIC]
        for negative in ("", "flies.")
    ]
    plain = compact.draw("goes.", decoding=Decoding(temperature=1.0))[0][RGB_STATIC]
    assert (guided[0] != plain).any() and (guided[0] != guided[1]).any()


def test_lossy_decoding_draws_whole_pictures(compact):
    """Of a form like any other, and refused where nothing is guessed."""
    (drawn,) = compact.draw("goes.", decoding=dataclasses.replace(DRAWN, parallel=4, lossy=1))
    (plain,) = compact.draw("goes.", decoding=DRAWN)
    assert {name: picture.shape for name, picture in drawn.items()} == {name: picture.shape for name, picture in plain.items()}
    with pytest.raises(pipelines.PipelineError, match="lossy=1 is of guesses, and parallel=0 makes none"):
        dataclasses.replace(DRAWN, lossy=1)


def test_parallel_decoding_draws_the_same(compact):
    plain, parallel = (compact.draw("goes.", decoding=dataclasses.replace(DRAWN, parallel=window))[0] for window in (0, 4))
    assert all((plain[name] == parallel[name]).all() for name in plain)


@pytest.mark.parametrize("ratio, shape", [("1:1", (16, 16)), ("3:1", (10, 28)), ("1:2", (22, 12))])
def test_any_shape_where_the_vocabulary_has_it(published, ratio, shape):
    (drawing,) = published.draw("a cat", ratio=ratio, area=256, decoding=DRAWN)
    assert list(drawing) == ["image"] and drawing["image"].shape == (*shape, 3), "2 pixels a code"


def test_sizes_that_cannot_be(compact, published):
    with pytest.raises(pipelines.WrongSize, match="its own sizes alone .rgb_static 128×128, rgb_gripper 96×96.: leave out ratio"):
        compact.draw("goes.", ratio="16:9")
    with pytest.raises(pipelines.WrongSize, match="expected width:height"):
        published.draw("a cat", ratio="0:1")
    with pytest.raises(pipelines.WrongSize, match="more than this checkpoint's context of 600 positions; choose a smaller area"):
        published.draw("a cat", ratio="1:1", area=10**9)
    with pytest.raises(pipelines.WrongSize, match="expected at least one each way"):
        published.draw("a cat", ratio="1:1", area=-5)
    with pytest.raises(pipelines.WrongSize, match="count is 0"):
        compact.draw("goes.", count=0)
    with pytest.raises(pipelines.PipelineError, match="does nothing without guidance"):
        Decoding(negative="ugly")


def test_prompts_longer_than_the_context_are_named(published, compact):
    for model in (published, compact):
        with pytest.raises(PromptTooLong, match=f"do not fit this checkpoint's context of {model.context}"):
            model.draw("word " * model.context, decoding=DRAWN, **({"area": 100} if model is published else {}))


def test_completion_keeps_what_is_not_hidden(compact):
    picture, mask = _pictures()[RGB_STATIC], np.zeros((200, 200), bool)
    mask[:25, :25] = True  # four pixels a code and four codes a block: a corner of the first block
    codes = compact.code(picture, RGB_STATIC)
    drawn = compact.complete(picture, mask, decoding=DRAWN)
    assert drawn.shape == (128, 128, 3)
    kept = compact.pixels(codes[None])[0]
    # The decoder looks at neighbours, so what is far from the mask is the same to the last bit.
    assert (drawn[64:, 64:] == kept[64:, 64:]).all() and (drawn != kept).any()


def test_completion_of_emu3s_codes(published, monkeypatch):
    _small(monkeypatch)
    picture, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    assert published.complete(picture, mask, decoding=DRAWN).shape == (16, 16, 3)


def test_masks_that_do_not_fit(compact):
    picture = _pictures()[RGB_STATIC]
    with pytest.raises(pipelines.WrongMask, match=r"bool of shape \(100, 200\), expected bool \(200, 200\)"):
        compact.complete(picture, np.ones((100, 200), bool))
    with pytest.raises(pipelines.WrongMask, match="mask is float64"):
        compact.complete(picture, np.ones((200, 200)))
    with pytest.raises(pipelines.WrongMask, match="hides nothing"):
        compact.complete(picture, np.zeros((200, 200), bool))
    with pytest.raises(pipelines.WrongPictures, match="camera='rgb_statik', expected one of rgb_static, rgb_gripper"):
        compact.complete(picture, np.ones((200, 200), bool), camera="rgb_statik")


# -- filming


def test_videos_past_the_window(compact):
    """Each window sees the last frames of the one before: what is written is what that document's request writes."""
    shown = np.stack([_pictures(seed)[RGB_STATIC] for seed in range(3)])
    added = compact.extend(shown, frames=4, text="go left", window=3, kept=2)
    assert added.shape == (4, 128, 128, 3)
    codes = compact.code_frames(shown[-2:], RGB_STATIC)
    for number in range(4):
        request = filming.film_request(compact, compact.texts("go left"), codes[-2:], 1, filming.CONTINUED, number)
        codes = np.concatenate([codes, filming.filmed_codes(compact, codes[-2:], 1, compact.run([request])[0])])
    np.testing.assert_array_equal(added, compact.pixels(codes[2:]))


def test_film_from_a_text(compact, published):
    assert compact.film("go left", frames=3, decoding=DRAWN).shape == (3, 128, 128, 3)
    film = published.film("a cat", frames=12, area=256, window=2, kept=1, decoding=DRAWN)
    assert film.shape == (12, 16, 16, 3), "a code is 2 pixels wide and 4 frames long"


def test_extend_emu3s_video(published, monkeypatch):
    _small(monkeypatch)
    shown = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    assert published.extend(shown, frames=4).shape == (4, 8, 8, 3)
    with pytest.raises(pipelines.WrongFrames, match="T a multiple of 4"):
        published.extend(shown[:3], frames=4)
    with pytest.raises(pipelines.WrongFrames, match="frames=3, expected at least 1 and a multiple of 4"):
        published.extend(shown, frames=3)


def test_numbers_of_frames_that_cannot_be(compact):
    shown = _pictures()[RGB_STATIC][None]
    with pytest.raises(pipelines.WrongFrames, match="frames=0"):
        compact.extend(shown, frames=0)
    with pytest.raises(pipelines.WrongFrames, match=r"shape \(0, 200, 200, 3\)"):
        compact.extend(shown[:0], frames=1)
    with pytest.raises(pipelines.WrongFrames, match="window=2 and kept=2"):
        compact.extend(shown, frames=1, window=2, kept=2)
    with pytest.raises(pipelines.PipelineError, match="text of what is to be filmed is empty"):
        compact.film(" ", frames=1)


def test_of_several_predictions_the_one_nearest_to_all_is_kept(compact):
    drawn = Decoding(temperature=1.0, seed=5, samples=4)
    shown = np.stack([_pictures(seed)[RGB_STATIC] for seed in range(2)])
    kept = compact.extend(shown, frames=1, window=3, decoding=drawn)
    each = [compact.extend(shown, frames=1, window=3, decoding=one) for one in agreement.each_sample(drawn)]
    assert len({one.tobytes() for one in each}) > 2, "they differ"
    pixels = np.stack(each).astype(np.float64)
    distances = [((pixels - one) ** 2).sum() for one in pixels]
    np.testing.assert_array_equal(kept, each[int(np.argmin(distances))])
    actions = np.zeros((2, tiny_tokens.HORIZON, 7))
    actions[..., 0] = -0.5
    looks = compact.imagine("go left", _pictures(), actions, decoding=drawn)
    assert len(looks) == 2 and set(looks[0]) == {RGB_STATIC, RGB_GRIPPER}


def test_numbers_of_samples_that_cannot_be(compact):
    shown = _pictures()[RGB_STATIC][None]
    with pytest.raises(pipelines.PipelineError, match="samples=4 with temperature=0 are all the same; set temperature, such as 0.5"):
        compact.extend(shown, frames=1, decoding=Decoding(samples=4))
    with pytest.raises(pipelines.PipelineError, match="samples is 0, expected at least 1"):
        compact.extend(shown, frames=1, decoding=Decoding(samples=0))
    with pytest.raises(pipelines.PipelineError, match="samples=2 is of films, of what actions lead to, and of answers; here"):
        compact.draw("goes.", decoding=Decoding(temperature=1.0, samples=2))


# -- asking


def test_answers_end_with_their_full_stop_and_stream(compact):
    stream = compact.ask("how fast?", _pictures(), longest=400, decoding=Decoding(temperature=3.0, seed=1))
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == stream.text
    assert stream.finish == "end" and stream.text.endswith(".") and "." not in stream.text[:-1]
    assert stream.text == compact.ask("how fast?", _pictures(), longest=400, decoding=Decoding(temperature=3.0, seed=1)).read()


def test_an_answer_that_does_not_end_says_so(compact):
    stream = compact.ask("how fast?", _pictures(), longest=1)
    assert stream.read() is stream.text and stream.finish in ("length", "end")
    with pytest.raises(pipelines.PipelineError, match="longest is 0"):
        compact.ask("how fast?", _pictures(), longest=0)


def test_with_the_arms_state_the_model_says_what_it_sees_before_it_answers(foretelling, monkeypatch):
    requests, run, events = [], foretelling.run, foretelling.events
    monkeypatch.setattr(foretelling, "run", lambda asked, **options: requests.extend(asked) or run(asked, **options))
    monkeypatch.setattr(foretelling, "events", lambda asked: requests.extend(asked) or events(asked))
    state = tiny_tokens.state_of(3)
    answer = foretelling.ask("how fast?", _pictures(), state=state, longest=20).read()
    assert "<" not in answer, "the numbers are not told"
    look, question = requests[0].prompt, requests[-1].prompt
    assert look[-1].ids == foretelling.state_words.ids(tiny_tokens.STATE.numbers(state))
    scene = set(foretelling.scene_words.single_ids().flatten().tolist())
    assert [type(part) for part in question] == [base.Begin, Image, Image, base.Text, base.Text, base.Text]
    assert question[3] is look[-1] and len(question[4].ids) == 3 and set(question[4].ids) <= scene
    requests.clear()
    foretelling.ask("how fast?", _pictures(), longest=20).read()
    assert [type(part) for part in requests[-1].prompt] == [base.Begin, Image, Image, base.Text], "of pictures alone nothing is said before"


@pytest.mark.parametrize(
    "state, message",
    [
        (np.zeros(7), "robot_obs has shape"),
        (np.full(15, np.nan), "not finite"),
        (["near"] * 15, "could not convert"),
    ],
)
def test_what_is_no_state_of_an_arm(foretelling, state, message):
    with pytest.raises(pipelines.WrongState, match=rf"robot_obs of the moment of the pictures, in metres and radians.*{message}"):
        foretelling.ask("how fast?", _pictures(), state=state)


def test_states_that_are_not_told(compact, published):
    with pytest.raises(pipelines.WrongState, match="was not told its arm's state in training; ask without state"):
        compact.ask("how fast?", _pictures(), state=np.zeros(15))
    with pytest.raises(pipelines.WrongState, match="a question is about a picture or a video alone"):
        published.ask("what is this?", _pictures()[RGB_STATIC], state=np.zeros(15))


def test_of_several_answers_the_one_nearest_to_all(compact, foretelling):
    answers = ["10 right 5 up.", "30 right 5 up.", "no.", "20 right 5 up."]
    assert agreement.most_agreed_answer(answers) == 3, "10 and 30 are further from each other than both are from 20"
    assert agreement.most_agreed_answer(["yes.", "no.", "no."]) == 1
    assert agreement.most_agreed_answer(["yes."]) == 0
    several = Decoding(temperature=2.0, seed=3, samples=3)
    for model, told in ((compact, {}), (foretelling, {"state": tiny_tokens.state_of(1)})):
        stream = model.ask("how fast?", _pictures(), longest=9, decoding=several, **told)
        assert list(stream) == [stream.text] and stream.finish in ("end", "length"), "as a whole"
        assert stream.text == model.ask("how fast?", _pictures(), longest=9, decoding=several, **told).read()
    with pytest.raises(pipelines.PipelineError, match="samples=4 with temperature=0 are all the same"):
        compact.ask("how fast?", _pictures(), decoding=Decoding(samples=4))


def test_published_questions_have_the_published_form(published, monkeypatch):
    _small(monkeypatch)
    picture = np.random.default_rng(0).integers(0, 256, (16, 8, 3)).astype(np.uint8)
    asked = []
    monkeypatch.setattr(published, "events", lambda requests: asked.extend(requests) or iter(()))
    published.ask("what is this?", picture)
    begin, before, image, after = asked[0].prompt
    assert published.text.decode(before.ids) == "You are a helpful assistant. USER: "
    assert published.text.decode(after.ids) == "what is this?. ASSISTANT:"
    np.testing.assert_array_equal(image.codes, published.code(picture, ""))
    assert image.codes.shape == (8, 4)
    published.ask("what happens?", frames=np.stack([picture] * 4))
    assert asked[1].prompt[2].codes.shape == (1, 8, 4), "four frames a code"


def test_published_answers(published, monkeypatch):
    _small(monkeypatch)
    picture = np.random.default_rng(0).integers(0, 256, (16, 8, 3)).astype(np.uint8)
    stream = published.ask("what is this?", picture, longest=5)
    assert stream.read() == stream.text and stream.finish in ("length", "end")
    assert published.describe(picture, longest=5).read()
    with pytest.raises(pipelines.WrongPictures, match="2 pictures were given; in the published form a question is about one"):
        published.ask("what is this?", [picture, picture])


def test_a_character_is_streamed_whole(published):
    class Bytes:
        text, vocabulary = published.text, published.vocabulary

    ids = published.text.encode("aé")
    events = iter([asking.Event(0, [index], "end" if number == len(ids) - 1 else None) for number, index in enumerate(ids)])
    assert len(ids) == 3 and list(asking.TextStream(Bytes, events)) == ["a", "é"]


def test_pictures_that_are_not_those_of_the_checkpoint(compact, published):
    pictures = _pictures()
    with pytest.raises(pipelines.WrongPictures, match=r"is shown 2 pictures at once \(rgb_static, rgb_gripper\), not 1"):
        compact.ask("how fast?", pictures[RGB_STATIC])
    with pytest.raises(pipelines.WrongPictures, match="pictures of front were given"):
        compact.describe({"front": pictures[RGB_STATIC]})
    with pytest.raises(pipelines.WrongPictures, match="float64 of shape"):
        compact.describe({name: picture / 255 for name, picture in pictures.items()})
    with pytest.raises(pipelines.WrongSize, match="0×200 pixels has nothing on it"):
        compact.describe(pictures | {RGB_STATIC: pictures[RGB_STATIC][:, :0]})
    with pytest.raises(pipelines.WrongSize, match="sides that differ by less than 100 times"):
        published.describe(np.zeros((1, 500, 3), np.uint8))
    with pytest.raises(pipelines.WrongFrames, match="not about a video"):
        compact.ask("how fast?", frames=pictures[RGB_STATIC][None])
    with pytest.raises(pipelines.WrongPictures, match="give one of them"):
        compact.ask("how fast?")
    with pytest.raises(pipelines.PipelineError, match="question is empty"):
        compact.ask(" ", pictures)
    with pytest.raises(pipelines.PipelineError, match="leave guidance at 1"):
        compact.describe(pictures, decoding=Decoding(guidance=2.0))


def test_resizing_is_said_once(tiny_checkpoint):
    said = []
    model = pipelines.load(tiny_checkpoint, say=said.append)
    model.look(_pictures())
    model.look(_pictures())
    assert said == [
        "200×200 pixels are resized to 128×128, at which this checkpoint reads rgb_static",
        "84×84 pixels are resized to 96×96, at which this checkpoint reads rgb_gripper",
    ]


# -- steps, foresight, reconstruction


@pytest.mark.parametrize("which", ["compact", "published"])
def test_steps_come_with_pictures(which, request):
    model, shape = request.getfixturevalue(which), {"area": 64} if which == "published" else {}
    progress = []
    model.progress = lambda done, total: progress.append((done, total))
    steps = list(model.interleave("go left", steps=3, step_text=4, decoding=DRAWN, **shape))
    assert 1 <= len(steps) <= 3 and all(step.text for step in steps)
    assert {step.picture.shape for step in steps} == {(128, 128, 3) if which == "compact" else (8, 8, 3)}
    assert progress[-1][0] <= progress[-1][1], "what is done and at most"
    with pytest.raises(pipelines.WrongFrames, match="steps=0"):
        model.interleave("go left", steps=0)


def test_foresight_depends_on_the_actions(compact):
    left, right = np.zeros((2, 2, tiny_tokens.HORIZON, 7))
    left[..., 0], right[..., 0] = -0.5, 0.5
    ids = [imagining.action_ids(compact, actions) for actions in (left, right)]
    assert ids[0] != ids[1]
    looks = compact.imagine("go left", _pictures(), left)
    assert [{name: picture.shape for name, picture in look.items()} for look in looks] == [
        {RGB_STATIC: (128, 128, 3), RGB_GRIPPER: (96, 96, 3)}
    ] * 2
    assert len(compact.imagine("go left", _pictures(), right[0])) == 1


@pytest.mark.parametrize(
    "actions, message",
    [
        (np.zeros((3, 7)), r"shape \(3, 7\), expected \(10, 7\) for a chunk"),
        (np.zeros((0, 10, 7)), r"shape \(0, 10, 7\)"),
        (np.zeros(7), r"shape \(7,\)"),
        (np.full((10, 7), np.nan), "NaN or infinity"),
        ([["left"]], "no array of numbers"),
    ],
)
def test_actions_of_the_wrong_shape(compact, actions, message):
    with pytest.raises(pipelines.WrongActions, match=message):
        compact.imagine("go left", _pictures(), actions)


def test_foresight_with_emu3s_vocabulary(published, tiny_checkpoint):
    """As a checkpoint of ours with that vocabulary has it: cameras with sizes, action tokenizer, normaliser."""
    own = load(tiny_checkpoint)
    foreign = published.checkpoint
    vision = foreign.vision_tokenizer
    parts = {"normalizer": own.normalizer, "action_tokenizer": own.action_tokenizer}
    policy = PolicySettings(history=1, trained_history=1, horizon=tiny_tokens.HORIZON, action_dim=7)
    vocabulary = Emu3Vocabulary(action_size=own.action_tokenizer.vocab_size)
    vision.image_sizes = {RGB_STATIC: 8, RGB_GRIPPER: 4}
    try:
        checkpoint = dataclasses.replace(foreign, vocabulary=vocabulary, policy=policy, provenance={"command": "train"}, **parts)
        model = pipelines.Pipelines(checkpoint)
        looks = model.imagine("go left", _pictures(), np.zeros((2, tiny_tokens.HORIZON, 7)))
        assert [{name: picture.shape for name, picture in look.items()} for look in looks] == [
            {RGB_STATIC: (8, 8, 3), RGB_GRIPPER: (4, 4, 3)}
        ] * 2
        assert model.film("go left", frames=5, decoding=DRAWN).shape == (5, 8, 8, 3), "our training codes each frame alone"
        assert list(model.draw("goes.", decoding=DRAWN)[0]) == [RGB_STATIC, RGB_GRIPPER]
        assert model.ask("how fast?", _pictures(), longest=3).read()
    finally:
        vision.image_sizes = {}


def test_reconstruction(compact, published):
    picture = _pictures()[RGB_STATIC]
    made = compact.reconstruct(picture, camera=RGB_STATIC)
    assert made.codes.shape == (16, 16) and made.original.shape == made.reconstructed.shape == (128, 128, 3)
    error = (made.original.astype(float) - made.reconstructed) / 255
    assert made.psnr_db == pytest.approx(-10 * np.log10((error**2).mean()), abs=0.05), "bytes are rounded"
    assert compact.reconstruct(picture[:30, :41]).reconstructed.shape == (30, 41, 3), "any size, padded and cut"
    video = published.reconstruct(np.stack([picture[:9, :8]] * 5))
    assert video.codes.shape == (2, 5, 4) and video.reconstructed.shape == (5, 9, 8, 3)
    with pytest.raises(pipelines.WrongPictures, match="camera='front', expected one of rgb_static"):
        compact.reconstruct(picture, camera="front")


# -- checkpoints


@pytest.mark.parametrize(
    "part, path",
    [
        ("vision_tokenizer", lambda model: model.draw("goes.")),
        ("text_tokenizer", lambda model: model.draw("goes.")),
        ("action_tokenizer", lambda model: model.imagine("go left", _pictures(), np.zeros((10, 7)))),
        ("normalizer", lambda model: model.imagine("go left", _pictures(), np.zeros((10, 7)))),
        ("policy", lambda model: model.imagine("go left", _pictures(), np.zeros((10, 7)))),
    ],
)
def test_a_part_that_is_missing_is_named(compact, part, path):
    model = pipelines.Pipelines(dataclasses.replace(compact.checkpoint, **{part: None}))
    with pytest.raises(pipelines.LacksPart, match=f"has no {part}.*, which this needs"):
        path(model)


def test_checkpoints_and_options(compact, published, tmp_path):
    assert pipelines.find("calvin-d").name == "calvin-d" and pipelines.find("calvin-d").is_dir()
    assert pipelines.find(tmp_path) is tmp_path
    assert published.published and published.codes_clips and not compact.published
    with pytest.raises(pipelines.LacksPart, match="no vocabulary.json"):
        pipelines.Pipelines(dataclasses.replace(compact.checkpoint, vocabulary=None))
    with pytest.raises(pipelines.PipelineError, match="form='chat', expected one of trained, published"):
        pipelines.Pipelines(compact.checkpoint, form="chat")
    with pytest.raises(pipelines.PipelineError, match="rows is 0"):
        pipelines.Pipelines(compact.checkpoint, rows=0)
    with pytest.raises(ValueError, match="engine='fast'"):
        pipelines.Pipelines(compact.checkpoint, engine="fast").draw("goes.")


def test_other_engines_write_the_same(published_folder, published):
    other = pipelines.load(published_folder, engine="transformers")
    greedy = {"area": 64, "decoding": Decoding(guidance=2.0)}
    (ours,), (theirs,) = (model.draw("a cat", **greedy) for model in (published, other))
    np.testing.assert_array_equal(ours["image"], theirs["image"])


# -- the forms are those of training


@pytest.mark.parametrize("kind", ["draw", "describe", "film", "world", "ask", "interleave"])
def test_prompts_are_the_beginnings_of_training_documents(kind, compact, asked_store, monkeypatch):
    _check_prompt(kind, compact, asked_store, {}, monkeypatch)


@pytest.mark.parametrize("kind", ["draw", "film", "world", "interleave", "ask"])
def test_what_is_foretold_stands_where_it_stood_in_training(kind, foretelling, felt_store, monkeypatch):
    encode = foretelling.text.encode
    words = {"states": tiny_tokens.STATE.spelled(encode), "scenes": tiny_tokens.SCENE.spelled(encode)}
    words |= {"scene_first": True, "scene_asked": True}
    _check_prompt(kind, foretelling, felt_store, words, monkeypatch)


def _check_prompt(kind, model, store, words, monkeypatch):
    """What the pipeline asks is, id for id, how a training document of that kind begins, and its grammar takes what follows."""
    vocabulary, episodes = model.vocabulary, store.episodes()
    texts = encoded_wordings(episodes, store.metadata["wordings"], model.text.encode)
    material = Material(episodes=episodes, texts=texts, vocabulary=vocabulary, horizon=10, chunks=2, moments=3, questions=1, **words)
    documents = (train_document(kind, material, anchors_of(kind, material)[0], np.random.default_rng(seed)) for seed in range(20))
    # Of a film that is foretold, as many frames are given as chance has it; the request below gives one.
    document = next(document for document in documents if kind != "film" or isinstance(document[1], Image))
    asked = []
    monkeypatch.setattr(model, "run", lambda requests, **_: asked.extend(requests) or [base.Written([], "end")])
    monkeypatch.setattr(model, "events", lambda requests: asked.extend(requests) or iter(()))
    _request_like(kind, model, document)
    prompt, whole = write(asked[0].prompt, vocabulary), write([base.Begin(), *document], vocabulary)
    assert len(prompt) < len(whole) and prompt.tolist() == whole[: len(prompt)].tolist()
    items = base.items_of(parse(whole, vocabulary), vocabulary, vocabulary.head_size)
    grammar = asked[0].grammar
    state = grammar.start
    for item in items[len(base.items_of(asked[0].prompt, vocabulary, vocabulary.head_size)) :]:
        if grammar.is_final(state):
            assert kind in ("draw", "film", "world") and item == vocabulary.eos, "where all pictures are there"
            break
        state = grammar.advance(state, item)
    assert grammar.is_final(state)


def test_pictures_are_foretold_in_words(foretelling, monkeypatch):
    """Every path draws behind the words that it wrote, and what is foreseen next stands on them; the oldest look has none in training."""
    requests, run = [], foretelling.run
    monkeypatch.setattr(foretelling, "run", lambda asked, **options: requests.extend(asked) or run(asked, **options))
    pictures = _pictures()
    assert set(foretelling.draw("goes.", decoding=DRAWN)[0]) == {RGB_STATIC, RGB_GRIPPER}
    assert foretelling.extend(pictures[RGB_STATIC][None], frames=3, text="go left").shape == (3, 128, 128, 3)
    assert all("<" not in step.text for step in foretelling.interleave("go left", steps=2, step_text=4, decoding=DRAWN))
    requests.clear()
    actions = np.zeros((4, tiny_tokens.HORIZON, 7))
    actions[..., [0, 1, 6]] = 0.3, 0.2, 1
    assert len(foretelling.imagine("go left", pictures, actions)) == 4
    words = len(foretelling.number_ids) and len(tiny_tokens.STATE.names) + len(tiny_tokens.SCENE.names)
    for number, request in enumerate(requests):
        look = request.prompt[2:]
        foretold = [part for part in look if isinstance(part, base.Text)]
        assert isinstance(look[0], Image) and len(foretold) == min(number, 1), "two are remembered"
        assert all(len(part.ids) == words and set(part.ids) <= set(foretelling.number_ids) for part in foretold)


def test_a_foretelling_checkpoint_stays_one(foretelling, felt_store, tiny_store, tmp_path):
    told = {"init_from": str(foretelling.checkpoint.folder), "steps": 1, "validation_fraction": 0.5}
    again = tiny_tokens.train(felt_store.path, tmp_path / "again", context=448, mixture=MixtureConfig(draw=1), **told)
    assert pipelines.load(again).foretold
    silent = tiny_tokens.train(felt_store.path, tmp_path / "silent", context=448, mixture=MixtureConfig(act=1), **told)
    assert not pipelines.load(silent).foretold, "as training warns"
    mixture = MixtureConfig(draw=1, act=1)
    with pytest.raises(ValueError, match="says what it sees when it acts; give scene_fraction"):
        tiny_tokens.config(felt_store.path, tmp_path, context=448, scene_first=True, mixture=mixture)
    with pytest.raises(ValueError, match="scene_first=true says before a picture what it will show: it needs a token store that knows"):
        tiny_tokens.train(tiny_store.path, tmp_path / "unknown", context=448, scene_first=True, mixture=MixtureConfig(film=1), steps=1)


def _request_like(kind: str, model, document) -> None:
    """Ask for what the document holds, by the request that its path makes."""
    from emu3_vla.pipelines import drawing, interleaving

    images = [part for part in document if isinstance(part, Image)]
    texts = [part for part in document if isinstance(part, base.Text)]
    words = set(model.number_ids)
    if kind == "draw":
        model.run([drawing.draw_request(model, texts[:1], model.cameras, Decoding())])
    elif kind == "describe":
        model.run([asking.describe_request(model, images, Decoding())])
    elif kind == "ask":
        look = document[: next(at for at, part in enumerate(document) if isinstance(part, base.Text) and not set(part.ids) & words)]
        model.run([asking.ask_request(model, document[len(look) : len(look) + 1], look, Decoding())])
    elif kind == "film":
        model.run([filming.film_request(model, texts[:1], images[0].codes[None], len(images) - 1, Decoding())])
    elif kind == "world":
        chunks = [part for part in document if isinstance(part, imagining.ActionChunk)]
        model.run([imagining.world_request(model, texts[:1], [images[:2]], chunks[:1], Decoding())])
    else:
        list(interleaving.interleave(model, model.text.decode(texts[0].ids), steps=3))


def test_no_gradients_are_kept(compact):
    compact.draw("goes.", decoding=DRAWN)
    assert not any(parameter.grad is not None for parameter in compact.checkpoint.model.parameters())
    assert not torch.is_inference_mode_enabled()


def test_a_policy_that_speaks_in_numbers_answers_in_words():
    """The shipped policy says what it sees in words of its own, which are no answer, however odd the question."""
    pipes = pipelines.load(pipelines.find("calvin-d"))
    words = [pipes.text.decode([index]) for index in pipes.number_ids]
    assert "<red_right 13>" in [word.strip() for word in words]
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (side, side, 3), np.uint8) for side in (200, 84)]
    assert "<" not in pipes.ask("describe the scene.", pictures, longest=12).read()
