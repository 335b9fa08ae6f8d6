"""The Emu3 policy: look, read the instruction, write the next action tokens, decode them to motion.

    policy = Emu3Policy("policies/checkpoints/calvin-d")
    policy.reset("open the drawer")
    actions = policy.infer(observation)["actions"]     # float32 (10, 7)

What the model reads is one document, as in training: the instruction, then up to `history` past chunks (both images and the actions
that were written), then both images of now. Where it was trained so, the arm's state in words stands behind the images, and then the model
says, before it acts, what it sees.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_tokenizer.dct import quantize
from action_tokenizer.prefix import CommittedPrefix
from emu3_vla.checkpoint import load
from emu3_vla.checkpoint.folder import VISION
from emu3_vla.data.tokens import content_hash
from emu3_vla.documents import ActionChunk, Image, Segment, Text
from emu3_vla.documents.stream import spell
from emu3_vla.generation.actions import ActionWriter, Chunk
from emu3_vla.generation.cache import CachedSequence, CachedTrunk
from emu3_vla.generation.items import embed
from emu3_vla.generation.words import Sentence, WordWriter
from emu3_vla.number_words import NumberWords, StateWords
from envs.spec import COMMITTED_ACTIONS, GRIPPER_CLOSE, GRIPPER_OPEN, ROBOT_OBS
from policies.chunking import JOIN_CORRELATION, check_committed, join_gap, rejoin
from policies.codes import checked_codes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Longest instruction that is expected, in text ids; only the cache's size depends on it.
MAX_TEXT_IDS = 256

# Of each session: the chunk that it did, its embeddings, what it saw, its answer.
_Decided = tuple[list[list[Segment]], list[torch.Tensor], list[np.ndarray | None], list[dict[str, Any]]]


class Emu3Policy:
    """A checkpoint folder as a policy; see policies.base.Policy.

    history: past chunks shown. temperature: 0 takes the likeliest action id, above 0 draws, seeded by `reset`. Both default to what
    policy.yaml says.
    vision_tokenizer: what code ids must fit that come in the place of images; see policies.codes.
    threads: of this process's tensor operations, which is process-wide; several simulators on one machine want 1 each.
    workers: groups of sessions that are decided side by side where several are asked at once, each with that many threads. No decision
    depends on it.
    dtype: "float32" or "bfloat16", of the model's arithmetic.
    int8_draft: let a copy of the trunk in int8 guess action ids, which the trunk verifies; the ids are the same, on a CPU sooner.
    lossy: let guesses at action ids count as right after so many rounds: sooner, and not what the model would have written. None: never.
    Raises what emu3_vla.load raises, and ValueError for an option that cannot be.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        history: int | None = None,
        temperature: float | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        workers: int = 1,
        int8_draft: bool = False,
        lossy: int | None = None,
        seed: int = 0,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if threads < 1 or workers < 1:
            raise ValueError(f"threads is {threads} and workers {workers}, expected at least 1 each")
        torch.set_num_threads(threads)
        self.checkpoint = load(folder, device=device, dtype=DTYPES[dtype]).require_policy()
        settings, vocabulary = self.checkpoint.policy, self.checkpoint.vocabulary
        self.history = settings.history if history is None else history
        if not 0 <= self.history <= settings.trained_history:
            raise ValueError(f"history is {history}, expected 0 to {settings.trained_history}: {folder} was trained with no more")
        self.name = Path(folder).resolve().name
        words = StateWords.of(settings.state) if settings.state else None
        encode = self.checkpoint.text_tokenizer.encode
        self.states = words.spelled(encode) if words else None
        self.scenes = NumberWords.of(settings.scene).spelled(encode) if settings.scene else None
        self.requires = frozenset(grid.name for grid in vocabulary.images) | ({ROBOT_OBS} if words else frozenset())
        self.vision_tokenizer = {
            "fingerprint": content_hash(self.checkpoint.folder / VISION),
            "codebook_size": vocabulary.codebook_size,
            "grids": {grid.name: [grid.rows, grid.columns] for grid in vocabulary.images},
        }
        self.action_units = settings.actions
        self.seed = seed
        self._shape = {"horizon": settings.horizon, "action_dim": settings.action_dim}
        grammar = self.checkpoint.action_tokenizer.grammar(**self._shape)
        temperature = settings.temperature if temperature is None else temperature
        draft = None
        if int8_draft:
            from emu3_vla.generation.int8_draft import Int8Trunk  # Numba takes a while to import

            draft = Int8Trunk(self.checkpoint.model)
        self._writer = ActionWriter(self.checkpoint.model, vocabulary, grammar, temperature, draft=draft, lossy=lossy)
        self._words = WordWriter(self.checkpoint.model, self.scenes) if self.scenes else None
        self._trunk = CachedTrunk(self.checkpoint.model)
        self._begin_action = self.checkpoint.model.model.embed_tokens.weight[[vocabulary.begin_action]].detach()
        self._workers, self._threads = workers, ThreadPoolExecutor(workers, "decisions")
        self._alone = Session(self)

    def sessions(self, number: int) -> list[Session]:
        """Policies that share this one's weights, for `infer_many`; see eval.lockstep.BatchedPolicy."""
        return [Session(self) for _ in range(number)]

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """Start a subtask: forget the past chunks. Raises ValueError for an empty or overlong instruction. `task` is not looked at."""
        self._alone.reset(instruction, seed=seed)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """Decide on the next chunk.

        Returns "actions" float32 (horizon, 7); "token_ids" list; "entropy" list, nats per id; "probability" of the ids written;
        "coefficients" int64 (horizon, 7), the scaled DCT coefficients, lowest frequency first, that the ids stand for;
        "scene", what a model that says so sees, {name: value}; "clipped", how many of the decoded values left [-1, 1]; "timing_s" by stage.
        An observation with envs.spec.COMMITTED_ACTIONS (n, 7): the ids are chosen as both the model and these first actions have it, the
        actions begin with them exactly, "committed" is n, and "join_gap" how far the ids alone were from the last of them.
        Raises ValueError before the first `reset` and for missing or wrong images, DecodingFailed if the model's output is not finite.
        """
        return self._alone.infer(observation)

    def prepare(self) -> None:
        """Read, while the arm moves, what the next decision begins with: instruction and past. No decision depends on it."""
        self._alone.prepare()

    @property
    def last_chunk(self) -> list[Segment]:
        """What a document has of the last decision: what was seen, what was said of it, and the actions."""
        return self._alone.last_chunk

    def look(self, observation: dict[str, np.ndarray]) -> list[Segment]:
        """What a document has of this moment before its actions: images as codes, and the arm's state where it is said."""
        return self._alone.look(observation)

    @torch.inference_mode()
    def infer_many(self, sessions: Sequence[Session], observations: Sequence[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        """What each session's `infer` would answer. Pictures are read session by session; prompts are read together and action ids written
        together, since either costs reading the model's weights. With `workers` so many groups are decided side by side. "timing_s" is a
        session's share.

        Raises what `infer` raises; then no session has changed.
        """
        before = [(session, session.state()) for session in sessions]
        groups = [slice(first, None, self._workers) for first in range(min(self._workers, len(sessions)))]
        try:
            decided = self._side_by_side([sessions[group] for group in groups], [observations[group] for group in groups])
        except Exception:
            for session, state in before:
                session.restore(state)
            raise
        answers: list[dict[str, Any]] = [{}] * len(sessions)
        for group, (chunks, embedded, scenes, answered) in zip(groups, decided, strict=True):
            answers[group] = answered
            for session, *chunk_and_scene in zip(sessions[group], chunks, embedded, scenes, strict=True):
                session.remember(*chunk_and_scene)
        return answers

    def _side_by_side(self, groups: Sequence[Sequence[Session]], observations: Sequence[Sequence[dict[str, np.ndarray]]]) -> list[_Decided]:
        """`_decide` of each group, in threads. Raises what the first of them raised, after all have ended."""
        if len(groups) == 1:
            return [self._decide(groups[0], observations[0])]
        decide = torch.inference_mode()(self._decide)  # a thread's own mode
        under_way = [self._threads.submit(decide, *each) for each in zip(groups, observations, strict=True)]
        wait(under_way)
        return [one.result() for one in under_way]

    def _decide(self, sessions: Sequence[Session], observations: Sequence[dict[str, np.ndarray]]) -> _Decided:
        """Each session's chunk and what it sees, for it to remember, and answer."""
        timing: dict[str, float] = {}
        with _timed(timing, "encode"):
            looks = [session.look(observation) for session, observation in zip(sessions, observations, strict=True)]
            committed = [self._committed(observation) for observation in observations]
        sequences, generators = [session.sequence for session in sessions], [session.generator for session in sessions]
        chunks = [self._writer.begin(session.last_ids(), self._prefix(ahead)) for session, ahead in zip(sessions, committed, strict=True)]
        scenes: list[np.ndarray | None] = [None] * len(sessions)
        with _timed(timing, "past"):
            self.read_past(sessions)
        with _timed(timing, "prefill"):
            seen = [embed(self.checkpoint.model, self.checkpoint.vocabulary, look)[1:] for look in looks]
            unread = seen if self._words else [torch.cat([rows, self._begin_action]) for rows in seen]
            sentences = [self._words.begin(session.scene) for session in sessions] if self._words else []
            states = self._read(sequences, unread, self._words or self._writer, sentences or chunks)
        if self._words:
            with _timed(timing, "describe"):
                scenes = self._words.write_each(sequences, sentences, states)
                states = self._read(sequences, self._last_words(scenes), self._writer, chunks)
        with _timed(timing, "decode"):
            written = self._writer.write_each(sequences, chunks, states, generators)
        with _timed(timing, "detokenize"):
            decoded = [self._actions(chunk.ids) for chunk in written]
        answers = []
        for chunk, scene, ahead, (actions, clipped, coefficients) in zip(written, scenes, committed, decoded, strict=True):
            answers.append(
                {
                    "actions": actions if ahead is None else rejoin(actions, ahead).astype(np.float32),
                    "committed": 0 if ahead is None else len(ahead),
                    "join_gap": 0.0 if ahead is None else join_gap(actions, ahead),
                    "token_ids": chunk.ids,
                    "entropy": chunk.entropy,
                    "probability": chunk.probability,
                    "clipped": clipped,
                    "coefficients": coefficients,
                    **({} if scene is None else {"scene": self._named(scene)}),
                    "timing_s": {stage: seconds / len(sessions) for stage, seconds in timing.items()},
                }
            )
        said = [[] if scene is None else [Text(self.scenes.ids(scene))] for scene in scenes]
        said = [[*words, ActionChunk(chunk.ids)] for words, chunk in zip(said, written, strict=True)]
        chunks = [[*look, *after] for look, after in zip(looks, said, strict=True)]
        embedded = [torch.cat([rows, self._embedded(after)]) for rows, after in zip(seen, said, strict=True)]
        return chunks, embedded, scenes, answers

    @torch.inference_mode()
    def read_past(self, sessions: Sequence[Session]) -> None:
        """Put instruction and past of each session through the trunk, where its sequence does not hold them yet. Always apart from what is
        seen now, so that every bit is the same whenever it is done."""
        parts = [(session.sequence, session.unread_past()) for session in sessions if not session.past_is_read]
        if parts:
            self._trunk.extend_each(parts)

    def _read(
        self,
        sequences: Sequence[CachedSequence],
        unread: Sequence[torch.Tensor],
        writer: WordWriter | ActionWriter,
        begun: Sequence[Sentence] | Sequence[Chunk],
    ) -> list[torch.Tensor]:
        """Put what is unread, and the guesses at what will be written behind it, through the trunk.

        Returns of each sequence the states after the last that was unread and after each guess: (1 + k, H).
        """
        parts = [(sequence, torch.cat([rows, writer.ahead(one)])) for sequence, rows, one in zip(sequences, unread, begun, strict=True)]
        read = self._trunk.extend_each(parts)
        return [states_nH[-1 - len(one.ahead) :] for states_nH, one in zip(read, begun, strict=True)]

    def _embedded(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Embeddings of segments without pictures: (n, H)."""
        ids = np.concatenate([spell(segment, self.checkpoint.vocabulary) for segment in segments])
        return self.checkpoint.model.model.embed_tokens.weight[torch.from_numpy(ids).to(self.checkpoint.model.device)]

    def _last_words(self, scenes: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Embeddings of the last word of what each session sees, which its sequence does not hold yet, and of "begin of action"."""
        embeddings, begin = self.checkpoint.model.model.embed_tokens.weight, self.checkpoint.vocabulary.begin_action
        return [embeddings[[self.scenes.ids(scene)[-1], begin]] for scene in scenes]

    def _named(self, scene: np.ndarray) -> dict[str, float]:
        words = self.scenes.words
        return dict(zip(words.names, words.values(scene).tolist(), strict=True))

    def new_sequence(self) -> CachedSequence:
        """A cache that a whole document fits into."""
        vocabulary = self.checkpoint.vocabulary
        images = sum(1 + vocabulary.blocks(grid.name) for grid in vocabulary.images)
        # Every action id stands for at least one coefficient or half a two-byte one, so this many positions always suffice.
        said = sum(spelled.most_ids for spelled in (self.states, self.scenes) if spelled)
        chunk = images + said + 2 + 2 * self._shape["horizon"] * self._shape["action_dim"]
        return self._trunk.sequence(1 + MAX_TEXT_IDS + (self.history + 1) * chunk)

    def _committed(self, observation: dict[str, np.ndarray]) -> np.ndarray | None:
        """The actions (n, 7) that are executed during this decision, if any. Raises InvalidAction."""
        given = observation.get(COMMITTED_ACTIONS)
        return None if given is None else check_committed(given, self._shape["horizon"])

    def _prefix(self, committed: np.ndarray | None) -> CommittedPrefix | None:
        """What the writing of ids has to heed."""
        if committed is None:
            return None
        normalised_nA = self.checkpoint.normalizer.normalize(committed)
        return self.checkpoint.action_tokenizer.committed(normalised_nA, horizon=self._shape["horizon"], correlation=JOIN_CORRELATION)

    def _actions(self, ids: list[int]) -> tuple[np.ndarray, int, np.ndarray]:
        """Actions of the ids, float32 (horizon, 7) within [-1, 1]; how many values had to be clipped to that; DCT coefficients."""
        tokenizer = self.checkpoint.action_tokenizer
        normalised_NTA = tokenizer.decode([ids], **self._shape)
        actions = self.checkpoint.normalizer.denormalize(normalised_NTA[0])
        motion = actions[:, :-1]
        clipped = int((np.abs(motion) > 1).sum())
        gripper = np.where(actions[:, -1:] >= 0, GRIPPER_OPEN, GRIPPER_CLOSE)
        clamped = np.concatenate([motion.clip(-1, 1), gripper], axis=1).astype(np.float32)
        return clamped, clipped, quantize(normalised_NTA, tokenizer.scale)[0]


class Session:
    """One arm's instruction, past and random stream; a Policy. `Emu3Policy.sessions` makes it."""

    def __init__(self, policy: Emu3Policy):
        self.policy = policy
        self.name, self.requires = policy.name, policy.requires
        self.sequence = policy.new_sequence()
        self.generator = torch.Generator(policy.checkpoint.model.device)
        self._instruction: torch.Tensor | None = None  # its embeddings (n, H), <bos> first
        self.scene: np.ndarray | None = None  # what was seen last in this subtask, in bins
        self.last_chunk: list[Segment] = []  # of the last decision: what was seen, what was said of it, and the actions
        self._past: list[torch.Tensor] = []  # embeddings (n, H) of each chunk of this subtask that is still shown

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """See Emu3Policy.reset."""
        if not instruction.strip():
            raise ValueError("the instruction is empty; say in a sentence what the arm shall do")
        ids = self.policy.checkpoint.text_tokenizer.encode(instruction)
        if len(ids) > MAX_TEXT_IDS:
            raise ValueError(
                f"the instruction has {len(ids)} text ids, expected at most {MAX_TEXT_IDS}; shorten it: {instruction[:60]!r}..."
            )
        with torch.inference_mode():
            self._instruction = embed(self.policy.checkpoint.model, self.policy.checkpoint.vocabulary, [Text(ids)])
        self._past, self.scene = [], None
        self.sequence.truncate(0)
        self.generator.manual_seed(self.policy.seed if seed is None else seed)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """See Emu3Policy.infer."""
        return self.policy.infer_many([self], [observation])[0]

    # -- the steps of a decision, for Emu3Policy.infer_many

    def state(self) -> tuple[int, torch.Tensor]:
        """What a decision changes before `remember`."""
        return self.sequence.length, self.generator.get_state()

    def restore(self, state: tuple[int, torch.Tensor]) -> None:
        """Back to what `state` gave."""
        self.sequence.truncate(state[0])
        self.generator.set_state(state[1])

    def look(self, observation: dict[str, np.ndarray]) -> list[Segment]:
        """What the document has of a moment: codes of the cameras' images, in stream order (where an observation has the codes, those), and
        the arm's state where it is said."""
        if self._instruction is None:
            raise ValueError("infer was called before reset; tell the policy the instruction first")
        checkpoint, images = self.policy.checkpoint, []
        given = checked_codes(observation, self.policy.vision_tokenizer)
        for grid in checkpoint.vocabulary.images:
            if grid.name in given:
                images.append(Image(grid.name, given[grid.name].astype(np.int64)))
                continue
            if grid.name not in observation:
                raise ValueError(f"the observation has no {grid.name!r}, only {', '.join(sorted(observation))}; this policy requires it")
            codes = checkpoint.vision_tokenizer.encode_camera(grid.name, np.asarray(observation[grid.name])[None])
            images.append(Image(grid.name, codes[0].cpu().numpy()))
        return [*images, *self._felt(observation)]

    def _felt(self, observation: dict[str, np.ndarray]) -> list[Text]:
        states = self.policy.states
        if states is None:
            return []
        if ROBOT_OBS not in observation:
            raise ValueError(f"the observation has no {ROBOT_OBS!r}, only {', '.join(sorted(observation))}; this policy requires it")
        return [Text(states.ids(states.words.numbers(observation[ROBOT_OBS])))]

    def prepare(self) -> None:
        """See Emu3Policy.prepare."""
        if self._instruction is not None:
            self.policy.read_past([self])

    def unread_past(self) -> torch.Tensor:
        """Embeddings of instruction and past, as far as the cache does not hold them yet: (n, H)."""
        return torch.cat([self._instruction, *self._past])[self.sequence.length :]

    @property
    def past_is_read(self) -> bool:
        """Whether the cache holds instruction and past."""
        return self.sequence.length >= len(self._instruction) + sum(map(len, self._past))

    def last_ids(self) -> Sequence[int]:
        """Of the chunk before, if there was one."""
        return self.last_chunk[-1].ids if self._past else ()

    def remember(self, chunk: list[Segment], rows: torch.Tensor, scene: np.ndarray | None) -> None:
        """Add a chunk, its embeddings (n, H), and what was seen, to the past. Where the oldest must go, all after the instruction moves:
        the cache keeps that."""
        self.last_chunk, self.scene = chunk, scene
        self._past.append(rows)
        history = self.policy.history
        if len(self._past) > history:
            self._past = self._past[len(self._past) - history :]
            self.sequence.truncate(len(self._instruction))


@contextmanager
def _timed(timing: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    timing[stage] = time.perf_counter() - began
