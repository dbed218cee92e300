"""The closed form of 1F1B against an event simulation of it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from outlay.planner.estimate.pipeline import bubble_s, waits_s, zero_bubble_s
from outlay.planner.estimate.software import ZERO_BUBBLE, software_of


def one_f_one_b(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """Passes of one stage in order: warm-up forwards, alternation, the rest of the backwards
    (Narayanan et al. 2021, arXiv 2104.04473, figure 3)."""
    warm = min(stages - stage - 1, micro)
    order = [("f", m) for m in range(warm)]
    for m in range(micro - warm):
        order += [("f", warm + m), ("b", m)]
    return order + [("b", m) for m in range(micro - warm, micro)]


def simulate(forward: list[float], backward: list[float], micro: int) -> float:
    """Seconds until the last pass of the last stage ends; a pass starts when its stage is free and
    its input has come."""
    stages = len(forward)
    queues = [one_f_one_b(s, stages, micro) for s in range(stages)]
    done: dict[tuple[str, int, int], float] = {}
    free, at = [0.0] * stages, [0] * stages
    left = sum(map(len, queues))
    while left:
        for s, queue in enumerate(queues):
            while at[s] < len(queue):
                kind, m = queue[at[s]]
                neighbour = s - 1 if kind == "f" else s + 1
                needed = (kind, neighbour, m)
                if 0 <= neighbour < stages and needed not in done:
                    break
                ready = done.get(needed, 0.0)
                start = max(free[s], ready)
                free[s] = start + (forward[s] if kind == "f" else backward[s])
                done[kind, s, m] = free[s]
                at[s] += 1
                left -= 1
    return max(free)


def closed_form(forward: list[float], backward: list[float], micro: int, vpp: int = 1) -> float:
    """What the estimate makes of it: from first, a middle and the last stage."""
    pp = len(forward)
    f, b = (np.array([[x[0]], [x[1] if pp > 2 else 0.0], [x[-1]]]) for x in (forward, backward))
    many = np.array([micro])
    bubble = bubble_s(f + b, waits_s(f, b, np.array([pp]), np.array([vpp]), many), many)
    return float((micro * (f + b).max(axis=0) + bubble)[0])


def pipeline(
    seed: int, first: tuple[float, float], last: tuple[float, float]
) -> tuple[list[float], list[float], int]:
    """(forward, backward, micro-batches) of a random pipeline whose ends differ from its inside by
    factors in these ranges."""
    rng = random.Random(seed)
    pp = rng.choice([1, 2, 3, 4, 6, 8, 12, 16])
    micro = rng.choice([1, 2, 3, 4, 8, 16, 32, 64])
    ratio, inside = rng.uniform(1.8, 3.2), rng.uniform(0.5, 2.0)
    ends = inside * rng.uniform(*first), inside * rng.uniform(*last)
    forward = [ends[0], *([inside] * (pp - 2)), ends[1]] if pp > 1 else [inside]
    return forward, [ratio * f for f in forward], micro


@pytest.mark.parametrize("seed", range(200))
def test_closed_form_agrees_with_an_event_simulation_within_one_per_cent(seed: int) -> None:
    """Stages as partitioning leaves them: equal within a tenth, the last with up to half as much again
    (the head)."""
    forward, backward, micro = pipeline(seed, (0.9, 1.1), (0.9, 1.5))
    assert closed_form(forward, backward, micro) == pytest.approx(
        simulate(forward, backward, micro), rel=0.01
    )


@pytest.mark.parametrize("seed", range(200))
def test_stages_that_differ_twofold_agree_within_four_per_cent(seed: int) -> None:
    forward, backward, micro = pipeline(seed, (0.6, 1.3), (0.6, 1.5))
    assert closed_form(forward, backward, micro) == pytest.approx(
        simulate(forward, backward, micro), rel=0.04
    )


def test_a_uniform_pipeline_has_the_textbook_bubble() -> None:
    pp, micro = 4, 12
    assert simulate([1.0] * pp, [2.0] * pp, micro) == pytest.approx((micro + pp - 1) * 3.0)


def test_interleaving_divides_the_bubble() -> None:
    f, pp, micro = np.ones((3, 1)), np.array([8]), np.array([64])
    plain, quarter = (
        bubble_s(3 * f, waits_s(f, 2 * f, pp, np.array([vpp]), micro), micro) for vpp in (1, 4)
    )
    assert plain == pytest.approx(7 * 3.0)
    assert quarter == pytest.approx(plain / 4)


def interleaved(rank: int, pp: int, micro: int, vpp: int) -> list[tuple[str, int, int]]:
    """(pass, chunk, micro-batch) of one rank in order: micro-batches in groups of pp through each chunk,
    two chunks warmed up for each rank behind (Narayanan et al. 2021, section 2.2)."""
    total = micro * vpp
    warm = min(2 * (pp - rank - 1) + (vpp - 1) * pp, total)

    def place(i: int) -> tuple[int, int]:
        group, inside = divmod(i, pp * vpp)
        return inside // pp, group * pp + inside % pp

    forward = [("f", *place(i)) for i in range(total)]
    backward = [("b", vpp - 1 - chunk, m) for chunk, m in map(place, range(total))]
    both = (x for pair in zip(forward[warm:], backward, strict=False) for x in pair)
    return [*forward[:warm], *both, *backward[total - warm :]]


def simulate_interleaved(
    forward: list[list[float]], backward: list[list[float]], micro: int
) -> float:
    """Seconds of the same, from those of each chunk of each rank; chunk c of rank r is virtual stage
    c·pp + r."""
    pp, vpp = len(forward), len(forward[0])
    queues = [interleaved(r, pp, micro, vpp) for r in range(pp)]
    done: dict[tuple[str, int, int], float] = {}
    free, at = [0.0] * pp, [0] * pp
    while any(at[r] < len(queues[r]) for r in range(pp)):
        for r, queue in enumerate(queues):
            while at[r] < len(queue):
                kind, chunk, m = queue[at[r]]
                stage = chunk * pp + r
                before = ("f", stage - 1, m) if kind == "f" else ("b", stage + 1, m)
                if before[1] == pp * vpp:
                    before = ("f", stage, m)
                if before[1] >= 0 and before not in done:
                    break
                free[r] = max(free[r], done.get(before, 0.0))
                free[r] += (forward if kind == "f" else backward)[r][chunk]
                done[kind, stage, m] = free[r]
                at[r] += 1
    return max(free)


def chunks(ranks: list[float], inside: float, vpp: int, *, spread: bool) -> list[list[float]]:
    """Of each rank; what the first and the last differ by lies in all of them, or in the one at the end."""
    if spread:
        return [[x / vpp] * vpp for x in ranks]
    found = [[inside / vpp] * vpp for _ in ranks]
    found[0][0] += ranks[0] - inside
    found[-1][-1] += ranks[-1] - inside
    return found


def compare_interleaved(
    seed: int, first: tuple[float, float], last: tuple[float, float], *, spread: bool
) -> tuple[float, float]:
    """(closed form, simulation) of a random pipeline whose ends differ from its inside by such factors."""
    rng = random.Random(seed)
    pp, vpp = rng.choice([2, 3, 4, 6, 8, 12]), rng.choice([2, 3, 4, 5])
    micro = pp * rng.choice([1, 2, 3, 4, 5])
    ratio, inside = rng.uniform(0.8, 3.2), rng.uniform(0.5, 2.0)
    forward = [inside * rng.uniform(*first), *([inside] * (pp - 2)), inside * rng.uniform(*last)]
    backward = [ratio * f for f in forward]
    f, b = (
        chunks(x, inside * y, vpp, spread=spread) for x, y in ((forward, 1.0), (backward, ratio))
    )
    return closed_form(forward, backward, micro, vpp), simulate_interleaved(f, b, micro)


@pytest.mark.parametrize("seed", range(200))
def test_interleaving_agrees_with_its_simulation_within_one_per_cent(seed: int) -> None:
    """No rank slower than those after it: the last has the head, in all of its chunks or in the last."""
    spread = seed % 2 == 0
    low = 0.9 if spread else 1.0
    closed, simulated = compare_interleaved(seed, (low, 1.0), (1.0, 1.5), spread=spread)
    assert closed == pytest.approx(simulated, rel=0.01)


@pytest.mark.parametrize("seed", range(100))
def test_a_slower_first_rank_of_an_interleaved_pipeline_is_within_five_per_cent(seed: int) -> None:
    closed, simulated = compare_interleaved(seed, (1.0, 1.1), (0.9, 1.0), spread=True)
    assert closed == pytest.approx(simulated, rel=0.05)


def test_one_stage_has_no_bubble() -> None:
    f, one = np.array([[1.0], [0.0], [1.0]]), np.array([1])
    assert bubble_s(3 * f, waits_s(f, 2 * f, one, one, 4 * one), 4 * one) == pytest.approx(0.0)


def simulate_zero_bubble(f: float, b: float, w: float, stages: int, micro: int) -> float:
    """Events of ZB-H1: forwards and input gradients in the order of 1F1B; a stage that would wait does a
    weight gradient that is due, and those left over at the end."""
    queues = [one_f_one_b(s, stages, micro) for s in range(stages)]
    done: dict[tuple[str, int, int], float] = {}
    free, at, due = [0.0] * stages, [0] * stages, [0] * stages
    left = sum(map(len, queues))
    while left:
        for s, queue in enumerate(queues):
            while at[s] < len(queue):
                kind, m = queue[at[s]]
                neighbour = s - 1 if kind == "f" else s + 1
                if 0 <= neighbour < stages and (kind, neighbour, m) not in done:
                    break
                ready = done.get((kind, neighbour, m), 0.0)
                while due[s] and free[s] + w <= ready + 1e-9:
                    free[s], due[s] = free[s] + w, due[s] - 1
                free[s] = max(free[s], ready) + (f if kind == "f" else b)
                done[kind, s, m] = free[s]
                due[s] += kind == "b"
                at[s] += 1
                left -= 1
    return max(free[s] + w * due[s] for s in range(stages))


@pytest.mark.parametrize("seed", range(200))
def test_zero_bubble_agrees_with_its_simulation_within_one_per_cent(seed: int) -> None:
    """Few micro-batches too; b up to a forward pass more, as with recomputation."""
    rng = random.Random(seed)
    pp, f = rng.choice([1, 2, 3, 4, 8, 16]), rng.uniform(0.5, 2.0)
    b, w = f * rng.uniform(0.9, 2.3), f * rng.uniform(0.5, 1.0)
    micro = rng.choice([1, 2, 3, 5, 8, 16, 32])
    idle = zero_bubble_s(*(np.array([x]) for x in (f, b, w, pp, micro)))[0]
    assert micro * (f + b + w) + idle == pytest.approx(
        simulate_zero_bubble(f, b, w, pp, micro), rel=0.01
    )


def test_zero_bubble_waits_less_than_1f1b_and_is_nobody_elses() -> None:
    software = software_of("megatron-zero-bubble")
    assert software == ZERO_BUBBLE
    assert not any(software_of(x).zero_bubble for x in ("", "deepspeed", "megatron", "fsdp2"))
    f, b, w = (np.array([x]) for x in (1.0, 1.1, 0.9))
    pp, micro = np.array([4]), np.array([16])
    forward, backward = (np.repeat(x[:, None], 3, axis=0) for x in (f, b + w))
    plain = bubble_s(forward + backward, waits_s(forward, backward, pp, np.ones(1), micro), micro)
    assert zero_bubble_s(f, b, w, pp, micro) < 0.45 * plain
