"""No file that a user or a run's folder gives is run: so the source says, and bad files try."""

import ast
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

import zsplg_ray
from zsplg_ray.cluster import worker
from zsplg_ray.cluster.trainrun import CHECKPOINTS, STATE
from zsplg_ray.config import ClipConfig, SamConfig, StudentConfig
from zsplg_ray.label.weights import fetch, load_clip, load_sam
from zsplg_ray.rundir import RunFolder
from zsplg_ray.shapes.clip import local_dir
from zsplg_ray.student.checkpoint import load_init, load_student
from zsplg_ray.student.model import DeepLabV3Plus
from zsplg_ray.views.evaluate import is_model

ROOT = Path(zsplg_ray.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "joblib.load"),
    *("tempfile.mktemp", "cloudpickle.load", "cloudpickle.loads", "marshal.loads", "shelve.open"),
}


def dotted(node: ast.expr) -> str:
    """os.path.join for the expression os.path.join; "" for what is no name."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> list[str]:
    """Calls in a source that might run what they read."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml", "marshal"):
            found += [f"{node.module}.{a.name}" for a in node.names if "oad" in a.name]
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {k.arg: k.value for k in node.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name == "torch.load" and getattr(given.get("weights_only"), "value", None) is not True:
            found.append(name)
        if name in ("np.load", "numpy.load"):
            allowed = given.get("allow_pickle")
            if allowed is None or getattr(allowed, "value", None) is not False:
                found.append(name)
        shell = given.get("shell")
        if shell is not None and getattr(shell, "value", None) is not False:
            found.append(f"{name} with a shell")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        *("torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)"),
        *("pickle.loads(b)", "from pickle import loads", "eval(s)", "yaml.load(s)", "np.load(f)"),
        *("subprocess.run(c, shell=True)", "np.load(f, allow_pickle=True)", "torch.jit.load(f)"),
    ],
)
def test_the_look_at_the_source_finds(source):
    assert faults(source)


# Files that try -----------------------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def mark(tmp_path):
    """The file that is there after a test only if code of a file was run."""
    path = tmp_path / "run"
    yield path
    assert not path.exists(), "code in a file was run"


def evil(mark: Path, form: str) -> bytes:
    """A file that touches `mark` when it is unpickled."""
    if form == "pickle":
        return pickle.dumps(Touch(mark))
    content = {"model": {"classifier.weight": torch.zeros(3, 4, 1, 1)}, "state": {}, "format": 1}
    content |= {"student": {}, "classes": Touch(mark), "extra": Touch(mark)}
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=form == "zip")
    return out.getvalue()


FORMS = pytest.mark.parametrize("form", ["pickle", "zip", "old"])


def test_the_files_would_do_it(tmp_path):
    for form in ("pickle", "zip", "old"):
        mark = tmp_path / form
        data = evil(mark, form)
        if form == "pickle":
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        assert mark.exists()


@FORMS
def test_sam_and_clip(tmp_path, mark, form):
    for name in ("w.pth", "w.pt", "w.safetensors", "w.bin"):
        path = tmp_path / name
        path.write_bytes(evil(mark, form))
        with pytest.raises(ValueError, match=r"^sam\.checkpoint must be"):
            load_sam(SamConfig(model="shapes", checkpoint=str(path)))
    folder = tmp_path / "clip"  # in which the tiny model's description is, as of any other
    folder.mkdir()
    shutil.copy(Path(local_dir(), "open_clip_config.json"), folder)
    told = {"pytorch_model.bin": "holds other things than tensors", "model.safetensors": "loaded"}
    for name, words in told.items():
        (folder / f"open_clip_{name}").write_bytes(evil(mark, form))
        with pytest.raises(ValueError, match=rf"^clip\.model must be .*{words}"):
            load_clip(ClipConfig(model=f"local-dir:{folder}"))


def test_clip_from_a_file(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("open_clip.list_models", lambda: ["tiny"])
    config = json.loads(Path(local_dir(), "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    np.savez(tmp_path / "w.npz", **{"params/img": np.array([Touch(mark)], object)})  # type: ignore
    (tmp_path / "w.pt").write_bytes(evil(mark, "zip"))
    for name in ("w.npz", "w.pt"):
        with pytest.raises(ValueError, match=r"^clip\.model must be .*weights can be loaded"):
            load_clip(ClipConfig(model=f"tiny/{tmp_path / name}"))


def test_clip_whose_description_asks_for_code(tmp_path):
    described = {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="without code of its own"):
        load_clip(ClipConfig(model=f"local-dir:{tmp_path}"))


@FORMS
def test_models_of_training(tmp_path, mark, form):
    model = DeepLabV3Plus(StudentConfig(backbone="test_byobnet", pretrained=False), 3)
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "train.json").write_text("{}")
    assert is_model(str(folder))
    for name in ("best.pt", "last.pt", "model.pth", "model.safetensors"):
        for old in folder.glob("*.pt"):
            old.unlink()
        (folder / name).write_bytes(evil(mark, form))
        for source in (
            (folder, folder / name) if name in ("best.pt", "last.pt") else [folder / name]
        ):
            with pytest.raises(ValueError, match=r"^model must be"):
                load_student(str(source))
            with pytest.raises(ValueError, match=r"^student\.init must be"):
                load_init(model, str(source))


@FORMS
def test_the_state_that_training_goes_on_from(tmp_path, mark, form, monkeypatch):
    place = tmp_path / CHECKPOINTS / "0123456789ab" / "step-00000001"
    place.mkdir(parents=True)
    (place / STATE).write_bytes(evil(mark, form))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    job = worker.Job(
        config=None,  # type: ignore[arg-type]
        data=None,  # type: ignore[arg-type]
        schedule=None,  # type: ignore[arg-type]
        folder=RunFolder(str(tmp_path)),
        attempt="a",
        start="0123456789ab/step-00000001",
    )
    with pytest.raises(pickle.UnpicklingError):
        worker._saved(job)


@pytest.mark.parametrize("url", ["http://example.com/sam.pth", "HTTP://10.0.0.1/sam.pth"])
def test_weights_come_over_https(tmp_path, url):
    with pytest.raises(ValueError, match="an https:// address"):
        fetch(url, tmp_path / "sam.pth", None)
    assert not list(tmp_path.iterdir())
