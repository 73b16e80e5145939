"""One look in a process of its own, which can be ended when what it looks at does not answer.

What enters: the name of a look, settings (by stdin, for they may hold credentials, and a command
line is seen by all). What leaves: its finding, or that there was no answer in time.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import zsplg_ray
from zsplg_ray.cluster.doctor.finding import Finding, finding, met
from zsplg_ray.config import DoctorConfig
from zsplg_ray.settings import flatten, from_mapping

_MARK = "finding: "


def bounded(module: str, config: DoctorConfig, limit_s: float, fix: str) -> Finding:
    """What `look(config)` of a module finds.

    Args:
        module: Its name; it has a `look`.
        config: The settings.
        limit_s: Seconds after which the process is ended.
        fix: What to do then.
    """
    ours, theirs = str(Path(zsplg_ray.__file__).parents[1]), os.environ.get("PYTHONPATH")
    path = f"{ours}{os.pathsep}{theirs}" if theirs else ours
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zsplg_ray.cluster.doctor.child", module],
            input=json.dumps(flatten(config)),
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return finding("fail", f"no answer in {limit_s:g} s", fix)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return finding("fail", f"the look ended with {done.returncode}: {last}", fix)
    return json.loads(lines[-1].removeprefix(_MARK))


def main() -> int:
    """The process: module's name in argv, settings on stdin, the finding on stdout."""
    config = from_mapping(DoctorConfig, json.load(sys.stdin))
    try:
        found = importlib.import_module(sys.argv[1]).look(config)
    except Exception as e:  # a finding like any other
        found = met(e)
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
