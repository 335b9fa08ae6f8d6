"""What the model writes of a few held-out documents, every so many steps, as Rerun recordings: next images, action chunks, answers.

    sampler = Sampler(output / "samples", held_out.shown(4), source)
    sampler.write(step, model)                    # samples/step-000400.rrd
    rerun outputs/train/first/samples/*.rrd       # all steps on one timeline

Entities, of each document (act/0, act/1, ... ask/0, ...):
  said                             the text that the document begins with: the instruction, or a caption
  now/<camera>                     the images that the model sees last, decoded from their codes
  next/<camera>/written, /true     the images that it writes after them, and those that came
  next/<camera>/codes_right        share of its codes that are the true ones
  action/<component>/predicted, /demonstrated    the action chunk after `now`, in action units, one bar a control step
  action/<component>/error         mean absolute difference of the two
  answers                          each question, what the model answered, and the answer
Timeline: step (of training).

Everything is written greedily, given the true document up to there. A recording cannot be appended to, and a run may be killed at any
moment: so every sampled step is a file of its own, whole or not there, under the step's name. A resumed run that comes by a step again
writes the same file again, and none is lost or doubled. All of a run's files have one recording id, by which the viewer joins them.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rerun as rr
import rerun.blueprint as rrb
import torch
from PIL import Image as PngImage

from emu3_vla.documents import Image, Segment, length_of
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.requests import END, Request, Result
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM
from emu3_vla.training.gaps import Gap, Gapper, Gaps
from emu3_vla.training.source import Source
from emu3_vla.vision_tokenizer.images import to_images
from envs.spec import ACTION_COMPONENTS

APPLICATION = "emu3-vla"
ROWS = 4
"""Of the engine's cache: gaps that are written side by side."""


class Sampler:
    """Writes a recording of one step at a time. One process's alone.

    documents: by the names of their entities. Raises what the token store's tokenizers raise.
    """

    def __init__(self, folder: Path, documents: Mapping[str, Sequence[Segment]], source: Source):
        self.folder, self._vocabulary = folder, source.vocabulary
        self._shape = {"horizon": source.horizon, "action_dim": source.action_dim}
        self._tokenizers = source.store.tokenizers()
        grammar = self._tokenizers.action.grammar(**self._shape)
        self._gapper = Gapper(source.vocabulary, grammar, self._tokenizers.text)
        self._documents = {name: self._gapper.gaps(document) for name, document in documents.items()}
        # Of the folder, so that a run that goes on has it again, and two runs in one viewer are two recordings.
        self._recording = str(uuid.uuid5(uuid.NAMESPACE_URL, folder.resolve().as_uri()))

    def write(self, step: int, model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM) -> Path:
        """Fill the gaps of all documents with this model, in evaluation mode, and record it as that of `step`.

        Raises DecodingFailed where the model's output is not finite.
        """
        gaps = [gap for document in self._documents.values() for gap in document.all()]
        results = dict(zip(map(id, gaps), self._filled(gaps, model), strict=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:06d}.rrd"
        temporary = target.with_name(f"{target.name}.part")
        stream = rr.RecordingStream(APPLICATION, recording_id=self._recording)
        stream.save(temporary, default_blueprint=_blueprint(self._documents))
        stream.send_recording_name(f"samples of {self.folder.resolve().parent.name}")
        stream.set_time("step", sequence=step)
        for name, document in self._documents.items():
            self._record(stream, name, document, results)
        stream.flush()
        stream.disconnect()
        temporary.replace(target)
        return target

    def _filled(self, gaps: Sequence[Gap], model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM) -> list[Result]:
        """What the model writes into each."""
        most = model.config.max_position_embeddings
        requests, capacity = [], 1
        for gap in gaps:
            before = length_of(gap.prompt, self._vocabulary)
            longest = min(limit for limit in (gap.grammar.longest, gap.longest, most - before + 1) if limit is not None)
            requests.append(Request(prompt=gap.prompt, grammar=gap.grammar, longest=longest))
            capacity = max(capacity, before + longest - 1)
        return Engine(model, self._vocabulary, EngineConfig(rows=ROWS, capacity=capacity)).generate(requests)

    def _record(self, stream: rr.RecordingStream, name: str, document: Gaps, results: Mapping[int, Result]) -> None:
        if document.said:
            stream.log(f"{name}/said", rr.TextDocument(self._gapper.text(document.said.ids)))
        for image in document.now:
            stream.log(f"{name}/now/{image.name}", self._picture(image.codes))
        if document.images:
            self._record_images(stream, f"{name}/next", document.images, results[id(document.images)])
        if document.chunk:
            self._record_chunk(stream, name, document.chunk, results[id(document.chunk)])
        if document.answers:
            rows = [self._answer(gap, results[id(gap)]) for gap in document.answers]
            table = ["| question | written | true |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
            stream.log(f"{name}/answers", rr.TextDocument("\n".join(table), media_type="text/markdown"))

    def _record_images(self, stream: rr.RecordingStream, name: str, gap: Gap, result: Result) -> None:
        for true, written in zip(gap.true, self._gapper.codes(gap, result.items), strict=True):
            stream.log(f"{name}/{true.name}/written", self._picture(written))
            stream.log(f"{name}/{true.name}/true", self._picture(true.codes))
            stream.log(f"{name}/{true.name}/codes_right", rr.Scalars(float((written == true.codes).mean())))

    def _record_chunk(self, stream: rr.RecordingStream, name: str, gap: Gap, result: Result) -> None:
        demonstrated = self._actions(list(gap.true[0].ids))
        for component, values in zip(ACTION_COMPONENTS, demonstrated.T, strict=True):
            stream.log(f"{name}/action/{component}/demonstrated", rr.BarChart(values))
        if result.finish != END:  # the model's context ended before the chunk did
            stream.log(f"{name}/action", rr.TextLog("the chunk did not end within the model's context", level=rr.TextLogLevel.WARN))
            return
        predicted = self._actions(self._gapper.action_tokens(result.items))
        errors = np.abs(predicted - demonstrated).mean(axis=0)
        for component, values, error in zip(ACTION_COMPONENTS, predicted.T, errors, strict=True):
            stream.log(f"{name}/action/{component}/predicted", rr.BarChart(values))
            stream.log(f"{name}/action/{component}/error", rr.Scalars(float(error)))

    def _answer(self, gap: Gap, result: Result) -> list[str]:
        """Question, what was written, and the answer, as cells of a table."""
        written = self._gapper.text(result.items) + ("" if result.finish == END else " …")
        cells = [self._gapper.text(gap.question.ids) if gap.question else "", written, self._gapper.text(gap.true[0].ids)]
        return [cell.replace("|", "\\|").replace("\n", " ").strip() for cell in cells]

    def _picture(self, codes: np.ndarray) -> rr.EncodedImage:
        """Of codes (rows, columns)."""
        pixels = self._tokenizers.vision.decode(torch.from_numpy(np.asarray(codes, np.int64))[None])
        png = io.BytesIO()  # without loss: what is looked at here is how well pictures come out
        PngImage.fromarray(to_images(pixels)[0]).save(png, "png")
        return rr.EncodedImage(contents=png.getvalue(), media_type="image/png")

    def _actions(self, ids: Sequence[int]) -> np.ndarray:
        """Of the ids of a chunk: float64 (horizon, 7), in action units."""
        return self._tokenizers.normalizer.denormalize(self._tokenizers.action.decode([ids], **self._shape)[0])


def _blueprint(documents: Mapping[str, Gaps]) -> rrb.Blueprint:
    """A tab a document: images on top, actions below, text at the side."""
    tabs = [view for name, document in documents.items() if (view := _view(name, document)) is not None]
    return rrb.Blueprint(
        rrb.Tabs(*tabs),
        rrb.TimePanel(state="collapsed", timeline="step"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.BlueprintPanel(state="collapsed"),
    )


def _view(name: str, document: Gaps) -> rrb.Vertical | None:
    images = [_image_view(f"{image.name} now", f"{name}/now/{image.name}") for image in document.now]
    rights = []
    for image in _true_images(document):
        images += [_image_view(f"{image.name} {which}", f"{name}/next/{image.name}/{which}") for which in ("written", "true")]
        rights.append(f"{name}/next/{image.name}/codes_right")
    words = [rrb.TextDocumentView(name="Said", origin=f"{name}/said")] if document.said else []
    words += [rrb.TextDocumentView(name="Answers", origin=f"{name}/answers")] if document.answers else []
    bars = []
    if document.chunk:
        for component in ACTION_COMPONENTS:
            contents = [f"{name}/action/{component}/{which}" for which in ("predicted", "demonstrated")]
            bars.append(rrb.BarChartView(name=component, contents=contents))
    curves = [rrb.TimeSeriesView(name="Share of codes that are right", contents=rights)] if rights else []
    if document.chunk:
        errors = [f"{name}/action/{component}/error" for component in ACTION_COMPONENTS]
        curves.append(rrb.TimeSeriesView(name="Mean error of the actions", contents=errors))
    rows = [rrb.Horizontal(*row) for row in ([*images, *words], bars, curves) if row]
    return rrb.Vertical(*rows, name=name) if rows else None


def _true_images(document: Gaps) -> list[Image]:
    return document.images.true if document.images else []


def _image_view(name: str, origin: str) -> rrb.Spatial2DView:
    return rrb.Spatial2DView(name=name, origin=origin)
