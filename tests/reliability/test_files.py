"""Damaged torch.save files: every cut and flip is refused, or gives exactly what the sound file gives."""

from __future__ import annotations

import io
import warnings
import zipfile

import pytest
import torch

from attacks import CODECS, DOCUMENTED, IS_LONG, contents, everything, small
from helpers import CLASSES

FLIPS = (0x01, 0x10, 0x80)
#: Of the short form: of each case every n-th byte with one of the flips, and every n-th cut.
SHORT_FLIPS, SHORT_CUTS, SHORT_PICKLE = 105, 315, 4


def saved_bytes(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


class Target:
    """An optimizer that damaged files are loaded into, and what the sound file makes of it."""

    def __init__(self, kind, options):
        _, self.source = small(kind, steps=3, **options)
        self.sound = saved_bytes(self.source)
        self._kind, self._options = kind, options
        self._renew()
        self.optimizer.load_state_dict(torch.load(io.BytesIO(self.sound), weights_only=True))
        self.expected = contents(self.optimizer)
        self._renew()

    def _renew(self):
        _, self.optimizer = small(self._kind, steps=1, **self._options)
        self.before = everything(self.optimizer)

    def attack(self, data, what, tally):
        try:
            loaded = torch.load(io.BytesIO(data), weights_only=True)
        except Exception:  # torch's reader has said so
            return tally.count("refused by torch.load")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.optimizer.load_state_dict(loaded)
        except DOCUMENTED as error:
            if everything(self.optimizer) != self.before:
                self._renew()
                return tally.find(f"changed something before {type(error).__name__} at {what}")
            if type(error) not in DOCUMENTED or len(str(error)) < 20:
                return tally.find(f"{type(error).__name__}: {error} at {what}")
            return tally.count("refused")
        except BaseException as error:
            self._renew()
            return tally.find(f"{type(error).__name__}: {error} at {what}")
        same = contents(self.optimizer) == self.expected
        self._renew()
        return tally.count("the same") if same else tally.find(f"taken without a word at {what}")


CASES = [(kind, codec) for kind in CLASSES for codec in CODECS]


def sampled(length, stride, case):
    """Places in a file: in the short form other ones for each case, spread over the stride, so that together the cases
    look everywhere."""
    return range(length) if IS_LONG else range(CASES.index(case) * stride // len(CASES), length, stride)


@pytest.mark.parametrize(("kind", "codec"), CASES)
def test_flips_of_saved_files(kind, codec, tally):
    target = Target(kind, CODECS[codec])
    for number, at in enumerate(sampled(len(target.sound), SHORT_FLIPS, (kind, codec))):
        for flip in FLIPS if IS_LONG else (FLIPS[number % len(FLIPS)],):
            data = bytearray(target.sound)
            data[at] ^= flip
            target.attack(bytes(data), f"byte {at} ^ {flip:#x}", tally)


@pytest.mark.parametrize(("kind", "codec"), CASES)
def test_cuts_of_saved_files(kind, codec, tally):
    target = Target(kind, CODECS[codec])
    for end in sampled(len(target.sound), SHORT_CUTS, (kind, codec)):
        target.attack(target.sound[:end], f"cut at {end}", tally)


@pytest.mark.parametrize("codec", CODECS if IS_LONG else ["default"])
def test_all_values_of_all_bytes_of_the_pickle(codec, tally):
    """The dict itself: names, numbers and structure, where one byte can turn an entry into another."""
    target = Target("adamw", CODECS[codec])
    with zipfile.ZipFile(io.BytesIO(target.sound)) as archive:
        pickled = archive.read("archive/data.pkl")
    begin = target.sound.index(pickled)
    for at in range(begin, begin + len(pickled), 1 if IS_LONG else SHORT_PICKLE):
        for value in range(256) if IS_LONG else (target.sound[at] ^ 1 << (at + codec.count("e")) % 8,):
            if value == target.sound[at]:
                continue
            data = bytearray(target.sound)
            data[at] = value
            target.attack(bytes(data), f"byte {at} of {begin}...{begin + len(pickled)} = {value}", tally)
