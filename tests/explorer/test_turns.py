"""Requests take turns piece by piece, few are let in, and all end when they are told to."""

import asyncio

import pytest

from retro_jax.explorer.turns import BusyError, Turns


def counting(name, log, count):
    try:
        for number in range(count):
            log.append((name, number))
            yield number
    finally:
        log.append((name, "ended"))


async def collect(turn):
    try:
        return [piece async for piece in turn]
    finally:
        turn.close()


def drain(turns):
    turns.thread.submit(lambda: None).result()


def test_requests_take_turns_and_each_gets_its_own_pieces():
    async def both():
        return await asyncio.gather(*(collect(turns.begin(counting(name, log, 3))) for name in "ab"))

    turns, log = Turns(2), []
    assert asyncio.run(both()) == [[0, 1, 2], [0, 1, 2]]
    drain(turns)
    assert log[:6] == [(name, number) for number in range(3) for name in "ab"]


def test_no_more_than_the_seats_are_let_in_and_a_closed_turn_makes_room():
    turns, log = Turns(1), []
    first = turns.begin(counting("a", log, 100))
    asyncio.run(anext_of(first))
    with pytest.raises(BusyError):
        turns.begin(counting("b", log, 1))
    first.close()
    first.close()
    drain(turns)
    assert log == [("a", 0), ("a", "ended")]
    assert asyncio.run(collect(turns.begin(counting("b", log, 1)))) == [0]


def test_a_request_that_fails_makes_room_too():
    def failing():
        yield 1
        raise ValueError("a mistake")

    turns = Turns(1)
    with pytest.raises(ValueError, match="a mistake"):
        asyncio.run(collect(turns.begin(failing())))
    drain(turns)
    assert asyncio.run(collect(turns.begin(counting("b", [], 2)))) == [0, 1]


def test_a_stop_ends_all_after_the_piece_in_progress():
    turns, log = Turns(1), []
    turn = turns.begin(counting("a", log, 100))
    assert asyncio.run(anext_of(turn)) == 0
    turns.stop()
    assert asyncio.run(collect(turn)) == []


async def anext_of(turn):
    return await anext(turn)
