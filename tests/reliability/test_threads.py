"""One optimizer and several threads: steps take turns, none is lost, and a state dict is of one moment."""

from __future__ import annotations

import threading

import torch

from attacks import IS_LONG, contents, plain, small
from helpers import set_grads


def in_threads(count, action):
    errors = []

    def run():
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_lose_no_step(tally):
    steps, count = (2000 if IS_LONG else 200), 4
    params, optimizer = small(steps=1, shapes=[(64, 64), (5,)])
    _, expected = small(steps=1, shapes=[(64, 64), (5,)])
    set_grads(params, 3)
    set_grads(expected.param_groups[0]["params"], 3)

    def act():
        for _ in range(steps):
            optimizer.step()
            tally.count("stepped")

    assert in_threads(count, act) == []
    for _ in range(steps * count):
        expected.step()
    assert optimizer.state[params[0]]["step"] == 1 + steps * count
    assert contents(optimizer) == contents(expected)


def test_threads_with_a_parameter_each_lose_no_step(tally):
    steps = 500 if IS_LONG else 100
    params, optimizer = small(steps=1)
    set_grads(params, 3)
    waiting = list(params)

    def act():
        mine = waiting.pop()
        for _ in range(steps):
            optimizer.step_param(mine)
            tally.count("stepped")

    assert in_threads(len(params), act) == []
    assert [optimizer.state[p]["step"] for p in params] == [1 + steps] * len(params)


def test_a_state_dict_beside_steps_is_of_one_moment(tally):
    """Every one that is taken has counts that agree; its arrays are live, and a load says where they went on."""
    params, optimizer = small(steps=1, shapes=[(64, 64), (5,)])
    set_grads(params, 3)
    stop = threading.Event()
    shown = []

    def act():
        while not stop.is_set():
            optimizer.step()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        for _ in range(400 if IS_LONG else 60):
            saved = optimizer.state_dict()
            shown.append({int(held["step"]) for held in saved["state"].values()})
            tally.count("taken")
    finally:
        stop.set()
        thread.join()
    assert all(len(steps) == 1 for steps in shown)
    _, other = small(steps=0, shapes=[(64, 64), (5,)])
    try:
        other.load_state_dict(saved)
    except ValueError as error:
        assert "checksum" in str(error)
    else:
        assert plain(other.state[other.param_groups[0]["params"][0]]) == plain(optimizer.state[params[0]])


def test_loads_beside_steps_are_whole(tally):
    params, optimizer = small(steps=1)
    _, source = small(steps=5)
    saved = source.state_dict()
    set_grads(params, 3)

    def act():
        for number in range(40):
            optimizer.step() if number % 4 else optimizer.load_state_dict(saved)
            tally.count("done")

    assert in_threads(3, act) == []
    assert len({held["step"] for held in optimizer.state.values()}) == 1
    assert all(bool(torch.isfinite(p).all()) for p in params)
