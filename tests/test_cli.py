"""The command line: wrong input ends in one clear line and exit code 2, and nothing is overwritten."""

import dataclasses
import json

import pytest

from emu3_vla import cli


def _run(capsys, *argv: str) -> tuple[int, str]:
    code = cli.main(list(argv))
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_lists_its_options(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "output_dir=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv,message",
    [
        (["evall"], "unknown command 'evall'; did you mean 'eval'?"),
        (["collect", "shard=2"], "unknown option 'shard' of 'emu3-vla collect'; did you mean 'shards'?"),
        (["collect", "demonstration.max_step=2"], "did you mean 'demonstration.max_steps'?"),
        (["collect", "shards"], "options are written name=value"),
        (["collect", "shards=many"], "option shards: Input should be a valid integer"),
        (["collect", "shards=0"], "shards=0 must be at least 1"),
        (["collect", "preset=debugg"], "unknown preset 'debugg' of 'emu3-vla collect'; did you mean 'debug'?"),
        (["collect", "tasks=[open_draw]"], "did you mean 'open_drawer'?"),
        (["eval", "env.scene=Z"], "'Z'"),
        (["eval", "policy=exprt"], "did you mean 'expert'?"),
        (["compare", "nowhere/a", "nowhere/b"], "no results nowhere/a"),
        (["compare", "nowhere/a", "nowhere/b", "nowhere/c"], "'nowhere/c' is not an option"),
    ],
)
def test_wrong_input_is_named(argv, message, capsys, tmp_path):
    folder = tmp_path / "run"
    code, text = _run(capsys, *argv, *([f"output_dir={folder}"] if len(argv) > 1 else []))
    assert code == 2
    assert message in text
    assert text.count("\n") == 1
    assert not folder.exists()


def test_preset_and_overrides_meet_in_the_config():
    config = cli.compose("collect", ["preset=debug", "demonstration.frame_stride=7"])
    assert (config.shards, config.chains_per_shard, config.demonstration.frame_stride) == (2, 1, 7)
    assert cli.compose("collect", ["preset=debug", "shards=3"]).shards == 3


def test_bare_values_at_the_start_have_names():
    compared = cli.compose("compare", ["here/a", "there/b", "seed=3"])
    assert (compared.a, compared.b, compared.seed) == ("here/a", "there/b", 3)
    assert cli.compose("compare", ["here/a", "b=there/b"]).b == "there/b"
    assert cli.compose("report", ["here", "--compare=there"]).compare == ("there",)


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path):
    config = cli.compose("collect", [f"output_dir={tmp_path}/run"])
    folder = cli.claim_output_dir("collect", config)
    before = (folder / "run.json").read_text()
    assert cli.claim_output_dir("collect", config) == folder
    with pytest.raises(cli.UsageError, match="holds another run .*seed=0 there, 1 now"):
        cli.claim_output_dir("collect", dataclasses.replace(config, seed=1))
    with pytest.raises(cli.UsageError, match="holds another run .*of 'emu3-vla collect'"):
        cli.claim_output_dir("eval", config)
    assert (folder / "run.json").read_text() == before


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    config = cli.compose("collect", [f"output_dir={tmp_path}"])
    with pytest.raises(cli.UsageError, match="not empty"):
        cli.claim_output_dir("collect", config)


def test_without_output_dir_the_same_command_finds_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = cli.claim_output_dir("collect", cli.compose("collect", []))
    assert first == cli.claim_output_dir("collect", cli.compose("collect", []))
    assert first != cli.claim_output_dir("collect", cli.compose("collect", ["seed=1"]))
    assert json.loads((first / "run.json").read_text())["command"] == "collect"
