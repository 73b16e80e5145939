"""Ray Tune and Optuna without tables, files and advice of their own.

What enters: nothing. What leaves: context managers; afterwards all is as it was before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import optuna

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one tells of every error in tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else the first Ctrl-C is swallowed
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nothing goes on from its own state
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",  # trials may take none
    "TUNE_WARN_THRESHOLD_S": "3600",
}
_LOGGERS = ("ray.tune", "ray.air", "ray.train")


@contextlib.contextmanager
def quiet_tune() -> Iterator[None]:
    """Ray Tune says nothing by itself, unless our own log is at DEBUG.

    What the user has set in the environment stays.
    """
    ours = [name for name in _ENVIRONMENT if name not in os.environ]
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    os.environ.update({name: _ENVIRONMENT[name] for name in ours})
    if not log.isEnabledFor(logging.DEBUG):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)  # what fails is told by who runs it
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna tells neither of each trial nor of what is experimental in it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
