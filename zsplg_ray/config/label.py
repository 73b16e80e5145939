"""Settings of zero-shot labelling: SAM, CLIP, prompts, thresholds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from zsplg_ray.config.shared import ActorsConfig, MlflowConfig, RayConfig
from zsplg_ray.settings import Range, Section, complain


@dataclass(frozen=True, kw_only=True)
class SamConfig(Section):
    """Segments: which SAM proposes them and how densely. Names and meaning are SAM's own."""

    PREFIX: ClassVar[str] = "sam."

    model: Annotated[Literal["vit_h", "vit_l", "vit_b", "shapes"], arg(aliases=["--sam"])] = "vit_h"
    """SAM's size; `shapes` is the tiny one that comes with this package and knows only shapes."""
    checkpoint: Annotated[str | None, arg(aliases=["--sam-checkpoint"])] = None
    """Weights: a path or URI (.pth, .safetensors). None: the official file, downloaded once."""
    points_per_side: Annotated[int | None, Range(1, 256)] = None
    """Points along one side of the prompt grid, [1, 256]. None: 32, or what the model wants."""
    points_per_batch: Annotated[int, Range(1, 65536)] = 64
    """Most points of an image decoded at a time, [1, 65536]; on a CPU only as many as its caches
    hold, and fewer when memory runs out. The masks are the same."""
    memory_gib: Annotated[float | None, Range(0.1, 4096)] = None
    """Memory of the device for segmenting, GiB in [0.1, 4096], beside the weights: it decides how
    many images go through SAM at once (`zsplg doctor` tells), at most `actors.in_flight`. None:
    70 % of what is free on a GPU; on a CPU, where more are not quicker, what one image takes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the image encoder. bfloat16 is faster; the masks are nearly the same."""
    pred_iou_thresh: Annotated[float | None, Range(0, 1)] = None
    """Masks whose predicted IoU is not higher are dropped, [0, 1]; 0 keeps all. None: 0.88, or the
    model's own."""
    stability_score_thresh: Annotated[float | None, Range(0, 1)] = None
    """Masks less stable than this are dropped, [0, 1]; 0 keeps all. None: 0.95, or the model's
    own."""
    stability_score_offset: Annotated[float | None, Range(0, 100)] = None
    """Shift of the mask threshold for the stability score, logits in [0, 100]. None: 1.0."""
    box_nms_thresh: Annotated[float | None, Range(0, 1)] = None
    """Of two masks whose boxes overlap more (IoU in [0, 1]) the better stays. None: 0.7."""
    crop_n_layers: Annotated[int, Range(0, 4)] = 0
    """Further passes over smaller crops of the image, layers in [0, 4]; layer i has 4**i crops."""
    crop_nms_thresh: Annotated[float, Range(0, 1)] = 0.7
    """As `box_nms_thresh`, between masks of different crops; the smaller crop's stays, [0, 1]."""
    crop_overlap_ratio: Annotated[float, Range(0, 0.99)] = 512 / 1500
    """How much crops overlap in the first layer, share of the image's short side, [0, 0.99]."""
    crop_n_points_downscale_factor: Annotated[int, Range(1, 16)] = 1
    """`points_per_side` is divided by this once a layer of crops, [1, 16]."""
    min_mask_region_area: Annotated[int | None, Range(0)] = None
    """Holes and islands smaller than this many pixels are removed, >= 0. None: 0, or the model's
    own."""
    random_weights: bool = False
    """For tests: random weights (seed 0) instead of a checkpoint; the masks mean nothing."""

    def extra_checks(self) -> None:
        """Every layer of crops has at least one point."""
        least = self.crop_n_points_downscale_factor**self.crop_n_layers
        if self.points_per_side is not None and self.points_per_side < least:
            rule = f">= {least}, so that the smallest of {self.crop_n_layers} layers has a point"
            fix = "raise it, or lower sam.crop_n_points_downscale_factor or sam.crop_n_layers"
            raise ValueError(complain("sam.points_per_side", rule, self.points_per_side, fix))


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Section):
    """Names: which CLIP embeds segments and class names, and how a segment is embedded."""

    PREFIX: ClassVar[str] = "clip."

    model: Annotated[str, arg(aliases=["--clip"])] = "ViT-B-16/laion2b_s34b_b88k"
    """MODEL/PRETRAINED of open_clip (PRETRAINED: a tag or a file), `hf-hub:ORG/NAME`,
    `local-dir:PATH`, or `shapes`, the tiny one that comes with this package."""
    embedder: Literal["gem", "maskclip", "sclip", "naclip", "crop"] = "gem"
    """How a segment is seen, all but crop by averaging a map of the image over its mask:
    gem (the paper's): self-self attention beside the last blocks;
    maskclip: in the last block every patch keeps its own value;
    sclip: the last block compares queries to queries, keys to keys;
    naclip: the last block compares keys to keys, near ones first, no MLP;
    crop: its box through CLIP, one pass a segment."""
    gem_depth: Annotated[int | None, Range(1, 64)] = None
    """For gem: last transformer blocks it replaces, [1, 64]. None: 7, or what the model wants."""
    dense_px: Annotated[int | None, Range(32, 4096)] = None
    """Side of the image for dense features, pixels in [32, 4096]. None: 448, or the model's own."""
    crop_batch: Annotated[int, Range(1, 4096)] = 32
    """Crops embedded at a time, [1, 4096]; halved by itself when memory runs out."""
    random_weights: bool = False
    """For tests: random weights (seed 0); PRETRAINED is not read and the names mean nothing."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """Text that stands for a class. May be changed by `relabel` without running SAM again."""

    PREFIX: ClassVar[str] = "prompts."

    templates: tuple[str, ...] | None = None
    """Sentences with {class} in them, averaged. None: `a photo of a {class}`, or the model's."""
    background: tuple[str, ...] | None = None
    """Words put into the templates for what is no class at all (wall, sky); a segment nearest to
    one of these is background. None: none, or the model's own."""

    def extra_checks(self) -> None:
        """There is a template, and every one has a place for the class."""
        if self.templates == ():
            fix = "write for example 'a photo of a {class}', or leave it out"
            raise ValueError(complain("prompts.templates", "at least one sentence", "none", fix))
        for template in self.templates or ():
            if "{class}" not in template:
                raise ValueError(
                    complain(
                        "prompts.templates",
                        "sentences that contain {class}",
                        template,
                        "write for example 'a photo of a {class}'",
                    )
                )


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(Section):
    """From similarities and masks to a label map. All of it can be changed by `relabel`."""

    PREFIX: ClassVar[str] = "compose."

    score: Literal["cosine", "softmax"] = "cosine"
    """A segment's score: cosine similarity to its best class, or softmax over the classes."""
    temperature: Annotated[float, Range(1e-6, 1e3)] = 0.01
    """Divides the cosine similarities before the softmax, [1e-06, 1000]; CLIP's own is 0.01."""
    min_similarity: Annotated[float | dict[str, float] | None, Range(-1, 1)] = None
    """Lowest score that names a segment, in [-1, 1] on the scale of `compose.score`; one number
    or one per class (`cat 0.3 '*' 0.2`). None: 0.2 (cosine), 0.5 (softmax), or the model's own."""
    min_margin: Annotated[float, Range(0, 2)] = 0.0
    """Lowest lead of the best score over the second best, [0, 2]."""
    min_area_px: Annotated[int, Range(0)] = 0
    """Segments of fewer pixels are not used, >= 0."""
    min_predicted_iou: Annotated[float, Range(0, 1)] = 0.0
    """Segments whose quality SAM predicts lower are not used, [0, 1]."""
    min_stability: Annotated[float, Range(0, 1)] = 0.0
    """Segments less stable than this are not used, [0, 1]."""
    order: Literal["score", "area"] = "score"
    """Who wins a pixel where segments overlap: the higher score, or the smaller area."""
    unsure: Literal["background", "ignore"] = "background"
    """What a pixel becomes that no accepted segment covers: background (the paper), or 255."""

    def extra_checks(self) -> None:
        """A mapping of thresholds holds at least one."""
        if self.min_similarity == {}:
            fix = "write for example 0.2, or cat 0.3 '*' 0.2"
            raise ValueError(complain("compose.min_similarity", "a threshold", "none", fix))


@dataclass(frozen=True, kw_only=True)
class LabellingConfig(Section):
    """What `label` is told; `out` may be left open, for what only looks ahead."""

    images: str
    """SRC: folder, glob, VOC root, split file, COCO json, Parquet, or s3:// gs:// of these."""
    classes: str
    """SPEC: voc, coco, cityscapes, ade20k, shapes, a text file (`name: alias, alias` a line), or
    `cat,dog`. Background is always class 0."""
    out: str | None = None
    """The run's folder, a path or URI. None: not chosen yet."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    max_pixels: Annotated[int, Range(1, 500_000_000)] = 200_000_000
    """Images of more pixels go to errors/, [1, 5e+08]: a guard against decompression bombs."""
    max_errors: Annotated[int | None, Range(0)] = None
    """The run stops with exit 1 once more images than this have failed, >= 0. None: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of an actor: auto (a GPU if it has one), cpu, cuda."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """The whole of run.json on stdout instead of a summary."""
    sam: SamConfig = field(default_factory=SamConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, kw_only=True)
class LabelConfig(LabellingConfig):
    """Images and class names in, segments and zero-shot pseudo labels out. The same command again
    does only what is missing."""

    out: str = field()
    """The run's folder (made if missing), a path or URI."""


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(Section):
    """Segments of a finished or running `label` in, new labels out; no SAM and no GPU. Settings
    that are not given stay as the labels were made."""

    run: str
    """The run's folder, as given to `label --out`."""
    classes: str | None = None
    """New class names (SPEC). None: those that the labels were made with."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """The whole of run.json on stdout instead of a summary."""
