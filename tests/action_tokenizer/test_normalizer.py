import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_tokenizer import ActionNormalizer, ActionStatistics, ActionTokenizerError, BadActions, TokenizerFilesError

MODES = ("quantile", "minmax", "meanstd")


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(20_000, 7)) * [1, 0.1, 1e-3, 5, 1, 1, 1] + [0, 1, 0, 0, 0, 0, 0]
    actions[:, 4] = 0.3
    actions[:, 5] = np.clip(actions[:, 5] * 3, -1, 1)
    actions[:, 6] = rng.choice([-1, 1], 20_000)
    return actions


@pytest.mark.parametrize("mode", MODES)
def test_inverse_is_exact_and_the_gripper_is_untouched(actions, mode, tmp_path):
    normalizer = ActionNormalizer.fit(actions, mode=mode)
    normalized = normalizer.normalize(actions)
    np.testing.assert_allclose(normalizer.denormalize(normalized), actions, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(normalized[:, 6], actions[:, 6])
    again = ActionNormalizer.load(normalizer.save(tmp_path / "normalizer.json"))
    np.testing.assert_array_equal(again.normalize(actions), normalized)
    assert (again.mode, again.passthrough, again.count) == (mode, (6,), 20_000)


def test_each_mode_does_what_it_says(actions):
    quantile, minmax, meanstd = (ActionNormalizer.fit(actions, mode=mode).normalize(actions) for mode in MODES)
    moving = [0, 1, 2, 3]
    np.testing.assert_allclose(np.quantile(quantile[:, moving], 0.01, axis=0), -1, atol=0.01)
    np.testing.assert_allclose(np.quantile(quantile[:, moving], 0.99, axis=0), 1, atol=0.01)
    np.testing.assert_allclose(minmax[:, moving].min(axis=0), -1)
    np.testing.assert_allclose(minmax[:, moving].max(axis=0), 1)
    np.testing.assert_allclose(meanstd[:, moving].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(meanstd[:, moving].std(axis=0), 1)


def test_a_saturated_dimension_keeps_its_exact_ends_and_a_constant_one_only_shifts(actions):
    normalizer = ActionNormalizer.fit(actions)
    assert (normalizer.center[5], normalizer.half_range[5]) == (0.0, 1.0)
    assert (normalizer.center[4], normalizer.half_range[4]) == (0.3, 1.0)
    assert ActionNormalizer.fit(actions, mode="meanstd").half_range[4] == 1.0


def test_clipping_cuts_all_but_what_is_passed_through(actions):
    normalizer = ActionNormalizer.fit(actions, passthrough=(3,))
    clipped = normalizer.normalize(actions, clip=True)
    assert np.abs(clipped[:, [0, 1, 2, 4, 5, 6]]).max() == 1
    np.testing.assert_array_equal(clipped[:, 3], actions[:, 3])


def test_chunks_keep_their_shape(actions):
    normalizer = ActionNormalizer.fit(actions.reshape(100, 200, 7))
    assert normalizer.normalize(actions[:70].reshape(7, 10, 7)).shape == (7, 10, 7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0, 1e-15]), min_size=1, max_size=30), min_size=1, max_size=6))
def test_merging_shards_equals_the_whole(shards):
    whole = ActionStatistics.of(np.concatenate([np.array(shard) for shard in shards])[:, None])
    parts = [ActionStatistics.of(np.array(shard)[:, None]) for shard in reversed(shards)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    values = np.concatenate(shards)
    assert merged.count == whole.count == len(values)
    assert (merged.low[0], merged.high[0]) == (values.min(), values.max())
    np.testing.assert_allclose(merged.mean, values.mean(), atol=1e-9 * np.abs(values).max())
    np.testing.assert_allclose(merged.std, values.std(), atol=1e-9 * np.abs(values).max())
    for fraction in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        assert merged.quantile(fraction)[0] == whole.quantile(fraction)[0]
        # A quantile lies between two ranks, each of which is off by at most its bin.
        rank, ordered = fraction * (len(values) - 1), np.sort(values)
        off = 0.008 * max(abs(ordered[math.floor(rank)]), abs(ordered[math.ceil(rank)])) + 1e-12
        assert abs(whole.quantile(fraction)[0] - np.quantile(values, fraction)) <= off


def test_statistics_survive_the_disk_and_damage_is_named(actions, tmp_path):
    statistics = ActionStatistics.of(actions)
    path = statistics.save(tmp_path / "statistics.npz")
    again = ActionStatistics.load(path)
    np.testing.assert_array_equal(again.quantile(0.37), statistics.quantile(0.37))
    np.testing.assert_array_equal(again.merge(statistics).std, statistics.merge(statistics).std)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TokenizerFilesError, match="whole action statistics"):
        ActionStatistics.load(path)
    with pytest.raises(TokenizerFilesError, match="whole action statistics"):
        ActionStatistics.load(tmp_path / "nothing.npz")


def test_bad_input_is_refused(actions):
    normalizer = ActionNormalizer.fit(actions)
    with pytest.raises(BadActions, match="6 dimensions, this normaliser was fitted on 7"):
        normalizer.normalize(np.zeros((2, 6)))
    with pytest.raises(BadActions, match=r"action nan at index \[1, 2\]"):
        normalizer.denormalize(np.array([[0.0] * 7, [0, 0, math.nan, 0, 0, 0, 0]]))
    with pytest.raises(BadActions, match="there are none"):
        ActionNormalizer.fit(np.zeros((0, 7)))
    with pytest.raises(ActionTokenizerError, match="mode is 'median', expected one of quantile"):
        ActionNormalizer.fit(actions, mode="median")
    with pytest.raises(ActionTokenizerError, match="names dimension 7, but actions have 7"):
        ActionNormalizer.fit(actions, passthrough=(7,))
    with pytest.raises(BadActions, match="of 7 and of 1 dimensions"):
        ActionStatistics.of(actions).merge(ActionStatistics.of(np.zeros((2, 1))))
    with pytest.raises(BadActions, match="between 0 and 1"):
        ActionStatistics.of(actions).quantile(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("center"), "is no normaliser"),
        (lambda v: v.update(half_range=[0.0] * 7), "half_range above 0"),
        (lambda v: v.update(center=[0.0] * 6), "expected"),
        (lambda v: v.update(mode="other"), "mode is 'other'"),
        (lambda v: v.update(center="x"), "x"),
    ],
)
def test_foreign_normalizer_files_are_refused(actions, tmp_path, change, message):
    path = ActionNormalizer.fit(actions).save(tmp_path / "normalizer.json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(TokenizerFilesError, match=message):
        ActionNormalizer.load(path)
    path.write_text(path.read_text()[:30])
    with pytest.raises(TokenizerFilesError, match="not JSON"):
        ActionNormalizer.load(path)
