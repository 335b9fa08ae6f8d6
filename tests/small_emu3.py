"""Small random Emu3 checkpoints in every layout, written as their publishers would write them."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Emu3Config, Emu3ForCausalLM, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3TextModel, Emu3VQVAEConfig

from emu3_vla.checkpoint.weights import write_weights
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer
from emu3_vla.vocabulary import TEXT_SIZE, Emu3Vocabulary

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Enough ids for Emu3's own vocabulary, and hardly any weights besides.
PUBLISHED_IDS = SIZES | {
    "vocab_size": Emu3Vocabulary.size,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": Emu3Vocabulary.pad,
    "bos_token_id": Emu3Vocabulary.bos,
    "eos_token_id": Emu3Vocabulary.eos,
}
VISION = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64}
STATED = {"img_token_id": 151851, "boi_token_id": 151852, "eoi_token_id": 151853, "eol_token_id": 151846, "eof_token_id": 151847}


def text_config(**changes) -> Emu3TextConfig:
    return Emu3TextConfig(**(SIZES | changes))


def decoder(seed: int = 0, **changes) -> Emu3ForCausalLM:
    """Weights with more spread than at the start of training, so that logits differ."""
    torch.manual_seed(seed)
    model = Emu3ForCausalLM(text_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    return model


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(1, 18)[None] if ids is None else ids).logits


def write_baai(folder: Path, model: Emu3ForCausalLM, *, architecture="Emu3ForCausalLM", shard_bytes=2**40, **values) -> Path:
    """BAAI's layout: rotary parameters in the old names, and ids that Transformers' configuration does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"model_type": "Emu3", "architectures": [architecture], "rope_theta": theta, "rope_scaling": None, "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config | STATED | values))
    write_weights(folder, dict(model.state_dict()), shard_bytes=shard_bytes)
    return folder


def write_univla(folder: Path, model: Emu3ForCausalLM) -> Path:
    values = {"action_experts": False, "vision_loss_weight": 0.5, "action_config": {"hidden_size": 4096, "action_dim": 7}}
    return write_baai(folder, model, architecture="Emu3MoE", **values)


def write_whole(folder: Path, *, codebook_size: int = 64, **changes) -> Emu3ForConditionalGeneration:
    """Transformers' layout, written by Transformers."""
    torch.manual_seed(1)
    names = {"<image>": 3, "<|extra_200|>": 4} | {f"<|visual token {code:06d}|>": 100 + code for code in range(codebook_size)}
    vision = Emu3VQVAEConfig(codebook_size=codebook_size, **VISION)
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=text_config(**changes), vq_config=vision, vocabulary_map=names)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


def write_vision(folder: Path, *, codebook_size: int = 64) -> Emu3Tokenizer:
    """Emu3's vision tokenizer alone."""
    torch.manual_seed(2)
    tokenizer = Emu3Tokenizer(Emu3VQVAEConfig(codebook_size=codebook_size, **VISION)).eval()
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_text(folder: Path, *, head: bool = True, **changes) -> torch.nn.Module:
    """Transformers' layout of the decoder alone, or of its trunk alone."""
    model = decoder(**changes) if head else Emu3TextModel(text_config(**changes)).eval()
    model.save_pretrained(folder)
    return model


def write_tiktoken(folder: Path, size: int = TEXT_SIZE) -> None:
    """A vocabulary of single bytes and made-up longer tokens: of the right form and number."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"\xff" + number.to_bytes(3, "big") for number in range(size - 256)]
    lines = (b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    (folder / "emu3.tiktoken").write_bytes(b"\n".join(lines) + b"\n")


def rewrite_weights(path: Path, change) -> None:
    """Spoil a weight file: change(dict of tensors) in place."""
    from safetensors.torch import load_file

    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, {"format": "pt"})
