"""Code ids in the place of images: the same decisions, fewer bytes, and never those of another tokenizer."""

import shutil

import numpy as np
import pytest
from served import Recording, serving

import policies
from policies import wire
from policies.client import RemotePolicy
from policies.edge import EdgeTokenizer

CAMERAS = ("rgb_static", "rgb_gripper")


def observation(step):
    """Blotches, which the tokenizer tells apart, at the cameras' own sizes."""
    random = np.random.default_rng(step)
    return {
        name: np.kron(random.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))
        for name, side in zip(CAMERAS, (200, 84), strict=True)
    }


@pytest.fixture(scope="module")
def policy(tiny_checkpoint):
    return policies.load(tiny_checkpoint)


@pytest.mark.parametrize("packed", [False, True])
def test_decisions_are_those_that_pixels_give(policy, tiny_checkpoint, packed):
    with serving(policy) as server:
        pixels, ids = (
            RemotePolicy(server.address),
            policies.load(server.address, tokenizer=tiny_checkpoint / "vision_tokenizer", packed=packed),
        )
        for remote in (pixels, ids):
            remote.reset("go left")
        for step in range(4):
            seen, said = (remote.infer(observation(step)) for remote in (pixels, ids))
            assert seen["token_ids"] == said["token_ids"] and seen["entropy"] == said["entropy"]
            np.testing.assert_array_equal(seen["actions"], said["actions"])
        grids = ids.metadata["vision_tokenizer"]["grids"]
        assert ids.bytes_sent < 4 * (2 * sum(rows * columns for rows, columns in grids.values()) + 400) < pixels.bytes_sent / 50
        pixels.close(), ids.close()


def test_ids_of_another_tokenizer_are_refused_by_both_sides(policy, tiny_checkpoint, tmp_path):
    other = tmp_path / "vision_tokenizer"
    shutil.copytree(tiny_checkpoint / "vision_tokenizer", other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with serving(policy) as server:
        with pytest.raises(wire.TokenizerMismatch, match="take the vision_tokenizer/ folder of that policy's checkpoint"):
            RemotePolicy(server.address, tokenizer=other)
        remote = RemotePolicy(server.address, tokenizer=tiny_checkpoint / "vision_tokenizer")
        remote._tokenizer = EdgeTokenizer(other)
        remote.reset("go left")
        with pytest.raises(wire.TokenizerMismatch, match=f"of tokenizer str '{remote._tokenizer.fingerprint[:40]}'"):
            remote.infer(observation(0))
        remote.close()


def test_a_policy_without_a_tokenizer_takes_no_ids(tiny_checkpoint):
    with serving(Recording()) as server, pytest.raises(wire.TokenizerMismatch, match="reads None"):
        RemotePolicy(server.address, tokenizer=tiny_checkpoint / "vision_tokenizer")


def test_the_policy_itself_checks_the_ids_it_is_given(policy):
    """Also without a server between."""
    session = policy.sessions(1)[0]
    session.reset("go left")
    images = session.look(observation(0))
    given = {"codes": {image.name: image.codes for image in images}, "tokenizer": policy.vision_tokenizer["fingerprint"]}
    assert session.look(given) == images
    mixed = given | {"codes": {"rgb_static": images[0].codes}, "rgb_gripper": observation(0)["rgb_gripper"]}
    assert session.look(mixed) == images
    with pytest.raises(wire.TokenizerMismatch):
        session.look(given | {"tokenizer": "another"})
    with pytest.raises(ValueError, match="lie in"):
        session.look(given | {"codes": {"rgb_static": images[0].codes + policy.vision_tokenizer["codebook_size"]}})
