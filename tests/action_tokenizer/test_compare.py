import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from action_chunks import smooth_chunks

from action_tokenizer import (
    ActionNormalizer,
    ActionStatistics,
    ActionTokenizer,
    ActionTokenizerError,
    BadActions,
    BinTokenizer,
    CoefficientOutOfRange,
    FastTokenizer,
    MalformedActionTokens,
    TokenizerFilesError,
    chunks_of,
)
from action_tokenizer.compare import CompareConfig, main, read_actions
from action_tokenizer.plot import ticks
from action_tokenizer.report import CALVIN_RELATIVE, report
from envs import spec


@pytest.fixture(scope="module")
def uniform() -> BinTokenizer:
    return BinTokenizer.uniform(action_dim=7, bins=256, horizon=10)


@pytest.fixture(scope="module")
def quantile(chunks) -> BinTokenizer:
    return BinTokenizer.fit_quantiles(chunks, bins=64)


def test_all_tokenizers_share_one_interface(fitted, uniform, quantile, chunks):
    for tokenizer in (fitted, uniform, quantile):
        assert isinstance(tokenizer, ActionTokenizer)
        ids = tokenizer.encode(chunks[:20])
        decoded = tokenizer.decode(ids, horizon=10, action_dim=7)
        assert decoded.shape == (20, 10, 7) and tokenizer.covers(chunks[:20]).all()
        grammar = tokenizer.grammar(10, 7)
        assert all(grammar.allowed(row)[grammar.end_id] for row in ids)


def test_uniform_bins_are_off_by_half_a_bin_at_most(uniform):
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, 10, 7))
    chunks[0] = [-1.0] * 6 + [1.0]
    ids = uniform.encode(chunks)
    assert ids[0][0] == 0 and ids[0][6] == 255
    assert np.abs(uniform.decode(ids) - chunks).max() <= 1 / 256 + 1e-12


def test_quantile_bins_hold_equally_many_and_keep_a_binary_gripper_exact(quantile, chunks):
    ids = np.array(quantile.encode(chunks)).reshape(-1, 10, 7)
    # The first dimension is a third zeros, which fall into one bin; the others share the rest evenly.
    assert np.sort(np.bincount(ids[..., 0].ravel(), minlength=64))[:20].max() <= 2 * chunks[..., 0].size / 64
    np.testing.assert_array_equal(quantile.decode(quantile.encode(chunks))[..., 6], chunks[..., 6])
    far = np.full((1, 10, 7), 1e6)
    assert quantile.covers(far).all() and len(quantile.encode(far)[0]) == 70


def test_bins_refuse_what_they_cannot_write_or_read(uniform, tmp_path):
    outside = np.zeros((2, 10, 7))
    outside[1, 3, 2] = 1.5
    with pytest.raises(CoefficientOutOfRange, match=r"action 1.5 \(chunk 1, step 3, dimension 2\) is outside the bins' -1.0 to 1.0"):
        uniform.encode(outside)
    assert uniform.decode(uniform.encode(outside, clip=True))[1, 3, 2] == pytest.approx(1, abs=1 / 256)
    assert uniform.covers(outside).tolist() == [True, False]
    with pytest.raises(BadActions, match="3 dimensions, these bins were made for 7"):
        uniform.encode(np.zeros((1, 10, 3)))
    with pytest.raises(MalformedActionTokens, match="chunk 1: 69 ids, one a value, where 70"):
        uniform.decode([[0] * 70, [0] * 69])
    with pytest.raises(MalformedActionTokens, match="chunk 0, position 4: id 256 is not in the vocabulary of 256"):
        uniform.decode([[0] * 4 + [256] + [0] * 65])
    with pytest.raises(ActionTokenizerError, match="action_dim is 6"):
        uniform.grammar(10, 6)
    with pytest.raises(ActionTokenizerError, match="expected at least 2"):
        BinTokenizer.uniform(action_dim=7, bins=1)
    (tmp_path / "bins.json").write_text('{"edges": []}')
    with pytest.raises(TokenizerFilesError, match="whole bins"):
        BinTokenizer.from_pretrained(tmp_path)


def test_bins_survive_saving(uniform, quantile, chunks, tmp_path):
    for number, tokenizer in enumerate((uniform, quantile)):
        again = BinTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / str(number)))
        assert again.encode(chunks[:5]) == tokenizer.encode(chunks[:5]) and again.horizon == 10
        np.testing.assert_array_equal(again.decode(again.encode(chunks[:5])), tokenizer.decode(tokenizer.encode(chunks[:5])))


def test_reports_tell_errors_in_physical_units(fitted, chunks):
    measured = report(fitted, chunks[:100])
    error = np.abs(fitted.decode(fitted.encode(chunks[:100])) - chunks[:100]).max(axis=(0, 1))
    assert measured.largest[0] == pytest.approx(error[0] * spec.MAX_RELATIVE_POSITION_M * 1000)
    assert measured.largest[3] == pytest.approx(np.degrees(error[3] * spec.MAX_RELATIVE_ROTATION_RAD))
    assert [unit.factor for unit in CALVIN_RELATIVE] == pytest.approx(
        [spec.MAX_RELATIVE_POSITION_M * 1000] * 3 + [np.degrees(spec.MAX_RELATIVE_ROTATION_RAD)] * 3 + [1]
    )
    assert measured.values_per_token == pytest.approx(70 / np.mean([len(row) for row in fitted.encode(chunks[:100])]))
    assert measured.clipped == 0 and measured.coefficients_covered == measured.coefficients_span


def test_reports_count_what_the_vocabulary_lacks(fitted, chunks):
    measured = report(fitted, np.concatenate([chunks[:99], np.full((1, 10, 7), -3.0)]))
    assert measured.clipped == 1
    assert measured.coefficients_span - measured.coefficients_covered == round(30 * np.sqrt(10)) - 32
    with pytest.raises(ActionTokenizerError, match="7 units for actions of 3"):
        report(fitted, np.zeros((1, 10, 3)))


def test_reports_with_a_normalizer_measure_in_the_actions_units(fitted, chunks):
    normalizer = ActionNormalizer.fit(chunks * 0.1, mode="minmax")
    measured, direct = (report(fitted, chunks[:100] * 0.1, normalizer=n) for n in (normalizer, None))
    assert measured.rmse[0] < direct.rmse[0]


class Recorded:
    def __init__(self, actions):
        self.actions = actions


def test_episodes_stream_into_chunks_fit_and_statistics():
    episodes = [Recorded(smooth_chunks(1, horizon=steps, seed=steps)[0]) for steps in (30, 9, 41, 10)]
    parts = list(chunks_of(iter(episodes), horizon=10, stride=3))
    assert [part.shape for part in parts] == [(7, 10, 7), (11, 10, 7), (1, 10, 7)]
    np.testing.assert_array_equal(parts[1][2], episodes[2].actions[6:16])
    statistics = ActionStatistics.of_many(episode.actions for episode in episodes)
    assert statistics.count == 90
    normalizer = ActionNormalizer.from_statistics(statistics, mode="minmax")
    scaled = list(chunks_of(episodes, horizon=10, normalizer=normalizer))
    assert max(np.abs(part).max() for part in scaled) <= 1
    tokenizer = FastTokenizer.fit(chunks_of(episodes, horizon=10, normalizer=normalizer), vocab_size=256)
    np.testing.assert_array_equal(tokenizer.covers(np.concatenate(scaled)), True)
    with pytest.raises(BadActions, match=r"episode 0 has actions of shape \(7,\)"):
        list(chunks_of([np.zeros(7)], horizon=10))
    with pytest.raises(BadActions, match="expected positive"):
        list(chunks_of(episodes, horizon=0))
    with pytest.raises(BadActions, match="no actions"):
        ActionStatistics.of_many([])


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "actions.npz"
    np.savez(path, **{f"episode{n}/actions": smooth_chunks(1, horizon=40, seed=n)[0] for n in range(20)}, other=np.zeros(3))
    return path


def test_the_command_measures_and_leaves_its_results(recording, fitted, tmp_path, capsys):
    extra, output = fitted.save_pretrained(tmp_path / "mine"), tmp_path / "out"
    output.mkdir()
    config = CompareConfig(
        data=str(recording), output_dir=str(output), tokenizers=(str(extra),), normalize="quantile", vocab_size=256, bins=32
    )
    main(config)
    printed = capsys.readouterr().out
    names = ["FAST, fitted here", "FAST, mine", "32 uniform bins", "32 quantile bins"]
    assert all(name in printed for name in names) and str(output / "comparison.svg") in printed
    values = json.loads((output / "comparison.json").read_text())
    assert list(values["reports"]) == names and values["config"]["bins"] == 32
    assert values["reports"]["32 uniform bins"]["tokens_mean"] == 70
    assert values["reports"]["FAST, fitted here"]["tokens_mean"] < 70
    lines = (output / "comparison.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokenizer"] for line in lines] == names
    drawing = ElementTree.parse(output / "comparison.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}circle")) == 2 * len(names)
    assert FastTokenizer.from_pretrained(output / "fast").horizon == 10
    assert ActionNormalizer.load(output / "normalizer.json").mode == "quantile"


def test_the_command_refuses_what_it_cannot_compare(recording, tmp_path):
    with pytest.raises(ActionTokenizerError, match="normalize='median', expected none, quantile"):
        CompareConfig(data="x", normalize="median")
    with pytest.raises(ActionTokenizerError, match="between 0 and 1"):
        CompareConfig(data="x", held_out=1)
    with pytest.raises(BadActions, match="neither an episode store"):
        main(CompareConfig(data=str(tmp_path / "nothing"), output_dir=str(tmp_path)))
    with pytest.raises(BadActions, match="0 episodes of at least 50 steps"):
        main(CompareConfig(data=str(recording), output_dir=str(tmp_path), horizon=50))
    np.savez(tmp_path / "none.npz", rewards=np.zeros(3))
    with pytest.raises(BadActions, match="holds rewards, and none of them is called actions"):
        list(read_actions(tmp_path / "none.npz"))


def test_an_episode_store_is_read(tmp_path):
    from emu3_vla.data.episodes import EpisodeStore

    def episode(steps):
        return spec.Episode(
            task="t",
            instruction="i",
            actions=smooth_chunks(1, horizon=steps, seed=steps)[0],
            robot_obs=np.zeros((steps, 15)),
            scene_obs=np.zeros((steps, 24)),
            imitate=np.ones(steps, bool),
            frame_step=np.array([0]),
            rgb_static=np.zeros((1, *spec.OBSERVATION[spec.RGB_STATIC].shape), np.uint8),
            rgb_gripper=np.zeros((1, *spec.OBSERVATION[spec.RGB_GRIPPER].shape), np.uint8),
        )

    store = EpisodeStore.create(tmp_path / "store", metadata={})
    store.write_shard(0, [episode(12), episode(20)])
    store.write_shard(1, [episode(15)])
    assert [actions.shape for actions in read_actions(tmp_path / "store")] == [(12, 7), (20, 7), (15, 7)]


@pytest.mark.parametrize("largest", [0.0, 0.004, 0.31, 1.0, 3.0, 7.2, 70.0, 99.9])
def test_axes_reach_the_largest_value_in_few_steps(largest):
    marks = ticks(largest)
    assert marks[0] == 0 and marks[-1] >= largest * (1 - 1e-9) and 2 <= len(marks) <= 9
