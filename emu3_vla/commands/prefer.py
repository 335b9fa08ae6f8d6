"""`emu3-vla prefer`: preference pairs of a policy's own answers, for `emu3-vla train preset=stage/dpo`.

    emu3-vla prefer output_dir=outputs/pairs policy=outputs/train/policy
    emu3-vla prefer output_dir=outputs/picture_pairs policy=outputs/draw/policy kind=images tokens=outputs/tokens

rollouts: from the same state and for the same instruction the policy drives the simulated arm several times; the simulator's oracle ranks
the rollouts: success before failure, and among successes the quicker. The states are training states as `collect` draws them, none of the
benchmark's.
images: the model draws several pictures for one caption; the one of which the caption is truest is preferred (training.drawing).

The best and the worst answer are a pair if they differ by `margin`. Shards that are there are skipped, so the same command goes on after a
kill; what a shard holds depends on the seed and its number alone.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import policies
from emu3_vla.commands.collect import CollectConfig, draw_chain, varied_initial_state
from eval.environment import OWN_SIMULATOR, EnvConfig
from policies.units import in_units

ROLLOUTS, IMAGES = "rollouts", "images"
KINDS = (ROLLOUTS, IMAGES)
JUDGES = 4096
"""Real pictures that drawn ones are compared with, at most."""


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """Options of `emu3-vla prefer`."""

    policy: str = policies.SHIPPED  # a shipped name or a checkpoint folder: who answers
    kind: str = ROLLOUTS  # rollouts or images
    tokens: str = ""  # images: a token store of the same tokenizers, with questions about the frames
    shards: int = 8
    situations_per_shard: int = 16  # prompts that are answered
    samples: int = 2  # answers to each
    temperature: float = 1.0  # of the answers' ids
    margin: float = 0.1  # by which the best answer must beat the worst; of a rollout's score, which is 1 for success and up to 1 for speed
    max_steps: int = 180  # control steps of a rollout
    env: EnvConfig = field(default_factory=EnvConfig)
    workers: int = 2  # processes, one thread each
    seed: int = 0
    output_dir: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in ("shards", "situations_per_shard", "max_steps", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}, expected at least 2: a pair is two answers to one prompt")
        if not self.temperature > 0 or not self.margin > 0:
            raise ValueError(f"temperature={self.temperature} and margin={self.margin}, expected above 0: equal answers make no pair")
        if policies.checkpoint_folder(self.policy) is None:
            raise ValueError(f"policy is {self.policy!r}, expected a checkpoint: pairs are of what a model wrote")
        if (self.kind == IMAGES) != bool(self.tokens):
            raise ValueError("tokens= is the token store whose captions are drawn: give it with kind=images, and not with kind=rollouts")
        if self.env.simulator != OWN_SIMULATOR:
            raise ValueError(f"env.simulator={self.env.simulator}: rollouts must begin in one state, which only {OWN_SIMULATOR} resets to")


def main(config: PreferConfig) -> None:
    """Write the missing shards of the pair store in `output_dir`."""
    from emu3_vla.data.pairs import PairStore
    from emu3_vla.data.tokens import TokenStore, hashes
    from emu3_vla.vocabulary import load_vocabulary

    folder = policies.checkpoint_folder(config.policy)
    found = hashes(folder)
    if config.tokens:
        TokenStore.open(config.tokens).require_hashes(found, f"the policy {folder}")
    made_by = {name: value for name, value in asdict(config).items() if name not in ("output_dir", "workers")}
    vocabulary = load_vocabulary(folder / "model" / "vocabulary.json")
    store = PairStore.create(config.output_dir, vocabulary, found, {"command": "prefer", "config": made_by})
    missing = [index for index in range(config.shards) if not store.has_shard(index)]
    said = TextColumn("shards · {task.fields[pairs]} pairs")
    columns = (BarColumn(), MofNCompleteColumn(), said, TimeElapsedColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, context.Pool(min(config.workers, max(1, len(missing))), initializer=_one_thread) as pool:
        bar = progress.add_task("prefer", total=config.shards, completed=config.shards - len(missing), pairs=0)
        for pairs in pool.imap_unordered(_write_shard, [(config, index) for index in missing]):
            progress.update(bar, advance=1, pairs=progress.tasks[bar].fields["pairs"] + pairs)
    print(f"{len(store)} pairs of {config.shards * config.situations_per_shard} prompts: {store.path}")


def _one_thread() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _write_shard(job: tuple[PreferConfig, int]) -> int:
    """Answer one shard's prompts; returns the number of pairs."""
    import torch

    from emu3_vla.data.pairs import PairStore

    torch.set_num_threads(1)
    config, index = job
    rng = np.random.default_rng([config.seed, index])
    answer = _rollouts if config.kind == ROLLOUTS else _drawings
    pairs = [pair for answers in answer(config, rng) if (pair := best_and_worst(answers, config.margin))]
    PairStore.open(config.output_dir).write_shard(index, pairs)
    return len(pairs)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a prompt: what was written, document by document (data.pairs.Written), how good it is, and about what."""

    written: Sequence
    score: float
    about: dict


def best_and_worst(answers: Sequence[Answer], margin: float):
    """The pair (data.pairs.Pair) of the best and the worst answer, or None where they do not differ by the margin."""
    from emu3_vla.data.pairs import Pair

    best, worst = max(answers, key=lambda answer: answer.score), min(answers, key=lambda answer: answer.score)
    if best.score - worst.score < margin:
        return None
    about = {"chosen": best.about, "rejected": worst.about}
    return Pair(chosen=best.written, rejected=worst.written, scores=(best.score, worst.score), about=about)


def rollout_score(success: bool, steps: int, max_steps: int) -> float:
    """0 for a failure; for a success 1, and up to 1 more the fewer steps it took."""
    return 2 - steps / max_steps if success else 0.0


def _rollouts(config: PreferConfig, rng: np.random.Generator):
    """Answers to each situation: rollouts from one state for one instruction."""
    from envs.calvin.language import training_wordings
    from envs.spec import ROBOT_OBS, SCENE_OBS
    from eval.chain import reset_to, run_chain

    env = config.env.make()
    varied = CollectConfig(env=config.env)
    recorder = _Recorder(_policy(config.policy, config.temperature))
    for _ in range(config.situations_per_shard):
        condition, (task, *_rest) = draw_chain(rng)
        robot_obs, scene_obs = varied_initial_state(condition, env.scene, rng, varied)
        state = {ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs}
        instruction = str(rng.choice(training_wordings()[task]))
        answers = []
        for seed in rng.integers(2**31, size=config.samples).tolist():
            result = run_chain(
                env,
                recorder,
                0,
                (condition, (task,)),
                {task: instruction},
                max_steps=config.max_steps,
                seed=seed,
                start=lambda env, result, rules, state=state: reset_to(env, state, 0, rules),
            )
            if result.error is not None:
                raise RuntimeError(f"a rollout of {task!r} broke: {result.error}")
            attempt = result.attempts[0]
            about = {"task": task, "instruction": instruction, "success": attempt.success, "steps": attempt.steps}
            score = rollout_score(attempt.success, attempt.steps, config.max_steps)
            answers.append(Answer(written=recorder.written(), score=score, about=about))
        yield answers
    env.close()


class _Recorder:
    """The policy, and for each chunk that it wrote the document that it saw then."""

    def __init__(self, policy):
        self.policy, self.name, self.requires = policy, policy.name, policy.requires
        self._instruction: list = []
        self._chunks: list[list] = []

    def reset(self, instruction: str, **options) -> None:
        from emu3_vla.documents import Begin, Text

        self.policy.reset(instruction, **options)
        self._instruction = [Begin(), Text(self.policy.checkpoint.text_tokenizer.encode(instruction))]
        self._chunks = []

    def infer(self, observation: dict[str, np.ndarray]) -> dict:
        answer = self.policy.infer(observation)
        self._chunks.append(self.policy.last_chunk)
        return answer

    def written(self) -> list:
        from emu3_vla.data.pairs import Written

        documents = []
        for number in range(len(self._chunks)):
            shown = self._chunks[max(0, number - self.policy.history) : number + 1]
            segments = [*self._instruction, *(part for chunk in shown for part in chunk)]
            documents.append(Written(segments=segments, given=len(segments) - 1))
        return documents


@cache  # once a worker, not once a shard
def _policy(name: str, temperature: float):
    return in_units(policies.load(name, temperature=temperature))


def _drawings(config: PreferConfig, rng: np.random.Generator):
    """Answers to each caption: pictures."""
    import torch

    from emu3_vla.data.pairs import Written
    from emu3_vla.documents import Begin, End, Text
    from emu3_vla.pipelines import Decoding, Pipelines
    from emu3_vla.pipelines.drawing import foretold_ids
    from emu3_vla.training.drawing import draw

    checkpoint, frames, judge = _studio(config.policy, config.tokens)
    model = Pipelines(checkpoint)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for number in rng.integers(len(frames), size=config.situations_per_shard).tolist():
        ids, caption = frames[number]
        # Pictures are compared, not what was foretold of them: that is the same for all.
        foretold = foretold_ids(model, [Text(ids)], Decoding(temperature=config.temperature, seed=int(rng.integers(2**31))))
        ids = [*ids, *foretold]
        answers = []
        for images in draw(checkpoint.model, checkpoint.vocabulary, [ids] * config.samples, config.temperature, generator):
            segments = [Begin(), Text(ids), *images, End()]
            written = [Written(segments=segments, given=2)]
            answers.append(Answer(written=written, score=judge.score(images[0].codes, caption), about={"caption": caption}))
        yield answers


@cache
def _studio(policy: str, tokens: str):
    """The checkpoint; captions of the store's frames, as ids and in words; and who judges pictures. Raises ValueError."""
    import torch

    from emu3_vla.checkpoint import load
    from emu3_vla.data.tokens import TokenStore
    from emu3_vla.model import BlockEmu3ForCausalLM
    from emu3_vla.training.drawing import NearestPictures
    from emu3_vla.training.kinds import CAPTION

    checkpoint = load(policies.checkpoint_folder(policy))
    if not isinstance(checkpoint.model, BlockEmu3ForCausalLM):
        raise ValueError(f"policy={policy} draws no pictures here: expected a model with vision blocks")
    episodes = TokenStore.open(tokens).episodes()
    if not all(episode.asked for episode in episodes):
        raise ValueError(f"tokens={tokens} holds no questions, so there are no captions; tokenize with questions=module:Class")
    asked = [(episode, frame) for episode in episodes for frame in range(len(episode.frame_step))]
    frames = [(ids := episode.asked.pair(frame, CAPTION)[1], checkpoint.text_tokenizer.decode(ids.tolist())) for episode, frame in asked]
    chosen = np.unique(np.linspace(0, len(asked) - 1, min(JUDGES, len(asked))).round().astype(int))
    codes = np.stack([asked[number][0].static_codes[asked[number][1]] for number in chosen])
    vision = checkpoint.vision_tokenizer
    judge = NearestPictures(codes, [frames[number][1] for number in chosen], vision.vectors(torch.arange(vision.codebook_size)))
    return checkpoint, frames, judge
