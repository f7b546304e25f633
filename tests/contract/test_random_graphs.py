"""The short version of benchmarks/random_graphs.py: random models, one technique each, against
oracles.
"""

from __future__ import annotations

import pytest

from contract.oracles import TECHNIQUES, examine

NAMES = tuple(TECHNIQUES)


@pytest.fixture(autouse=True)
def _quick(no_clock: None) -> None:
    """Candidates of a fusion don't race."""


QUICK = 2 * len(NAMES)  # each technique on a plain and on an odd model
SEEDS = [*range(QUICK), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK, 30))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_model(seed: int):
    """No crash, no hang and no wrong answer without a word; every second model has odd steps."""
    name = NAMES[seed // 2 % len(NAMES)]
    outcome, message = examine(name, seed, odd=seed % 2 == 1)
    assert outcome in ("ok", "refused"), f"{name}: {outcome}: {message}"
