"""The closed form of 1F1B against an event simulation of it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from outlay.planner.estimate.pipeline import bubble_s, waits_s, zero_bubble_s


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


def closed_form(forward: list[float], backward: list[float], micro: int) -> float:
    """What the estimate makes of it: from first, a middle and the last stage."""
    pp = len(forward)
    f, b = (np.array([[x[0]], [x[1] if pp > 2 else 0.0], [x[-1]]]) for x in (forward, backward))
    one = np.array([1])
    many = np.array([micro])
    bubble = bubble_s(f + b, waits_s(f, b, np.array([pp]), one, many), many)
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
    rng = random.Random(seed)
    pp, f = rng.choice([1, 2, 4, 8, 16]), rng.uniform(0.5, 2.0)
    b, w = f * rng.uniform(0.9, 1.3), f * rng.uniform(0.6, 1.0)
    micro = pp * rng.choice([2, 3, 4, 8])
    idle = zero_bubble_s(np.array([f]), np.array([b]), np.array([w]), np.array([pp]))[0]
    assert micro * (f + b + w) + idle == pytest.approx(
        simulate_zero_bubble(f, b, w, pp, micro), rel=0.01
    )
