"""One look in a process of its own, which can be ended when what it looks at does not answer.

What enters: the name of a look, settings (by stdin, for they may hold credentials, and a command
line is seen by all). What leaves: its finding, or that there was no answer in time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import zsplg_ray
from zsplg_ray.cluster.doctor.finding import Finding, finding, met
from zsplg_ray.config import DoctorConfig
from zsplg_ray.settings import flatten, from_mapping

START_S = 60.0
"""Longest that a process may take for its imports, on a machine that is busy."""
_READY, _MARK = "ready to look", "finding: "


def bounded(module: str, config: DoctorConfig, limit_s: float, fix: str) -> Finding:
    """What `look(config)` of a module finds.

    Args:
        module: Its name; it has a `look`.
        config: The settings.
        limit_s: Seconds for the look itself, after which the process is ended.
        fix: What to do then.
    """
    ours, theirs = str(Path(zsplg_ray.__file__).parents[1]), os.environ.get("PYTHONPATH")
    path = f"{ours}{os.pathsep}{theirs}" if theirs else ours
    process = subprocess.Popen(
        [sys.executable, "-m", "zsplg_ray.cluster.doctor.child", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdin is not None and process.stdout is not None
    end = threading.Timer(START_S, process.kill)
    lines = []
    with process:
        try:
            end.start()
            with contextlib.suppress(BrokenPipeError):  # it is gone: its last line says why
                process.stdin.write(json.dumps(flatten(config)) + "\n")
                process.stdin.close()
            for line in process.stdout:
                if line.startswith(_READY):  # its imports are done: from now on the clock is its
                    end.cancel()
                    end = threading.Timer(limit_s, process.kill)
                    end.start()
                lines.append(line.strip())
        finally:
            end.cancel()
            process.kill()
    found = [line for line in lines if line.startswith(_MARK)]
    if found:
        return json.loads(found[-1].removeprefix(_MARK))
    if process.returncode == -signal.SIGKILL:
        return finding("fail", f"no answer in {limit_s:g} s", fix)
    last = ([line for line in lines if line] or ["no message"])[-1]
    return finding("fail", f"the look ended with {process.returncode}: {last}", fix)


def main() -> int:
    """The process: module's name in argv, settings on stdin, the finding on stdout."""
    config = from_mapping(DoctorConfig, json.loads(sys.stdin.readline()))
    look = importlib.import_module(sys.argv[1]).look
    sys.stdout.write(f"\n{_READY}\n")
    sys.stdout.flush()
    try:
        found = look(config)
    except Exception as e:  # a finding like any other
        found = met(e)
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
