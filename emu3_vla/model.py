"""The decoder: Transformers' Emu3ForCausalLM as trunk, with vision blocks in and a depth decoder out.

    ids and blocks → one embedding per position → Emu3 trunk → states
    states → output head: the next text, action or special id
    states → depth decoder: the next block's codes, one after another

By the chain rule p(block) = Π p(code | state, codes before it in the block), so this stays exact next-token prediction with block_size²
fewer trunk positions. Precedents: MegaByte (arXiv 2305.07185), RQ-Transformer (arXiv 2203.01941).

Axes: B documents, L positions, P = B×L, N blocks, C codes of a block, S text ids said before it, H width of the trunk, D width of the depth
decoder, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3_vla import attention
from emu3_vla.cross_entropy import SLICE_LOGITS, check_targets, sliced_cross_entropy
from emu3_vla.documents import IGNORE, NOTHING, SAID, Batch, BlockContext
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary

Matrix = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer, or what computes the same."""

FREQUENCIES = 7
"""Of waves that foretold numbers are read as: 1 to 64 radians a metre or radian, whole numbers, since angles go round. The shortest is
10 cm long."""


class BlockEmu3Config(Emu3TextConfig):
    """Emu3TextConfig and what the blocks need. `vocab_size` counts the ids of the head: all but the vision codes."""

    model_type = "emu3_vla_blocks"

    codebook_size: int = 1024
    codes_per_block: int = 16
    num_places: int = 25  # block places over all images of a chunk
    code_dim: int = 64  # width of one code's embedding before a block's are merged
    block_hidden: int = 0  # width of what is computed of a block's codes together, beside their sum; 0: nothing
    hide_codes: float = 0.0  # share of the codes that a block shows as zeros in training, so that no single one is relied on
    depth_size: int = 128
    depth_layers: int = 2
    depth_heads: int = 4
    depth_noise: float = 0.0  # most of the codes before in a block that the depth decoder is shown wrong in training
    recall: bool = False  # the depth decoder sees the block that stood at its place in the picture before
    foretold: list | tuple = ()  # numbers said before a picture that the depth decoder reads: of each the first of its ids, the one after
    # its last, and which of these numbers it is relative to, or -1
    foretold_size: int = 512  # width of what it makes of them
    state_per_code: bool = False  # the depth decoder reads the trunk's state anew for each code of a block; without: the same for all


def build_config(vocabulary: CompactVocabulary, **sizes: Any) -> BlockEmu3Config:
    """A configuration for this vocabulary. sizes: any field of BlockEmu3Config (hidden_size, num_hidden_layers, ...)."""
    config = BlockEmu3Config(
        vocab_size=vocabulary.head_size,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        codebook_size=vocabulary.codebook_size,
        codes_per_block=vocabulary.codes_per_block,
        num_places=vocabulary.num_places,
        **{"recall": True, "state_per_code": True} | sizes,
    )
    # On CPUs the fused attention's backward is slower than two plain matrix products (a third of a training step here).
    config._attn_implementation = "eager"
    return config


def build_plain_config(vocabulary: Emu3Vocabulary, **sizes: Any) -> Emu3TextConfig:
    """A configuration of Emu3 itself. sizes: any field of Emu3TextConfig."""
    special = {"pad_token_id": vocabulary.pad, "bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos}
    return Emu3TextConfig(vocab_size=vocabulary.head_size, **special, **sizes)


class BlockEmu3ForCausalLM(Emu3ForCausalLM):
    """Emu3 over vision blocks. `model` and `lm_head` are Emu3ForCausalLM's own; `blocks` and `depth` are added."""

    config_class = BlockEmu3Config

    def __init__(self, config: BlockEmu3Config):
        super().__init__(config)
        self.blocks = BlockEmbedding(config)
        self.depth = DepthDecoder(config)
        self.post_init()
        self.blocks.balance()

    def embed(self, batch: Batch) -> torch.Tensor:
        """One embedding per position: (B, L, H)."""
        embedded_BLH = self.model.embed_tokens(batch.ids_BL)
        blocks_NH = self.blocks(batch.codes_NC, batch.places_N)
        flat_PH = embedded_BLH.flatten(0, 1).index_copy(0, batch.block_at_N, blocks_NH.to(embedded_BLH.dtype))
        return flat_PH.view_as(embedded_BLH)

    def states(self, batch: Batch) -> torch.Tensor:
        """The trunk's state after every position: (P, H). A packed batch needs `attention.confine`d attention."""
        return _trunk_states(self, self.embed(batch), batch)


class PlainEmu3ForCausalLM(Emu3ForCausalLM):
    """Emu3 itself, for training on batches: vision codes are ids of its one head, one per position."""

    def states(self, batch: Batch) -> torch.Tensor:
        """As BlockEmu3ForCausalLM.states."""
        return _trunk_states(self, self.model.embed_tokens(batch.ids_BL), batch)


def _trunk_states(model: Emu3ForCausalLM, embedded_BLH: torch.Tensor, batch: Batch) -> torch.Tensor:
    packed = {} if batch.spans is None else {"position_ids": batch.spans.positions_BL, "spans": batch.spans}
    if packed and model.config._attn_implementation != attention.NAME:
        raise ValueError("this batch holds several documents a row, and the model's attention does not keep to one: call attention.confine")
    return model.model(inputs_embeds=embedded_BLH, use_cache=False, **packed).last_hidden_state.flatten(0, 1)


class BlockEmbedding(nn.Module):
    """A block of codes at a place as one input of the trunk."""

    def __init__(self, config: BlockEmu3Config):
        super().__init__()
        self.hide = config.hide_codes
        self.codes = nn.Embedding(config.codebook_size, config.code_dim)
        # One matrix over all codes of the block at once: each place within the block has its own part of it.
        self.merge = nn.Linear(config.codes_per_block * config.code_dim, config.hidden_size, bias=False)
        self.places = nn.Embedding(config.num_places, config.hidden_size)
        # What several codes show together, an edge that crosses them or the place of a corner, is no sum over them.
        self.together = SquaredReluMlp(config.codes_per_block * config.code_dim, config.block_hidden, config.hidden_size)
        # Without it what is computed of a block outgrows where the block is.
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if self.together else None

    def forward(self, codes_NC: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
        block_NE = self._shown(self.codes(codes_NC)).flatten(1)
        merged_NH = self.merge(block_NE)
        if self.together:
            merged_NH = self.norm(merged_NH + self.together(block_NE))
        return merged_NH + self.places(places_N)

    @torch.no_grad()
    def balance(self, scale: float = 0.1) -> None:
        """Begin with what is shown and where it is in equal parts."""
        if self.together:
            self.norm.weight.fill_(scale)
            self.places.weight.normal_(0, scale)

    @torch.no_grad()
    def start_from_codebook(self, vectors_KE: torch.Tensor) -> None:
        """Give codes that look alike embeddings that are alike: the tokenizer's code vectors (codes, width), projected at random where the
        embedding has another width."""
        standard_KE = (vectors_KE - vectors_KE.mean(0)) / vectors_KE.std(0)
        width = self.codes.embedding_dim
        same = width == vectors_KE.shape[1]
        projection_EC = torch.eye(width) if same else torch.randn(vectors_KE.shape[1], width) / vectors_KE.shape[1] ** 0.5
        self.codes.weight.copy_(standard_KE @ projection_EC * self.codes.weight.std())

    def _shown(self, embedded_NCE: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.hide):
            return embedded_NCE
        shown_NC = torch.rand(embedded_NCE.shape[:2], device=embedded_NCE.device) >= self.hide
        return embedded_NCE * shown_NC[..., None]


class SquaredReluMlp(nn.Module):
    """Pre-norm MLP; empty, and false, where its width is 0."""

    def __init__(self, size: int, hidden: int, out: int):
        super().__init__()
        self.hidden = hidden
        if hidden:
            self.norm = nn.RMSNorm(size, eps=1e-5)
            self.up = nn.Linear(size, hidden, bias=False)
            self.down = nn.Linear(hidden, out, bias=False)

    def __bool__(self) -> bool:
        return self.hidden > 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(self.norm(inputs))).square())


class DepthDecoder(nn.Module):
    """A small causal transformer over the codes of one block, started by the trunk's state."""

    def __init__(self, config: BlockEmu3Config):
        super().__init__()
        size = config.depth_size
        # To show a block of before again, each code needs its own part of the state.
        self.states = config.codes_per_block if config.state_per_code else 1
        self.state = nn.Linear(config.hidden_size, self.states * size, bias=False)
        self.codes = nn.Embedding(config.codebook_size, size)
        self.noise = config.depth_noise
        # Most of a next picture is the one before again: what stood at a code's own place need not pass through the trunk.
        self.before = nn.Embedding(config.codebook_size - NOTHING, size) if config.recall else None
        # The trunk looks at what it has drawn rather than at what it said would be there, so that is read here once more.
        self.foretold = Foretold(config) if config.foretold else None
        self.slots = nn.Embedding(config.codes_per_block, size)
        self.layers = nn.ModuleList(DepthLayer(size, config.depth_heads) for _ in range(config.depth_layers))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.head = nn.Linear(size, config.codebook_size, bias=False)

    def forward(self, states_NH: torch.Tensor, codes_NC: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Logits of each code given the state, what is known of its block beside, and the codes written so far: (N, C, codebook_size)."""
        return self._logits(states_NH, self._misread(codes_NC[:, :-1]), context)

    @torch.no_grad()
    def write(self, states_NH: torch.Tensor, context: BlockContext, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Write blocks, one code after another: int64 (N, C). choose: logits (N, codebook_size) -> codes (N,)."""
        codes = torch.empty(len(states_NH), 0, dtype=torch.long, device=states_NH.device)
        for _ in range(self.slots.num_embeddings):
            chosen = choose(self._logits(states_NH, codes, context)[:, -1])
            codes = torch.cat([codes, chosen[:, None]], dim=1)
        return codes

    def _misread(self, written_NK: torch.Tensor) -> torch.Tensor:
        """In training other codes in the place of some: of each block another share, up to `noise`.

        The codes before tell nearly all of the next one, so a caption or the past is hardly looked at; and a model that only knows right
        ones does not find its way back from its own wrong one.
        """
        if not (self.training and self.noise):
            return written_NK
        shares_N1 = self.noise * torch.rand(len(written_NK), 1, device=written_NK.device)
        wrong_NK = torch.rand(written_NK.shape, device=written_NK.device) < shares_N1
        return torch.where(wrong_NK, torch.randint_like(written_NK, self.codes.num_embeddings), written_NK)

    def _logits(self, states_NH: torch.Tensor, written_NK: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Logits of the first K + 1 codes given the first K."""
        count = written_NK.shape[1] + 1
        # The state joins every slot, not the first alone: a path past attention.
        state_NSD = self.state(states_NH).unflatten(-1, (self.states, -1))[:, :count]
        hidden = F.pad(self.codes(written_NK), (0, 0, 1, 0)) + state_NSD + self.slots.weight[:count]
        if self.before is not None:
            hidden = hidden + self.before(context.before_NC[:, :count] - NOTHING)
        if self.foretold is not None:
            hidden = hidden + self.foretold(context)[:, :count]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class Foretold(nn.Module):
    """Number words said right before a picture (training.kinds), as what each code of a block at its place makes of them.

    Where things are and how they stand is in the words, and which of it a code shows depends on its place alone, so this is a function of
    both: numbers → what they mean together → what of it is at a place → a part of each code's input. Where the last text is something
    else, nothing is added. A number is read as waves of it. Phases of a wave add where waves are multiplied, so a way from the tool is read
    as a place in the world, too, without being learnt.
    """

    def __init__(self, config: BlockEmu3Config):
        super().__init__()
        first, stop, relative = zip(*config.foretold, strict=True)
        if len(first) > SAID:
            raise ValueError(f"{len(first)} numbers are foretold, expected at most {SAID}")
        self.bounds, sizes = (first, stop), [end - begin for begin, end in zip(first, stop, strict=True)]
        self.starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.relative = [number for number, to in enumerate(relative) if to >= 0]
        self.bases = [relative[number] for number in self.relative]
        hidden = config.foretold_size
        self.words = nn.Embedding(sum(sizes), 2 * FREQUENCIES)
        self.up = nn.Linear((len(sizes) + len(self.relative)) * 2 * FREQUENCIES, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.across = nn.Linear(hidden, hidden, bias=False)
        self.places = nn.Embedding(config.num_places, hidden)
        self.down = nn.Linear(hidden, config.codes_per_block * config.depth_size, bias=False)
        self.slots = config.codes_per_block

    @torch.no_grad()
    def begin(self, values: Sequence[torch.Tensor]) -> None:
        """Begin with waves of the numbers' values, and with no part in what is written. values: of each number, those of its words."""
        phases = torch.cat([*values]).float()[:, None] * 2.0 ** torch.arange(FREQUENCIES)
        self.words.weight.copy_(torch.cat([phases.sin(), phases.cos()], dim=1))
        self.places.weight.normal_()
        for layer in (self.up, self.across):
            layer.weight.normal_(0, layer.in_features**-0.5)
        self.down.weight.zero_()

    def forward(self, context: BlockContext) -> torch.Tensor:
        """(N, C, D)."""
        return self.of(context, self.up, self.across, self.down)

    def of(self, context: BlockContext, up: Matrix, across: Matrix, down: Matrix) -> torch.Tensor:
        """The same by these matrices."""
        first_S, stop_S = torch.tensor(self.bounds, device=context.said_NS.device)
        said_NS = context.said_NS[:, -len(first_S) :]
        are_words_N1 = ((said_NS >= first_S) & (said_NS < stop_S)).all(1, keepdim=True)
        rows_NS = (said_NS - first_S).where(are_words_N1, 0) + torch.tensor(self.starts, device=said_NS.device)
        together = self.norm(F.relu(up(self._waves(rows_NS))).square())
        here = F.relu(across(together) + self.places(context.places_N)).square()
        return (down(here) * are_words_N1).unflatten(-1, (self.slots, -1))

    def _waves(self, rows_NS: torch.Tensor) -> torch.Tensor:
        """Of all numbers, and of those that are relative to another in the world."""
        said = self.words(rows_NS)
        sine, cosine = said.chunk(2, dim=-1)
        (sine_by, cosine_by), (sine_from, cosine_from) = ((sine[:, at], cosine[:, at]) for at in (self.relative, self.bases))
        placed = [sine_by * cosine_from + cosine_by * sine_from, cosine_by * cosine_from - sine_by * sine_from]
        return torch.cat([said, torch.cat(placed, dim=-1)], dim=1).flatten(1)


class DepthLayer(nn.Module):
    """Pre-norm causal attention and a squared-ReLU MLP."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(size, eps=1e-5)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size, eps=1e-5)
        self.up = nn.Linear(size, 4 * size, bias=False)
        self.down = nn.Linear(4 * size, size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Plain products: over a block's few codes the fused kernel's backward takes many times as long on a CPU.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.relu(self.up(self.mlp_norm(hidden))).square())


def token_losses(
    model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM, states_PH: torch.Tensor, targets_P: torch.Tensor, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the supervised ids, over the head's ids alone (codes in blocks have their own head).

    Where the logits of all of them would be many, they are never all held. Returns losses float32 (M,), their targets int64 (M,), and
    whether the likeliest id was right, bool (M,). Raises ValueError for a target that the head does not write.
    """
    at = (targets_P != IGNORE).nonzero().squeeze(1)
    targets = targets_P[at]
    if len(targets) * model.config.vocab_size > SLICE_LOGITS:
        losses, right = sliced_cross_entropy(states_PH[at], model.lm_head.weight, targets, smoothing)
        return losses, targets, right
    check_targets(targets, model.config.vocab_size)
    logits = model.lm_head(states_PH[at]).float()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return losses, targets, logits.detach().argmax(dim=1) == targets


def block_losses(model: BlockEmu3ForCausalLM, states_PH: torch.Tensor, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every code of the chosen blocks, float32 (len(chosen), C). chosen: int64, indices into the batch's N blocks."""
    codes = batch.codes_NC[chosen]
    # Never negative: a document opens with <bos> and an image with its begin token, so a block always has a position before it.
    logits = model.depth(states_PH[batch.block_at_N[chosen] - 1], codes, batch.block_context(chosen))
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
