"""The stages' curves: what is drawn and told is what the runs wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.stages import curves


def _row(step, validation=None, **losses):
    return {"step": step} | ({"validation": losses} if validation else losses)


ROWS = [
    {"event": "gradient skipped", "step": 5},
    _row(5, loss_vision=3.0, loss_special=9.0, lr=1e-3),
    _row(5, validation=True, loss_vision=2.5, loss_text=2.0, action_accuracy=0.5),
    _row(10, loss_vision=2.0),
    _row(10, loss_vision=1.5),  # once more, after a kill
    _row(10, validation=True, loss_vision=1.25, loss_text=1.0),
]


@pytest.fixture
def folder(tmp_path):
    for name in curves.STAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_curves_of_a_run(folder):
    training, held_out = curves.curves(curves.counted(folder / "vla" / "metrics.jsonl"))
    assert training == {"vision": [(5, 3.0), (10, 1.5)]}
    assert held_out == {"vision": [(5, 2.5), (10, 1.25)], "text": [(5, 2.0), (10, 1.0)]}


def test_all_stages_are_drawn_and_told(folder, capsys):
    curves.main(str(folder))
    told = (folder / "curves.md").read_text()
    assert "| `world_model` | 10 |  | 2.000 → 1.000 | 2.500 → 1.250 |  |" in told
    assert told in capsys.readouterr().out
    drawing = (folder / "curves.svg").read_text()
    assert drawing.startswith("<?xml") and all(name in drawing for name in curves.STAGES)


def test_a_stage_that_was_not_run_is_named(folder):
    (folder / "vla" / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="vla"):
        curves.main(str(folder))


@pytest.mark.slow
def test_all_stages_run_one_after_the_other(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path / "stages"), "SMALL": "1", "PYTHON": sys.executable}
    script = Path(__file__).parents[2] / "examples/stages/run.sh"
    for _ in range(2):  # the second passes everything over
        ended = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=1800)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert "| `dpo_pictures` |" in ended.stdout
