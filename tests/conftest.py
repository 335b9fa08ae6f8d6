"""Where the reference outputs of the original software are, for the tests that compare with them; and what several files share."""

import importlib.util
import os
from pathlib import Path

import pytest

# Tests run side by side, a process a core: two threads each would only get in each other's way. Before anything imports numpy or torch.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder named by EMU3_VLA_REFERENCE; tests that need it are skipped where it is not given."""
    folder = os.environ.get("EMU3_VLA_REFERENCE")
    if not folder:
        pytest.skip("EMU3_VLA_REFERENCE names no folder with the original software's recorded outputs")
    return Path(folder)


@pytest.fixture(scope="session")
def calvin_assets(reference) -> Path:
    """calvin_env's own data folder."""
    return reference / "calvin_data" / "data"


@pytest.fixture(scope="session")
def qwen_file() -> Path:
    """Qwen's BPE, which Emu3 uses: the file named by EMU3_VLA_QWEN, or the copy in the dashscope package (the extra `qwen`)."""
    given, package = os.environ.get("EMU3_VLA_QWEN"), importlib.util.find_spec("dashscope")
    if not given and package is None:
        pytest.skip("Qwen's BPE is not at hand: pip install 'emu3-vla[qwen]', or name a qwen.tiktoken in EMU3_VLA_QWEN")
    return Path(given) if given else Path(package.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """A token store of 40 short episodes whose actions can be learned; see tiny_tokens."""
    import tiny_tokens

    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_store, tmp_path_factory) -> Path:
    """A checkpoint folder trained on it for a few steps: enough to act, not to act well."""
    import tiny_tokens

    return tiny_tokens.train(tiny_store.path, tmp_path_factory.mktemp("train"), steps=6)
