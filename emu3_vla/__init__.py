"""Emu3 for robots: one Transformer over text, image, video and action tokens."""


def load(folder, *, device="cpu", dtype=None):
    """The model and tokenizers of a checkpoint folder: see `emu3_vla.checkpoint.load`."""
    from emu3_vla.checkpoint import load as load_checkpoint

    return load_checkpoint(folder, device=device, dtype=dtype)
