"""`inspect` finds what was planted and nothing else, in every format; a Rerun recording of an episode can be written."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arm_recordings import FRONT, QUICK, ForeignArm, own_episode, own_store

from emu3_vla import cli
from emu3_vla.data.recordings.checks import Comparison
from emu3_vla.data.recordings.convert import ConvertConfig, main
from emu3_vla.data.recordings.formats import open_dataset
from emu3_vla.data.recordings.inspection import InspectConfig, inspect
from emu3_vla.data.recordings.video import write_video


def found(folder, frames: bool = True) -> dict[int, set[str]]:
    """Kinds of findings by episode."""
    report = inspect(open_dataset(folder), frames)
    kinds: dict[int, set[str]] = {}
    for finding in report["findings"]:
        kinds.setdefault(finding["episode"], set()).add(finding["kind"])
    return kinds


@dataclasses.dataclass
class Spoiled(ForeignArm):
    """Episode 1 of camera `front` stands still from step 10 on."""

    def pictures(self, camera, number):
        frames = super().pictures(camera, number)
        if number == 1 and camera == FRONT:
            frames[10:] = frames[10]
        return frames


def test_a_good_dataset_has_no_findings(tmp_path):
    arm = ForeignArm(lengths=[40, 45, 42])
    for version in ("v2.1", "v3.0"):
        assert found(arm.write(tmp_path / version, version, steps_per_part=60)) == {}
    store = own_store(tmp_path / "store", [own_episode(seed, steps=40, every=5) for seed in range(3)])
    assert found(store.path) == {}
    (tmp_path / "calvin").mkdir()
    main(ConvertConfig(source=str(store.path), target_format="calvin", output_dir=str(tmp_path / "calvin")))
    assert found(tmp_path / "calvin") == {}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_what_is_wrong_with_numbers_and_pictures_is_found(tmp_path, version):
    def spoil(number, columns):
        if number == 0:
            columns["observation.state"][20:, 1] += 400  # mm
        if number == 2:
            columns["action"][:, 6] = 1
        if number == 3:
            columns["observation.state"][5, 3] = np.nan

    arm = Spoiled(lengths=[40, 45, 42, 41, 42, 4], spoil=spoil)
    folder = arm.write(tmp_path / "arm", version, steps_per_part=60)
    kinds = found(folder)
    assert kinds.pop(0) == {"jump"} and kinds.pop(1) == {"frozen camera"} and kinds.pop(2) == {"gripper"}
    assert kinds.pop(3) == {"not finite"} and kinds.pop(5) == {"short", "gripper"} and kinds == {}
    findings = {finding["kind"]: finding for finding in inspect(open_dataset(folder), True)["findings"]}
    assert findings["jump"]["step"] == 20 and findings["jump"]["what"].startswith("observation.state[1] goes from")
    assert (
        findings["frozen camera"]["step"] == 10
        and "front shows one picture for 2.3 s while the arm moves" in findings["frozen camera"]["what"]
    )
    assert findings["not finite"]["step"] == 5 and "1 of 41 steps are NaN" in findings["not finite"]["what"]
    assert found(folder, frames=False).get(1) is None


def test_the_same_actions_twice_are_found(tmp_path):
    twin = own_episode(0, steps=30)
    kinds = found(own_store(tmp_path / "store", [twin, own_episode(1, steps=30), dataclasses.replace(twin, instruction="other")]).path)
    assert kinds == {2: {"duplicate"}}
    silent = own_store(tmp_path / "silent", [dataclasses.replace(twin, instruction="")])
    assert found(silent.path) == {0: {"no instruction"}}


def test_clocks_and_missing_frames_are_found(tmp_path):
    arm = ForeignArm(lengths=[30, 30, 30, 30])
    folder = arm.write(tmp_path / "arm")
    path = folder / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    times = table["timestamp"].to_numpy().copy()
    times[15:] += 0.2
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(times)), path)
    video = "videos/chunk-000/observation.images.front/episode_{:06d}.mp4".format
    arm.write(tmp_path / "slow")
    write_video(folder / video(2), iter([arm.pictures(FRONT, 2)]), 14.7, dataclasses.replace(QUICK, keyframe_interval=1))
    write_video(folder / video(3), iter([arm.pictures(FRONT, 3)[:25]]), 15, QUICK)
    report = inspect(open_dataset(folder), True)
    by_episode = {number: [f for f in report["findings"] if f["episode"] == number] for number in range(4)}
    assert not by_episode[0] and [f["kind"] for f in by_episode[1]] == ["clock"]
    assert by_episode[1][0]["step"] == 15 and "off the even rate by up to 0.2 s" in by_episode[1][0]["what"]
    assert "clock" in {f["kind"] for f in by_episode[2]} and any("ms from its row" in f["what"] for f in by_episode[2])
    assert {f["kind"] for f in by_episode[3]} == {"missing frames", "damaged"}
    assert any("5 of 30 frames are not in episode_000003.mp4" in f["what"] for f in by_episode[3])


def test_the_report_counts_and_ranges(tmp_path, capsys):
    folder = ForeignArm(lengths=[20, 33]).write(tmp_path / "arm", "v3.0")
    assert cli.main(["inspect", str(folder), "--rerun=[1]", f"output_dir={tmp_path / 'out'}"]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "out/inspection.json").read_text())
    assert report["episodes"] == 2 and report["steps"] == 53 and report["rate_hz"] == 15 and abs(report["measured_rate_hz"] - 15) < 1e-3
    assert report["instructions"] == {"pick it up": 2, "put it down": 1} and report["cameras"][FRONT] == [96, 128]
    actions = np.concatenate([ForeignArm(lengths=[20, 33]).read(number).columns["action"] for number in range(2)])
    assert np.allclose(report["columns"]["action"]["max"], actions.max(axis=0)) and np.allclose(
        report["columns"]["action"]["mean"], actions.mean(axis=0), rtol=1e-5
    )
    assert "2 episodes, 53 steps at 15 Hz" in said and "nothing suspicious" in said and "pick it up" in said
    recording = tmp_path / "out/episode_000001.rrd"
    assert str(recording) in said and recording.stat().st_size > 20_000 and not list((tmp_path / "out").glob("*.part"))


def test_wrong_options_are_named(tmp_path, capsys):
    folder = ForeignArm(lengths=[20]).write(tmp_path / "arm")
    assert cli.main(["inspect", str(folder), "--rerun=[4]", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "rerun=4: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"view=true shows the episodes of rerun=\[…\]; name some"):
        InspectConfig(dataset=str(folder), view=True)
    assert list(Comparison.empty().findings()) == []


def test_what_rests_may_tremble(tmp_path):
    """A step that is large beside an episode's others is no jump where the same number moves a hundred times as far elsewhere."""

    def spoil(number, columns):
        if number == 0:
            still = columns["observation.state"][:, 1]
            still[:] = still[0] + np.linspace(0, 1e-3, len(still))
            still[20:] += 0.5  # mm

    arm = ForeignArm(lengths=[40, 45, 42], spoil=spoil)
    assert found(arm.write(tmp_path / "arm", "v3.0", steps_per_part=60)) == {}
