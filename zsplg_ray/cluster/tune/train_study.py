"""A study's folder: which trials there are and what became of each, in tune.json.

What enters: trials as they are begun and as they end. What leaves:

    tune.json         settings, data, trials (number, settings, state, val mIoU, folder), the best
    trials/NNNN/      a training run's folder each (trainrun.py)
    best.pt           copy of the best trial's

tune.json is the record of what has been decided: a trial stands in it before it starts, and its end
does before anybody acts on it. How far a trial is stands in its own train.json. So whatever is
killed, each trial exists once, and the search can be told again all that it has learned.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from zsplg_ray.cluster.trainrun import (
    new_attempt,
    read_training,
    refuse_differences,
    weight_settings,
    write_training,
)
from zsplg_ray.cluster.tune.train_space import Params, Told
from zsplg_ray.config import TuneTrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place

FILE = "tune.json"
VERB = "tune train"

End = Literal["complete", "stopped", "failed"]
"""How a trial ends; `stopped`: early, for it was behind others."""

_SEARCH = ("search.method", "search.over", "search.seed", "asha.off", "asha.reduction")
_ALSO = ("asha.grace_epochs", "train.validate_epochs")


def describe_study(config: TuneTrainConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tune.json at the start.

    Args:
        config: As the user gave it.
        run: train.json of a run with the same settings and data, see `describe_training`.
    """
    kept = ("config", "classes", "data", "schedule", "weights", "versions", "fingerprint")
    study: dict[str, Any] = {"verb": VERB, "state": "running", "id": uuid.uuid4().hex}
    study |= {k: run[k] for k in kept}
    study["versions"] = study["versions"] | {"optuna": importlib.metadata.version("optuna")}
    return study | {"trials": [], "best": None, "seconds": 0.0, "mlflow": None}


def refuse_other_study(
    folder: RunFolder, study: Mapping[str, Any], config: TuneTrainConfig
) -> dict[str, Any] | None:
    """The study that the folder holds already, to go on with; None if there is none.

    Raises: ValueError if there is one and `config.resume` is off; if it is of other settings or
        data, with the first that differs; or if the folder holds something else.
    """
    fix = "give another --out"
    for name in ("run.json", "train.json"):
        if folder.read_bytes(name) is not None:
            shown = f"{folder.uri} with {name}"
            raise ValueError(complain("out", "a folder without other runs", shown, fix))
    keys = ("verb", "config", "data", "trials", "state")
    old = folder.read_record(FILE, keys, "restore it, or use another --out")
    if old is None:
        return None
    if old["verb"] != VERB:
        shown = f"{folder.uri} with `zsplg {old['verb']}`"
        raise ValueError(complain("out", "a folder without other studies", shown, fix))
    if not config.resume:
        fix = "add --resume to go on with it, or give another --out"
        raise ValueError(complain("out", "a folder without a study", folder.uri, fix))
    names = [*weight_settings(study), *_SEARCH, *_ALSO]
    names += ["trials"] if config.search.method == "grid" else []
    refuse_differences(old, study, dict.fromkeys(names), folder.uri)
    if config.trials < len(old["trials"]):
        rule = f">= {len(old['trials'])}, the trials in {folder.uri}"
        raise ValueError(complain("trials", rule, config.trials, "raise it"))
    return old


class Study:
    """tune.json and the trials' folders. Everything is on disk once a method returns.

    Args:
        folder: The study's.
        record: The content of tune.json.
    """

    def __init__(self, folder: RunFolder, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record
        self._began = time.monotonic() - record["seconds"]
        self.curves: dict[int, list[tuple[float, int, float]]] = {}
        """Trial's number -> time, epoch and val mIoU of each of its validations."""
        for trial in self.trials:
            self._look(trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles what it is given, to be restored from there: we never do that

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The trials, by number."""
        return self.record["trials"]

    def place(self, number: int) -> str:
        """Address of a trial's folder."""
        return trial_place(self.folder.uri, number)

    def told(self) -> list[Told]:
        """The trials as a search sees them."""
        curves = [tuple((e, miou) for _, e, miou in self.curves[t["number"]]) for t in self.trials]
        return [
            Told(t["params"], curve, t["state"])
            for t, curve in zip(self.trials, curves, strict=True)
        ]

    def write(self) -> None:
        """Replace tune.json."""
        self.record["seconds"] = round(time.monotonic() - self._began, 3)
        text = json.dumps(self.record, indent=1, ensure_ascii=False) + "\n"
        self.folder.write_bytes(FILE, text.encode())

    # Trials -------------------------------------------------------------------------------------

    def begin(self, params: Params) -> int:
        """Put a new trial down; its number."""
        number = len(self.trials)
        trial = {"number": number, "params": params, "state": "running", "folder": _name(number)}
        trial |= {"epochs": 0, "val_miou": None, "best_epoch": None, "seconds": 0.0, "error": None}
        self.trials.append(trial)
        self.curves[number] = []
        self.write()
        return number

    def try_again(self) -> None:
        """Have trials that failed run once more: what they failed of may have been mended."""
        for trial in self.trials:
            if trial["state"] == "failed":
                trial |= {"state": "running", "error": None}

    def heard(self, number: int, epoch: int, val_miou: float) -> None:
        """A validation of a trial that goes on."""
        self.curves[number].append((time.time(), epoch, val_miou))

    def end(self, number: int, state: End, error: str | None = None) -> bool:
        """Put down how a trial ended; whether it is the best so far."""
        trial = self.trials[number]
        self._look(trial)
        trial |= {"state": state, "error": error}
        best = best_of(self.trials)
        new = best is not None and best["number"] == number
        if new:
            self._take(trial)
        self.write()
        return new

    def settle(self, state: str) -> None:
        """The end of this start of the command: nothing runs any more, and all records say so.

        `state`: of the study.
        """
        for trial in self.trials:
            self._end_run(trial)
            self._look(trial)
        best = best_of(self.trials)
        if best is not None:
            self._take(best)
        self.record["state"] = state
        self.write()

    def _take(self, trial: Mapping[str, Any]) -> None:
        """Make a trial the best: best.pt first, so that what tune.json names is there."""
        model = RunFolder(self.place(trial["number"])).read_bytes("best.pt")
        if model is not None:
            self.folder.write_bytes("best.pt", model)
            names = ("number", "params", "val_miou", "best_epoch", "folder")
            self.record["best"] = {k: trial[k] for k in names}

    def _look(self, trial: dict[str, Any]) -> None:
        """Bring a trial up to what its train.json says."""
        curve = self.curves.setdefault(trial["number"], [])
        run = read_training(RunFolder(self.place(trial["number"])))
        if run is None:
            return
        history = [e for e in run["history"] if e.get("val_miou") is not None]
        curve[:] = [(e["time"], e["epoch"], e["val_miou"]) for e in history]
        trial["seconds"] = run["seconds"]
        if run["last"] is not None:
            trial["epochs"] = run["last"]["epoch"]
        if run["best"] is not None:
            trial |= {"val_miou": run["best"]["val_miou"], "best_epoch": run["best"]["epoch"]}

    def _end_run(self, trial: Mapping[str, Any]) -> None:
        """A train.json that still says `running` was left by a process that was killed.

        Its attempt ends too: what lives on of it somewhere is refused when it comes to report.
        """
        folder = RunFolder(self.place(trial["number"]))
        run = read_training(folder)
        if run is None or run["state"] != "running":
            return
        state = "interrupted" if trial["state"] == "running" else trial["state"]
        write_training(folder, run | {"state": state, "attempt": new_attempt()})


def best_of(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial of the highest val mIoU among those that ended well; of equal ones the first."""
    judged = [
        t for t in trials if t["state"] in ("complete", "stopped") and t["val_miou"] is not None
    ]
    return max(judged, key=lambda t: t["val_miou"], default=None)


def trial_place(out: str, number: int) -> str:
    """Address of a trial's folder in the study's."""
    return Place.parse(out).child(_name(number)).uri


def _name(number: int) -> str:
    return f"trials/{number:04}"
