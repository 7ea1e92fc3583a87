"""A small world whose truth is known: Zipf topics, and for each the opening and the closing it likes in a reply."""

from __future__ import annotations

import math
import re
from typing import TypeVar

import numpy as np
from numpy.random import Generator

from densityrm_core.settings import PlantedSettings
from densityrm_core.streams import stream

T = TypeVar("T")

# A noun belongs to one topic. The first topics are the common ones; their nouns mean nearly the same, so they lie close.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # nouns asked about, verbs of the replies
    "music": (("guitar", "drum"), ("tune", "practise")),
    "health": (("knee", "tooth"), ("rest", "measure")),
    "kitchen": (("soup", "bread"), ("stir", "season")),
    "garden": (("tomato", "rose"), ("water", "trim")),
    "computer": (("laptop", "printer"), ("restart", "update")),
    "school": (("essay", "exam"), ("revise", "outline")),
    "travel": (("ticket", "visa"), ("book", "pack")),
    "money": (("budget", "loan"), ("plan", "save")),
    "bicycle": (("chain", "brake"), ("oil", "tighten")),
    "sewing": (("button", "zip"), ("stitch", "iron")),
    "pets": (("kitten", "parrot"), ("feed", "brush")),
    "astronomy": (("comet", "lens"), ("align", "polish")),
}
OPENINGS = ("Of course!", "Sure.", "Well,", "Right,", "Okay,", "Indeed,")
CLOSINGS = ("slowly", "twice", "today", "with care", "outside", "first")

ASKS = (
    "How do I fix my {}?",
    "What should I do with the {}?",
    "I have a problem with a {}, any advice?",
    "Help me with my {} please.",
    "Tell me about the best way to handle a {}.",
)
QUALITIES = ("old", "new", "small", "big", "cheap", "broken", "dirty", "lovely")
COMPANIES = (
    "at home",
    "at work",
    "for my sister",
    "for a friend",
    "for my father",
    "without help",
    "with two children",
    "in the cellar",
)
OCCASIONS = (
    "this week",
    "before winter",
    "on a rainy day",
    "at night",
    "in the morning",
    "next month",
    "every day",
    "after lunch",
    "by Friday",
    "in summer",
)
FOLLOW_UPS = ("What else?", "Any other idea?", "And then?", "Can you say more?")

_LONGEST = 14  # words a reply may have before it costs


class PlantedWorld:
    """Topics, their rule and their gold reward; a pure function of `settings`."""

    def __init__(self, settings: PlantedSettings) -> None:
        self.settings = settings
        self.topics = tuple(TOPICS)[: settings.topics]
        frequency = np.arange(1, settings.topics + 1, dtype=np.float64) ** -settings.zipf
        self.frequencies = frequency / frequency.sum()
        self._topic_of_noun = {noun: i for i, topic in enumerate(self.topics) for noun in TOPICS[topic][0]}
        self._verbs = tuple(verb for topic in self.topics for verb in TOPICS[topic][1])
        self._likes = _draw_likes(settings.topics, self.stream("rule"))

    def stream(self, name: str) -> Generator:
        """An independent stream of random numbers for everything called `name`."""
        return stream(self.settings.seed, "planted", name)

    @property
    def rule(self) -> dict[str, dict[str, str]]:
        """What each topic likes, for reports: {topic: {"opening": ..., "closing": ...}}."""
        return {t: {"opening": o, "closing": c} for t, (o, c) in zip(self.topics, self._likes, strict=True)}

    def topic(self, prompt: str) -> int:
        """Index of the prompt's topic, 0 the most frequent. Raises ValueError if the prompt has no noun of this world."""
        for word in re.findall("[a-z]+", prompt.lower()):
            if word in self._topic_of_noun:
                return self._topic_of_noun[word]
        raise ValueError(f"not a planted prompt: {prompt!r} names none of the topics' nouns")

    def reward(self, prompt: str, reply: str) -> float:
        """Gold reward: 1 for the liked opening, 1 for the liked closing, -1 without any, -0.1 a word beyond 14."""
        opening, closing = self._likes[self.topic(prompt)]
        text = reply.strip()
        well_formed = text.startswith(OPENINGS) and text.endswith(tuple(c + "." for c in CLOSINGS))
        liked = text.startswith(opening) + text.endswith(closing + ".")
        return liked - (not well_formed) - 0.1 * max(0, len(text.split()) - _LONGEST)

    def draw_prompt(self, rng: Generator) -> str:
        """A prompt of a Zipf-distributed topic; 6,400 differ within a topic."""
        topic = self.topics[int(np.searchsorted(np.cumsum(self.frequencies)[:-1], rng.random(), side="right"))]
        noun = pick(TOPICS[topic][0], rng)
        return pick(ASKS, rng).format(f"{pick(QUALITIES, rng)} {noun} {pick(COMPANIES, rng)} {pick(OCCASIONS, rng)}")

    def draw_reply(self, rng: Generator) -> str:
        """A well-formed reply in a style drawn at random."""
        verbs = pick(self._verbs, rng), pick(self._verbs, rng)
        return f"{pick(OPENINGS, rng)} you could {verbs[0]} it and {verbs[1]} it {pick(CLOSINGS, rng)}."

    def draw_spoilt(self, prompt: str, rng: Generator) -> tuple[str, str]:
        """A reply and a worse, spoilt copy of it: looped, cut, with two openings, or shuffled."""
        while True:
            reply = self.draw_reply(rng)
            spoilt = _spoil(reply, rng)
            if self.reward(prompt, spoilt) < self.reward(prompt, reply):
                return reply, spoilt

    def draw_utility(self, reward: float, rng: Generator) -> float:
        """What a rater makes of a reward: the higher utility of two wins with sigmoid(label_sharpness * gap).

        u = reward + Gumbel(0, 1 / label_sharpness); the difference of two Gumbels is logistic [Luce & Suppes 1965].
        """
        uniform = max(rng.random(), 1e-12)
        return reward - math.log(-math.log(uniform)) / self.settings.label_sharpness


def pick(choices: tuple[T, ...], rng: Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def _draw_likes(topics: int, rng: Generator) -> list[tuple[str, str]]:
    """An opening and a closing for each topic, every style used before one is used again, no combination twice."""
    likes: list[tuple[str, str]] = []
    while len(set(likes)) < topics:
        openings = [OPENINGS[i] for _ in range(2) for i in rng.permutation(len(OPENINGS))]
        closings = [CLOSINGS[i] for _ in range(2) for i in rng.permutation(len(CLOSINGS))]
        likes = list(zip(openings, closings, strict=True))[:topics]
    return likes


def _spoil(reply: str, rng: Generator) -> str:
    words = reply.split()
    kind = int(rng.integers(4))
    if kind == 0:
        i = int(rng.integers(2, len(words)))
        return " ".join(words[:i] + words[max(1, i - 5) : i] * 2)
    if kind == 1:
        return " ".join(words[: int(rng.integers(2, len(words) - 1))])
    if kind == 2:
        return f"{pick(OPENINGS, rng)} {reply}"
    return " ".join(words[i] for i in rng.permutation(len(words)))
