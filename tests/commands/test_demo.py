"""The demo command, with the scripted expert."""

import json

import pytest

from emu3_vla.cli import UsageError, compose, main


def test_demo_leaves_its_files_and_runs_twice(tmp_path, capsys):
    options = ["demo", "policy=expert", "chains=[3]", "max_steps=12", "frame_stride=6", f"output_dir={tmp_path / 'demo'}"]
    assert main(options) == 0
    said = capsys.readouterr()
    for name in ("recording.rrd", "rollout.mp4", "results.json", "report.html"):
        assert (tmp_path / "demo" / name).is_file() and str(tmp_path / "demo" / name) in said.out
    assert "rerun " in said.out and "0 of 1 subtasks solved" in said.out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["average_length"] == 0 and "chain 3 alone for the 1000 official chains" in results["deviations"]
    assert main(options) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chains=[]"], "expected one or more"),
        (["chains=[1000]"], "from 0 to 999"),
        (["chains=[1,1]"], "twice"),
        (["policy=exprt"], "did you mean 'expert'"),
    ],
)
def test_wrong_options_are_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        compose("demo", ["policy=zero", *overrides])
