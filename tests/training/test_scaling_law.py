"""The grid of small models: what is trained, that it goes on where it was cut off, and what is made of its losses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from emu3_vla import cli
from emu3_vla.training import power_law, scaling_law
from emu3_vla.training.loop import ModelSizes, TrainConfig
from emu3_vla.training.power_law import Law
from emu3_vla.training.scaling_law import Point, ScalingLawConfig


def _debug(store, folder: Path) -> ScalingLawConfig:
    return cli.compose("scaling-law", ["preset=debug", f"tokens={store.path}", f"output_dir={folder}"])


def test_the_law_of_a_grid_predicts_the_larger_model(tiny_store, tmp_path, capsys):
    """Losses that follow a known law; the sizes and lengths are those of the real grid."""
    config = dataclasses.replace(ScalingLawConfig(tokens=str(tiny_store.path)), output_dir=str(tmp_path), resamples=20)
    known = Law(0.5, 60.0, 900.0, 0.4, 0.5)
    points = []
    for run in scaling_law._runs(config):
        parameters, tokens = run.width**3, run.config.steps * 1600
        points.append(Point(run=run, parameters=parameters, tokens=tokens, losses={"action": float(known(parameters, tokens))}))
    results = scaling_law._results(points, config)
    law = results["laws"]["action"]
    assert law["law"] == power_law.rounded(known)
    assert [row["relative_error"] < 1e-3 for row in law["held_out"]] == [True]
    assert law["held_out"][0]["parameters"] == 256**3
    assert law["size_exponent"] == pytest.approx(5 / 9, abs=1e-3)
    scaling_law._write(results, points, config, tmp_path)
    page = (tmp_path / scaling_law.REPORT).read_text()
    assert "<svg" in page and "width-256-steps-1600" in page
    assert json.loads((tmp_path / scaling_law.RESULTS).read_text())["laws"] == json.loads(json.dumps(results["laws"]))
    assert not list(tmp_path.glob("*.tmp"))


def test_runs_are_ordinary_ones_of_growing_models():
    config = ScalingLawConfig(tokens="somewhere", output_dir="here")
    runs = scaling_law._runs(config)
    assert len({run.name for run in runs}) == len(config.widths) * len(config.steps) + 1
    assert [run.name for run in runs if run.held_out] == ["width-256-steps-1600"] and runs[0].held_out  # the longest begins
    for run in runs:
        assert isinstance(run.config, TrainConfig)
        assert run.config.model.hidden_size == run.width and run.config.model.num_attention_heads == run.width // 32
        expected = config.train.optimizer.learning_rate * (256 / run.width) ** 0.5
        assert run.config.optimizer.learning_rate == pytest.approx(expected)
    layers = [scaling_law.sizes_of(width, ModelSizes()).num_hidden_layers for width in (32, 64, 128, 256)]
    assert layers == sorted(layers) and layers[0] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (64, 96)}, r"widths=\[64, 96\]: expected at least 3 different ones"),
        ({"steps": (100, 100, 200, 300)}, "each once"),
        ({"steps": (0, 100, 200)}, r"steps=\[0, 100, 200\]: expected at least 1"),
        ({"widths": (64, 96, 100)}, "width 100 is no multiple of 32"),
        ({"held_out_width": 192}, "held_out_width=192 is not larger than all of"),
        ({"held_out_steps": ()}, "held_out_steps is empty"),
        ({"workers": 0}, "workers=0"),
        ({"train": TrainConfig(tokens="x")}, "leave them empty"),
        ({"train": TrainConfig(tokens="", processes=2)}, "every run is one process"),
    ],
)
def test_grids_that_tell_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ScalingLawConfig(tokens="somewhere", **values)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_debug_grid_trains_goes_on_and_reports(tiny_store, tmp_path, capsys, monkeypatch):
    config = _debug(tiny_store, tmp_path)
    scaling_law.main(config)
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / scaling_law.REPORT))
    first = json.loads((tmp_path / scaling_law.RESULTS).read_text())
    assert set(first["laws"]) == {"action", "vision"} and len(first["runs"]) == 10
    parameters = np.array([run["parameters"] for run in first["runs"]])
    assert (np.diff(parameters) >= 0).all() and len(set(parameters)) == 4
    policy = tmp_path / "runs" / "width-64-steps-4" / "policy"
    policy.rename(tmp_path / "away")  # as if it had been cut off before its end
    trained = []
    monkeypatch.setattr(scaling_law, "_train", lambda config: trained.append(Path(config.output_dir).name) or scaling_law.loop.main(config))
    monkeypatch.setattr(scaling_law.multiprocessing, "get_context", lambda method: _Here)
    scaling_law.main(config)
    assert trained == ["width-64-steps-4"]
    assert json.loads((tmp_path / scaling_law.RESULTS).read_text())["laws"] == first["laws"]


class _Here:
    """A pool of this process."""

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def imap_unordered(self, work, items, chunksize):
            for item in items:
                work(item)
                yield Path(item.output_dir).name
