"""Interrupts at every place where Python can take one, and what must hold behind them."""

from __future__ import annotations

import os
import sys

import flashoptim_native

FOLDER = os.path.dirname(flashoptim_native.__file__)


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt: nobody's `except Exception` takes it."""


class At:
    """Raises at the n-th line or bytecode of this package that is run inside; counts how many there are."""

    def __init__(self, number, opcodes=False):
        self.number = number
        self.opcodes = opcodes
        self.seen = 0
        self.where = None

    def __enter__(self):
        self._before = sys.gettrace()
        # Python 3.12 looks when tracing begins whether any frame has asked for bytecodes, and never again.
        sys._getframe().f_trace_opcodes = self.opcodes
        sys.settrace(self._call)
        return self

    def __exit__(self, kind, error, traceback):
        sys.settrace(self._before)
        return kind is Interrupt

    def _call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._line

    def _line(self, frame, event, argument):
        if event != ("opcode" if self.opcodes else "line"):
            return self._line
        if self.seen == self.number:
            self.seen += 1
            self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
            sys.settrace(None)
            raise Interrupt
        self.seen += 1
        return self._line


def places(action, opcodes=False):
    """How many places an action has."""
    with At(-1, opcodes) as at:
        action()
    return at.seen
