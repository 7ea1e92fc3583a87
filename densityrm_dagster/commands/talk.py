"""A conversation as a person has it in the terminal, or a script through a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from densityrm_dagster.terminal import is_terminal

if TYPE_CHECKING:
    from densityrm_core.models.tokens import Codec
    from densityrm_core.policies.chat import Conversation, Reply

_HELP = """/reset          forget the conversation
/system TEXT    set the system turn, which stands before the conversation; without TEXT there is none
/retry          reply to the last prompt anew
/help           show this list
/quit           end, as Ctrl-D does; Ctrl-C stops a reply that is being written
A prompt that begins with / needs a space before it."""
_CUT_OFF = "[…]"
_WIDE = 80  # columns of the terminal from which on two replies stand side by side


class Talk:
    """Prompts and commands in, replies out."""

    def __init__(self, conversation: "Conversation", names: Sequence[str], readers: Sequence["Codec"]) -> None:
        """Args: readers, the codec of every policy, and behind them that of the reward model if there is one."""
        self._conversation, self._names, self._readers = conversation, names, readers
        self._person = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self._console = Console(highlight=False, force_terminal=is_terminal(sys.stdout))
        self._answered = True
        self._forget_losses()
        cast(TextIO, sys.stdin).reconfigure(errors="surrogateescape")
        sys.stdout.reconfigure(errors="replace")

    def run(self) -> bool:
        """Answer until /quit or the end of input. False if lines came from a pipe and one of them was wrong."""
        if self._person:
            say("/help lists what can be typed besides prompts; Ctrl-D ends")
        for line in _lines(self._person):
            if line.strip() == "/quit":
                break
            if line.strip():
                self._take(line)
        return self._answered or self._person

    def _take(self, line: str) -> None:
        from densityrm_core.reward_models.scoring import ConversationError

        try:
            line.encode()  # bytes that are no UTF-8 came in as surrogates
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            else:
                self._answer(lambda: self._conversation.ask(line.strip()))
        except UnicodeEncodeError:
            self._refuse("this prompt is no UTF-8 text")
        except ConversationError as error:
            self._refuse(str(error))

    def _command(self, word: str, rest: str = "") -> None:
        if word == "/retry":
            self._answer(self._conversation.retry)
        elif word == "/reset":
            self._conversation.reset()
            self._forget_losses()
        elif word == "/system":
            self._conversation.instruct(rest.strip())
        elif word == "/help":
            say(_HELP)
        else:
            self._refuse(f"there is no {word}; /help lists what there is, and a space before it makes it a prompt")

    def _answer(self, ask: "Callable[[], list[Reply]]") -> None:
        try:
            with self._console.status("") if self._person else contextlib.nullcontext():
                replies = ask()
        except KeyboardInterrupt:
            if not self._person:
                raise
            say("\nstopped; the conversation is as it was before")
            return
        show(replies, self._names, self._console if is_terminal(sys.stdout) else None)
        self._say_losses()

    def _refuse(self, why: str) -> None:
        self._answered = False
        say(f"error: {why}")

    def _forget_losses(self) -> None:
        self._unsaid = {number: codec.truncated for number, codec in enumerate(self._readers)}

    def _say_losses(self) -> None:
        """Say it once of every model that what was said has outgrown."""
        for number, (name, codec) in enumerate(zip_longest(self._names, self._readers, fillvalue="the reward model")):
            if codec.truncated > self._unsaid.get(number, codec.truncated):
                del self._unsaid[number]
                replies = f" and the first {codec.max_reply_tokens:,} of a reply" * (number >= len(self._names))
                say(f"note: {name} now reads only the last {codec.max_prompt_tokens:,} tokens of the conversation{replies}")


def say(text: str) -> None:
    """Print what is no reply."""
    print(text, file=sys.stderr, flush=True)


def show(replies: "Sequence[Reply]", names: Sequence[str], terminal: Console | None) -> None:
    """Print the replies to one prompt and an empty line: as they are, or in a terminal as a person reads them."""
    several = len(replies) > 1 or replies[0].reward is not None
    heads = [_head(name, reply) for name, reply in zip(names, replies, strict=True)]
    if terminal is None:
        for head, reply in zip(heads, replies, strict=True):
            print(f"{head}\n" * several + _marked(reply))
        print(flush=True)
    else:
        _show_person(heads if several else [""], [_visible(_marked(reply)) for reply in replies], terminal)


def labels(folders: Sequence[Path]) -> list[str]:
    """The end of every path, as much of it as tells the models apart and is not but a seed."""
    parts = [folder.absolute().parts[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names) and not any(name.isdigit() for name in names):
            return names
    return [f"{Path(*path[-2:])} ({number})" for number, path in enumerate(parts, start=1)]


def _lines(person: bool) -> Iterator[str]:
    if not person:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and its keys
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _head(name: str, reply: "Reply") -> str:
    return name if reply.reward is None else f"{name}  reward {reply.reward:+.3f}"


def _marked(reply: "Reply") -> str:
    return reply.text if reply.finished else f"{reply.text.rstrip()} {_CUT_OFF}"


def _visible(text: str) -> str:
    """`text` without anything that would steer the terminal."""
    from densityrm_core.pairs.inspection import plain

    return "\n".join(map(plain, text.expandtabs().split("\n"))) or "(an empty reply)"


def _show_person(heads: Sequence[str], texts: Sequence[str], console: Console) -> None:
    if len(texts) > 1 and console.width >= _WIDE:
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for head in heads:
            table.add_column(Text(head), header_style="bold", ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        console.print(table)
    else:
        for head, text in zip(heads, texts, strict=True):
            console.print(*[Text(head, "bold")] * bool(head), Text(text), sep="\n", overflow="fold")
    console.print()
