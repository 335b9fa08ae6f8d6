"""Damaged and contradictory datasets: a named error that says where, never a stand-in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arm_recordings import MAPPING, ForeignArm, own_episode, own_store

from emu3_vla.data.recordings import calvin
from emu3_vla.data.recordings.convert import ConvertConfig, main
from emu3_vla.data.recordings.formats import detect, named, open_dataset
from emu3_vla.data.recordings.mapping import MappingError
from emu3_vla.data.recordings.recording import RecordingError
from emu3_vla.data.recordings.video import VideoConfig


@pytest.fixture
def arm(tmp_path):
    return ForeignArm(lengths=[12, 10]).write(tmp_path / "v21")


def run(source, format, folder, **options):
    folder.mkdir(exist_ok=True)
    main(ConvertConfig(source=str(source), target_format=format, output_dir=str(folder), **options))


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_parquet_file_cut_short_is_named(arm, tmp_path):
    cut(arm / "data/chunk-000/episode_000001.parquet")
    with pytest.raises(RecordingError, match=r"episode 1 of .*episode_000001\.parquet is damaged or cut short"):
        run(arm, "lerobot_v3.0", tmp_path / "out")
    assert not (tmp_path / "out/conversion.json").exists()  # found while looking through, before anything was written
    (arm / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(RecordingError, match=r"episode 1 of .*episode_000001\.parquet is missing"):
        run(arm, "lerobot_v3.0", tmp_path / "out")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_missing_and_a_short_video_are_named(tmp_path, version):
    arm = ForeignArm(lengths=[12, 10]).write(tmp_path / "arm", version, steps_per_part=10)
    other = ForeignArm(lengths=[12, 6]).write(tmp_path / "other", version, steps_per_part=10)
    video = max(path.relative_to(arm) for path in arm.glob("videos/**/*.mp4") if "front" in str(path))
    (arm / video).write_bytes((other / video).read_bytes())
    with pytest.raises(RecordingError, match=rf"episode 1 of .*{video.name} ends after 6 of its 10 frames"):
        run(arm, "lerobot_v3.0", tmp_path / "short")
    cut(arm / video, 0.3)
    with pytest.raises(RecordingError, match=rf"episode 1 of .*{video.name} cannot be (decoded|read)"):
        run(arm, "lerobot_v3.0", tmp_path / "cut")
    (arm / video).unlink()
    with pytest.raises(RecordingError, match=rf"episode 1 of .*its video .*{video.name} is missing"):
        run(arm, "lerobot_v3.0", tmp_path / "missing")


def test_counts_that_contradict_are_named(arm, tmp_path):
    edit(arm / "meta/info.json", lambda info: info.update(total_frames=99))
    with pytest.raises(RecordingError, match="info.json says total_frames=99, but the episodes that the metadata list have 22"):
        open_dataset(arm)
    edit(arm / "meta/info.json", lambda info: info.update(total_frames=22, total_episodes=3))
    with pytest.raises(RecordingError, match="total_episodes=3, but .* have 2"):
        open_dataset(arm)
    edit(arm / "meta/info.json", lambda info: info.update(total_frames=23, total_episodes=2))
    lines = (arm / "meta/episodes.jsonl").read_text().replace('"length": 10', '"length": 11')
    (arm / "meta/episodes.jsonl").write_text(lines)
    with pytest.raises(RecordingError, match="episode 1 of .* has 10 rows, and 11 by the metadata"):
        open_dataset(arm).read(1)
    (arm / "meta/episodes.jsonl").write_text(lines[:-20])
    with pytest.raises(RecordingError, match=r"episodes\.jsonl, line 2: damaged or cut short"):
        open_dataset(arm)


def test_rows_that_contradict_are_named(arm):
    path = arm / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    for name, change, message in (
        ("frame_index", lambda column: [*column[:4], 7, *column[5:]], "frame_index is 7 in row 4, expected 4"),
        ("task_index", lambda column: [5] * len(column), "task_index 5 is not in the dataset's 2 tasks"),
        ("task_index", lambda column: [1] * len(column), r"its rows are of the tasks \['put it down'\], and of \['pick it up'\]"),
        ("action", lambda column: [row[:6] for row in column], "'action' holds 72 values of float in 12 rows, expected float32 of shape"),
    ):
        columns = {key: table[key].to_pylist() for key in table.column_names}
        columns[name] = change(columns[name])
        kind = pa.list_(pa.float32()) if name == "action" else pa.int64()
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(columns[name], kind)), path)
        with pytest.raises(RecordingError, match=f"episode 0 of .*: .*{message}"):
            open_dataset(arm).read(0)
    pq.write_table(table.drop_columns(["grid"]), path)
    with pytest.raises(RecordingError, match="episode 0 of .*: its rows lack grid"):
        open_dataset(arm).read(0)


@pytest.mark.parametrize("format", ["lerobot_v3.0", "zarr"])
def test_an_action_that_is_no_number_is_named_and_can_be_left_out(tmp_path, format):
    def spoil(number, columns):
        if number == 1:
            columns["action"][7, 2] = np.nan

    arm = ForeignArm(lengths=[12, 10], spoil=spoil).write(tmp_path / "arm")
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    options = {"mapping": str(tmp_path / "mapping.yaml")} if format == "zarr" else {}
    with pytest.raises(RecordingError, match=r"episode 1 of .*: 'action' is nan at step 7, entry 2 .* leave the episode out with skip="):
        run(arm, format, tmp_path / "out", **options)
    assert not (tmp_path / "out/conversion.json").exists()
    run(arm, format, tmp_path / "out", skip=(1,), **options)
    assert open_dataset(tmp_path / "out").lengths == [12]


def test_unknown_formats_and_folders_are_named(arm, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'lerobot_v31'; did you mean"):
        named("lerobot_v31")
    assert named("lerobot_v3") == "lerobot_v3.0" and named("zarr") == "zarr"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        detect(tmp_path / "nowhere")
    with pytest.raises(RecordingError, match="is no dataset that is known"):
        detect(tmp_path)
    edit(arm / "meta/info.json", lambda info: info.update(codebase_version="v1.6"))
    with pytest.raises(RecordingError, match="is a LeRobot dataset of version 'v1.6', expected one of v2.1, v2.0, v3.0"):
        detect(arm)
    edit(arm / "meta/info.json", lambda info: info.update(codebase_version="v2.1", fps=None))
    with pytest.raises(RecordingError, match="info.json lacks fps"):
        open_dataset(arm)
    (arm / "meta/info.json").write_text("{")
    with pytest.raises(RecordingError, match="info.json is damaged or cut short"):
        detect(arm)


def test_a_foreign_dataset_needs_a_mapping_that_fits(arm, tmp_path):
    with pytest.raises(
        MappingError, match=r"cameras observation\.images\.front, .* say with mapping= which of them is what .* to write zarr"
    ):
        run(arm, "zarr", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="mapping=droidd is no file and no preset; did you mean droid?"):
        run(arm, "zarr", tmp_path / "out", mapping="droidd")
    with pytest.raises(
        MappingError, match="mapping droid: cameras.rgb_static.key is 'observation.images.exterior_1_left', which is no camera"
    ):
        run(arm, "zarr", tmp_path / "out", mapping="droid")
    with pytest.raises(ValueError, match="skip=7: .* has episodes 0 to 1"):
        run(arm, "lerobot_v3.0", tmp_path / "out", skip=(7,))


def test_calvin_is_checked_too(tmp_path):
    store = own_store(tmp_path / "store", [own_episode(0, steps=6), own_episode(1, steps=5)])
    (tmp_path / "task").mkdir()
    run(store.path, "calvin", tmp_path / "task/training")
    with pytest.raises(RecordingError, match="CALVIN dataset of 1 splits; name one of them: .*training"):
        detect(tmp_path / "task")
    folder = tmp_path / "task/training"
    cut(folder / "episode_0000008.npz", 0.2)
    with pytest.raises(RecordingError, match=r"episode 1 of .*episode_0000008\.npz is damaged or cut short"):
        open_dataset(folder).read(1)
    (folder / "episode_0000008.npz").unlink()
    with pytest.raises(RecordingError, match=r"episode 1 of .*: episode_0000008\.npz is missing"):
        open_dataset(folder).read(1)


def test_a_dataset_cannot_run_code(tmp_path):
    store = own_store(tmp_path / "store", [own_episode(0, steps=6)])
    run(store.path, "calvin", tmp_path / "calvin")

    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'run')!r}, 'w')",))

    np.save(tmp_path / "calvin" / calvin.LANGUAGE, np.array({"language": Hostile()}, dtype=object), allow_pickle=True)
    with pytest.raises(RecordingError, match=r"auto_lang_ann\.npy cannot be read: it holds builtins\.exec"):
        open_dataset(tmp_path / "calvin")
    assert not (tmp_path / "run").exists()


def test_video_options_are_checked(arm, tmp_path):
    for options, message in (
        ({"codec": "h265"}, "video.codec='h265', expected one of h264, av1"),
        ({"crf": 52}, "video.crf=52 is outside what h264 knows"),
        ({"codec": "av1", "lossless": True}, "video.lossless=true needs video.codec=h264"),
        ({"pixel_format": "rgb24"}, "video.pixel_format='rgb24'"),
        ({"keyframe_interval": 0}, "video.keyframe_interval=0"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoConfig(**options)
    odd = ForeignArm(lengths=[5])
    odd.schema.cameras["observation.images.front"] = type(odd.schema.cameras["observation.images.front"])(height=63, width=64)
    with pytest.raises(ValueError, match="frames of 64×63 have an odd side, which yuv420p cannot hold"):
        odd.write(tmp_path / "odd")
