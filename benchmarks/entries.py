"""The benchmarks: which methods run on which cases, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import jax_block, today
from benchmarks.bench import Bench, Case, Measured, Run
from benchmarks.closed_form import products
from benchmarks.families import FAMILIES
from benchmarks.rows import TIME
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import Gaussian
from costbp.estimators.memory_plans import ByteBudget, blocks, keep_all, per_block, recomputing
from costbp.estimators.oracles import Batched, Central, Exact, OneSided
from costbp.estimators.projected import Projected

Entry = Callable[[Bench], None]

EPS = 1e-3
MANY = 8
TIMED = ("bert", "llama")  # an encoder and a decoder, where all families would take long
NOISE = 1.02  # "no slower than" allows what two equal runs differ by


def fmad_one(bench: Bench) -> None:
    """One direction by forward-mode AD, on every family."""
    ours, stock = "FmAD K=1", "stock jvp"
    for case in bench.cases():
        measured = bench.measure(
            "fmad_one",
            case,
            {ours: case.estimate(Projected(Exact(), Gaussian()))},
            {stock: partial(today.stock_jvp, case.objective, case.batch)},
            timed=_affordable(case),
        )
        _hold_closed_form(bench, case, measured, ours, 1)
        bench.hold(case, measured, ours, flops=2.05, time=2.4, memory=2.6)


def fmad_many(bench: Bench) -> None:
    """Eight directions on one primal pass."""
    ours, stock, single = "FmAD K=8", "stock vmap(jvp) K=8", "stock jvp (one of 8)"
    for case in bench.cases():
        if not _small(case) and case.family != TIMED[0]:
            continue  # one large case shows what there is to see
        measured = bench.measure(
            "fmad_many",
            case,
            {ours: case.estimate(Projected(Exact(), Gaussian(), MANY))},
            {
                stock: partial(today.stock_vmap_jvp, case.objective, case.batch, MANY),
                single: partial(today.stock_jvp, case.objective, case.batch),
            },
            timed=case.family in TIMED,
        )
        _hold_closed_form(bench, case, measured, ours, MANY)
        against = measured.times(ours, stock)
        bench.check(ours, "time over stock vmap(jvp)", "time", case.label, against, NOISE)
        eighth = measured.times(single, ours)
        gain = None if eighth is None else MANY * eighth
        bench.check(ours, "8 stock jvps over its time", "time", case.label, gain, 1.8, True)


def _hold_closed_form(bench: Bench, case: Case, measured: Measured, method: str, k: int) -> None:
    seen = products(case.objective, case.batch)
    counted = measured.counts["forward"].flops
    if seen.forward_mode(0) != counted:
        raise AssertionError(f"{case.label}: {seen.forward_mode(0)} FLOPs seen, {counted} counted")
    floor = seen.forward_mode(k)
    error = abs(measured.counts[method].flops / floor - 1)
    bench.check(method, "FLOPs, error of closed form", "flops", case.label, error, 0.005)
    bench.check(method, "closed form, in forwards", "flops", case.label, floor / counted, None)


def zo_central(bench: Bench) -> None:
    """Two losses along one direction, on every family."""
    ours, stock = "ZO central K=1", "ZO in place (MeZO)"
    estimator = Projected(Central(EPS), Gaussian())
    for case in bench.cases():
        measured = bench.measure(
            "zo_central",
            case,
            {ours: case.estimate(estimator)},
            {stock: partial(today.in_place_difference, case.objective, case.batch, EPS)},
            timed=_affordable(case),
        )
        bench.hold(case, measured, ours, flops=2.02, time=2.1, memory=1.01)
        theta = case.objective.theta
        before = theta.clone()
        case.estimate(estimator)()
        share, changed = "share of theta changed", float((theta != before).float().mean())
        bench.check(ours, share, "value", case.label, changed, 0.0)
        bench.check(stock, share, "value", case.label, today.changed_in_place(theta, EPS), None)
        half = today.changed_in_place(theta.bfloat16(), EPS)
        bench.check(stock, f"{share}, bfloat16", "value", case.label, half, None)


def zo_one_sided(bench: Bench) -> None:
    """A base loss and eight perturbed ones: looped, batched, and which of both ``auto`` runs."""
    auto, loop, batch = (f"ZO one-sided K=8 {how}" for how in ("auto", "loop", "batch"))
    for shape in (bench.size.large, bench.size.small):
        for family in TIMED:
            case = bench.case(family, *shape)

            def run(how: Batched, case: Case = case) -> Run:
                return case.estimate(Projected(OneSided(EPS, how), Gaussian(), MANY))

            both = {loop: run("never"), batch: run("always")}
            measured = bench.measure("zo_one_sided", case, both, {})
            measured.counts[auto] = bench.count(case, run("auto"))
            bench.hold(case, measured, auto, flops=9.1)
            bench.hold(case, measured, loop, memory=1.01)
            peak = measured.counts[auto].peak
            chosen = min(both, key=lambda name: abs(measured.counts[name].peak - peak))
            other = batch if chosen == loop else loop
            times, small = measured.times(chosen), shape == bench.size.small
            quantity, bound = (f"{TIME}, small batch", 9 / 2) if small else (TIME, 9 * NOISE)
            bench.check(auto, quantity, "time", case.label, times, bound)
            lead = measured.times(chosen, other)
            bench.check(auto, "time over that of the other", "time", case.label, lead, NOISE)
            bench.results.notes.append(f"{case.label}: auto chose '{chosen}'")


def bp(bench: Bench) -> None:
    """Backpropagation: everything stored, blocks recomputed, and within a byte budget."""
    full, recomputed, budgeted = "BP", "BP per block", "BP byte budget"
    stock = "BP, gradient_checkpointing"
    for family in FAMILIES:
        other = bench.objective(family, checkpointed=True)
        for shape in bench.size.shapes:
            case = bench.case(family, *shape)
            budget = _middling_budget(bench, case)
            measured = bench.measure(
                "bp",
                case,
                {
                    full: case.estimate(Backprop(keep_all)),
                    recomputed: case.estimate(Backprop(per_block)),
                    budgeted: case.estimate(Backprop(ByteBudget(budget / 2**20))),
                },
                {stock: partial(other.gradient, case.batch)},
                timed=_affordable(case),
            )
            bench.hold(case, measured, full, flops=2.1)
            bench.hold(case, measured, recomputed, flops=3.05)
            against = measured.times(recomputed, stock)
            bench.check(recomputed, "time over transformers'", "time", case.label, against, NOISE)
            share = measured.counts[budgeted].peak / budget
            bench.check(budgeted, "peak over budget", "memory", case.label, share, 1.0)


def _middling_budget(bench: Bench, case: Case) -> int:
    """Bytes halfway between the peaks with every block recomputed and with none."""
    objective, batch = case.objective, case.batch

    def everything() -> None:
        with recomputing(blocks(objective.module)):
            objective.gradient(batch)

    runs = (everything, lambda: objective.gradient(batch))
    peaks = [bench.count(case, run).peak for run in runs]
    return sum(peaks) // 2


def _small(case: Case) -> bool:
    return case.rows * case.length <= 64


def _affordable(case: Case) -> bool:
    return _small(case) or case.family == TIMED[0]


ENTRIES: dict[str, Entry] = {
    "fmad_one": fmad_one,
    "fmad_many": fmad_many,
    "zo_central": zo_central,
    "zo_one_sided": zo_one_sided,
    "bp": bp,
    "jax": jax_block.jax_block,
}
