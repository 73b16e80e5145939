"""The command line: `zsplg VERB [--config FILE.yaml] [--section.setting VALUE ...]`.

What enters: argv. What leaves: one call of a verb (verbs.py), and an exit code: 0 done, 1 the work
failed, 2 bad input (one line on stderr, nothing written), 130 interrupted, by Ctrl-C or by SIGTERM,
which is how Ray, Slurm and Kubernetes stop a job. Flags are read by flags.py.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from zsplg_ray import __version__, config, flags
from zsplg_ray.safe_text import MAX_CHARS, SafeFormatter, masked, one_line, shortened
from zsplg_ray.settings import Section, WorkError, complain, nearest, setting_types
from zsplg_ray.signals import sigterm_interrupts
from zsplg_ray.verbs import EXAMPLES, SUBMIT, VERBS

if TYPE_CHECKING:
    from zsplg_ray.cluster.submit.job import Command

S = TypeVar("S", bound=Section)
log = logging.getLogger("zsplg_ray.cli")  # also where this file is the main module


def parse(cls: type[S], argv: Sequence[str], verb: str, *, elsewhere: bool = False) -> S:
    """The settings of a verb from its flags; see `flags.parse`.

    `elsewhere`: it will run on other machines, and only there looks for what a run has stored.
    """
    theirs = {name for other, _, _ in VERBS.values() for name in setting_types(other)}
    known = cls is config.RelabelConfig and not elsewhere
    stored = _settings_of_labels if known else _nothing_stored
    example = EXAMPLES.get(verb, "")
    return flags.parse(cls, argv, verb, example=example, theirs=theirs, stored=stored)


def _settings_of_labels(argv: Sequence[str], in_file: Mapping[str, Any]) -> dict[str, Any]:
    """`relabel` starts from the settings that the run's labels were made with."""
    run = flags.value_of(argv, "--run") or in_file.get("run")
    if not isinstance(run, str):
        return {}
    from zsplg_ray.rundir import RunFolder

    return RunFolder(run).label_settings()


def _nothing_stored(argv: Sequence[str], in_file: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def usage() -> str:
    """The text of `zsplg --help`."""
    lines = [f"  {name:<13} {about}" for name, (_, _, about) in VERBS.items()]
    return "\n".join(
        [
            f"zsplg {__version__}: unlabelled images + class names -> a segmentation model",
            "",
            "usage: zsplg VERB [--config FILE.yaml] [--section.setting VALUE ...]",
            "",
            *lines,
            "",
            "zsplg VERB --help tells every setting with unit, range and default.",
            f"{flags.VERBOSE}, with any verb: {flags.VERBOSE_DOES}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Entry point of the console script `zsplg`."""
    argv, verbose = flags.take_verbose(list(sys.argv[1:] if argv is None else argv))
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb = argv[0]
    try:
        _start_log(verbose)
        verb, rest = _take_verb(argv)
        cls, run, _ = VERBS[verb]
        with sigterm_interrupts():
            if verb != SUBMIT:
                return run(parse(cls, rest, verb))
            own, inner = _split(rest)
            return run(_submit_settings(own), _command(inner))
    except ValueError as e:
        print(f"error: {_on_one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted; {e if e.args else _AFTER.get(verb, _AGAIN)}", file=sys.stderr)
        return 130
    except (WorkError, OSError) as e:  # OSError: a full disk, a folder that may not be written
        log.debug("what failed", exc_info=True)
        print(f"error: {_on_one_line(e)}", file=sys.stderr)
        return 1


_AGAIN = "what is finished is kept, the same command goes on from there"
_AFTER = {
    "tune train": "what is finished is kept, the same command with --resume goes on",
    "export": "nothing was written",
    "review export": "nothing was written",
    SUBMIT: "no job was submitted",
    "estimate": "nothing was written",
    "evaluate": "nothing was written",
    "report": "nothing was written",
    "doctor": "nothing was written",
    "shapes": "the same command starts anew",
}
"""What an interrupted verb has left, if the interruption does not tell it."""


def _take_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, and the rest. Raises: ValueError."""
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), list(argv[words:])
    if verb not in VERBS:
        begins = any(known.startswith(f"{verb} ") for known in VERBS)  # one of two words
        near = nearest(" ".join(argv[:2]) if begins else verb, VERBS)
        fix = f"did you mean `{near}`?" if near else "see zsplg --help"
        raise ValueError(complain("verb", f"one of {', '.join(VERBS)}", verb, fix))
    return verb, rest


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `submit`, and what stands behind `--`. Raises: ValueError if nothing does."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, inner = list(argv[:at]), list(argv[at + 1 :])
    if not inner and not {"-h", "--help"} & set(own):
        rule, fix = "given behind --", "write zsplg submit --address URL -- VERB ..."
        raise ValueError(complain("verb", rule, " ".join(own) or "nothing", fix))
    return own, inner


def _submit_settings(argv: Sequence[str]) -> config.SubmitConfig:
    """The settings of `submit`. Raises: ValueError, which never shows what `env` holds."""
    try:
        return parse(config.SubmitConfig, argv, SUBMIT)
    except ValueError as e:
        if not str(e).startswith("env "):
            raise
    fix = "write --env NAME VALUE [NAME VALUE ...]"
    raise ValueError(complain("env", "a name and a text for each variable", "other", fix))


def _command(argv: Sequence[str]) -> Command:
    """A verb that will run in a job. Raises: ValueError if something is wrong with its settings."""
    verb, rest = _take_verb(argv)
    if verb == SUBMIT:
        fix = "name the verb that does the work"
        raise ValueError(complain("verb", "one that runs in a job", SUBMIT, fix))
    settings = parse(VERBS[verb][0], flags.take_verbose(rest)[0], verb, elsewhere=True)
    from zsplg_ray.cluster.submit.job import Command

    return Command(verb, rest, settings, flags.value_of(rest, "--config"))


def _on_one_line(error: BaseException) -> str:
    """What an error says, whatever is in the names and addresses that it tells of."""
    return one_line(masked(shortened(" ".join(str(error).splitlines()), 4 * MAX_CHARS)))


class _Stderr(logging.StreamHandler):
    """Writes to what stderr is at the moment: while a verb shows its progress, above that."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Where to."""
        return sys.stderr


def _start_log(verbose: bool) -> None:
    """Messages of this project to stderr, from the level in $ZSPLG_LOG on; all if `verbose`."""
    handler = _Stderr()
    handler.setFormatter(SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = "DEBUG" if verbose else os.environ.get("ZSPLG_LOG", "INFO").upper()
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if level not in levels:
        rule, fix = f"one of {', '.join(levels)}", "change or unset this environment variable"
        raise ValueError(complain("ZSPLG_LOG", rule, level, fix))
    logging.getLogger("zsplg_ray").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
