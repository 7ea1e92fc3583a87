"""Raw files of the planted world, in the three sources' own formats, defects included."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.random import Generator

from densityrm_core.files import replacing
from densityrm_core.settings import PlantedSettings
from densityrm_core.sources.planted_world import FOLLOW_UPS, PlantedWorld, pick

__all__ = ["PlantedWorld", "planted_file", "planted_rows", "write_raw"]

_GENERATOR = 1  # raise when the same settings shall give other rows
_TWO_TURNS = 0.15
_ANSWERS = (*(2,) * 14, *(3,) * 4, 4, 5)  # of a question, drawn uniformly
_TRIES = 60


def planted_file(name: str, settings: PlantedSettings, folder: Path) -> Path:
    """The raw file of source `name`, written unless it is there: one file for each set of settings."""
    content = json.dumps([_GENERATOR, settings.model_dump(mode="json")], sort_keys=True)
    path = folder / f"planted-{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.jsonl.gz"
    if not path.exists():
        write_raw(name, settings, path)
    return path


def write_raw(name: str, settings: PlantedSettings, path: Path) -> None:
    """Write the planted rows of source `name` in its raw format. Same settings, same bytes; the file appears at once, whole."""
    with replacing(path) as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as zipped:
        for row in planted_rows(name, settings):
            zipped.write(json.dumps(row).encode() + b"\n")


def planted_rows(name: str, settings: PlantedSettings) -> Iterator[dict[str, Any]]:
    """The rows of source `name`, drawn from a stream of its own."""
    row, rows = {
        "hh_rlhf": (_hh_row, settings.hh_rows),
        "ultrafeedback": (_ultrafeedback_row, settings.ultrafeedback_rows),
        "stack_exchange": (_stack_exchange_row, settings.stack_exchange_questions),
    }[name]
    world = PlantedWorld(settings)
    rng = world.stream(name)
    for number in range(1, rows + 1):
        yield row(world, number, rng.random() < settings.defects, rng)


def _labelled(world: PlantedWorld, prompt: str, rng: Generator) -> tuple[str, str]:
    """Two replies of unequal reward, the one a noisy rater prefers first; a spoilt reply always loses."""
    if rng.random() < world.settings.spoilt:
        return world.draw_spoilt(prompt, rng)
    first = second = world.draw_reply(rng)
    while world.reward(prompt, first) == world.reward(prompt, second):
        second = world.draw_reply(rng)
    utilities = [world.draw_utility(world.reward(prompt, reply), rng) for reply in (first, second)]
    return (first, second) if utilities[0] > utilities[1] else (second, first)


def _hh_row(world: PlantedWorld, number: int, defect: bool, rng: Generator) -> dict[str, Any]:
    prompt = world.draw_prompt(rng)
    chosen, rejected = _labelled(world, prompt, rng)
    context = other = f"\n\nHuman: {prompt}"
    if rng.random() < _TWO_TURNS:
        context = other = f"{context}\n\nAssistant: {world.draw_reply(rng)}\n\nHuman: {pick(FOLLOW_UPS, rng)}"
    if defect:
        kind = pick(("identical", "empty", "context"), rng)
        rejected = {"identical": chosen, "empty": ""}.get(kind, rejected)
        if kind == "context":
            other = f"\n\nHuman: {prompt}\n\nAssistant: {world.draw_reply(rng)}\n\nHuman: Never mind."
    return {"chosen": f"{context}\n\nAssistant: {chosen}", "rejected": f"{other}\n\nAssistant: {rejected}"}


def _ultrafeedback_row(world: PlantedWorld, number: int, defect: bool, rng: Generator) -> dict[str, Any]:
    prompt = world.draw_prompt(rng)
    chosen, rejected = _labelled(world, prompt, rng)
    low = int(rng.integers(2, 16)) / 2
    high = low + int(rng.integers(1, 5)) / 2
    if defect:
        kind = pick(("identical", "empty", "tied"), rng)
        rejected = {"identical": chosen, "empty": ""}.get(kind, rejected)
        high = low if kind == "tied" else high
    sides = {
        side: [{"content": prompt, "role": "user"}, {"content": reply, "role": "assistant"}]
        for side, reply in (("chosen", chosen), ("rejected", rejected))
    }
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        **sides,
        "messages": sides["chosen"],
        "score_chosen": high,
        "score_rejected": low,
    }


def _stack_exchange_row(world: PlantedWorld, number: int, defect: bool, rng: Generator) -> dict[str, Any]:
    prompt = world.draw_prompt(rng)
    replies = _ranked(world, prompt, pick(_ANSWERS, rng), rng)
    scores = [int(rng.integers(-2, 3))]
    for _ in replies[1:]:
        scores.append(scores[-1] + int(rng.integers(1, 4)))
    if defect:
        scores[-1] = scores[-2]
    answers = [
        {
            "answer_id": 10 * number + place,
            "author": "",
            "pm_score": scores[i],
            "selected": i == len(replies) - 1,
            "text": f"<p>{html.escape(replies[i])}</p>\n",
        }
        for place, i in enumerate(rng.permutation(len(replies)).tolist())
    ]
    return {"qid": number, "question": f"<p>{html.escape(prompt)}</p>\n", "answers": answers}


def _ranked(world: PlantedWorld, prompt: str, wanted: int, rng: Generator) -> list[str]:
    """At least two replies of distinct rewards, worst first in a noisy rater's eyes.

    Well-formed replies have three rewards, so a fourth answer is a spoilt one.
    """
    rewards: dict[str, float] = {}
    spoilt: list[str] = []
    if rng.random() < world.settings.spoilt:
        reply, worst = world.draw_spoilt(prompt, rng)
        rewards, spoilt = {reply: world.reward(prompt, reply), worst: world.reward(prompt, worst)}, [worst]
    tries = 0
    while len(rewards) < 2 or (len(rewards) < wanted and tries < _TRIES):
        tries += 1
        reply = world.draw_reply(rng) if len(rewards) < 3 else world.draw_spoilt(prompt, rng)[1]
        reward = world.reward(prompt, reply)
        if reward not in rewards.values():
            rewards[reply] = reward
    utilities = {reply: world.draw_utility(reward, rng) for reply, reward in rewards.items() if reply not in spoilt}
    return spoilt + sorted(utilities, key=utilities.__getitem__)
