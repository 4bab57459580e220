"""Gradient release: one gradient is alive at a time, and those of one layer at most."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flashoptim_native
from flashoptim_native import enable_gradient_release
from release_helpers import live_gradients, pair, train


@pytest.mark.parametrize("is_released", [False, True])
def test_one_gradient_is_alive_at_a_time(is_released):
    """Bytes of gradients, counted whenever one is complete: before its release, and after it."""
    model, optimizer = pair()[0]
    params = list(model.parameters())
    largest, whole = max(p.nbytes for p in params), sum(p.nbytes for p in params if p is not model.unused)
    before, after = [], []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: before.append(live_gradients(params)))
    if is_released:
        enable_gradient_release(model, optimizer)
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: after.append(live_gradients(params)))
    train(model, optimizer, range(2))
    assert len(before) == len(after) == 2 * (len(params) - 1)
    if is_released:
        assert max(before) == largest and max(after) == 0
    else:
        assert max(before) == max(after) == whole


def peak_of_backward(is_released, layers=12, width=256):
    """The most bytes that the allocator gave out at a time during a backward(), as torch's profiler saw it."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(torch.bfloat16)
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    if is_released:
        enable_gradient_release(model, optimizer)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    peak = 0
    for _ in range(2):  # the first one makes the states
        loss = model(x).float().square().mean()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss.backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        optimizer.step()
        optimizer.zero_grad()
    return peak / (width * width * 2)


def test_peak_memory_of_backward_falls_to_a_few_gradients():
    # Products bring temporaries of their own, on some processors more than four gradients at a time.
    plain, released = peak_of_backward(False), peak_of_backward(True)
    assert plain > 11
    assert released < plain - 8.5
