"""The command that talks to policies: prompts in, replies out, of two models at once if asked."""

import contextlib
import math
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densityrm_core.experiment import home, load_experiment
from densityrm_dagster.commands.errors import one_line_errors
from densityrm_dagster.commands.score import ready_scorer, reward_model_folder
from densityrm_dagster.commands.talk import Talk, labels, say
from densityrm_dagster.terminal import is_terminal

if TYPE_CHECKING:
    from densityrm_core.policies.chat import Policy
    from densityrm_core.policies.decoding import Decoding

_COLDEST = 0.01  # below, scaled logits leave float32


def chat(
    model: Annotated[str, typer.Option(help="folder of a language model, or one of this experiment: grpo_a, grpo_a/0 (seed 0)")],
    versus: Annotated[str | None, typer.Option(help="a second one, which is asked the same")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="show every reply's reward: a folder, rm_density/0, or models:/<name>@<alias>")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="draw from the fewest tokens of this probability; 1: from all")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="draw from this many likeliest tokens; 0: from all")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of a reply at most; by default as many as it was trained for")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="repeats a conversation; by default a new one, which is printed")
    ] = None,
) -> None:
    """Talk to a policy, or to two at once, each of which goes on from its own replies; /help lists what else can be typed.

    Lines from a pipe are prompts too: replies go to stdout, an empty line behind each prompt's, all else to stderr. A reply
    that was cut off ends in […]. Exit code 1 if a prompt could not be answered.
    """
    _check(temperature, top_p)
    with one_line_errors(), _interruptible():
        folders = [_folder("--model", model), *([_folder("--versus", versus)] if versus is not None else [])]
        with _reward_model(reward_model) as rewards:  # what is wrong here is said before anything heavy is loaded
            policies = [_policy(folder, max_new_tokens) for folder in folders]
            scorer = ready_scorer(rewards) if rewards else None
        from densityrm_core.policies.chat import Conversation

        decodings = [_decoding(policy, temperature, top_p, top_k) for policy in policies]
        seed = secrets.randbelow(2**31) if seed is None else seed
        say(f"{' and '.join(labels(folders))}, temperature {temperature:g}; --seed {seed} repeats this conversation")
        readers = [policy.codec for policy in policies] + ([scorer.codec] if scorer else [])
        answered = Talk(Conversation(policies, decodings, seed, scorer), labels(folders), readers).run()
    raise typer.Exit(0 if answered else 1)


def _check(temperature: float, top_p: float) -> None:
    if not (temperature == 0 or _COLDEST <= temperature < math.inf):
        raise typer.BadParameter(f"{temperature} is neither 0 nor a finite number from {_COLDEST} on", param_hint="--temperature")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"{top_p} is not above 0 and at most 1", param_hint="--top-p")


def _folder(option: str, name: str) -> Path:
    """A folder by its path, else a model of this experiment by its asset and seed; the highest seed if none is given."""
    if Path(name).is_dir():
        return Path(name)
    models = home() / load_experiment().name / "models"
    if re.fullmatch(r"\w+(/\d+)?", name):
        stored = models / name
        seeds = [int(folder.name) for folder in stored.glob("*") if folder.name.isdigit()]
        stored = stored / str(max(seeds)) if seeds else stored
        if stored.is_dir():
            return stored
    there = sorted(folder.name for folder in models.glob("[!.]*"))
    known = f"{models} holds {', '.join(there)}" if there else f"{models} holds no model yet"
    raise OSError(
        f"{option} {name}: there is no such folder, nor a model of this name: {known}; set DENSITYRM_HOME, or give a folder"
    )


def _reward_model(name: str | None) -> contextlib.AbstractContextManager[Path | None]:
    if name is None:
        return contextlib.nullcontext()
    return reward_model_folder(name if name.startswith("models:") else str(_folder("--reward-model", name)))


def _policy(folder: Path, max_new_tokens: int | None) -> "Policy":
    from densityrm_core.hardware import pick_device
    from densityrm_core.policies.chat import load_policy
    from densityrm_dagster.tracking.training import set_up_torch

    compute = load_experiment().compute
    set_up_torch(compute)
    if is_terminal(sys.stderr):
        say(f"loading {folder}")
    policy = load_policy(folder, pick_device(compute.device), max_new_tokens)
    for note in policy.notes:
        say(f"note: {note}")
    return policy


def _decoding(policy: "Policy", temperature: float, top_p: float, top_k: int) -> "Decoding":
    from densityrm_core.policies.decoding import Decoding

    return Decoding(policy.codec.max_reply_tokens, temperature, top_k, top_p)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say("")
        raise typer.Exit(130) from None
