"""How many samples does `hfsparse eval --until decided` need for the verdict of a whole run?

    python -m benchmarks.studies.decided benchmarks/results/proof/smollm2-32k.md …
        [--limit 1.0] [--replays 200] [--seed 0]

Replays runs that were done with a number of samples set beforehand. A report keeps how many of its
pairs were lost and won by task and length, not in which order: so each replay shuffles them, and
asks them in rounds. Rows whose scores are not all 0 or 1, or of which McNemar's p leaves open how
many were won, are left out, on both sides. All arms are judged as if they promised to lose at most
--limit points.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hfsparse.anytime import anytime
from hfsparse_eval.options import ROUND
from hfsparse_eval.report.statistics import Change, change, mcnemar
from hfsparse_eval.report.verdict import judge

HEAD = (
    "arm|samples|drop, points (95 %)|verdict|decided early, % of replays|same verdict, %"
    "|samples, median|nine in ten need|of all, %"
)


def read_arms(page: Path) -> dict[str, dict[str, np.ndarray]]:
    """By arm, then by task and length: the change of each sample, 1 won, -1 lost."""
    arms: dict[str, dict[str, np.ndarray]] = {}
    for part in page.read_text("utf-8").split("\n## Scores: ")[1:]:
        title, _, rest = part.partition("\n")
        table = rest.partition("\n## ")[0].partition("Set apart")[0]
        rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        known = {
            " ".join(row[:2]): recover(row) for row in rows if len(row) == 9 and row[2].isdigit()
        }
        arms[title] = {
            name: found for name, found in known.items() if found is not None and name != "all all"
        }
    return arms


def recover(row: list[str]) -> np.ndarray | None:
    """The changes behind a row of a table of scores; None where it leaves them open."""
    _, _, n, dense, own, _, p, whole, _ = row
    if [dense, own] != whole.split(" / "):
        return None
    n, had, has = int(n), *(round(float(share) * int(n) / 100) for share in (dense, own))
    fits = [won for won in range(max(0, has - had), n - had + 1) if told(n, had, has, won) == p]
    if len(fits) != 1:
        return None
    (won,) = fits
    lost = had - has + won
    return np.repeat([-1.0, 1.0, 0.0], [lost, won, n - lost - won])


def told(n: int, had: int, has: int, won: int) -> str:
    """McNemar's p as reports print it, if so many were won; empty where that can't be."""
    lost = had - has + won
    if not 0 <= lost <= had or lost + won > n:
        return ""
    p = mcnemar([True] * lost + [False] * won, [False] * lost + [True] * won)
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def replay(strata: Mapping[str, np.ndarray], limit: float, rng) -> tuple[str, int]:
    """The verdict of a run in rounds, empty if all samples don't decide it, and its samples."""
    most = min(map(len, strata.values()))
    blocks = np.stack([rng.permutation(each)[:most] for each in strata.values()], 1) * 100
    for count in [*range(ROUND, most, ROUND), most]:
        low, high = anytime(blocks[:count], worst=100)
        seen = Change(blocks[:count].size, 0.0, low, high, alike=False, each=count)
        if word := judge(seen, limit):
            return word, seen.n
    return "", blocks.size


def rows(page: Path, options) -> Iterator[list[str]]:
    rng = np.random.default_rng(options.seed)
    for title, strata in read_arms(page).items():
        if not strata:
            continue
        most = min(map(len, strata.values()))
        changes = np.concatenate([rng.permutation(each)[:most] for each in strata.values()])
        seen = change(np.zeros(len(changes)), changes)
        verdict = judge(seen, options.limit) or "not decided"
        words, samples = zip(
            *(replay(strata, options.limit, rng) for _ in range(options.replays)), strict=True
        )
        early = [bool(word) and n < len(changes) for word, n in zip(words, samples, strict=True)]
        same = [(word or "not decided") == verdict for word in words]
        middle = np.median(samples)
        yield [
            title,
            f"{len(changes)}",
            f"{0 - seen.mean:.1f} [{0 - seen.high:.1f}, {0 - seen.low:.1f}]",
            verdict,
            f"{100 * np.mean(early):.0f}",
            f"{100 * np.mean(same):.0f}",
            f"{middle:.0f}",
            f"{np.quantile(samples, 0.9):.0f}",
            f"{100 * middle / len(changes):.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, help="reports of hfsparse eval, report.md")
    parser.add_argument("--limit", type=float, default=1.0, help="points that may be lost")
    parser.add_argument("--replays", type=int, default=200, help="of each arm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for page in options.pages:
        arms = read_arms(page)
        used = {name for strata in arms.values() for name in strata}
        print(f"\n## {page.stem}\n\nUp to {len(used)} tasks and lengths of an arm.\n")
        head = HEAD.split("|")
        for row in (head, ["---"] * len(head), *rows(page, options)):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
