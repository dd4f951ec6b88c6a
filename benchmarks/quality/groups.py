"""The runs of the quality measurements, by the question that they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from quality.rules import Nearest, OwnBlock, RandomBlocks, Rule, Sizes, compensation_error, sub_blocks
from rainfusion.core.policies import Hybrid, TopK, TopP

SHARES = (0.6, 0.7, 0.8, 0.9, 0.95)
PICTURED = (0.8, 0.9)


@dataclass(frozen=True)
class Run:
    """A rule at a share of block pairs to skip.

    Attributes:
        dense_steps: dense at the start and at the end.
        config: further settings of a `RainFusionConfig`, for runs that go through `apply_rainfusion`; with
            ``calibrated`` for budgets a head.
        picture: keep some frames.
    """

    rule: Rule
    share: float
    dense_steps: tuple[int, int] = (0, 0)
    note: str = ""
    config: dict[str, Any] | None = None
    picture: bool = False


OURS = Rule("block means")
PAPER = Rule("published", partial(TopK, counting="paper"))
RANDOM = Rule("random blocks, no sink", RandomBlocks, {"sink": None})
RASTER = Rule("raster order, no sink", settings={"sink": None}, raster=True)
SINKS = (("first_frame", "rows and columns"), ("first_frame_keys", "columns"), (None, "none"))


def sink(name: str | None, said: str, omitted: str) -> Rule:
    """The shipped rule with a sink and a treatment of omitted blocks."""
    also = ", summaries" if omitted == "summary" else ""
    return Rule(f"sink {said}{also}", settings={"sink": name, "omitted": omitted})


def headline(grid: Sizes) -> list[Run]:
    """The published rule, and what no rule should lose to; ours is among `sinks`."""
    runs = [Run(PAPER, share, picture=share in PICTURED) for share in SHARES]
    return runs + [Run(rule, share) for share in PICTURED for rule in (RANDOM, RASTER)]


def sinks(grid: Sizes) -> list[Run]:
    """Sinks at equal density, omitted blocks dropped or summarised."""
    rules = [sink(*which, omitted) for omitted in ("drop", "summary") for which in SINKS]
    return [Run(rule, share, picture=share in PICTURED) for share in SHARES for rule in rules]


def selection(grid: Sizes) -> list[Run]:
    """Which blocks: scores, priors, windows and block sizes, without a sink."""
    no_sink = {"sink": None}
    rules = [
        Rule("own block first", OwnBlock, no_sink),
        Rule("9 nearest first", partial(Nearest, grid=grid), no_sink),
        Rule("sub-blocks", settings=no_sink, scores=sub_blocks),
        Rule("sub-blocks, summaries", settings={**no_sink, "omitted": "summary"}, scores=sub_blocks),
        Rule("compensation error, summaries", settings={**no_sink, "omitted": "summary"}, scores=compensation_error),
        *(Rule(f"window {'x'.join(map(str, w))}", settings={**no_sink, "window": w}) for w in WINDOWS),
        Rule("blocks of 64", settings={**no_sink, "block": 64}),
        Rule("blocks of 64, summaries", settings={**no_sink, "block": 64, "omitted": "summary"}),
    ]
    return [Run(rule, share) for share in (0.8, 0.9) for rule in rules]


WINDOWS = ((1, 8, 16), (2, 8, 8), (4, 4, 8), (8, 4, 4))


def masses(grid: Sizes) -> list[Run]:
    """Shares of the mass instead of numbers of blocks."""
    no_sink = {"sink": None}
    top_p = [Rule(f"top-p {mass}", lambda share, mass=mass: TopP(mass), no_sink) for mass in (0.3, 0.5, 0.7, 0.85)]
    hybrid = [Rule(f"hybrid {mass}", lambda share, mass=mass: Hybrid(share, mass), no_sink) for mass in (0.3, 0.5, 0.7)]
    return [Run(rule, 0.95 if rule in hybrid else 0.0) for rule in (*top_p, *hybrid)]


def schedule(grid: Sizes) -> list[Run]:
    """Dense steps, of 30."""
    return [
        Run(OURS, share, steps, note=f"dense {steps[0]}+{steps[1]} of 30")
        for share in (0.8, 0.9)
        for steps in ((0, 0), (3, 0), (6, 0), (9, 0), (0, 3), (0, 6), (3, 3))
    ]


def budgets(grid: Sizes) -> list[Run]:
    """Budgets a head by calibration; their rivals, one share for all heads, are among `sinks`."""
    none, full = sink(None, "none", "drop"), sink("first_frame", "rows and columns", "drop")
    runs = [Run(none, 0.8, note="uniform, applied", config={})]
    for rule, shares in ((none, SHARES), (sink(None, "none", "summary"), SHARES), (full, (0.6, 0.7, 0.8))):
        runs += [Run(rule, share, note="budgets a head", config={"calibrated": True}) for share in shares]
    return runs


def combined(grid: Sizes) -> list[Run]:
    """Budgets a head together with windows deeper in time and with smaller blocks."""
    base = {"sink": None, "omitted": "summary"}
    more: list[dict[str, Any]] = [{"window": (4, 4, 8)}, {"window": (8, 4, 4)}, {"block": 64}]
    more.append({"window": (4, 4, 4), "block": 64})
    return [
        Run(Rule(str(also), settings={**base, **also}), share, note="budgets a head", config={"calibrated": True})
        for also in more
        for share in (0.8, 0.9, 0.95)
    ]


def reuse(grid: Sizes) -> list[Run]:
    """Masks that are used again, by age and by drift."""
    rule = sink(None, "none", "drop")
    settings: list[dict[str, Any]] = [{"refresh_every": every} for every in (1, 2, 4, 8)]
    settings += [{"refresh_every": 8, "reuse_drift": drift} for drift in (0.05, 0.1, 0.2, 0.4)]
    return [
        Run(rule, 0.8, note=" ".join(f"{name} {value}" for name, value in config.items()), config=config)
        for config in settings
    ]


def quick(grid: Sizes) -> list[Run]:
    """A few runs for a CPU."""
    ours = sink(None, "none", "summary")
    return [
        Run(PAPER, 0.8, picture=True),
        Run(ours, 0.8),
        Run(ours, 0.8, note="budgets a head", config={"calibrated": True}, picture=True),
        Run(RANDOM, 0.8),
    ]


GROUPS: dict[str, Callable[[Sizes], list[Run]]] = {
    "headline": headline,
    "sinks": sinks,
    "selection": selection,
    "masses": masses,
    "schedule": schedule,
    "budgets": budgets,
    "combined": combined,
    "reuse": reuse,
    "quick": quick,
}
