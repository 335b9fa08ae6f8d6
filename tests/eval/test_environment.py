"""Which simulator an evaluation runs in: checked before anything starts."""

import importlib.util

import pytest

from emu3_vla.cli import UsageError, compose
from eval.environment import EnvConfig
from eval.results import named_by

HAS_ORIGINAL = importlib.util.find_spec("calvin_env") is not None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("env.simulator=calvin-env", "env.simulator=calvin-env is not one of emu3-vla, calvin_env, robot; did you mean 'calvin_env'"),
        ("env.renderer=tinny", "env.renderer=tinny is not one of tiny, egl; did you mean 'tiny'"),
    ],
)
def test_wrong_options_are_said(option, message):
    with pytest.raises(UsageError, match=message):
        compose("eval", ["policy=zero", option])


def test_the_original_does_not_draw_by_egl():
    with pytest.raises(ValueError, match="env.renderer=egl is not for env.simulator=calvin_env"):
        EnvConfig(simulator="calvin_env", renderer="egl")


@pytest.mark.skipif(HAS_ORIGINAL, reason="calvin_env is installed")
def test_a_missing_original_is_an_error_of_the_option():
    with pytest.raises(UsageError, match=r"env.simulator=calvin_env: .* is not installed: pip install 'emu3-vla\[calvin\]'"):
        compose("eval", ["policy=zero", "env.simulator=calvin_env"])


def test_another_version_of_the_original_than_required_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("envs.calvin_official.installed_version", lambda: "797142c")
    with pytest.raises(ValueError, match="env.version=1431a46 is required, but the installed calvin_env is 797142c"):
        EnvConfig(simulator="calvin_env", version="1431a46", assets=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="incomplete for scene D"):
        EnvConfig(simulator="calvin_env", version="797142c", assets=str(tmp_path))


def test_our_simulator_takes_version_and_names_what_it_is():
    env = EnvConfig(version="797142c").make()
    assert env.version == "797142c" and env.renderer == "PyBullet TinyRenderer (CPU)"
    env.close()
    env = EnvConfig().make()
    assert env.version == "1431a46" and env.observe_mode == "on_demand"
    env.close()


def test_own_assets_are_those_of_our_simulator_alone(calvin_assets):
    assert EnvConfig().own_assets and EnvConfig().assets_name == "own low-polygon"
    config = EnvConfig(assets=str(calvin_assets))
    assert not config.own_assets and config.assets_name == str(calvin_assets)


def test_results_name_what_ran_not_what_was_asked_for():
    chains = [{"renderer": name} for name in ("tiny", "", "egl", "tiny")]
    assert named_by(chains, "renderer") == "egl and tiny"
    assert named_by(chains[1:2], "renderer") == "unknown, as no chain began"
