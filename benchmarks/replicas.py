"""How uneven data-parallel replicas are, and what an exchange of microbatches mends. Simulated.

    scripts/bench replicas [--quick] [--models vlm-s,...] [--replicas 2,8,32] [--draws independent,shards]
        [--batches 2] [--before 32] [--by-work] [--cache FILE] [--json FILE]

Every replica draws its own batches of 16 microbatches of the mix that the model's recipe names (H100, the shipped
partition of the model, chosen on other batches); ``shards``: each replica draws from one source of the mix alone. All
replicas are planned before and after the exchange; of more than 32 (``--before``: as many before it, where independent
batches differ by work alone), a third of as many, the costliest, and some others, the mean being scaled from them by
work. Plans are searched by 6,000 schedules, a second of a core; those of the slowest replicas, which alone
count, by 20,000, for which a run has the time. Rules of others are planned by the same search and priced by the same
simulator, on the first batch of 32 replicas, ``swap`` beside them: ``lengths`` (largest first by tokens, equal counts),
``fitted`` (LoongForge's: a quadratic in tokens fitted to what microbatches take, largest first, up to 20 moves), ``by
module`` (OrchMLLM's: instances of each module evened by their tokens, apart from their microbatch; what moving the
encoder's outputs back costs is left out, which flatters it).

``--by-work`` searches no plans: it prints how uneven the work of replicas is before and after, over many global
batches, which bounds what any balance can gain. Thousands of plans are searched else; those in ``--cache`` are not
searched again, so that the table can be made in pieces.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import yaml

from dip_megatron.core import OperationGraph
from dip_megatron.core.graph import Floats
from dip_megatron.describe.cost import CostModel, cost_model, priced_graph
from dip_megatron.describe.files import resolve
from dip_megatron.describe.model import MultimodalModel, Partition
from dip_megatron.describe.workload import Clip, Microbatch, load_workload
from dip_megatron.planner.balance import Places, Work, assign, microbatch_work
from dip_megatron.planner.replicated import PLANNED, Outcome, outcome, rearranged, work_of
from dip_megatron.recipes import load_recipe
from dip_megatron.report.schedules import text_table
from dip_megatron.schedulers.dip.engine import search, warm_up

MODELS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l", "qwen2-5-vl-7b")
RULES = ("swap", "free", "lengths", "fitted", "by module")
COUNT = 16
EVALUATIONS, LONGER = 6000, 20_000


class Seconds:
    """Iteration times of batches under their plans, kept in a file if there is one; many processes may share it."""

    def __init__(self, file: Path | None, evaluations: int = EVALUATIONS, longer: int = LONGER):
        self.evaluations, self.longer = evaluations, longer
        self._data = sqlite3.connect(":memory:" if file is None else file, timeout=60.0, isolation_level=None)
        self._data.execute("CREATE TABLE IF NOT EXISTS plans (batch TEXT PRIMARY KEY, seconds REAL)")

    def of(self, graph: OperationGraph, evaluations: int) -> float:
        """Under the plan of a search that tries so many schedules."""
        key = _digest(graph, evaluations)
        known = self._data.execute("SELECT seconds FROM plans WHERE batch = ?", (key,)).fetchone()
        if known is None:
            found = search(graph, budget_seconds=1e6, evaluations=evaluations, deterministic=True, workers=1)
            known = (found.iteration_time,)
            self._data.execute("INSERT OR REPLACE INTO plans VALUES (?, ?)", (key, *known))
        return float(known[0])


def _digest(graph: OperationGraph, evaluations: int) -> str:
    """Of everything a search looks at."""
    whole = hashlib.sha256(str(evaluations).encode())
    for field in fields(graph):
        value = getattr(graph, field.name)
        whole.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return whole.hexdigest()


@dataclass(frozen=True, eq=False)
class Case:
    """A model as it is trained, and the mix it draws from."""

    name: str
    model: MultimodalModel
    partition: Partition
    pricer: CostModel
    mix: str
    known: Seconds
    count: int = COUNT

    @staticmethod
    def of(name: str, known: Seconds) -> Case:
        recipe = load_recipe(name)
        return Case(
            name, recipe.model, recipe.partition, cost_model(recipe.model, recipe.cluster), recipe.workload, known
        )

    def seconds(self, microbatches: Sequence[Microbatch], longer: bool = False) -> float:
        """What a replica takes under a plan for these; searched ``longer``: as long as a run does."""
        evaluations = self.known.longer if longer else self.known.evaluations
        return self.known.of(priced_graph(self.pricer, self.partition, microbatches), evaluations)

    def independent(self, replicas: int, seed: int) -> list[tuple[Microbatch, ...]]:
        """A batch for each replica, all from the whole mix."""
        return [b.microbatches for b in load_workload(self.mix, self.model, replicas, self.count, seed)]

    def shards(self, replicas: int, seed: int) -> list[tuple[Microbatch, ...]]:
        """A batch for each replica, each from one source of the mix, sources shared out by their weights."""
        whole = yaml.safe_load(resolve("workloads", self.mix).read_text(encoding="utf-8"))
        sources = whole["draw"]["sources"]
        share = np.cumsum([s["weight"] for s in sources]) / sum(s["weight"] for s in sources)
        batches: list[tuple[Microbatch, ...]] = []
        with tempfile.TemporaryDirectory() as folder:
            for r in range(replicas):
                source = sources[int(np.searchsorted(share, (r + 0.5) / replicas))]
                file = Path(folder) / "shard.yaml"
                file.write_text(yaml.safe_dump(whole | {"draw": whole["draw"] | {"sources": [source]}}))
                batches += [b.microbatches for b in load_workload(file, self.model, 1, self.count, seed * 10_000 + r)]
        return batches


def largest_first(worth: Floats, replicas: int, most: int | None) -> Places:
    """Largest first to the least loaded replica, ``most`` microbatches each (None: any number)."""
    load, count = np.zeros(replicas), np.zeros(replicas, dtype=np.int64)
    place = np.empty(len(worth), dtype=np.int64)
    for m in np.argsort(-worth, kind="stable"):
        free = load if most is None else np.where(count < most, load, np.inf)
        place[m] = np.argmin(free)
        load[place[m]] += worth[m]
        count[place[m]] += 1
    return place


def fitted(work: Work, tokens: Floats) -> Places:
    """Largest first by a quadratic in the tokens of a microbatch, fitted to what microbatches take, then the twenty
    best moves from the most to the least loaded."""
    took = work.seconds.max(axis=1)
    worth = np.asarray(np.polyval(np.polyfit(tokens, took, 2), tokens), dtype=float)
    place = largest_first(worth, work.replicas, None)
    for _ in range(20):
        load = np.bincount(place, worth, work.replicas)
        worst, least = int(np.argmax(load)), int(np.argmin(load))
        mine = np.flatnonzero(place == worst)
        after = np.maximum(load[worst] - worth[mine], load[least] + worth[mine])
        if len(mine) < 2 or after.min() >= load[worst]:
            break
        place[mine[int(np.argmin(after))]] = least
    return place


def by_module(batches: Sequence[Sequence[Microbatch]]) -> list[list[Microbatch]]:
    """Each encoder's instances largest first to the least loaded replica, and what the language model (or the DiT)
    reads likewise; each replica's instances then spread over its microbatches alike."""
    replicas, count = len(batches), len(batches[0])
    flat = [m for batch in batches for m in batch]
    if flat[0].clips:
        clips = [c for m in flat for c in m.clips]
        home = largest_first(np.array([float(c.frames * c.height * c.width) for c in clips]), replicas, None)
        spread: list[list[list[Clip]]] = [[[] for _ in range(count)] for _ in range(replicas)]
        for clip, r in sorted(zip(clips, home, strict=True), key=lambda c: -c[0].frames * c[0].height * c[0].width):
            min(spread[r], key=lambda line: sum(c.frames * c.height * c.width for c in line)).append(clip)
        return [[Microbatch(clips=tuple(line)) for line in lines if line] for lines in spread]
    place = largest_first(np.array([float(m.tokens) for m in flat]), replicas, count)
    images = np.array([i for m in flat for i in m.images], dtype=float)
    home = largest_first(images, replicas, None) if len(images) else np.zeros(0, dtype=np.int64)
    out = []
    for r in range(replicas):
        mine = [flat[m] for m in np.flatnonzero(place == r)]
        own = sorted((int(i) for i in images[home == r]), reverse=True)
        lines: list[list[int]] = [[] for _ in mine]
        for image in own:
            # Never more than the sequence has tokens, so that it stays as long as it is.
            open_ = [k for k, m in enumerate(mine) if sum(lines[k]) + image <= m.tokens]
            lines[min(open_ or range(len(mine)), key=lambda k: sum(lines[k]) / mine[k].tokens)].append(image)
        out.append([
            replace(m, text_tokens=max(m.tokens - sum(line), 0), images=tuple(line),
                    sequences=m.sequences if sum(line) <= m.tokens else ())
            for m, line in zip(mine, lines, strict=True)
        ])  # fmt: skip
    return out


def planned(
    case: Case, work: Work, batches: Sequence[Sequence[Microbatch]], place: Places, most: int = PLANNED
) -> Outcome:
    """Of the replicas under their plans, if microbatches are where ``place`` says."""
    return outcome_of(case, rearranged(batches, work.replica, place), work.cost(place), most)


def outcome_of(case: Case, batches: Sequence[Sequence[Microbatch]], cost: Floats, most: int = PLANNED) -> Outcome:
    """Under plans; those of the slowest replicas, which count, are searched as long as a run would."""
    return outcome(case.seconds, batches, cost, longer=lambda batch: case.seconds(batch, longer=True), planned=most)


def price_of(case: Case) -> Callable[[Sequence[Microbatch]], tuple[Floats, Floats]]:
    """What microbatches of one replica are worth, as :func:`work_of` asks for it."""
    return lambda batch: microbatch_work(priced_graph(case.pricer, case.partition, batch))


def by_work(case: Case, draw: str, replicas: int, count: int) -> list[str]:
    """A row of the table without plans, over ``count`` global batches."""
    before, after, moved, spent = [], [], [], []
    for b in range(count):
        work = work_of(price_of(case), getattr(case, draw)(replicas, 5 + b))
        start = time.process_time()
        found = assign(work)
        spent.append(time.process_time() - start)
        before.append(found.before.max() / found.before.mean())
        after.append(found.after.max() / found.after.mean())
        moved.append(found.moved.mean())
    return [
        case.name, draw, str(replicas), str(count), f"{np.mean(before):.3f}", f"{min(before):.3f}",
        f"{max(before):.3f}", f"{max(after):.4f}", f"{np.mean(moved):.0%}", f"{max(spent):.3f}",
    ]  # fmt: skip


def measure(case: Case, batches: Sequence[Sequence[Microbatch]], rules: bool, most: int) -> dict[str, float]:
    """One row of the table; ``most`` replicas are planned before the exchange."""
    price = price_of(case)
    replicas = len(batches)
    work = work_of(price, batches)
    start = time.process_time()
    swapped = assign(work)
    spent = time.process_time() - start
    before = planned(case, work, batches, work.replica, most)
    after = planned(case, work, batches, swapped.replica)
    row = {
        "before": before.spread, "after": after.spread, "gain": before.slowest / after.slowest,
        "moved": float(swapped.moved.mean()), "seconds": spent,
    }  # fmt: skip
    if rules:
        tokens = np.array([float(m.tokens) for batch in batches for m in batch])
        others = {
            "free": assign(work, "free").replica, "lengths": largest_first(tokens, replicas, COUNT),
            "fitted": fitted(work, tokens),
        }  # fmt: skip
        row["swap"] = after.spread
        row |= {name: planned(case, work, batches, place).spread for name, place in others.items()}
        apart = by_module(batches)
        worth = work_of(price, apart)
        row["by module"] = outcome_of(case, apart, worth.cost(worth.replica)).spread
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, few replicas, one batch")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--replicas", default="2,8,32,128,1024")
    parser.add_argument("--draws", default="independent,shards")
    parser.add_argument("--before", type=int, default=PLANNED, help="replicas planned before the exchange")
    parser.add_argument("--batches", type=int, default=2, help="global batches a row of up to 32 replicas")
    parser.add_argument("--by-work", action="store_true", help="no plans: work alone")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="schedules tried for every plan")
    parser.add_argument("--longer", type=int, default=LONGER, help="schedules tried for the slowest replicas' plans")
    parser.add_argument("--no-rules", action="store_true", help="leave out the rules of others")
    parser.add_argument("--cache", type=Path, help="keep the times of plans in this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models, counts = options.models.split(","), [int(r) for r in options.replicas.split(",")]
    if options.quick:
        models, counts, options.batches = models[:2], [2, 8], 1
    warm_up()
    assign(replace_work())
    known = Seconds(options.cache, options.evaluations, options.longer)
    rows, data = [], []
    for name in models:
        case = Case.of(name, known)
        for draw in options.draws.split(","):
            for replicas in counts if draw == "independent" else [r for r in counts if r in (8, 32)]:
                if options.by_work:
                    few = replicas <= PLANNED
                    rows.append(by_work(case, draw, replicas, options.batches if few else min(options.batches, 2)))
                    print(" ".join(rows[-1]), file=sys.stderr, flush=True)
                    continue
                rules = replicas == 32 and not options.no_rules
                found = [
                    measure(
                        case,
                        getattr(case, draw)(replicas, 5 + b),
                        rules and b == 0,
                        options.before if draw == "independent" else PLANNED,
                    )
                    for b in range(options.batches if replicas <= PLANNED else 1)
                ]
                mean = {key: float(np.mean([f[key] for f in found if key in f])) for key in found[0]}
                data.append({"model": name, "draw": draw, "replicas": replicas, **mean})
                rows.append([
                    name, draw, str(replicas), f"{mean['before']:.3f}", f"{mean['after']:.3f}", f"{mean['gain']:.3f}",
                    f"{mean['moved']:.0%}", f"{mean['seconds']:.3f}",
                    *(f"{mean[k]:.3f}" if k in mean else "" for k in RULES),
                ])  # fmt: skip
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    if options.by_work:
        print(f"Work of the most loaded replica over the mean; {COUNT} microbatches a replica\n")
        print(text_table(["model", "draw", "replicas", "batches", "before", "least", "most", "after, most", "moved",
                          "seconds"], rows))  # fmt: skip
        return
    print("Slowest replica over the mean, simulated;", end=" ")
    print(
        f"{COUNT} microbatches a replica, {options.evaluations} schedules tried for every plan, {options.longer} for "
        "those of the slowest replicas\n"
    )
    print(text_table(
        ["model", "draw", "replicas", "before", "after", "gain", "moved", "seconds", *RULES], rows,
    ))  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def replace_work() -> Work:
    """Two microbatches: what compiles the assignment before it is timed."""
    return Work(np.array([[1.0], [2.0]]), np.ones((2, 1)), np.array([0, 1]), 2)


if __name__ == "__main__":
    main()
