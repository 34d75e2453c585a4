"""How many tokens are drafted, by a clock that goes as engines would take."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from vllm_toptheta.backend.drafts.length import SETTLING, WINDOW, DraftLength, Load

CHOICES = [8, 0, 4, 8, 8]
Cost = Callable[[int], tuple[float, float]]  # by drafts: seconds of a step, and tokens that it gives a sequence


def engine(sparse: float, acceptance: float, verification: float = 1.4) -> Cost:
    """Of a dense step that takes a second."""

    def step(drafts: int) -> tuple[float, float]:
        tokens = sum(acceptance**index for index in range(drafts + 1))
        return (drafts * sparse + verification if drafts else 1.0), tokens

    return step


def best(cost: Cost) -> float:
    """Tokens a second, with the number of drafts that is fastest."""
    return max(tokens / seconds for seconds, tokens in map(cost, set(CHOICES)))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    """Steps of an engine, two of which are always on their way, as with asynchronous scheduling."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.length = DraftLength(CHOICES, self.clock)
        self.scheduled = [self.length[1]] * 3
        self.before = 0.0  # when it last began to run
        self.chance = random.Random(0)  # noqa: S311 - nothing is secret

    def run(self, cost: Cost, steps: int, *, num_seqs: int = 12, context: int = 32_000, prompts: float = 0.0) -> float:
        """Tokens that a sequence gets in a second; a step holds a prompt, left out, with a chance of `prompts`."""
        begin = self.before = self.clock.now
        waited, given = 0.0, 0.0
        for _ in range(steps):
            drafts = self.scheduled.pop(0)
            self.scheduled.append(self.length[num_seqs])
            seconds, tokens = cost(drafts)
            noise = self.chance.uniform(0.97, 1.03)
            is_plain = self.chance.random() >= prompts
            self.clock.now += seconds * noise + (0 if is_plain else 20)
            waited += 0 if is_plain else 20
            whole = int(tokens * num_seqs + self.chance.random())
            given += whole / num_seqs
            self.length.step(num_seqs, num_seqs * context, whole, is_plain=is_plain)
        return given / (self.clock.now - begin - waited)


@pytest.mark.parametrize(
    ("sparse", "acceptance"),
    [(0.45, 0.98), (0.45, 0.9), (0.45, 0.6), (0.7, 0.98), (0.7, 0.9), (1.0, 1.0), (1.0, 0.5), (0.3, 0.995), (0.9, 0.0)],
)
@pytest.mark.parametrize("prompts", [0.0, 0.2])
def test_it_is_nearly_as_fast_as_the_best_number(sparse: float, acceptance: float, prompts: float) -> None:
    server, cost = Server(), engine(sparse, acceptance)
    server.run(cost, 200, prompts=prompts)
    # trials included
    assert server.run(cost, 4000, prompts=prompts) > 0.97 * best(cost)


@pytest.mark.parametrize(("sparse", "acceptance"), [(0.45, 0.95), (0.45, 0.7), (1.0, 0.98), (0.7, 0.98)])
def test_single_sequences_whose_drafts_are_accepted_by_chance(sparse: float, acceptance: float) -> None:
    chance = random.Random(1)  # noqa: S311 - nothing is secret
    expected = engine(sparse, acceptance)

    def cost(drafts: int) -> tuple[float, float]:
        accepted = next((index for index in range(drafts) if chance.random() > acceptance), drafts)
        return expected(drafts)[0], accepted + 1

    server = Server()
    server.run(cost, 200, num_seqs=1)
    assert server.run(cost, 6000, num_seqs=1) > 0.95 * best(expected)


def test_the_most_is_tried_first_and_all_are_within_a_hundred_steps() -> None:
    server = Server()
    tried = [server.length.current]
    for _ in range(100):
        server.run(engine(1.0, 0.5), 1)
        if server.length.current != tried[-1]:
            tried.append(server.length.current)
    assert tried[:3] == [8, 4, 0]
    assert tried[3:] == []


def test_texts_that_change_are_noticed() -> None:
    server, wrong, right = Server(), engine(0.45, 0.3), engine(0.45, 0.98)
    server.run(wrong, 400)
    assert server.length.current == 0
    # what took long is tried again after long
    server.run(engine(0.45, 0.3), 3000)
    assert server.length.current == 0
    server.run(right, 6000)
    assert server.length.current == 8
    server.run(wrong, 60)
    assert server.run(wrong, 4000) > 0.97 * best(wrong)


def test_loads_are_known_apart() -> None:
    server, short, long = Server(), engine(1.0, 0.98), engine(0.45, 0.98)
    for _ in range(6):  # less than a window of each at a time
        for _ in range(10):
            server.run(short, WINDOW // 2 + SETTLING, context=500)
            server.run(long, WINDOW // 2 + SETTLING)
    found = {}
    for name, cost, context in (("short", short, 500), ("long", long, 32_000)):
        server.run(cost, SETTLING + 1, context=context)
        found[name] = server.length.current
    assert found == {"short": 0, "long": 8}


def test_a_load_that_is_new_begins_with_what_is_drafted() -> None:
    server, cost = Server(), engine(0.45, 0.3)
    server.run(cost, 400)
    assert server.length.current == 0
    for num_seqs in (1, 3, 6, 12):  # as requests come
        server.run(cost, 2, num_seqs=num_seqs)
        assert server.length.current == 0


@pytest.mark.parametrize(("sparse", "acceptance", "number"), [(0.5, 0.5, 0), (0.45, 0.98, 8)])
def test_batches_whose_requests_end_one_after_the_other(sparse: float, acceptance: float, number: int) -> None:
    """Each begins with prompts, and ends with a few steps of every smaller load."""
    server, cost = Server(), engine(sparse, acceptance)

    def batch() -> tuple[float, float]:
        """Seconds, and those of none or all of the drafts."""
        begin, expected = server.clock.now, 0.0
        for num_seqs, steps in [(12, 100), *((num_seqs, 4) for num_seqs in range(11, 0, -1))]:
            given = 0.0
            while given < steps:
                given += server.run(cost, 1, num_seqs=num_seqs) * (server.clock.now - server.before)
            seconds, tokens = cost(number)
            expected += given * seconds / tokens
        return server.clock.now - begin, expected

    batch()
    taken, expected = map(sum, zip(*(batch() for _ in range(8)), strict=True))
    assert taken < 1.03 * expected


def test_what_is_borrowed_keeps_its_proportions() -> None:
    """So that no other number is tried where steps of a larger batch take thrice the time."""
    server, cost = Server(), engine(0.45, 0.98)
    server.run(cost, 400, num_seqs=6)
    assert server.length.current == 8

    def slower(drafts: int) -> tuple[float, float]:
        seconds, tokens = cost(drafts)
        return 3 * seconds, tokens

    for _ in range(5 * WINDOW):
        server.run(slower, 1, num_seqs=12)
        assert server.length.current == 8


def test_a_load_far_from_the_last_one_is_tried_on_its_own() -> None:
    server = Server()
    server.run(engine(1.0, 0.5), 400, context=500)
    assert server.length.current == 0
    server.run(engine(0.45, 0.98), 100)
    assert server.length.current == 8


def test_what_is_tried_again_is_not_tried_on_when_its_load_comes_back() -> None:
    server, cost = Server(), engine(0.45, 0.3)
    server.run(cost, 400)
    while server.length.current == 0:  # after long
        server.run(cost, 1)
    server.run(cost, 1, num_seqs=100)
    server.run(cost, SETTLING + 1)
    assert server.length.current == 0


def test_loads() -> None:
    assert Load.of(12, 12 * 32_000) == Load.of(15, 15 * 20_000)
    edges = [Load.of(count, count * 1000) for count in (1, 2, 4, 8, 16)]
    assert all(one != other for one, other in pairwise(edges))
    assert Load.of(0, 0) == (0, 0)


def test_one_number_is_kept() -> None:
    length = DraftLength([6], Clock())
    for _ in range(100):
        length.step(1, 100, 1, is_plain=True)
    assert length[1] == 6


def test_steps_that_give_nothing_are_no_error() -> None:
    server = Server()
    for _ in range(200):
        server.clock.now += 1
        server.length.step(2, 100, 0, is_plain=True)
        server.length.step(0, 0, 0, is_plain=True)
    assert server.length.current in CHOICES


@pytest.mark.parametrize(("relative", "are_worth"), [(0.985, False), (0.93, True)])
def test_drafts_have_to_be_worth_it(relative: float, are_worth: bool) -> None:
    """What they gain in full steps is lost again where requests of a batch end one after the other."""
    server, drafted = Server(), []

    def cost(drafts: int) -> tuple[float, float]:
        drafted.append(drafts)
        seconds, tokens = engine(0.6, 0.98)(drafts)
        return (relative * tokens if drafts else seconds), tokens

    server.run(cost, 200)
    drafted.clear()
    server.run(cost, 4000)
    # a step without drafts takes a fifth or a tenth of the time of others, so trials are many steps
    share = sum(map(bool, drafted)) / len(drafted)
    assert share > 0.75 if are_worth else share < 0.06
