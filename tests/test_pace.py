"""Rates and the time that is left, with a clock of our own."""

import pytest

from zsplg_ray.pace import ARRIVALS, KNOWN_S, SMOOTH_S, WINDOW_S, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def steady(pace: Pace, clock: Clock, each_s: float, size: int, arrivals: int, done=0) -> int:
    """So many arrivals of `size`, one every `each_s`."""
    for _ in range(arrivals):
        clock.now += each_s
        done += size
        pace.seen(done)
    return done


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_blocks_that_arrive_together_make_no_nonsense(clock):
    """16 images after 40 s and 8 right behind them are no 8,000 images a second."""
    pace = Pace(clock)
    pace.start()
    clock.now += 40
    pace.seen(16)
    clock.now += 0.001
    pace.seen(24)
    assert pace.rate() == pytest.approx(24 / 40, rel=0.01)
    assert pace.left_s(60) == pytest.approx(100, rel=0.01)


def test_nothing_is_known_at_first(clock):
    pace = Pace(clock)
    assert pace.rate() is None and pace.left_s(10) is None
    pace.start()
    assert steady(pace, clock, 0.5, 1, 3) == 3
    assert clock.now - 100 < KNOWN_S and pace.rate() is None and pace.left_s(10) is None
    steady(pace, clock, 0.5, 1, 20, done=3)
    assert pace.rate() == pytest.approx(2.0) and pace.left_s(10) == pytest.approx(5.0)
    assert pace.left_s(0) is None, "all is done"


def test_what_was_done_lately_counts(clock):
    pace = Pace(clock)
    pace.start()
    done = steady(pace, clock, 1, 1, 100)
    steady(pace, clock, 1, 5, 2 * int(WINDOW_S), done)
    assert pace.rate() == pytest.approx(5.0, rel=0.05)


def test_slow_work_has_a_window_of_several_arrivals(clock):
    pace = Pace(clock)
    pace.start()
    steady(pace, clock, 10 * WINDOW_S, 1, 3 * ARRIVALS)
    assert pace.rate() == pytest.approx(1 / (10 * WINDOW_S), rel=0.01)


def test_the_time_left_falls_evenly_between_arrivals_and_moves_little_at_one(clock):
    pace = Pace(clock)
    pace.start()
    done = steady(pace, clock, 4, 4, 30)  # one a second, in blocks
    before = pace.left_s(400 - done)
    for _ in range(3):
        clock.now += 1
        left = pace.left_s(400 - done)
        assert before is not None and left is not None and before - left == pytest.approx(1, abs=1)
        before = left
    clock.now += 0.1
    pace.seen(done + 40)  # a burst
    left = pace.left_s(400 - done - 40)
    assert left is not None and before is not None
    assert abs(before - left) < 400 / SMOOTH_S, "one arrival does not turn it over"


def test_work_that_stands_still_gets_slower(clock):
    pace = Pace(clock)
    pace.start()
    steady(pace, clock, 1, 1, 30)
    clock.now += 300
    assert pace.rate() == pytest.approx(30 / 330, rel=0.1)


def test_steps_that_are_done_again_are_not_counted_twice(clock):
    pace = Pace(clock)
    pace.start(done=50)
    steady(pace, clock, 1, 1, 20, done=50)
    pace.seen(60)
    steady(pace, clock, 1, 1, 10, done=60)
    assert 0 < pace.rate() <= 1.0  # type: ignore[operator]


def test_the_earliest_start_counts(clock):
    pace = Pace(clock)
    pace.start()
    pace.start(90.0)
    pace.start(95.0)
    assert pace.began == 90.0
    steady(pace, clock, 5, 10, 2)
    assert pace.rate() == pytest.approx(20 / 20)
