"""The command line: what it makes of argv, and how it fails."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zsplg_ray import __version__, cli, config
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import Section, WorkError, flag_names, flatten
from zsplg_ray.signals import sigterm_kept

LABEL = ["label", "--images", "i", "--classes", "cat,dog", "--out", "o"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Commands run where nothing is, so that whatever they write is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def told(monkeypatch):
    """Verbs that note the config that they are given instead of working."""
    given: list[Section] = []

    def note(made: Section, *more: object) -> int:
        given.append(made)
        return 0

    noting = {verb: (cls, note, about) for verb, (cls, _, about) in cli.VERBS.items()}
    monkeypatch.setattr(cli, "VERBS", noting)
    return given


def parsed(argv: list[str]) -> dict[str, Any]:
    cls, _, _ = cli.VERBS[argv[0]]
    return flatten(cli.parse(cls, argv[1:], argv[0]))


def changes(argv: list[str]) -> dict[str, Any]:
    """What the flags after LABEL change."""
    plain = parsed(LABEL)
    return {k: v for k, v in parsed([*LABEL, *argv]).items() if plain[k] != v}


# Bad input ---------------------------------------------------------------------------------------

BAD: list[tuple[list[str], str, str]] = [
    (["lable"], "verb must be one of label, ", "did you mean `label`?"),
    (["--quiet", "label"], "verb must be one of", "see zsplg --help"),
    (["tune"], "verb must be one of label, ", "did you mean `tune train`?"),
    (["tune", "label"], "got tune", "did you mean `tune labels`?"),
    (["tune", "labels", "--run", "a", "b"], "truth must be given, got nothing", "add --truth"),
    (["tune", "labels", "--truth", "t", "--run"], "run must be given, each once", "name each once"),
    (["tune", "labels", "--truth", "t", "--run", "a", "a"], "each once, got a a", "name each once"),
    (
        ["tune", "labels", "--run", "r", "--truth", "t", "--templates", "seven", "eight"],
        "templates must be a list of run, photo, seven, scene, got seven eight",
        "choose a list of run,",
    ),
    (["label"], "images must be given, got nothing", "add --images"),
    (["label", "--images", "i"], "classes must be given", "add --classes"),
    (["label", "--images", "", "--classes", "c", "--out", "o"], "images must be given", "--help"),
    (["evaluate", "--truth", "t"], "labels must be given", "see zsplg evaluate --help"),
    (["evaluate", "run", "--truth"], "truth must be given with a value, got nothing", "--truth="),
    (["evaluate", "run", "more", "--truth", "t"], "got more", "quote values with blanks"),
    (["shapes", "--out", "o", "--n", "0"], "n must be in [1, 1e+06], got 0", "choose"),
    (["relabel"], "run must be given, got nothing", "add --run"),
    (["relabel", "--run", "none"], "run must be a run's folder (with run.json), got none", "label"),
    (["relabel", "--run=none"], "run must be a run's folder (with run.json), got none", "label"),
    ([*LABEL, "--sam", "vit_x"], "sam.model must be one of vit_h,", "did you mean vit_"),
    ([*LABEL, "--sam=vit_x"], "sam.model must be one of vit_h,", "did you mean vit_"),
    ([*LABEL, "--clip.embedder", "gme"], "clip.embedder must be one of gem, maskclip", "mean gem?"),
    ([*LABEL, "--compose.min-similarty", "1"], "a known flag", "--compose.min-similarity?"),
    ([*LABEL, "--compose.min_similarty=1"], "a known flag", "--compose.min-similarity?"),
    ([*LABEL, "--SAM", "vit_b"], "--SAM must be a known flag", "did you mean --sam?"),
    ([*LABEL, "--compose.min-similarity", "7"], "in [-1, 1], got 7.0", "choose"),
    ([*LABEL, "--compose.min-similarity", "nan"], "in [-1, 1], got nan", "choose"),
    ([*LABEL, "--compose.min-similarity", "x"], "min_similarity must be a number or", "choose"),
    ([*LABEL, "--compose.min-similarity", "cat"], "min_similarity must be a number or", "choose"),
    ([*LABEL, "--compose.min-similarity", "cat", "9"], "in [-1, 1], got {'cat': 9.0}", "choose"),
    ([*LABEL, "--compose.min-similarity"], "must be a threshold", "write for example"),
    ([*LABEL, "--sam.points-per-side", "1.5"], "points_per_side must be a whole number", "choose"),
    ([*LABEL, "--max-pixels", "1e9"], "max_pixels must be a whole number, got 1e9", "choose"),
    ([*LABEL, "--actors.flush-s", "inf"], "actors.flush_s must be >= 0, got inf", "choose"),
    ([*LABEL, "--actors.min", "3", "--actors.max", "2"], "actors.max must be >= actors.min", "low"),
    ([*LABEL, "--prompts.templates", "photo"], "contain {class}, got photo", "write"),
    ([*LABEL, "--out", "-o"], "out must be written with =", "write --out=-o"),
    ([*LABEL, "--root", "--quiet"], "root must be given with a value, got --quiet", "--root="),
    ([*LABEL, "--images"], "images must be given with a value, got nothing", "add"),
    ([*LABEL, "extra"], "got extra", "quote values with blanks"),
    ([*LABEL, "--quiet", "yes"], "got yes", "--help"),
    ([*LABEL, "--quiet=yes"], "got yes", "--help"),
    ([*LABEL, "-x"], "got -x", "--help"),
    ([*LABEL, "--config"], "config must be a YAML file, got nothing", "write --config FILE"),
    ([*LABEL, "--config="], "config must be a YAML file, got nothing", "write --config FILE"),
    ([*LABEL, "--config", "file:///none.yaml"], "config must be a readable", "No such file"),
    ([*LABEL, "--config", "none.yaml"], "config must be a readable YAML file", "No such file"),
    ([*LABEL, "--sam", "a\nb"], "got a\\nb", "choose"),
    (["submit"], "verb must be given behind --, got nothing", "zsplg submit --address URL -- VERB"),
    (["submit", "--"], "verb must be given behind --, got nothing", "-- VERB ..."),
    (["submit", *LABEL], "given behind --, got label --images", "-- VERB ..."),
    (["submit", "--wait", "--", "lable"], "verb must be one of label, ", "did you mean `label`?"),
    (["submit", "--", "tune"], "verb must be one of label, ", "did you mean `tune train`?"),
    (["submit", "--", "submit", "--", *LABEL], "one that runs in a job, got submit", "the work"),
    (["submit", "--wiat", "--", *LABEL], "--wiat must be a known flag", "did you mean --wait?"),
    (["submit", "x", "--", *LABEL], "got x", "quote values with blanks"),
    (["submit", "--", *LABEL[:-2]], "out must be given, got nothing", "add --out"),
    (["submit", "--", *LABEL, "--sam", "vit_x"], "sam.model must be one of", "did you mean vit_"),
]


@pytest.mark.parametrize(
    ("argv", "rule", "fix"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_input_is_one_line_on_stderr_and_nothing_else(argv, rule, fix, capsys, empty_folder):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1
    assert " must be " in err and ", got " in err
    got, _, told_fix = err.partition("; ")
    assert rule in got and fix in told_fix
    assert not list(empty_folder.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("sam:\n  modle: vit_b", "did you mean `sam.model`?"),
        ("imgs: x", "did you mean `images`?"),
        ("sam: {points_per_side: 0}", "sam.points_per_side must be in [1, 256], got 0"),
        ("compose: {min_margin: true}", "compose.min_margin must be a number, got True"),
        ("out: [a]", "out must be a text"),
        ("a: [", "config must be valid YAML"),
        ("- label", "config must be a mapping of settings"),
    ],
)
def test_bad_files_are_told_in_the_same_form(content, rule, capsys, empty_folder):
    Path("c.yaml").write_text(content)
    assert cli.main([*LABEL, "--config", "c.yaml"]) == 2
    out, err = capsys.readouterr()
    assert rule in err and len(err.splitlines()) == 1 and not out
    assert [p.name for p in empty_folder.iterdir()] == ["c.yaml"]


def test_long_and_odd_values_are_shown_as_they_are(capsys):
    odd = "a|b ---- [red]x[/red]  two  blanks ╭ " + "word " * 60 + "x" * 300
    assert cli.main([*LABEL, "--prompts.templates", odd]) == 2
    assert f"got {odd}; write" in capsys.readouterr().err


def test_what_stands_behind_the_dashes_is_the_verbs(told, capsys):
    parsed = [
        "submit",
        "--job-id",
        "x",
        "--",
        *LABEL,
        "--json",
        "--prompts.templates",
        "{class} --",
    ]
    assert cli.main(parsed) == 0
    made = told[0]
    assert isinstance(made, config.SubmitConfig) and made.job_id == "x" and not made.json
    with pytest.raises(SystemExit) as caught:
        cli.main(["submit", "--", "label", "--help"])
    assert caught.value.code == 0 and "--max-pixels" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["label", "tune", "train", "predict"])
def test_entry_points_of_jobs_are_the_verbs(name, empty_folder):
    jobs = Path(cli.__file__).parent.parent / "jobs"
    what = ["labels"] if name == "tune" else []
    argv = [sys.executable, str(jobs / f"{name}.py"), *what, "--nonsense"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=empty_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--nonsense must be a known flag" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_real_process_exits_with_2_and_no_traceback(empty_folder):
    argv = [sys.executable, "-m", "zsplg_ray.cli", *LABEL, "--sam.points-per-side", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=empty_folder)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "sam.points_per_side must be in [1, 256], got 0; choose a value in [1, 256]"
    assert done.stderr == f"error: {expected}\n"
    assert not list(empty_folder.iterdir())


def test_the_command_line_alone_loads_nothing_heavy():
    look = (
        "import sys, zsplg_ray, zsplg_ray.cli as cli; cli.main(['label', '--nonsense']); "
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Work that fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (WorkError("out of patience"), 1, "error: out of patience"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (ValueError("a must be b, got c;\nd"), 2, "error: a must be b, got c; d"),
        (KeyboardInterrupt(), 130, "interrupted; the same command starts anew"),
    ],
)
def test_exit_codes_of_work_that_fails(monkeypatch, capsys, raised, code, line):
    def work(given: config.ShapesConfig) -> int:
        raise raised

    monkeypatch.setitem(cli.VERBS, "shapes", (config.ShapesConfig, work, ""))
    assert cli.main(["shapes", "--out", "o"]) == code
    out, err = capsys.readouterr()
    assert err.startswith(line) and len(err.splitlines()) == 1 and out == ""


def test_sigterm_ends_work_as_ctrl_c_does(monkeypatch, capsys):
    def work(given: config.ShapesConfig) -> int:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli.VERBS, "shapes", (config.ShapesConfig, work, ""))
    assert cli.main(["shapes", "--out", "o"]) == 130
    assert "interrupted; the same command starts anew" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["doctor"], "interrupted; nothing was written\n"),
        (["evaluate", "run", "--truth", "t"], "interrupted; nothing was written\n"),
        (["report", "run"], "interrupted; nothing was written\n"),
        (LABEL, "interrupted; what is finished is kept, the same command goes on from there\n"),
    ],
)
def test_who_interrupts_a_verb_is_told_what_it_leaves(monkeypatch, capsys, argv, line):
    def work(given: object) -> int:
        raise KeyboardInterrupt

    cls = cli.VERBS[argv[0]][0]
    monkeypatch.setitem(cli.VERBS, argv[0], (cls, work, ""))
    assert cli.main(argv) == 130 and capsys.readouterr().err == line


def test_a_handler_of_sigterm_outlives_what_sets_its_own():
    def ours(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with contextlib.suppress(ValueError), sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ValueError
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def work(given: config.ShapesConfig) -> int:
        raise KeyError("a bug")

    monkeypatch.setitem(cli.VERBS, "shapes", (config.ShapesConfig, work, ""))
    with pytest.raises(KeyError):
        cli.main(["shapes", "--out", "o"])


def test_an_unknown_log_level_is_bad_input(monkeypatch, capsys):
    monkeypatch.setenv("ZSPLG_LOG", "loud")
    assert cli.main(["shapes", "--out", "o"]) == 2
    assert "ZSPLG_LOG must be one of DEBUG," in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--verbose", *LABEL], [*LABEL, "--verbose"]])
def test_verbose_is_known_to_every_verb_and_sets_the_level(argv, told, monkeypatch):
    monkeypatch.setenv("ZSPLG_LOG", "ERROR")
    ours = logging.getLogger("zsplg_ray")
    before = ours.level
    try:
        assert cli.main(argv) == 0
        assert told[0] == told[-1] and ours.level == logging.DEBUG
        assert cli.main(LABEL) == 0
        assert told[1] == told[0] and ours.level == logging.ERROR
        job = ["submit", "--", *LABEL, "--verbose"]
        assert cli.main(job) == 0 and ours.level == logging.ERROR, "the job's, not ours"
    finally:
        ours.setLevel(before)


def test_a_job_is_as_verbose_as_it_was_asked_to_be():
    command = cli._command([*LABEL, "--verbose"])
    assert "--verbose" in command.argv and command.settings == parse_label()


def parse_label() -> Section:
    return cli.parse(cli.VERBS["label"][0], LABEL[1:], "label")


# Help --------------------------------------------------------------------------------------------


def test_help_lists_the_verbs(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert all(f"  {verb} " in out for verb in cli.VERBS) and not err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_tells_every_setting_and_the_example(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    cls = cli.VERBS[verb][0]
    assert all(flag in out for flag in flag_names(cls)) and not err
    assert cli.EXAMPLES[verb] in out and "--verbose: " in out
    if verb == "label":
        text = " ".join(out.split())
        assert "logits in [0, 100]. None: 1.0. (default: None)" in text
        assert "{cosine,softmax}" in text and "(default: vit_h)" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_examples_are_good_command_lines(verb, told):
    if verb == "relabel":
        RunFolder("run").write_run(stored({}))
    assert cli.main(shlex.split(cli.EXAMPLES[verb])[1:]) == 0
    assert isinstance(told[0], cli.VERBS[verb][0])


# Good input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--sam", "vit_b"], {"sam.model": "vit_b"}),
        (["--sam=vit_b"], {"sam.model": "vit_b"}),
        (["--sam.model", "vit_b", "--sam", "vit_l"], {"sam.model": "vit_l"}),
        (["--clip", "RN50/openai"], {"clip.model": "RN50/openai"}),
        (["--sam-checkpoint", "a b.pth"], {"sam.checkpoint": "a b.pth"}),
        (["--compose.min-similarity", "0.3"], {"compose.min_similarity": 0.3}),
        (["--compose.min_similarity", "0.3"], {"compose.min_similarity": 0.3}),
        (["--compose.min-similarity=0.3"], {"compose.min_similarity": 0.3}),
        (["--compose.min_similarity=0.3"], {"compose.min_similarity": 0.3}),
        (["--compose.min-similarity", "-0.3"], {"compose.min_similarity": -0.3}),
        (["--compose.min-similarity=-0.3"], {"compose.min_similarity": -0.3}),
        (
            ["--compose.min-similarity", "cat", "0.3", "*", "-0.2"],
            {"compose.min_similarity": {"cat": 0.3, "*": -0.2}},
        ),
        (["--compose.min-similarity", "None"], {}),
        (["--images", "my photos"], {"images": "my photos"}),
        (["--images=-a_b=c"], {"images": "-a_b=c"}),
        (["--images", "s3://b/a_b?x=y&z=1"], {"images": "s3://b/a_b?x=y&z=1"}),
        (["--out=--quiet"], {"out": "--quiet"}),
        (["--images", "first", "--images", "last"], {"images": "last"}),
        (["--quiet"], {"quiet": True}),
        (["--quiet", "--no-quiet"], {}),
        (["--sam.random-weights"], {"sam.random_weights": True}),
        (["--prompts.templates", "a {class}", "b {class}"], None),
        (["--actors.gpus", ".5", "--max-errors", "0"], {"actors.gpus": 0.5, "max_errors": 0}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_flags_change_what_they_name_and_nothing_else(argv, expected):
    templates = {"prompts.templates": ["a {class}", "b {class}"]}
    assert changes(argv) == (templates if expected is None else expected)


def test_positional_arguments_and_flags_come_in_any_order():
    for argv in (["run", "--truth", "t", "--json"], ["--json", "--truth", "t", "run"]):
        made = parsed(["evaluate", *argv])
        assert (made["labels"], made["truth"], made["json"]) == ("run", "t", True)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default():
    Path("c.yaml").write_text(
        "images: from file\nclasses: cat,dog\nout: -o\nsam: vit_b\nquiet: true\n"
        "compose:\n  min_similarity: {cat: 0.3, '*': 0.2}\n  min_margin: 0.25\n"
        "actors.min: 2\nprompts: {templates: ['a {class}']}\n"
    )
    address = f"file://{Path('c.yaml').absolute()}"
    for argv in (["--config", "c.yaml"], ["--config=c.yaml"], ["--config", address]):
        flags = ["--sam", "vit_l", "--no-quiet", "--compose.min-margin", "0.5"]
        made = parsed(["label", *flags, *argv])
        plain = parsed(LABEL)
        assert {k: v for k, v in made.items() if plain[k] != v} == {
            "images": "from file",
            "out": "-o",
            "sam.model": "vit_l",
            "compose.min_similarity": {"cat": 0.3, "*": 0.2},
            "compose.min_margin": 0.5,
            "actors.min": 2,
            "prompts.templates": ["a {class}"],
        }
    assert parsed(["label", "--images", "flag", "--config", "c.yaml"])["images"] == "flag"


def test_positional_arguments_may_stand_in_the_file():
    Path("c.yaml").write_text("labels: run\ntruth: t\n")
    assert parsed(["evaluate", "--config", "c.yaml"])["labels"] == "run"
    assert parsed(["evaluate", "other", "--config", "c.yaml"])["labels"] == "other"


# relabel starts from what the run was made with --------------------------------------------------


def stored(settings: dict[str, Any]) -> dict[str, Any]:
    """A run.json."""
    plain = flatten(config.LabelConfig(images="i", classes="cat", out="o"))
    return {
        "config": {**plain, **settings},
        "resolved": plain,
        "classes": {"names": ["background", "cat"], "aliases": [[], ["cat"]]},
        "weights": {},
        "labels_state": "complete",
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "the run"
    settings = {"compose.min_margin": 0.25, "compose.min_area_px": 9, "sam.points_per_side": 3}
    RunFolder(str(folder)).write_run(stored({**settings, "prompts.templates": ["a {class}"]}))
    return str(folder)


def test_relabel_keeps_the_settings_of_the_run_unless_told_otherwise(run):
    Path("c.yaml").write_text(f"run: {run}\ncompose:\n")
    ways = (
        ["--run", run],
        [f"--run={run}"],
        ["--config", "c.yaml"],
        ["--run", "none", "--run", run],
        ["--run", run, "--config", "c.yaml"],
    )
    for way in ways:
        made = parsed(["relabel", *way, "--compose.min-margin", "0.5"])
        assert made["run"] == run
        assert made["compose.min_area_px"] == 9 and made["prompts.templates"] == ["a {class}"]
        assert made["compose.min_margin"] == 0.5
        assert "sam.points_per_side" not in made
    Path("c.yaml").write_text("compose: {min_area_px: 4}\n")
    made = parsed(["relabel", "--run", run, "--config", "c.yaml"])
    assert (made["compose.min_area_px"], made["compose.min_margin"]) == (4, 0.25)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {}}', "3"])
def test_relabel_refuses_a_run_json_that_no_run_wrote(content, capsys):
    Path("run.json").write_text(content)
    assert cli.main(["relabel", "--run", "."]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run.json must be ") and len(err.splitlines()) == 1


def test_relabel_refuses_what_is_no_folder(capsys):
    Path("file").write_text("x")
    assert cli.main(["relabel", "--run", "file"]) == 2
    assert "run must be a run's folder" in capsys.readouterr().err


def test_help_does_not_need_the_run(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["relabel", "--run", os.devnull, "--help"])
    assert caught.value.code == 0
