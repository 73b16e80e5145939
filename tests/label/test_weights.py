"""Where weights come from: fetched once, whole, with the right hash; what lies is refused."""

import hashlib
import http.server
import logging
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zsplg_ray.config import ClipConfig, SamConfig
from zsplg_ray.label import weights
from zsplg_ray.label.weights import (
    OFFICIAL,
    clip_source,
    fetch,
    load_clip,
    load_sam,
    read_state,
    sam_checkpoint,
    sha256_file,
    state_sha256,
)
from zsplg_ray.shapes.sam import WEIGHTS as SAM_SHAPES
from zsplg_ray.storage import cache_dir

CONTENT = b"weights " * 50_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, so that nothing is taken from this machine's."""
    monkeypatch.setenv("ZSPLG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "there" / "w.pth"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def server():
    """A web server: /whole, /cut (shorter than promised), anything else is not found."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in ("/whole", "/cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:1000])

        def log_message(self, format, *args):
            pass

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def files(folder: Path) -> list[str]:
    """What is in a cache, locks (empty files) left out."""
    return sorted(p.name for p in folder.rglob("*") if p.suffix != ".lock" or p.stat().st_size)


def refused(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert " must be " in message and "; " in message and len(message.splitlines()) == 1
    return message


# Fetching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_is_fetched_whole_and_only_once(source, cache, sha256, caplog):
    caplog.set_level(logging.INFO)
    to = cache / "deep" / "w.pth"
    assert fetch(source.as_uri(), to, sha256, 10 * 2**20) == to
    assert to.read_bytes() == CONTENT and files(cache) == ["deep", "w.pth"]
    assert "(10 MiB)" in caplog.text, "the size is told before"
    source.unlink()
    assert fetch(source.as_uri(), to, sha256).read_bytes() == CONTENT


def test_another_hash_is_refused_and_the_file_not_kept(source, cache):
    message = refused(fetch, source.as_uri(), cache / "w.pth", "0" * 64)
    assert message.startswith(f"weights must be of SHA-256 {'0' * 64}, got {SHA256};")
    assert files(cache) == []
    assert fetch(source.as_uri(), cache / "w.pth", SHA256).is_file(), "the next try may succeed"


@pytest.mark.parametrize("path", ["cut", "none"])
def test_a_download_that_fails_leaves_nothing(server, cache, path):
    message = refused(fetch, f"{server[0]}/{path}", cache / "w.pth", None)
    assert message.startswith(
        f"sam.checkpoint must be a file that can be downloaded, got {server[0]}"
    )
    assert files(cache) == []


@pytest.mark.parametrize("url", ["file:///none/w.pth", "nope://x/w.pth", "http://127.0.0.1:1/w"])
def test_addresses_that_lead_nowhere(url, cache):
    assert "sam.checkpoint must be a file that can be downloaded" in refused(
        fetch, url, cache / "w.pth", None
    )
    assert files(cache) == []


def test_those_who_ask_at_the_same_time_download_once(server, cache):
    start = threading.Barrier(6)
    got: list[bytes] = []

    def ask():
        start.wait()
        got.append(fetch(f"{server[0]}/whole", cache / "w.pth", SHA256).read_bytes())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [CONTENT] * 6
    assert server[1] == ["/whole"]


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("ZSPLG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/zsplg_ray")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/zsplg_ray")


# Which checkpoint --------------------------------------------------------------------------------


def test_the_official_files():
    assert {k: (f.name, f.size) for k, f in OFFICIAL.items()} == {
        "vit_h": ("sam_vit_h_4b8939.pth", 2_564_550_879),
        "vit_l": ("sam_vit_l_0b3195.pth", 1_249_524_607),
        "vit_b": ("sam_vit_b_01ec64.pth", 375_042_383),
    }
    hashes = [file.sha256 for file in OFFICIAL.values()]
    assert len(set(hashes)) == 3 and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    base = "https://dl.fbaipublicfiles.com/segment_anything/"
    assert all(file.url == base + file.name for file in OFFICIAL.values())


def test_without_a_checkpoint_the_official_one_is_fetched_and_its_hash_checked(monkeypatch, cache):
    asked = []
    monkeypatch.setattr(weights, "fetch", lambda *args: asked.append(args))
    sam_checkpoint(SamConfig(model="vit_l"))
    official = OFFICIAL["vit_l"]
    assert asked == [(official.url, cache / official.name, official.sha256, official.size)]


def test_where_a_checkpoint_is_looked_for(source, tmp_path, monkeypatch, cache):
    assert sam_checkpoint(SamConfig(random_weights=True, checkpoint="none")) is None
    assert sam_checkpoint(SamConfig(model="shapes")) == SAM_SHAPES
    assert sam_checkpoint(SamConfig(model="shapes", checkpoint=str(source))) == source
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sam_checkpoint(SamConfig(checkpoint="~/there/w.pth")) == source
    fetched = sam_checkpoint(SamConfig(checkpoint=source.as_uri()))
    assert fetched is not None and fetched.parent == cache and fetched.suffix == ".pth"
    assert fetched.read_bytes() == CONTENT
    other = source.with_name("v.safetensors")
    other.write_bytes(b"other")
    again = sam_checkpoint(SamConfig(checkpoint=other.as_uri()))
    assert again is not None and again.suffix == ".safetensors" and again != fetched


@pytest.mark.parametrize("checkpoint", ["none.pth", "", "."])
def test_a_checkpoint_that_is_no_file(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(load_sam, SamConfig(checkpoint=checkpoint))
    assert message.startswith("sam.checkpoint must be a file, got")


# Reading state dicts -----------------------------------------------------------------------------


class Malicious:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(params=["torch file", "bare pickle", "torch file called safetensors"])
def malicious(request, tmp_path):
    suffix = ".safetensors" if "safetensors" in request.param else ".pth"
    file, touched = tmp_path / f"evil{suffix}", tmp_path / "touched"
    state = {"a": torch.zeros(2), "b": Malicious(touched)}
    if request.param == "bare pickle":
        file.write_bytes(pickle.dumps(state, 2))
    else:
        torch.save(state, file)
    return file, touched


def test_code_in_a_checkpoint_is_refused_and_not_run(malicious):
    file, touched = malicious
    for call in (read_state, lambda f: load_sam(SamConfig(model="shapes", checkpoint=str(f)))):
        message = refused(call, file)
        assert message.startswith(
            f"sam.checkpoint must be a .pth or .safetensors state dict, got {file}"
        )
        assert "weights_only" not in message, "torch's advice to read it nevertheless is passed on"
    assert not touched.exists()


def test_code_in_a_clip_file_is_refused_and_not_run(malicious):
    file, touched = malicious
    message = refused(load_clip, ClipConfig(model=f"ViT-S-32-alt/{file}"))
    assert message.startswith("clip.model must be a model whose weights can be loaded")
    assert "weights_only" not in message
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", [1, 2], torch.zeros(2), {"model": {"a": torch.zeros(2)}}, {"a": 1}],
    ids=["empty", "text", "list", "tensor", "nested", "numbers"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_state_dict_is_refused(content, suffix, tmp_path):
    file = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert refused(read_state, file).startswith("sam.checkpoint must be a .pth or .safetensors")


def test_states_come_back_as_float32_on_the_cpu(tmp_path):
    state = {"half": torch.rand(3).half(), "count": torch.tensor(3), "b": torch.rand(2).bfloat16()}
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        back = read_state(tmp_path / name)
        assert {k: v.dtype for k, v in back.items()} == {
            "half": torch.float32,
            "count": torch.int64,
            "b": torch.float32,
        }
        assert all(torch.equal(back[k], state[k].to(back[k].dtype)) for k in state)


# SAM ---------------------------------------------------------------------------------------------


def test_the_tiny_sam_takes_the_path_of_the_large_ones(tmp_path):
    sam = load_sam(SamConfig(model="shapes"))
    assert not sam.training and not any(p.requires_grad for p in sam.parameters())
    torch.save(sam.state_dict(), tmp_path / "w.pth")
    again = load_sam(SamConfig(model="shapes", checkpoint=str(tmp_path / "w.pth")))
    assert state_sha256(again) == state_sha256(sam)
    assert state_sha256(load_sam(SamConfig(model="shapes", random_weights=True))) != state_sha256(
        sam
    )


@pytest.mark.parametrize("wrong", ["shape", "missing", "more"])
def test_weights_of_another_model_are_refused(wrong, tmp_path):
    state = read_state(SAM_SHAPES)
    name = sorted(state)[0]
    if wrong == "shape":
        state[name] = state[name].repeat(2, *[1] * (state[name].ndim - 1))
    elif wrong == "missing":
        del state[name]
    else:
        state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    message = refused(
        load_sam, SamConfig(model="shapes", checkpoint=str(tmp_path / "w.safetensors"))
    )
    assert message.startswith("sam.checkpoint must be the weights of shapes, got ")
    assert message.endswith("give the file that belongs to --sam, or another --sam")


def test_random_weights_are_always_the_same_and_leave_the_random_state_alone():
    config = SamConfig(model="shapes", random_weights=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = state_sha256(load_sam(config))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert state_sha256(load_sam(config)) == first


# CLIP --------------------------------------------------------------------------------------------


def test_the_clip_that_a_name_means(tmp_path, monkeypatch):
    def source(model, **values):
        return clip_source(ClipConfig(model=model, **values))

    assert source("ViT-B-16/laion2b_s34b_b88k") == ("ViT-B-16", "laion2b_s34b_b88k")
    assert source("hf-hub:org/name") == ("hf-hub:org/name", None)
    assert source("local-dir:/some/where") == ("local-dir:/some/where", None)
    assert source("ViT-B-16/none", random_weights=True) == ("ViT-B-16", None)
    assert source("ViT-B-16", random_weights=True) == ("ViT-B-16", None)
    file = tmp_path / "mine.pt"
    file.touch()
    assert source(f"ViT-B-16/{file}") == ("ViT-B-16", str(file))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source("ViT-B-16/~/mine.pt") == ("ViT-B-16", str(file))
    assert source("shapes")[0].startswith("local-dir:")


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ("ViT-B16/openai", "did you mean ViT-B-16?"),
        ("vit-b-32/openai", "did you mean ViT-B-32?"),
        ("0000000/openai", "see open_clip.list_models()"),
        ("ViT-B-16", "PRETRAINED is a file or one of openai, laion400m_e31"),
        ("ViT-B-16/", "PRETRAINED is a file or one of openai"),
        ("ViT-B-16/none.pt", "PRETRAINED is a file or one of openai"),
    ],
)
def test_unknown_clip_models_are_told_what_is_near(model, fix):
    message = refused(clip_source, ClipConfig(model=model))
    assert message.startswith(f"clip.model must be MODEL/PRETRAINED of open_clip, got {model};")
    assert fix in message


def test_clip_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"positional_embedding": torch.zeros(3, 3)}, tmp_path / "w.pt")
    message = refused(load_clip, ClipConfig(model=f"ViT-S-32-alt/{tmp_path / 'w.pt'}"))
    assert message.startswith(
        "clip.model must be a model whose weights can be loaded, got ViT-S-32"
    )
    assert "clip.model must" in refused(load_clip, ClipConfig(model=f"local-dir:{tmp_path}/none"))


def test_the_tiny_clip_is_loaded_as_any_other_and_always_the_same():
    model, tokenizer = load_clip(ClipConfig(model="shapes"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer(["a photo of a star"]).shape == (1, model.context_length)
    again, _ = load_clip(ClipConfig(model="shapes"))
    assert state_sha256(model) == state_sha256(again)
    torch.manual_seed(3)
    random = [load_clip(ClipConfig(model="shapes", random_weights=True))[0] for _ in range(2)]
    assert state_sha256(random[0]) == state_sha256(random[1]) != state_sha256(model)


# Fingerprints ------------------------------------------------------------------------------------


def test_a_models_hash_knows_names_values_and_buffers_but_not_their_order():
    def model(weight=1.0, name="a", buffer=0.0, turned=False):
        made = torch.nn.Module()
        tensors = {name: torch.full((2,), weight), "z": torch.ones(()).bfloat16()}
        for key in sorted(tensors, reverse=turned):
            made.register_parameter(key, torch.nn.Parameter(tensors[key]))
        made.register_buffer("seen", torch.tensor(buffer))
        return made

    base = state_sha256(model())
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert state_sha256(model(turned=True)) == base
    others = [
        model(weight=np.nextafter(np.float32(1), 2).item()),
        model(name="b"),
        model(buffer=1.0),
    ]
    assert len({base, *map(state_sha256, others)}) == 4


def test_a_files_hash(source):
    assert sha256_file(source) == SHA256
