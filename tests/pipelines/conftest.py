"""A checkpoint with Emu3's vocabulary, for the paths and for their commands."""

import pytest
import small_emu3

from emu3_vla.vocabulary import Emu3Vocabulary


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory):
    """Emu3's vocabulary and vision tokenizer in BAAI's layout, with hardly any weights. A code is 2 pixels wide and 4 frames long."""
    folder = tmp_path_factory.mktemp("published")
    model = small_emu3.decoder(**small_emu3.PUBLISHED_IDS | {"max_position_embeddings": 600})
    small_emu3.write_baai(folder, model)
    small_emu3.write_vision(folder / "vision_tokenizer", codebook_size=Emu3Vocabulary.codebook_size)
    small_emu3.write_tiktoken(folder)
    return folder
