"""Uniform numbers of a seed, one for each token drawn: those of numpy's PCG64, without `numpy.random`.

To import `numpy.random` takes a twentieth of the time in which a process says its first token. So the little
that drawing a token needs of it stands here, number for number the same:

    numpy.random.Generator(PCG64(SeedSequence(seed, spawn_key=(stream,)))).random()

A hash spreads seed and stream over 256 bits; these are the first state and the increment of a linear
congruential generator of 128 bits, of which 64 are given out, permuted (M. E. O'Neill, pcg-random.org).
"""

import os

_LOW_32, _LOW_64, _LOW_128 = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


class Uniform:
    """An endless stream of numbers from 0 to below 1."""

    def __init__(self, seed: int | None, stream: int = 0) -> None:
        """The same seed and stream give the same numbers; None draws a seed from the system."""
        if seed is None:
            seed = int.from_bytes(os.urandom(16), "little")
        first, increment = _spread(seed, stream)
        self._increment = (increment << 1 | 1) & _LOW_128
        self._state = self._increment + first
        self._step()

    def random(self) -> float:
        """The next number."""
        self._step()
        state = self._state
        mixed, turn = (state >> 64 ^ state) & _LOW_64, state >> 122
        turned = (mixed >> turn | mixed << 64 - turn) & _LOW_64
        return (turned >> 11) * 2.0**-53  # as many bits as a float holds

    def _step(self) -> None:
        self._state = (self._state * _MULTIPLIER + self._increment) & _LOW_128


class _Hash:
    """Multiplies 32 bits by a constant that changes with every use."""

    def __init__(self, constant: int, multiplier: int) -> None:
        self._constant, self._multiplier = constant, multiplier

    def __call__(self, word: int) -> int:
        word ^= self._constant
        self._constant = self._constant * self._multiplier & _LOW_32
        word = word * self._constant & _LOW_32
        return word ^ word >> 16


def _spread(seed: int, stream: int) -> tuple[int, int]:
    """Two numbers of 128 bits: numpy's `SeedSequence`, with a pool of four words."""
    words = [seed >> shift & _LOW_32 for shift in range(0, max(128, seed.bit_length()), 32)]
    spread = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [spread(word) for word in words[:4]]

    def mix(target: int, word: int) -> None:
        mixed = (0xCA01F9DD * pool[target] - 0x4973F715 * spread(word)) & _LOW_32
        pool[target] = mixed ^ mixed >> 16

    for source in range(4):
        for target in range(4):
            if source != target:
                mix(target, pool[source])
    for word in [*words[4:], stream]:
        for target in range(4):
            mix(target, word)
    told = _Hash(0x8B51F9DD, 0x58F38DED)
    halves = [told(word) | told(pool[place + 1]) << 32 for place, word in list(enumerate(pool))[::2] * 2]
    return halves[0] << 64 | halves[1], halves[2] << 64 | halves[3]
