"""What the driver knows of its actors: counts, how busy they are, how fast it goes."""

import threading

import pytest

from zsplg_ray.cluster.notes import Busy, NoteBook, interval_s, keep_telling
from zsplg_ray.cluster.progress import Actors, Progress
from zsplg_ray.cluster.training import Training
from zsplg_ray.display import plain_line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def said(through: int, busy_s: float, alive_s: float, **more) -> dict:
    return {"through": through, "busy_s": busy_s, "alive_s": alive_s, **more}


@pytest.fixture
def progress(clock) -> Progress:
    made = Progress("label", show=False, clock=clock)
    made.plan(40, 8)
    made.actors = Actors(2, gpus=True, clock=clock)
    return made


# What a process measures -------------------------------------------------------------------------


def test_time_at_work_is_measured_also_while_it_is_under_way(clock):
    busy = Busy(clock)
    clock.now = 4
    assert busy.read() == {"through": 0, "busy_s": 0, "alive_s": 4}
    with busy.at_work():
        clock.now = 7
        assert busy.read()["busy_s"] == 3
    clock.now = 10
    with pytest.raises(ValueError), busy.at_work():
        clock.now = 12
        raise ValueError
    assert busy.read() == {"through": 0, "busy_s": 5, "alive_s": 12}


def test_the_share_is_that_of_all_actors_lately(clock):
    actors = Actors(2, gpus=True, clock=clock)
    assert actors.busy() is None
    actors.hear_all({"a": said(0, 1, 4)})
    assert actors.busy() == 0.25
    for now in range(1, 200):
        clock.now = now
        actors.hear_all({"a": said(now, 1 + now, 4 + now), "b": said(0, 0.5 * now, now)})
    assert actors.busy() == pytest.approx(0.75, abs=0.01), "one always, the other half of its time"
    assert actors.facts() == ["GPUs busy 75%", "2 actors up"]


def test_a_quick_run_knows_how_busy_it_was_from_what_was_handed_over(clock):
    actors = Actors(1, gpus=True, clock=clock)
    actors.hear_all({"a": said(0, 0, 0.1)})
    actors.brought("a", said(24, 0.75, 1.0))
    assert actors.busy() == 0.75


def test_without_gpus_it_is_the_actors_that_are_busy(clock):
    actors = Actors(3, gpus=False, clock=clock)
    actors.hear_all({"a": said(0, 2, 2)})
    assert actors.facts() == ["actors busy 100%", "1/3 actors up"]


def test_the_book_forgets_who_is_silent(monkeypatch):
    now = Clock()
    monkeypatch.setattr("zsplg_ray.cluster.notes.time.monotonic", now)
    book = NoteBook()
    book.note("a", {"step": 1})
    now.now = 10
    book.note("b", {"step": 2})
    book.note("b", {"step": 3})
    assert book.notes(20) == {"a": {"step": 1}, "b": {"step": 3}}
    assert book.notes(5) == {"b": {"step": 3}}


def test_many_processes_speak_rarely():
    assert interval_s(1) == interval_s(100) == 1.0 and interval_s(1000) == 10.0


def test_who_finds_nobody_to_listen_stops_telling():
    calls, called = [], threading.Event()

    def tell() -> None:
        calls.append(threading.current_thread())
        called.set()
        raise RuntimeError

    keep_telling(tell, 0.001)
    assert called.wait(10)
    calls[0].join(10)
    assert not calls[0].is_alive() and len(calls) == 1


# What the driver makes of it ---------------------------------------------------------------------


def test_images_count_before_their_block_is_handed_over(progress, clock):
    progress.hear({"a": said(0, 0, 1)})
    clock.now = 5
    progress.hear({"a": said(6, 5, 6), "b": said(2, 1, 1)})
    assert progress.view().done == 8 + 6 + 2
    progress.add(15, 1, said(16, 9, 10, actor="a"))
    assert progress.view().done == 8 + 16 + 2, "none twice"
    assert progress.labelled == 15 and progress.failed == 1
    clock.now = 30
    progress.hear({"c": said(1, 1, 1)})  # a and b are gone, with what b had not handed over
    progress.add(8, 0, said(8, 9, 10, actor="c"))
    assert progress.view().done == 8 + 16 + 8
    assert "1 error" in progress.view().facts


def test_in_the_end_only_what_was_handed_over_counts(progress):
    progress.hear({"a": said(30, 5, 6)})
    progress.add(8, 0, said(8, 9, 10, actor="a"))
    assert progress.view().done == 8 + 30
    progress.over = True
    assert progress.view().done == 8 + 8


def test_it_says_so_when_all_actors_have_died(progress):
    progress.hear({"a": said(4, 5, 6)})
    progress.hear({})
    told = plain_line(progress.view())
    assert "starting actors" in told
    assert "actor up" not in told
    progress.add(4, 0, said(4, 5, 7, actor="a"))
    assert progress.view().waits is None
    progress.hear({"b": said(0, 0, 1)})
    progress.add(28, 0, said(28, 5, 7, actor="b"))
    progress.hear({})
    assert progress.view().waits is None, "all is done"


def test_the_count_never_falls_and_never_passes_the_total(progress):
    progress.hear({"a": said(100, 1, 1)})
    assert progress.view().done == 40
    progress.hear({"b": said(0, 1, 1)})
    assert progress.view().done == 40


def test_the_rate_counts_from_the_moment_at_which_models_were_loaded(progress, clock):
    clock.now = 100  # Ray and the models have taken their time
    progress.hear({"a": said(0, 0, 0)})
    clock.now = 116
    progress.add(16, 0, said(16, 16, 16, actor="a"))
    clock.now = 116.01
    progress.add(16, 0, said(32, 16, 16.01, actor="a"))
    assert progress.rate() == pytest.approx(2.0, rel=0.01), "not 16 images in 10 ms"


def test_a_run_that_nobody_heard_has_the_same_rate(progress, clock):
    clock.now = 116
    progress.add(16, 0, said(16, 16, 16, actor="a"))
    clock.now = 120
    progress.add(16, 0, said(32, 20, 20, actor="a"))
    assert progress.rate() == 32 / 20


def test_nothing_done_has_no_rate(progress):
    assert progress.rate() == 0.0


def test_it_says_what_it_waits_for_until_actors_are_up(progress, clock):
    progress.waits("starting actors and loading the models")
    assert "loading the models" in plain_line(progress.view())
    progress.hear({})
    assert progress.view().waits is not None
    progress.hear({"a": said(0, 1, 1)})
    told = plain_line(progress.view())
    assert told.startswith("label: 8/40 images, the first images are under way, GPUs busy 100%")
    assert "left" not in told
    for second in range(1, 17):
        clock.now = second
        progress.hear({"a": said(second, second, 1 + second)})
    told = plain_line(progress.view())
    assert "under way" not in told and "images/s" in told and "s left" in told


def test_a_context_in_a_context_changes_nothing(capsys):
    with Progress("label") as progress:
        with progress as inner:
            inner.plan(3)
            inner.add(3)
        assert not progress.over
    assert capsys.readouterr().err.count("label: 3/3 images") == 1


# Training ----------------------------------------------------------------------------------------

RUN = {
    "schedule": {"steps": 40, "steps_per_epoch": 10, "epochs": 4, "images_per_step": 16},
    "workers": {"num": 2},
    "history": [],
    "best": None,
}


def test_training_tells_steps_between_validations(clock):
    training = Training(show=False, clock=clock)
    training.waits("starting workers")
    training.begin(RUN)
    training.hear({"1": {}})
    assert "starting workers" in plain_line(training.view())
    for second in range(1, 16):
        clock.now = second
        note = {"step": second, "loss": 0.5, "judging": False}
        training.hear({"0": note, "1": {"step": second, "judging": False}})
    told = plain_line(training.view())
    assert told.startswith("train: 15/40 steps, epoch 2/4, loss 0.5000, 1.00 steps/s, 16.0 images")
    assert told.endswith("2/2 workers up, 25 s left, 15 s so far")
    training.validated({**RUN, "history": [{"epoch": 1, "step": 10, "loss": 0.6}]})
    assert training.view().done == 15, "what train.json says lags behind"
    training.hear({"0": {"step": 20, "loss": 0.4, "judging": True}})
    assert training.view().waits == "validating"
    entry = {"epoch": 2, "step": 20, "loss": 0.45, "val_miou": 0.3, "unreadable_images": 2.0}
    best = {"epoch": 1, "step": 10, "val_miou": 0.4}
    training.validated({**RUN, "history": [entry], "best": best})
    told = plain_line(training.view())
    assert "val mIoU 0.3000 (best 0.4000 at epoch 1), 2 images not readable" in told
    training.validated({**RUN, "history": [entry], "best": {**best, "epoch": 2, "step": 20}})
    assert "val mIoU 0.3000 (the best)" in plain_line(training.view())


def test_a_training_that_goes_on_counts_what_was_done_before_as_no_speed(clock):
    training = Training(show=False, clock=clock)
    entry = {"epoch": 2, "step": 20, "loss": 0.45}
    training.begin({**RUN, "history": [entry]})
    for second in range(15):
        clock.now = 100 + second
        training.hear({"0": {"step": 20 + second, "loss": 0.5, "judging": False}})
    assert "1.00 steps/s" in training.view().facts


def test_a_long_validation_is_no_slow_step(clock):
    training = Training(show=False, clock=clock)
    training.begin({**RUN, "schedule": {**RUN["schedule"], "steps": 2000}})
    for second in range(60):
        clock.now = second
        training.hear({"0": {"step": 10 * second, "judging": False}})
    for second in range(60, 241):
        clock.now = second
        training.hear({"0": {"step": 600, "judging": True}})
    assert "10.00 steps/s" in training.view().facts
    for second in range(241, 260):
        clock.now = second
        training.hear({"0": {"step": 600 + 10 * (second - 240), "judging": False}})
    view = training.view()
    assert "10.00 steps/s" in view.facts
    assert view.left_s == pytest.approx(121 * 4, rel=0.3), "as much time for validations as before"
