"""Which of the measured points a search returns: the best few are measured once more, side by side.

A point that has reached a target by luck is found out so, and the one that is returned has kept the
budget twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize import checkpoint
from quantize.compression.search.budget import Budget
from quantize.compression.search.points import ORIGINAL, Row
from quantize.compression.search.result import Result, doubts_of, facts_of, layers_of
from quantize.compression.search.trial import BURST_S, Trial

CANDIDATES = 2  # measured again side by side, the best first
CONFIRMATIONS = 2  # of so many each
FEWEST_ROUNDS, MOST_ROUNDS = 5, 11  # of such a measurement
SHARE = 0.25  # of the minutes that the first of them may take
LEAST_NOISE, MOST_NOISE = 0.02, 0.05  # share of a latency that is taken for noise


def noise_of(original: Row) -> float:
    """Of a speed-up, as a share: how far the original was from itself, within reason."""
    return min(max(original["speed_noise"], LEAST_NOISE), MOST_NOISE)


def confirmation(original: Row, seconds: float) -> tuple[int, float]:
    """Rounds in which candidates and original can be measured again in about so many seconds, and
    how long that takes.
    """
    turn = max(BURST_S, original["latency_ms"]["median"] / 1e3)
    start = turn + (original["load_s"] or 0.0)
    processes = CANDIDATES + 1
    left = seconds / processes - start
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(left / turn)))
    return rounds, processes * (start + rounds * turn)


def best(rows: Sequence[Row], budget: Budget, noise: float) -> list[Row]:
    """Rows that keep the budget, the preferred one first: where a target is given, the fastest of
    those that lost least, give or take noise; ones that aren't slower than the original and reach
    the target by more than noise come before others. Without a target, the fastest.

    Args:
        rows: of all points.
        budget: what is asked for.
        noise: of a speed-up, as a share.
    """
    fitting = [row for row in rows if row["fits"]]
    if not budget.has_targets:
        return sorted(fitting, key=_by_speed)

    def rank(row: Row) -> tuple[bool, bool]:
        return is_slower(row, noise), budget.excess(row, noise) > 0

    found: list[Row] = []
    for wanted in sorted({rank(row) for row in fitting}):
        found += _by_loss([row for row in fitting if rank(row) == wanted])
    return found


def is_slower(row: Row, noise: float) -> bool:
    """Than the original, by more than noise, a share of a speed-up."""
    return row["speedup"] < 1 - noise


def nearly(rows: Sequence[Row], budget: Budget) -> list[Row]:
    """Rows within the loss that miss a target by no more than noise, the nearest first."""
    missing = [row for row in rows if row["within"] and not row["fits"]]
    close = [row for row in missing if budget.excess(row, -MOST_NOISE) <= 0]
    return sorted(close, key=budget.excess)


def _by_loss(rows: Sequence[Row]) -> list[Row]:
    """The fastest first of those that lost least: no more than the noise of the one that has surely
    lost least. Others follow by their loss.
    """
    least = min(rows, key=lambda row: row["loss"] + row["loss_noise"])
    most = max(least["loss"], 0.0) + least["loss_noise"]
    alike = [row for row in rows if row["loss"] <= most]
    others = [row for row in rows if row["loss"] > most]
    return sorted(alike, key=_by_speed) + sorted(others, key=lambda row: row["loss"])


def _by_speed(row: Mapping[str, Any]) -> tuple[float, float]:
    return -(row["speedup"] or 0.0), row["bytes"]


def choose(trial: Trial, rounds: int, was_cut: bool) -> Result:
    """The best row that keeps the budget when the best few are measured once more; else the best
    there is, and why it isn't enough.

    Args:
        trial: with all that was measured.
        rounds: of a measurement.
        was_cut: whether there was more to try when the minutes were over.
    """
    budget, rows = trial.budget, trial.rows()
    noise = noise_of(trial.original())
    wanted = best(rows, budget, noise) + nearly(rows, budget)
    for _ in range(CONFIRMATIONS):
        group, wanted = wanted[:CANDIDATES], wanted[CANDIDATES:]
        fresh = _confirmed(trial, group, rounds)
        rows = trial.rows()
        good = best([*rows[:1], *fresh], budget, noise)
        if good:
            return _result(trial, good[0], rows, True, _kept(good[0], noise))
    within = [row for row in rows if row["within"] and not row["fits"]]
    nearest = min(within, key=budget.excess)
    return _result(trial, nearest, rows, False, _missed(nearest, rows, was_cut))


def _kept(row: Row, noise: float) -> str:
    """What is said of a row that keeps the budget."""
    reason = f"{row['name']} keeps the budget: {facts_of(row)}"
    if is_slower(row, noise):
        reason += "; whatever else was tried and keeps it is slower than the original too"
    return reason


def _missed(nearest: Row, rows: Sequence[Row], was_cut: bool) -> str:
    """What is said where none does, and what the targets would cost."""
    why = "; ".join(nearest["misses"])
    reason = f"the budget isn't met: {why}; the best is {nearest['name']}: {facts_of(nearest)}"
    reaching = [row for row in rows if row["reaches"] and not row["within"]]
    if reaching:
        least = min(reaching, key=lambda row: row["loss"])
        reason += f"; {least['name']} reaches the targets, but {least['misses'][-1]}"
    return reason + "; the minutes were over before everything was tried" * was_cut


def _confirmed(trial: Trial, group: Sequence[Row], rounds: int) -> list[Row]:
    """The rows of a group measured again, without the original, which is measured beside."""
    others = [row for row in group if row["name"] != ORIGINAL]
    fresh = trial.confirmed(others, rounds) if others else []
    for row in fresh:
        try:
            trial.points.keep(row)
        except OSError as error:  # a full disk: only a later search needs it
            trial.say(f"not written down: {error}")
    return fresh


def _result(trial: Trial, row: Row, rows: list[Row], met: bool, reason: str) -> Result:
    file = trial.path(row["name"])
    model = checkpoint.load(file, trial.model)
    layers = layers_of(row, model)
    return Result(model, file, rows, met, reason + doubts_of(row, rows), layers)
