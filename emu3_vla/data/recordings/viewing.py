"""An episode of any dataset as a Rerun recording: cameras, every column as a plot, the instruction. Needs rerun-sdk.

Entities: camera/<name> (JPEG), column/<name>/<entry>, instruction. Timelines: step, and time (step over rate).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from emu3_vla.data.recordings.recording import Recording, Schema, is_action

APPLICATION = "emu3-vla"
JPEG_QUALITY = 85
MOST_ENTRIES = 32  # of a column; larger ones are no plots


def write_recording(path: Path, recording: Recording, schema: Schema) -> None:
    """Write one .rrd file; it appears under its name when it is whole."""
    temporary = path.with_name(path.name + ".part")
    stream = rr.RecordingStream(APPLICATION)
    names = [name for name, column in schema.columns.items() if column.dtype != "string" and np.prod(column.shape) <= MOST_ENTRIES]
    stream.save(temporary, default_blueprint=_blueprint(schema, names))
    stream.send_recording_name(recording.where)
    steps = np.arange(len(recording))
    times = [rr.TimeColumn("step", sequence=steps), rr.TimeColumn("time", duration=steps / schema.rate_hz)]
    for name in names:
        values = recording.columns[name].reshape(len(recording), -1).astype(np.float64)
        for entry in range(values.shape[1]):
            stream.send_columns(f"column/{_plain(name)}/{entry}", times, rr.Scalars.columns(scalars=values[:, entry]))
    for step in np.flatnonzero(np.diff(recording.instruction_of, prepend=-1)):
        _at(stream, int(step), schema)
        stream.log("instruction", rr.TextDocument(recording.instructions[recording.instruction_of[step]]))
    for camera in schema.cameras:
        frames = (frame for block in recording.frames(camera) for frame in block)
        for step, frame in zip(recording.frame_step, frames, strict=True):
            _at(stream, int(step), schema)
            stream.log(f"camera/{_plain(camera)}", rr.Image(frame).compress(jpeg_quality=JPEG_QUALITY))
    stream.flush()
    stream.disconnect()
    temporary.replace(path)


def _at(stream: rr.RecordingStream, step: int, schema: Schema) -> None:
    stream.set_time("step", sequence=step)
    stream.set_time("time", duration=step / schema.rate_hz)


def _plain(name: str) -> str:
    return name.replace("/", "_").replace(".", "_")


def _blueprint(schema: Schema, names: list[str]) -> rrb.Blueprint:
    cameras = [rrb.Spatial2DView(name=camera, origin=f"camera/{_plain(camera)}") for camera in schema.cameras]
    ordered = sorted(names, key=lambda name: not is_action(name))
    plots = [rrb.TimeSeriesView(name=name, contents=[f"column/{_plain(name)}/**"]) for name in ordered]
    words = rrb.TextDocumentView(name="Instruction", origin="instruction")
    return rrb.Blueprint(
        rrb.Vertical(rrb.Horizontal(*cameras, words), rrb.Tabs(*plots), row_shares=[3, 2]),
        rrb.TimePanel(state="collapsed", timeline="time"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.BlueprintPanel(state="collapsed"),
    )
