"""A trial's way to those who listen to it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from zsplg_ray.cluster.tune import trial
from zsplg_ray.cluster.tune.trial import Gate, TrialRun
from zsplg_ray.settings import WorkError


async def tasks(*calls) -> list[asyncio.Task]:
    """Calls that have come as far as they can."""
    found = [asyncio.create_task(call) for call in calls]
    for _ in range(5):
        await asyncio.sleep(0)
    return found


async def first(pending: asyncio.Task) -> Any:
    return await asyncio.wait_for(pending, 5)


def test_nobody_waits_at_the_gate_for_a_trial_that_has_ended():
    """An actor holds so many calls at a time; one left behind by each trial would fill it."""

    async def study():
        gate = Gate()
        for number in range(20):
            await gate.open(number)
            (hearing,) = await tasks(gate.hear(number))
            (telling,) = await tasks(gate.tell(number, {"epoch": 1}))
            assert await first(hearing) == {"epoch": 1}
            await gate.answer(number, True)
            assert await first(telling)
            (hearing,) = await tasks(gate.hear(number))
            await gate.close(number)
            assert await first(hearing) is None
        assert len(asyncio.all_tasks()) == 1
        await gate.close(99)  # nobody waits there

    asyncio.run(study())


def test_what_a_killed_process_left_at_the_gate_is_void():
    async def study():
        gate = Gate()
        await gate.open(0)
        old = await tasks(gate.hear(0), gate.tell(1, {"epoch": 1}))
        await gate.open(0)
        await gate.open(1)
        assert [await first(call) for call in old] == [None, False]
        hearing, _ = await tasks(gate.hear(1), gate.tell(1, {"epoch": 2}))
        assert await first(hearing) == {"epoch": 2}

    asyncio.run(study())


class Calls:
    """An actor that puts down what is called; each call gives `result`."""

    def __init__(self, result) -> None:
        self.calls, self.result = [], result

    def __getattr__(self, name):
        def remote(*args):
            self.calls.append((name, *args))
            return self.result

        return SimpleNamespace(remote=remote)


def run_of(gate, alive) -> TrialRun:
    run = TrialRun.__new__(TrialRun)
    run.number, run.gate, run.error, run.asked, run.waiting = 3, gate, "no memory", False, None
    run.folder = SimpleNamespace(read_bytes=None)  # type: ignore[assignment]
    run.thread = SimpleNamespace(is_alive=lambda: alive)  # type: ignore[assignment]
    return run


def test_a_trial_that_ends_leaves_no_call_behind(monkeypatch):
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr(trial, "read_training", lambda folder: None)
    gate = Calls("hearing")
    run = run_of(gate, alive=False)
    assert run.step()["ended"] == "failed"
    assert gate.calls == [("hear", 3), ("close", 3)] and run.waiting is None


def test_a_trial_that_another_process_goes_on_with_ends(monkeypatch):
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: None)
    with pytest.raises(WorkError, match="another process has gone on with trial 3"):
        run_of(Calls("hearing"), alive=True).step()
