"""The scorer: it counts what it says it counts, and a checkpoint that only repeats is no better than repeating."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tokens
import torch

from emu3_vla import cli, pipelines
from emu3_vla.commands import eval_generation
from emu3_vla.data.tokens import TokenStore
from emu3_vla.documents import Image
from emu3_vla.pipelines import scoring
from emu3_vla.pipelines.state_probe import StateProbe, _ridge
from emu3_vla.vision_tokenizer.probe import RIDGE
from envs.calvin.questions import Questions
from envs.spec import RGB_GRIPPER, RGB_STATIC
from eval.sequences import initial_state, long_horizon_sequences


def _about(speed: int) -> list[tuple[str, str]]:
    """CALVIN's questions about a state that the pictures tell: what is on and open follows from the speed."""
    robot_obs, scene_obs = (part.copy() for part in initial_state(long_horizon_sequences(1)[0][0]))
    scene_obs[4], scene_obs[5], scene_obs[1] = speed > 1, speed % 2, 0.2 * (speed == 3)
    return Questions("D").about(robot_obs, scene_obs)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A store with CALVIN's questions, and a checkpoint that was hardly trained on it."""
    folder = tmp_path_factory.mktemp("asked")
    options = {"asked": True, "questions": eval_generation.QUESTIONS, "about": _about}
    store = tiny_tokens.tiny_store(folder / "tokens", shards=4, episodes_per_shard=3, **options)
    return store, tiny_tokens.train(store.path, folder / "train", steps=1)


def test_the_command_leaves_figures_and_a_page(asked, tmp_path, capsys):
    store, checkpoint = asked
    options = {"checkpoint": checkpoint, "tokens": store.path, "output_dir": tmp_path / "out", "longest": 6, "validation_fraction": 0.25}
    assert cli.main(["eval-generation", "preset=debug", *(f"{name}={value}" for name, value in options.items())]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measures = results["measures"]
    assert list(measures) == list(eval_generation.MEASURES)
    assert measures["ask"]["all"]["n"] == 2 * 19 and measures["ask"]["distance of a block"]["n"] == 2 * 3
    assert {"drawer", "light bulb", "red block"} < set(measures["describe"])
    assert measures["draw"]["drawn"]["drawer"]["n"] == 2 and measures["draw"]["real_pictures"]["light bulb"]["share"] == 1.0
    assert list(measures["world"]) == ["rgb_static, 1 chunk ahead", "rgb_gripper, 1 chunk ahead"]
    assert list(measures["film"]) == ["rgb_static, 1 frame ahead", "rgb_static, 2 frames ahead"]
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "another drawing" in page


@pytest.mark.parametrize(
    "change, message",
    [
        (("measures=[drew]",), "measures=['drew'], expected some of ask, describe, draw"),
        (("frames=0",), "frames is 0"),
        (("kept=4",), "window=4 and kept=4"),
        (("validation_fraction=1",), "expected between 0 and 1"),
    ],
)
def test_options_that_cannot_be(change, message, capsys, tmp_path):
    assert cli.main(["eval-generation", f"tokens={tmp_path}", f"output_dir={tmp_path / 'out'}", *change]) == 2
    assert message in capsys.readouterr().err


def test_other_tokenizers_and_other_questions_are_refused(asked, tiny_store, tiny_checkpoint, capsys, tmp_path):
    store, checkpoint = asked
    for name, tokens, message in (
        (checkpoint, tiny_store.path, "was written by another"),
        (tiny_checkpoint, tiny_store.path, "asked by nobody"),
    ):
        assert cli.main(["eval-generation", f"checkpoint={name}", f"tokens={tokens}", f"output_dir={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err


def test_answers_are_counted_by_kind_and_in_millimetres(monkeypatch):
    def one(question, truth, answer, finish="end"):
        return scoring.Answered(question=question, truth=truth, answer=answer, finish=finish)

    far, near = "how far is the red block from the hand?", "how far is the switch from the hand?"
    answered = [
        one("is the drawer open?", "yes.", "yes."),
        one("is the drawer open?", "no.", "yes."),
        one(far, "30 right 40 back 0 down.", "0 right 0 back 0 down."),
        one(far, "5 right 0 back 0 down.", "5 right 0 back 0 down."),
        one(far, "5 right 0 back 0 down.", "25 right 0 back 0 down."),
        one(far, "5 right 0 back 0 down.", "no.", "length"),
        one(near, "5 right 0 back 0 down.", "yes."),
    ]
    monkeypatch.setattr(scoring, "answers", lambda *_, **__: answered)
    monkeypatch.setattr(scoring, "moments", lambda *_: [])
    config = SimpleNamespace(frames=1, seed=0, longest=9, state=False, samples=1)
    figures = eval_generation._ask(None, config, [], [], None).figures
    assert figures["all"]["share"] == pytest.approx(3 / 7, abs=1e-4) and figures["all"]["cut_short"] == 1
    assert figures["all"]["word_for_word"] == pytest.approx(2 / 7, abs=1e-4)
    assert figures["drawer"]["share"] == 0.5 and figures["drawer"]["n"] == 2
    block = figures["distance of a block"]
    assert (block["n"], block["no_distance"], block["mean_mm"], block["median_mm"]) == (4, 1, 23.3, 20.0)
    assert figures["distance of a fixture"] == {
        "n": 1,
        "share": 0.0,
        "ci95": [0.0, pytest.approx(0.7935)],
        "word_for_word": 0.0,
        "cut_short": 0,
        "no_distance": 1,
    }


def test_errors_are_pooled_before_they_are_decibels():
    def one(error, repeated):
        return scoring.Foreseen(camera=RGB_STATIC, ahead=1, error=error, repeated_error=repeated, pictures=())

    found = eval_generation._errors([one(0.01, 0.0), one(0.03, 0.1), one(0.02, 0.08)], seed=0)
    assert found["psnr_db"] == 16.99 and found["repeated_psnr_db"] == 12.22, "a camera that sees nothing move does not count as infinite"
    assert found["nearer_than_repeating"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["error_saved"] == pytest.approx(0.04)
    assert found["psnr_db_ci95"][0] <= 16.99 <= found["psnr_db_ci95"][1]


def test_pictures_that_are_right_have_no_error(asked):
    """The scorer with a model that knows: what was written is the truth, or the last picture again."""
    store, checkpoint = asked
    model, (_, held_out) = pipelines.load(checkpoint), TokenStore.open(store.path).split(0.25)
    run = scoring.moments(held_out, 2, 0, run=4)
    for answer, right in ((2, True), (1, False)):
        codes = [scoring._static(moment) for moment in run]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "run", lambda requests: [SimpleNamespace(number=number) for number in range(len(requests))])
            own = iter([each[2:] if answer == 2 else each[[1, 1]] for each in codes])
            patch.setattr(scoring.filming, "filmed_codes", lambda *_, own=own: next(own))
            found = scoring.filmed(model, run)
        assert len(found) == 4 and [one.ahead for one in found] == [1, 2, 1, 2]
        assert all((one.error == 0) if right else (one.error == one.repeated_error) for one in found)


def test_moments_are_of_different_episodes_and_held_out(asked):
    _, held_out = asked[0].split(0.25)
    chosen = scoring.moments(held_out, 50, 0)
    assert len({id(moment.episode) for moment in chosen}) == len(chosen) == len(held_out)
    pairs = scoring.consequences(held_out, 50, tiny_tokens.HORIZON, 0)
    steps = [moment.episode.frame_step[list(moment.frames)] for moment in pairs]
    assert pairs and all(after - before == tiny_tokens.HORIZON for before, after in steps)
    assert scoring.moments(held_out, 3, 1)[0].frames != scoring.moments(held_out, 3, 0)[0].frames


@pytest.mark.parametrize("width", [12, 40])
def test_few_pictures_or_many_give_the_weights_of_ridge_regression(width):
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(30, width, generator=generator), torch.randn(30, 3, generator=generator)
    penalty = RIDGE * features.square().mean() * 30
    expected = torch.linalg.solve((features.T @ features + penalty * torch.eye(width)).double(), (features.T @ targets).double())
    torch.testing.assert_close(_ridge(features, targets), expected.float(), atol=1e-3, rtol=1e-3)


def test_the_probe_reads_what_the_codes_say(asked):
    random = np.random.default_rng(0)
    tokenizer = pipelines.load(asked[1]).vision

    def look(state: int) -> list[Image]:
        static, gripper = random.integers(0, 32, (4, 4)), random.integers(0, 32, (2, 2))
        static[3, 2] = 4 * state  # the others say nothing
        return [Image(RGB_STATIC, static), Image(RGB_GRIPPER, gripper)]

    states = random.integers(0, 3, 900)
    looks = [look(state) for state in states]
    said = [{"drawer": "abc"[state], "door": "left" if state else "right"} for state in states]
    read = StateProbe(tokenizer, looks[:700], said[:700]).read(looks[700:])
    right = np.mean([one == truth for one, truth in zip(read, said[700:], strict=True)])
    assert right > 0.9
    with pytest.raises(ValueError, match="0 pictures and 0 captions"):
        StateProbe(tokenizer, [], [])
    assert torch.is_grad_enabled()
