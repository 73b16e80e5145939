"""A training that is stopped while Ray Train has the word."""

import signal

import pytest

from zsplg_ray.signals import interrupts_are_told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_told_whatever_fit_makes_of_it(number):
    before = signal.signal(number, lambda *given: None)  # as Ray's own handler: raises nothing
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_are_told():
            signal.raise_signal(number)
            raise RuntimeError("the controller is gone")
    finally:
        signal.signal(number, before)


def test_another_signal_is_none():
    before = signal.signal(signal.SIGUSR1, lambda *given: None)
    try:
        with pytest.raises(RuntimeError, match="is gone"), interrupts_are_told():
            signal.raise_signal(signal.SIGUSR1)
            raise RuntimeError("the controller is gone")
    finally:
        signal.signal(signal.SIGUSR1, before)
