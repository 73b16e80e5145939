"""The tiny CLIP of the embedded world, as a model that open_clip loads like any other.

Enters: the committed weights, about a megabyte in float16. Leaves: a folder for open_clip's
`local-dir:` scheme, so that model, preprocessing and tokenizer come from the very functions that
load real checkpoints, and nothing downstream knows that this model is a toy.

Why the weights are packed: open_clip's own tokenizer has 49,408 tokens, and the captions use about
a hundred. The file holds only those rows of the token table, their ids, and ONE row more, that of
the words the captions do not use; it was trained on names of things that no scene shows, and
`local_dir` fills every other row of the table with it. So an unknown word reads as "something
else", not as noise.

Shapes: V tokens of the tokenizer, U tokens that captions use, E width of the text tower.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from zsplg_ray.shapes.captions import SYNONYMS
from zsplg_ray.storage import cache_dir

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "clip_shapes.safetensors"
"""The committed weights, made by `zsplg_ray.shapes.train_clip`."""

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 8,
        "width": 96,
        "head_width": 32,
        "layers": 5,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}
"""What open_clip builds the model from; it travels inside the weights file."""

PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
"""How open_clip's transform prepares an image; it too travels inside the weights file."""

KNOWN_WORDS = frozenset(
    {name for class_name, others in SYNONYMS.items() for name in (class_name, *others)}
    | {"background"}
)
"""Class names this model was taught, synonyms included; any other name deserves a warning."""

SETTINGS: dict[str, Any] = {
    "gem_depth": 2,
    "dense_px": 160,
    "templates": ("a photo of a {class}",),
    "background": ("background",),
    "min_similarity": {
        "cosine": {"gem": 0.5, "maskclip": 0.4, "sclip": 0.4, "naclip": 0.52, "crop": 0.5},
        "softmax": {"gem": 0.5, "maskclip": 0.5, "sclip": 0.5, "naclip": 0.9, "crop": 0.5},
    },
}
"""What suits this model, under the names that presets use; chosen on training-side scenes.

It was trained for gem and crop. naclip is beyond it: without the last block's residual and MLP it
names no better than chance, and these thresholds let next to nothing pass.
"""

_TOKEN_TABLE = "token_embedding.weight"


def pack(path: Path, state: Mapping[str, Tensor], token_id_U: Tensor, unknown_E: Tensor) -> None:
    """Write a packed weights file; the counterpart of `local_dir`.

    Args:
        path: File to write, replaced atomically.
        state: The model's parameters; `token_embedding.weight` holds the rows of `token_id_U` only.
        token_id_U: int, ids of those rows in the tokenizer, ascending.
        unknown_E: Row of every token that is not listed.
    """
    tensors = {name: value.detach().half().contiguous() for name, value in state.items()}
    tensors["token_ids"] = token_id_U.int().contiguous()
    tensors["token_unknown"] = unknown_E.detach().half().contiguous()
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"open_clip_config": json.dumps(config)})
    partial.replace(path)


def local_dir(weights: Path = WEIGHTS) -> Path:
    """Expand the weights into a folder for open_clip, once per machine; later calls only look.

    The folder is named after the SHA-256 of the weights file, so new weights never meet old ones.
    Each file is written elsewhere and moved into place: any number of processes may call this at
    once.

    Args:
        weights: A file as `pack` writes it.

    Returns:
        A folder with `open_clip_config.json` and `open_clip_model.safetensors`: both
        `open_clip.create_model_and_transforms` and `open_clip.get_tokenizer` take it as
        f"local-dir:{folder}".
    """
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"clip_shapes_{digest[:16]}"
    files = [folder / "open_clip_model.safetensors", folder / "open_clip_config.json"]
    if all(file.is_file() for file in files):
        return folder
    state, config = _expand(weights)
    partial = Path(tempfile.mkdtemp(dir=root))
    try:
        save_file(state, partial / files[0].name)
        (partial / files[1].name).write_text(config)
        folder.mkdir(exist_ok=True)
        for file in files:
            (partial / file.name).replace(file)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.debug("expanded %s into %s", weights.name, folder)
    return folder


def _expand(weights: Path) -> tuple[dict[str, Tensor], str]:
    """Float32 parameters under open_clip's names, the token table whole; and the config as JSON."""
    with safe_open(weights, "pt") as file:
        config = file.metadata()["open_clip_config"]
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    token_id_U = state.pop("token_ids").long()
    vocabulary_size = json.loads(config)["model_cfg"]["text_cfg"]["vocab_size"]
    table_VE = state.pop("token_unknown").repeat(vocabulary_size, 1)
    table_VE[token_id_U] = state[_TOKEN_TABLE]
    state[_TOKEN_TABLE] = table_VE
    return state, config
