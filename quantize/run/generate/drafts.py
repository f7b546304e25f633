"""Guesses of what comes next, for the model to check several in one pass (Leviathan et al., arXiv
2211.17192).

A drafter guesses with the request's own noise and settings (see `sampling`), and the model's own
choice decides at every position. So the tokens are those of plain decoding, whatever the draft, and
its length may follow the clock.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LONGEST = 4  # tokens that are looked up


class ModelDraft:
    """A smaller model with the same vocabulary, read through a cache of its own if it can."""

    def __init__(self, reader, choose: Callable[[Tensor, int], Tensor]):
        self.reader, self.choose = reader, choose

    def propose(self, ids: Tensor, count: int) -> Tensor:
        """The draft's own next `count` tokens [B, count] after ids [B, T]."""
        start = ids.shape[1]
        if self.reader.length >= start:
            self.reader.truncate(start - 1)
        todo, guesses = ids[:, self.reader.length :], []
        for i in range(count):
            token = self.choose(self.reader.read(todo, last=1)[:, 0], start + i)
            todo = token[:, None]
            guesses.append(todo)
        return torch.cat(guesses, dim=1)


class LookupDraft:
    """What followed the last few tokens where they stood before in the same text (prompt look-up;
    no model).

    The longest of the last 1 to LONGEST tokens that occurs earlier is taken at its latest place.
    """

    def propose(self, ids: Tensor, count: int) -> Tensor:
        """Guesses [1, n], n from 0 (never seen before) to `count`, after ids [1, T]."""
        text = ids[0]
        for size in range(min(LONGEST, len(text) - 1), 0, -1):
            windows = text[:-1].unfold(0, size, 1)  # all earlier places [places, size]
            found = (windows == text[-size:]).all(1).nonzero()
            if len(found):
                start = int(found[-1]) + size
                return ids[:, start : start + count]
        return ids[:, :0]


class Pace:
    """How many tokens to guess: what gives the most tokens per second by the times and acceptance
    seen so far; 0 if none pays.

    A guess of n costs n drafted tokens and a pass of n + 1; it gives (1 - a^(n+1)) / (1 - a) tokens
    when each guess is right with probability a. Off, it tries again after 32 tokens, then twice as
    many each time.
    """

    def __init__(self, fixed: int | None):
        self.fixed = fixed
        self.acceptance, self.draft_s = 0.8, 0.0  # per token
        # seconds of a pass, by the number of guesses checked in it
        self.pass_s: dict[int, float] = {}
        self.pause, self.wait = 0, 32

    def length(self) -> int:
        if self.fixed is not None:
            return self.fixed
        if self.pause > 0:
            return 0
        if len(self.pass_s) < 2:  # first a pass without guesses, then one with some
            return 4 * len(self.pass_s)
        best = max((0, *LENGTHS), key=self._tokens_per_s)
        if best == 0:
            self.pause, self.wait = self.wait, self.wait * 2
            self.acceptance = max(self.acceptance, 0.5)  # the next try gets a chance
        return best

    def record(self, guessed: int, right: int, draft_s: float, pass_s: float) -> None:
        """Note a round: `right` of `guessed` tokens were kept, and what drafting and checking took,
        in seconds.
        """
        self.pause -= right + 1
        old = self.pass_s.get(guessed, pass_s)
        self.pass_s[guessed] = 0.8 * old + 0.2 * pass_s
        if guessed:
            tested = min(right + 1, guessed)
            for i in range(tested):
                self.acceptance = 0.9 * self.acceptance + 0.1 * (i < right)
            each_s = draft_s / guessed
            self.draft_s = 0.8 * (self.draft_s or each_s) + 0.2 * each_s
            if right == guessed:
                self.wait = 32

    def _tokens_per_s(self, count: int) -> float:
        a = min(self.acceptance, 0.999)
        return (1 - a ** (count + 1)) / (1 - a) / (count * self.draft_s + self._pass_s(count))

    def _pass_s(self, count: int) -> float:
        """Seconds of a pass with `count` guesses: measured, or on the line between the nearest
        measured ones.
        """
        if count in self.pass_s:
            return self.pass_s[count]
        known = sorted(self.pass_s)
        low = max((n for n in known if n < count), default=known[0])
        high = min((n for n in known if n > count), default=known[-1])
        if low == high:
            low = known[0]
        slope = max(0.0, (self.pass_s[high] - self.pass_s[low]) / max(1, high - low))
        return self.pass_s[low] + slope * (count - low)
