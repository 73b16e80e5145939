"""Models in files: ours, UniMatch's, plain ones; and what is refused with one clear line."""

import io
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.student.models import TINY
from zsplg_ray.config import StudentConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.student.checkpoint import (
    FORMAT,
    build,
    load_init,
    load_student,
    pack,
    read_weights,
    weights_sha256,
)
from zsplg_ray.student.model import DeepLabV3Plus
from zsplg_ray.vocab import class_list

GOLDEN = Path(__file__).parent / "golden" / "unimatch_checkpoint_keys.json"
CLASSES = class_list("cat,dog")


def random_model(config, n_classes=3, seed=0) -> DeepLabV3Plus:
    """Every weight and every running statistic is a random number."""
    model = build(config, n_classes)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.eval()


def outputs(model) -> torch.Tensor:
    image = torch.rand((1, 3, 65, 49), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(image)[0]


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY)


def save(path: Path, content) -> str:
    torch.save(content, path)
    return str(path)


# What is read ------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_released_checkpoints():
    golden = {k: tuple(v) for k, v in json.loads(GOLDEN.read_text())["keys"].items()}
    with torch.device("meta"):
        model = DeepLabV3Plus(StudentConfig(backbone="resnet101s.gluon_in1k"), 21)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: v for k, v in ours.items() if ".layer" not in k} == golden
    blocks = {k.rsplit(".", 2)[0] for k in ours if ".layer3." in k and k.endswith("conv1.weight")}
    assert blocks == {f"backbone.layer3.{i}" for i in range(23)}


def test_a_checkpoint_as_unimatch_releases_them(tmp_path):
    model = random_model(StudentConfig(backbone="resnet50s"), 21)
    state = model.state_dict()
    content = {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 79}
    content |= {"optimizer": {"state": {}, "param_groups": [{"lr": 0.001}]}, "previous_best": 75.2}
    content["model_ema"] = {k: torch.zeros(1) for k in state}
    student = load_student(save(tmp_path / "official.pth", content), classes="voc")
    assert student.config.backbone == "resnet50s" and student.conf_thresh is None
    assert student.classes.names[20] == "tvmonitor" and not student.model.training
    assert torch.equal(outputs(student.model), outputs(model))
    assert student.sha256 == weights_sha256(model)
    told = refusal(str(tmp_path / "official.pth"), classes="voc", backbone="resnet101s")
    assert "over resnet101s, got" in told and "missing: backbone.layer3.10.bn1.bias" in told


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_our_own_files_come_back_as_they_were(tmp_path, tiny, wrapper):
    state = {wrapper + k: v for k, v in tiny.state_dict().items()}
    path = tmp_path / "any name"
    path.write_bytes(pack(state, TINY, CLASSES, {"conf_thresh": 0.8, "epoch": 3}))
    before = torch.random.get_rng_state()
    student = load_student(str(path))
    assert torch.equal(before, torch.random.get_rng_state()), "torch's generator was used"
    assert student.config == TINY and student.classes == CLASSES and student.conf_thresh == 0.8
    assert torch.equal(outputs(student.model), outputs(tiny))
    assert student.sha256 == weights_sha256(tiny)
    assert load_student(str(path), classes="cat,dog", backbone="test_byobnet").config == TINY
    assert read_weights(str(path)).extra["epoch"] == 3


def test_plain_state_dicts_and_safetensors_tell_their_widths(tmp_path):
    config = StudentConfig(backbone="resnet18", decoder_channels=24, aspp_channels=40)
    model = random_model(config, 5)
    uris = [save(tmp_path / "a.pth", model.state_dict())]
    safetensors.torch.save_file(model.state_dict(), str(tmp_path / "a.safetensors"))
    uris.append(str(tmp_path / "a.safetensors"))
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    uris.append(save(tmp_path / "half.pth", {"state_dict": halves}))
    for uri in uris:
        student = load_student(uri, classes="a,b,c,d")
        found = student.config
        assert (found.backbone, found.decoder_channels) == ("resnet18", 24)
        assert (found.aspp_channels, found.low_level_channels) == (40, 48)
        tolerance = 1e-2 if "half" in uri else 0.0
        close = np.allclose(outputs(student.model), outputs(model), rtol=tolerance, atol=tolerance)
        assert close and next(student.model.parameters()).dtype == torch.float32
    assert load_student(uris[0], otherwise=class_list("a,b,c,d")).classes.names[1] == "a"


def test_a_run_s_folder_stands_for_its_best_model(tmp_path, tiny):
    other = random_model(TINY, seed=5)
    (tmp_path / "last.pt").write_bytes(pack(other.state_dict(), TINY, CLASSES))
    assert load_student(str(tmp_path)).sha256 == weights_sha256(other)
    (tmp_path / "best.pt").write_bytes(pack(tiny.state_dict(), TINY, CLASSES))
    assert load_student(str(tmp_path)).sha256 == weights_sha256(tiny)
    assert load_student(tmp_path.as_uri()).sha256 == weights_sha256(tiny)
    assert load_student((tmp_path / "last.pt").as_uri()).sha256 == weights_sha256(other)


def test_a_model_in_an_object_store(tiny, bucket):
    model = pack(tiny.state_dict(), TINY, CLASSES)
    RunFolder(bucket.uri("run")).write_bytes("best.pt", model)
    for path in ("run", "run/best.pt"):
        assert load_student(bucket.uri(path)).sha256 == weights_sha256(tiny)
    assert "exists" in refusal(bucket.uri("none"))


def test_what_is_packed_is_plain_and_carries_its_format(tiny):
    content = torch.load(io.BytesIO(pack(tiny.state_dict(), TINY, CLASSES)), weights_only=True)
    assert content["format"] == FORMAT and content["classes"] == CLASSES.to_dict()
    json.dumps({k: v for k, v in content.items() if k != "model"})


# What is refused ---------------------------------------------------------------------------------


def refusal(uri: str, **given) -> str:
    with pytest.raises(ValueError) as caught:
        load_student(uri, **given)
    assert len(str(caught.value).splitlines()) == 1 and " must be " in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_models(tmp_path, tiny):
    assert "model must be something that exists" in refusal(str(tmp_path / "none.pt"))
    assert refusal(str(tmp_path / "none.pt"), name="labels").startswith("labels must be")
    assert "a folder with best.pt or last.pt" in refusal(str(tmp_path))
    (tmp_path / "text.pt").write_bytes(b"no weights")
    assert "a checkpoint, a state dict or .safetensors" in refusal(str(tmp_path / "text.pt"))
    data = pack(tiny.state_dict(), TINY, CLASSES)
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    assert "cut.pt" in refusal(str(tmp_path / "cut.pt"))
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    assert "cut.safetensors" in refusal(str(tmp_path / "cut.safetensors"))
    assert "no tensors" in refusal(save(tmp_path / "empty.pt", {"epoch": 1}), classes="voc")
    assert "no tensors" in refusal(save(tmp_path / "list.pt", [torch.zeros(1)]), classes="voc")
    bare = {k[9:]: v for k, v in tiny.state_dict().items() if k.startswith("backbone.")}
    assert "(no classifier.weight)" in refusal(save(tmp_path / "bare.pt", bare), classes="voc")


class Evil:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return print, ("run",)


def test_no_code_is_ever_run(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"model": {"a": torch.zeros(1)}, "evil": Evil()}, path)
    assert "other things than tensors" in refusal(str(path), classes="voc")
    path.write_bytes(pickle.dumps({"a": Evil()}))
    assert "evil.pt" in refusal(str(path), classes="voc")
    assert "run" not in capsys.readouterr().out


def test_a_newer_format_is_named(tmp_path, tiny):
    content = torch.load(io.BytesIO(pack(tiny.state_dict(), TINY, CLASSES)), weights_only=True)
    told = refusal(save(tmp_path / "new.pt", {**content, "format": FORMAT + 1}))
    assert told.startswith(f"model must be of format {FORMAT}, got")


def test_classes_must_be_known_and_fit(tmp_path, tiny):
    plain = save(tmp_path / "plain.pth", tiny.state_dict())
    assert "3 classes with background: add --classes" in refusal(plain)
    assert "classes must be 3 with background" in refusal(plain, classes="cat")
    (tmp_path / "ours.pt").write_bytes(pack(tiny.state_dict(), TINY, CLASSES))
    told = refusal(str(tmp_path / "ours.pt"), classes="cat,cow")
    assert told.startswith("classes must be those of") and "cat, dog, got" in told


def test_weights_that_do_not_fit_name_the_first_differences(tmp_path, tiny):
    state = tiny.state_dict()
    missing = {k: v for k, v in state.items() if not k.startswith("fuse.")}
    told = refusal(save(tmp_path / "a.pth", missing), classes="cat,dog")
    assert "missing: fuse.0.weight, fuse.1.bias, fuse.1.num_batches_tracked, and 9 more" in told
    told = refusal(save(tmp_path / "b.pth", {**state, "aux.w": torch.ones(1)}), classes="cat,dog")
    assert "unexpected: aux.w" in told
    reshaped = {**state, "fuse.1.bias": torch.zeros(7)}
    told = refusal(save(tmp_path / "c.pth", reshaped), classes="cat,dog")
    assert "of another shape: fuse.1.bias" in told
    strange = {f"backbone.x.{k}" if "backbone" in k else k: v for k, v in state.items()}
    told = refusal(save(tmp_path / "d.pth", strange), classes="cat,dog")
    assert "resnet101s" in told and "--backbone" in told
    told = refusal(save(tmp_path / "e.pth", state), classes="cat,dog", backbone="resnet5O")
    assert told.startswith("student.backbone must be a convolutional timm model")
    (tmp_path / "ours.pt").write_bytes(pack(state, TINY, CLASSES))
    told = refusal(str(tmp_path / "ours.pt"), backbone="resnet18")
    assert told.startswith("backbone must be test_byobnet as in")


def test_unimatch_s_own_xception_is_told_apart(tmp_path, tiny):
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith("backbone.")}
    state["backbone.block1.sepconv1.depthwise.weight"] = torch.zeros(1)
    told = refusal(save(tmp_path / "x.pth", state), classes="cat,dog")
    assert "UniMatch's own Xception" in told


# A model to start from ---------------------------------------------------------------------------


def test_everything_that_fits_is_taken_over(tmp_path, tiny, caplog):
    uri = save(tmp_path / "a.pth", {"model": tiny.state_dict()})
    model = random_model(TINY, seed=7)
    with caplog.at_level(logging.WARNING):
        digest = load_init(model, uri)
    assert not caplog.records and torch.equal(outputs(model), outputs(tiny))
    assert digest == weights_sha256(tiny)


def test_a_classifier_of_other_classes_starts_anew(tmp_path, tiny, caplog):
    (tmp_path / "best.pt").write_bytes(pack(tiny.state_dict(), TINY, CLASSES))
    model = random_model(TINY, n_classes=6, seed=7)
    fresh = model.classifier.weight.clone()
    with caplog.at_level(logging.WARNING):
        load_init(model, str(tmp_path))
    assert "classifier.bias, classifier.weight" in caplog.text
    assert torch.equal(model.classifier.weight, fresh)
    ours, theirs = model.state_dict(), tiny.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "classifier" not in k)


def test_a_bare_backbone_may_be_given(tmp_path, tiny, caplog):
    uri = save(tmp_path / "timm.pth", tiny.backbone.state_dict())
    model = random_model(TINY, seed=7)
    head = model.state_dict()["head.project.0.weight"].clone()
    load_init(model, uri)
    ours, theirs = model.backbone.state_dict(), tiny.backbone.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert torch.equal(model.state_dict()["head.project.0.weight"], head)


def test_nothing_that_fits_is_an_error(tmp_path, tiny):
    uri = save(tmp_path / "other.pth", {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"student\.init must be weights that fit this model"):
        load_init(tiny, uri)
    with pytest.raises(ValueError, match=r"student\.init must be something that exists"):
        load_init(tiny, str(tmp_path / "none"))
