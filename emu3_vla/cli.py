"""The command line: `emu3-vla <command> [option=value ...]`.

    emu3-vla eval policy=expert env.scene=D eval.num_sequences=50
    emu3-vla train preset=debug output_dir=outputs/try

Reads the defaults of the command's config dataclass, a preset from configs/<command>/, and the overrides; claims the output folder;
calls one `main(config)`. Errors that a user can cause end in one line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import json
import os
import sys
from pathlib import Path
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    # command: (module:ConfigClass, what it does)
    "demo": ("emu3_vla.commands.demo:DemoConfig", "the shipped policy drives one simulated chain; leaves recording, video and report"),
    "collect": ("emu3_vla.commands.collect:CollectConfig", "scripted expert's episodes, with disturbances, into an episode store"),
    "train-tokenizer": ("emu3_vla.vision_tokenizer.train:TrainTokenizerConfig", "train a vision tokenizer on an episode store"),
    "eval-tokenizer": ("emu3_vla.vision_tokenizer.evaluate:EvalTokenizerConfig", "how good vision tokenizers are, side by side"),
    "convert": ("emu3_vla.data.recordings.convert:ConvertConfig", "recordings of CALVIN, LeRobot and our own, any into any"),
    "inspect": ("emu3_vla.data.recordings.inspection:InspectConfig", "what a dataset of recordings holds, and what in it is suspicious"),
    "tokenize": ("emu3_vla.data.tokenize:TokenizeConfig", "episode store → token store"),
    "compare-action-tokenizers": (
        "action_tokenizer.compare:CompareConfig",
        "tokens, error and time of FAST and binning on the same chunks",
    ),
    "train": ("emu3_vla.training.loop:TrainConfig", "next-token prediction on a token store; preset=stage/... for each stage"),
    "prefer": ("emu3_vla.commands.prefer:PreferConfig", "pairs of a policy's own answers, ranked by the simulator, for stage/dpo"),
    "scaling-law": ("emu3_vla.training.scaling_law:ScalingLawConfig", "how the loss falls with model and data; predicts a larger model"),
    "eval": ("eval.run:EvalConfig", "score a policy on CALVIN's long-horizon chains"),
    "compare": ("eval.compare:CompareConfig", "two evaluations of the same chains, paired: is the difference real?"),
    "report": ("eval.report:ReportConfig", "an evaluation's page anew, beside others with --compare=<results>"),
    "rollout": ("eval.rollout:RolloutConfig", "one chain, with video and a Rerun recording"),
    "serve": ("emu3_vla.commands.serve:ServeConfig", "a policy over websockets, as openpi's client speaks to it"),
    "generate image": ("emu3_vla.commands.generate:ImageConfig", "draw pictures of what a prompt says"),
    "generate video": ("emu3_vla.commands.generate:VideoConfig", "film what a prompt says"),
    "extend": ("emu3_vla.commands.generate:ExtendConfig", "continue a video, for any length"),
    "ask": ("emu3_vla.commands.generate:AskConfig", "a question about pictures or a video, answered as it is written"),
    "describe": ("emu3_vla.commands.generate:DescribeConfig", "what there is to see, in words"),
    "interleave": ("emu3_vla.commands.generate:InterleaveConfig", "steps in words, each with its picture"),
    "imagine": ("emu3_vla.commands.generate:ImagineConfig", "what the cameras will see if the arm does this"),
    "complete": ("emu3_vla.commands.generate:CompleteConfig", "draw anew what a mask hides of a picture"),
    "reconstruct": ("emu3_vla.commands.generate:ReconstructConfig", "a picture or video through the vision tokenizer and back"),
    "eval-generation": (
        "emu3_vla.commands.eval_generation:EvalGenerationConfig",
        "score answers, descriptions, drawings and foresight on held-out frames",
    ),
    "export": ("emu3_vla.export:ExportConfig", "write a checkpoint in Transformers' or Llama's layout, for other programs"),
    "doctor": ("emu3_vla.commands.doctor:DoctorConfig", "check this installation; --fetch-assets downloads calvin_env's assets"),
}


POSITIONAL: dict[str, tuple[str, ...]] = {
    "compare": ("a", "b"),
    "complete": ("image", "mask"),
    "describe": ("image",),
    "doctor": ("checkpoint",),
    "extend": ("video",),
    "inspect": ("dataset",),
    "reconstruct": ("image",),
    "report": ("results",),
}
"""Commands whose first arguments may be bare values, and the options that they are."""


class UsageError(ValueError):
    """Something in the command line that the user can put right."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `emu3-vla` script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    folder = None
    try:
        command, overrides = _named(argv)
        target = _target(command)
        if overrides and overrides[0] in ("-h", "--help"):
            print(_options(command, target))
            return 0
        config = compose(command, overrides)
        if hasattr(config, "output_dir"):
            folder = claim_output_dir(command, config)
            config = dataclasses.replace(config, output_dir=str(folder))
        sys.modules[target.__module__].main(config)
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        release_output_dir(folder)
        if os.environ.get("EMU3_VLA_TRACEBACK"):
            raise
        print(f"emu3-vla: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nemu3-vla: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def compose(command: str, overrides: list[str]) -> Any:
    """The config dataclass of `command` after its preset and `overrides` ("a.b=value"). Raises UsageError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from pydantic import TypeAdapter, ValidationError

    target = _target(command)
    defaults = _defaults(target)
    overrides = [_as_override(argument) for argument in _name_positional(command, overrides)]
    sentences, overrides = _take_sentences(target, overrides)
    presets, overrides = _take_presets(command, overrides)
    known = _flatten(defaults)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if "=" not in override:
            raise UsageError(f"{override!r} is not an option; options are written name=value (emu3-vla {command} --help lists them)")
        if key not in known:
            raise UsageError(f"unknown option {key!r} of 'emu3-vla {command}'{nearest(key, known)}")
    store_name = f"{_folder(command).replace('-', '_')}_defaults"
    ConfigStore.instance().store(name=store_name, node=defaults)
    try:
        with initialize_config_dir(str(importlib.resources.files("configs")), version_base="1.3"):
            composed = hydra_compose(store_name, overrides)
            if presets:
                folder = importlib.resources.files("configs") / _folder(command)
                files = [OmegaConf.load(str(folder / f"{preset}.yaml")) for preset in presets]
                composed = OmegaConf.merge(hydra_compose(store_name), *files, OmegaConf.from_dotlist(overrides))
        values = OmegaConf.to_container(composed, resolve=True) | sentences
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"options of 'emu3-vla {command}': {str(error).splitlines()[0]}") from error
    try:
        return TypeAdapter(target).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised by the config itself: it says which option
            raise UsageError(str(first["ctx"]["error"])) from error
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"option {where or command}: {first['msg']} (got {first['input']!r})") from error


def claim_output_dir(command: str, config: Any) -> Path:
    """Create the run's folder, or resume the same run's. Raises UsageError where another run's files would be touched.

    An empty `output_dir` becomes outputs/<command>/<hash of the configuration>, so the same command finds its own folder again.
    """
    resolved = dataclasses.asdict(config)
    for name in ("output_dir", *getattr(config, "RESUMES_WITH", ())):
        resolved.pop(name)
    record = {"command": command, "config": resolved}
    text = json.dumps(record, indent=1, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = Path(config.output_dir or Path("outputs") / _folder(command) / digest[:8])
    if not _leads():
        return folder
    claim = folder / "run.json"
    if claim.exists():
        if claim.read_text() != text:
            raise UsageError(
                f"{folder} holds another run ({_difference(json.loads(claim.read_text()), record)}); "
                "choose another output_dir=, or delete that folder yourself"
            )
        return folder
    if folder.is_file():
        raise UsageError(f"output_dir={folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no run.json of this program; choose another output_dir=")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = claim.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(claim)
    return folder


def release_output_dir(folder: Path | None) -> None:
    """Give up a claim under which nothing was made, so that the corrected command may use the folder."""
    if folder is not None and _leads() and [path.name for path in folder.iterdir()] == ["run.json"]:
        (folder / "run.json").unlink()
        folder.rmdir()


def _leads() -> bool:
    """Whether this is the process that makes folders, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def nearest(name: str, known) -> str:
    """'; did you mean …?' for an unknown name, or the list of what there is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _named(argv: list[str]) -> tuple[str, list[str]]:
    """The command, which may be two words, and what follows it."""
    for words in (2, 1):
        if " ".join(argv[:words]) in COMMANDS:
            return " ".join(argv[:words]), argv[words:]
    second = [name.split()[1] for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if second:
        said = f"not {argv[1]!r}" if len(argv) > 1 else "and nothing was said"
        raise UsageError(f"'emu3-vla {argv[0]}' needs to know what: {' or '.join(second)}, {said}")
    return argv[0], argv[1:]


def _folder(command: str) -> str:
    """The name of a command's folders."""
    return command.replace(" ", "-")


def _target(command: str) -> type:
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    module, name = COMMANDS[command][0].split(":")
    return getattr(importlib.import_module(module), name)


def _defaults(target: type) -> dict:
    """Default values of a config dataclass as plain containers; '???' (Hydra's word for required) where it has none."""
    values = {}
    for field in dataclasses.fields(target):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = "???"
        if dataclasses.is_dataclass(value):
            value = _defaults(type(value)) | dataclasses.asdict(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _flatten(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{key}.")
    return keys


def _name_positional(command: str, arguments: list[str]) -> list[str]:
    """Bare values at the start become options with names."""
    named = []
    for option, argument in zip(POSITIONAL.get(command, ()), arguments, strict=False):
        if "=" in argument or argument.startswith("--"):
            break
        named.append(f"{option}={argument}")
    return named + arguments[len(named) :]


def _as_override(argument: str) -> str:
    """`--some-option=value` is some_option=value; without a value it is true."""
    if not argument.startswith("--"):
        return argument
    name, given, value = argument[2:].partition("=")
    return f"{name.replace('-', '_')}={value if given else 'true'}"


def _take_sentences(target: type, overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options that are sentences, as they were typed (Hydra would read their commas and brackets as lists), and the other overrides."""
    sentences, rest = {}, []
    for override in overrides:
        name, given, value = override.partition("=")
        if given and name in getattr(target, "SENTENCES", ()):
            sentences[name] = value
        else:
            rest.append(override)
    return sentences, rest


def _take_presets(command: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Presets in the order in which they apply ("preset=stage/vla,stage/debug" names two), and the other overrides."""
    rest = [override for override in overrides if not override.startswith("preset=")]
    given = [override.removeprefix("preset=") for override in overrides if override.startswith("preset=")]
    if not given:
        return [], rest
    folder = Path(str(importlib.resources.files("configs") / _folder(command)))
    known = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    chosen = given[-1].split(",")
    for preset in chosen:
        if preset not in known:
            raise UsageError(f"unknown preset {preset!r} of 'emu3-vla {command}'{nearest(preset, known)}")
    return chosen, rest


def _difference(old: dict, new: dict) -> str:
    if old.get("command") != new["command"]:
        return f"of 'emu3-vla {old.get('command')}'"
    before, after = _leaves(old["config"]), _leaves(json.loads(json.dumps(new["config"], default=str)))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return "; ".join(f"{key}={before.get(key)} there, {after.get(key)} now" for key in changed[:3])


def _leaves(values: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: emu3-vla COMMAND [option=value ...]\n\n" + "\n".join(lines) + "\n\nemu3-vla COMMAND --help lists its options."


def _options(command: str, target: type) -> str:
    leaves = _leaves(_defaults(target))
    lines = [f"  {key}={value}" for key, value in leaves.items()]
    return f"emu3-vla {command}: {COMMANDS[command][1]}\n\noptions and defaults ('???' must be given):\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
