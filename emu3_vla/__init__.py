"""Emu3 for robots: one Transformer over text, image, video and action tokens."""


def load(path, *, device="cpu", dtype=None, vision_tokenizer=None, text_tokenizer=None, action_tokenizer=None):
    """The model, tokenizers and configuration of a checkpoint folder or Hugging Face name: see `emu3_vla.checkpoint.loading.load`."""
    from emu3_vla.checkpoint import load as load_checkpoint

    tokenizers = {"vision_tokenizer": vision_tokenizer, "text_tokenizer": text_tokenizer, "action_tokenizer": action_tokenizer}
    return load_checkpoint(path, device=device, dtype=dtype, **tokenizers)
