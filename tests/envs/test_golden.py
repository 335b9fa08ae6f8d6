"""Golden states and frames: this installation agrees with them, and a wrong one would not."""

import shutil

import numpy as np
import pytest

from envs.calvin.images import golden
from envs.calvin.scenes import SCENES
from envs.spec import CAMERAS

BLOCKS_M = np.r_[21:24, 27:30, 33:36]
"""Columns of a state (39,) that are block positions."""


@pytest.fixture(scope="module")
def observed():
    """Every scene of ours as it behaves here."""
    return {scene: golden.observe(scene) for scene in SCENES}


def _assert_agrees(scene: str, seen: golden.Observed, kind: str) -> None:
    recorded = golden.recorded_states()[kind][scene]
    assert golden.difference(seen.free, recorded["free"]).within_tolerance
    assert seen.contact.shape == recorded["contact"].shape
    frames = list(golden.comparable_frames(scene, seen, kind))
    assert [camera for camera, _, _ in frames] == list(CAMERAS)
    for camera, frame, kept in frames:
        assert golden.share_off(frame, kept) <= golden.PIXELS_OFF_TOLERANCE, (scene, camera)


@pytest.mark.parametrize("scene", SCENES)
def test_our_scenes_behave_as_recorded(scene, observed):
    _assert_agrees(scene, observed[scene], golden.OWN)


@pytest.mark.parametrize("scene", SCENES)
def test_calvins_scenes_behave_as_recorded(scene, calvin_assets):
    _assert_agrees(scene, golden.observe(scene, calvin_assets), golden.CALVIN_ENV)


def test_another_scene_would_be_noticed(observed):
    for scene, other in zip("ABCD", "BCDA", strict=True):
        recorded = golden.recorded_states()[golden.OWN][scene]
        assert not golden.difference(observed[other].contact, recorded["contact"]).within_tolerance
        for camera, frame, _ in golden.comparable_frames(other, observed[other], golden.OWN):
            assert golden.share_off(frame, golden.recorded_frame(scene, camera)) > golden.PIXELS_OFF_TOLERANCE
            side = golden.MEAN_PIXELS[camera]
            means = golden.block_means(frame, side), golden.recorded_means(scene, camera)
            assert golden.share_off(*means) > golden.PIXELS_OFF_TOLERANCE


def test_difference_tells_lengths_angles_and_flags_apart():
    recorded = golden.recorded_states()[golden.OWN]["D"]["free"]
    same = golden.difference(recorded.copy(), recorded)
    assert same.equal and same.within_tolerance and same.length_m == same.angle_rad == 0 and not same.flags

    def changed(column: int, by: float) -> golden.Difference:
        states = recorded.copy()
        states[2, column] += by
        return golden.difference(states, recorded)

    moved = changed(21, 0.001)
    assert moved.length_m == pytest.approx(0.001) and moved.angle_rad == 0 and not moved.within_tolerance and not moved.equal
    assert changed(7, 0.02).angle_rad == pytest.approx(0.02) and not changed(7, 0.02).within_tolerance
    assert changed(5, 2 * np.pi - 1e-6).angle_rad == pytest.approx(1e-6)
    assert changed(19, -1).flags and not changed(19, -1).within_tolerance
    assert changed(21, 1e-6).within_tolerance and not changed(21, 1e-6).equal
    assert not changed(21, np.nan).within_tolerance
    with pytest.raises(ValueError, match="record anew: python -m envs.calvin.images.golden"):
        golden.difference(recorded[1:], recorded)


def test_free_sequence_touches_nothing_and_contact_sequence_does():
    for by_scene in golden.recorded_states().values():
        for sequences in by_scene.values():
            free, contact = (states[:, BLOCKS_M] for states in (sequences["free"], sequences["contact"]))
            assert np.abs(free - free[0]).max() < 1e-3
            assert np.abs(contact - contact[0]).max() > 0.05


@pytest.mark.parametrize("epsilon", [1e-15, 1e-12, 1e-9])
def test_tolerance_covers_what_another_rounding_does(epsilon, monkeypatch):
    start, rng = golden.start_state(), np.random.default_rng(0)
    jolted = {key: state + np.where(state % 1 == 0, 0, epsilon * rng.standard_normal(state.shape)) for key, state in start.items()}
    monkeypatch.setattr(golden, "start_state", lambda: jolted)
    seen = golden.observe("C")
    assert any((jolted[key] != start[key]).any() for key in start)
    assert golden.difference(seen.free, golden.recorded_states()[golden.OWN]["C"]["free"]).within_tolerance


def test_share_off_and_difference_image():
    recorded = np.full((10, 10, 3), 100, np.uint8)
    frame = recorded.copy()
    frame[0, :4, 1] = 102  # as much as is allowed
    assert golden.share_off(frame, recorded) == 0
    frame[0, :4, 1] = 97
    assert golden.share_off(frame, recorded) == 0.04
    image = np.asarray(golden.difference_image(frame, recorded))
    assert image.shape == (200, 600, 3)
    assert image[0, 400].tolist() == [0, 24, 0] and image[-1, -1].tolist() == [0, 0, 0]


def test_recording_writes_what_is_read(tmp_path, observed, monkeypatch):
    shutil.copytree(golden.FOLDER, tmp_path / "goldens")
    files = sorted(path.name for path in golden.FOLDER.iterdir())
    calvins = golden.recorded_states()[golden.CALVIN_ENV]
    (tmp_path / "goldens" / "own_D_rgb_static.png").unlink()
    golden.record(folder=tmp_path / "goldens")
    assert sorted(path.name for path in (tmp_path / "goldens").iterdir()) == files
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "goldens")
    monkeypatch.setattr(golden, "STATES_FILE", tmp_path / "goldens" / "states.json")
    golden.recorded_states.cache_clear()
    try:
        for scene in SCENES:
            assert golden.difference(golden.recorded_states()[golden.OWN][scene]["contact"], observed[scene].contact).equal
            for camera in CAMERAS:
                np.testing.assert_array_equal(golden.recorded_frame(scene, camera), observed[scene].frames[camera])
            np.testing.assert_array_equal(golden.recorded_states()[golden.CALVIN_ENV][scene]["free"], calvins[scene]["free"])
    finally:
        golden.recorded_states.cache_clear()


def test_recording_with_calvins_assets_keeps_means_alone(calvin_assets, tmp_path):
    golden.record(calvin_assets, tmp_path)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) == {path.name for path in golden.FOLDER.iterdir()}
    assert {name for name in files if name.endswith(".png")} == {f"own_{scene}_{camera}.png" for scene in SCENES for camera in CAMERAS}
    assert sum(files.values()) < 300_000
