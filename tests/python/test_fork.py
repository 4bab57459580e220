"""A child of fork() has none of the threads of its parent's pool: nothing in it must wait for them."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import flashoptim_native

SECONDS = 60


def make_optimizer():
    torch.manual_seed(0)
    # Enough blocks of 1,024 elements for several threads.
    parameter = torch.nn.Parameter(torch.randn(512 * 1024).to(torch.bfloat16))
    parameter.grad = torch.randn(512 * 1024).to(torch.bfloat16)
    return parameter, flashoptim_native.FlashAdamW([parameter], lr=1e-2)


def stored_bytes(parameter):
    return bytes(parameter.detach().view(torch.uint8).numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork() is what is tested")
def test_a_step_in_a_child_behind_a_threaded_step_ends_and_has_the_same_bits():
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    try:
        parameter, optimizer = make_optimizer()
        optimizer.step()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(SECONDS)  # a child that hangs is ended, and that is a failure
                optimizer.step()
                large = torch.ones(2048, 1024).to(torch.int64)  # of torch, which would wait for its threads
                assert torch.get_num_threads() == 1 and int(large.sum()) == large.numel()
                os.close(read)
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(stored_bytes(parameter))
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            there = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        optimizer.step()
        assert there == stored_bytes(parameter)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork() is what is tested")
def test_a_child_of_a_process_that_has_not_stepped_keeps_its_threads():
    script = """
import os, sys, torch, flashoptim_native
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(8))
optimizer = flashoptim_native.FlashAdamW([p])
child = os.fork()
if child == 0:
    os._exit(torch.get_num_threads())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=SECONDS).returncode == 2
