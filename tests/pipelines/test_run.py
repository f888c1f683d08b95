"""Signals: the first interrupts, the second does not break off what the first has begun."""

import os
import signal
import time

import pytest

from pipelines.run import Interrupted, interruptible


def work_and_clean_up(cleaned_up: list[bool]) -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except Interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        cleaned_up.append(True)
        raise


def test_a_second_signal_does_not_break_off_the_cleaning_up() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cleaned_up: list[bool] = []
    try:
        with pytest.raises(Interrupted, match="SIGINT"), interruptible():
            work_and_clean_up(cleaned_up)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert cleaned_up == [True]


def test_without_a_signal_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
