"""Every setting of the product, written once.

What enters: defaults (here), a YAML file, flags, dotted overrides (settings.py). What leaves:
frozen dataclasses whose values have been checked. The field is the YAML key, the flag
(`--compose.min-similarity`), the Tune key and the MLflow parameter (`compose.min_similarity`); the
command line is generated from these classes by tyro (cli.py), and its help text is the docstring
under each field.

A setting that is None means "what suits the chosen model"; `label.presets.resolve` fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

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
class ActorsConfig(Section):
    """How the work is spread. An actor is one process that holds SAM and CLIP."""

    PREFIX: ClassVar[str] = "actors."

    min: Annotated[int, Range(1, 100_000)] = 1
    """Actors that are always up, [1, 100000]."""
    max: Annotated[int | None, Range(1, 100_000)] = None
    """Most actors, [1, 100000]. None: one for each GPU that the cluster has or, where that can be
    learnt, may come to have, at least min."""
    gpus: Annotated[float | None, Range(0, 64)] = None
    """GPUs an actor takes, [0, 64]; 0.5 puts two on one. None: 1 where there are GPUs, else 0."""
    cpus: Annotated[float | None, Range(0, 1024)] = None
    """CPUs an actor takes, [0, 1024]. None: 0 with a GPU; without one, all but one, shared."""
    decode_cpus: Annotated[float, Range(0.01, 64)] = 1.0
    """CPUs that one image-reading task takes, [0.01, 64]."""
    in_flight: Annotated[int, Range(1, 64)] = 16
    """Images an actor takes and writes at a time, [1, 64]: what a crash makes it do again."""
    flush_s: Annotated[float, Range(0)] = 60.0
    """Seconds after which finished images are written even if fewer, >= 0."""
    resources: Annotated[dict[str, float], Range(1e-4, 1e6)] = field(default_factory=dict)
    """Custom resources of the nodes that an actor may stand on, amount by name (`label_node
    0.001`), each in [0.0001, 1e+06]; this is how `cluster.yaml` sends it to its own nodes."""

    def extra_checks(self) -> None:
        """At least as many actors may run as must run, on whole GPUs or parts of one."""
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            rule = "a whole number where it is over 1"
            raise ValueError(complain("actors.gpus", rule, self.gpus, "give an actor whole GPUs"))
        if self.max is not None and self.max < self.min:
            raise ValueError(
                complain(
                    "actors.max",
                    f">= actors.min ({self.min})",
                    self.max,
                    "raise it or lower min",
                )
            )


@dataclass(frozen=True, kw_only=True)
class RayConfig(Section):
    """The Ray cluster."""

    PREFIX: ClassVar[str] = "ray."

    address: str | None = None
    """Cluster to use, such as `auto`. None: RAY_ADDRESS if it is set, else Ray starts here."""
    num_cpus: Annotated[int | None, Range(1, 4096)] = None
    """CPUs that a Ray started here offers, [1, 4096]. None: those of this machine."""
    object_store_gib: Annotated[float | None, Range(0.08, 4096)] = None
    """Shared memory of a Ray started here, GiB in [0.08, 4096]. None: Ray's choice."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig(Section):
    """Where runs are tracked. MLflow that is down or slow never stops or fails a run."""

    PREFIX: ClassVar[str] = "mlflow."

    uri: str | None = None
    """MLflow server or store. None: MLFLOW_TRACKING_URI if it is set, else `mlflow.db` in the run's
    folder. `off`: no tracking."""
    experiment: str = "zsplg_ray"
    """Name of the experiment: one for each project, so that its runs stand together."""
    run_name: str | None = None
    """Name of the run. None: the name of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class ModelMlflowConfig(MlflowConfig):
    """Where runs that make a model are tracked, and what becomes of the model."""

    log_model: bool = True
    """Put the best model into the run as a pyfunc that `mlflow models serve` can serve."""
    register: Annotated[str | None, arg(aliases=["--register"])] = None
    """Register the best model under this name, as a new version. None: do not."""
    alias: str = "champion"
    """Alias that the registered version gets, so that `models:/NAME@champion` is the newest."""

    def extra_checks(self) -> None:
        """What is registered is a model that is logged, under a name that MLflow takes."""
        if self.register is None:
            return
        if not self.log_model:
            fix = "leave out --mlflow.no-log-model"
            raise ValueError(complain("mlflow.log_model", "on with register", "off", fix))
        if not self.register.strip() or set("/:@") & set(self.register):
            fix = "choose another name"
            raise ValueError(
                complain("mlflow.register", "a name without / : @", self.register, fix)
            )


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Section):
    """Images and class names in, segments and zero-shot pseudo labels out. The same command again
    does only what is missing."""

    images: str
    """SRC: folder, glob, VOC root, split file, COCO json, Parquet, or s3:// gs:// of these."""
    classes: str
    """SPEC: voc, coco, cityscapes, ade20k, shapes, a text file (`name: alias, alias` a line), or
    `cat,dog`. Background is always class 0."""
    out: str
    """The run's folder (made if missing), a path or URI."""
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


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Section):
    """The model that is trained: DeepLabV3+ over a timm backbone."""

    PREFIX: ClassVar[str] = "student."

    backbone: Annotated[str, arg(aliases=["--backbone"])] = "resnet101s.gluon_in1k"
    """A convolutional timm model. UniMatch's own: resnet50s.gluon_in1k, resnet101s.gluon_in1k; for
    CPUs a small one, such as test_byobnet or resnet18."""
    pretrained: bool = True
    """Start from timm's weights of the backbone (ImageNet), downloaded once."""
    init: str | None = None
    """Start from the weights in this file or URI: a model of `zsplg train`, a checkpoint that
    UniMatch released, a state dict (.pth, .safetensors), or `shapes`, the small backbone that
    comes with this package. A classifier of other classes starts anew. None: timm's weights, or
    none."""
    output_stride: Literal[8, 16] = 16
    """Pixels of the image for one of the high-level features, 8 or 16."""
    aspp_channels: Annotated[int | None, Range(1, 4096)] = None
    """Channels of each branch of the pyramid, [1, 4096]. None: an eighth of the backbone's."""
    low_level_channels: Annotated[int, Range(1, 4096)] = 48
    """Channels that the low-level features are reduced to, [1, 4096]."""
    decoder_channels: Annotated[int, Range(1, 4096)] = 256
    """Channels of the two fusing convolutions, [1, 4096]."""
    frozen_bn: bool = False
    """Batch normalisation keeps its running statistics as they are, for batches too small for
    their own."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """Views of an image: weak (size, crop, flip) and, of unlabelled ones, two strong (colour,
    CutMix). All follow from (train.seed, pass over the data, image)."""

    PREFIX: ClassVar[str] = "augment."

    crop_px: Annotated[int, Range(32, 4096)] = 321
    """Side of the square crop, pixels in [32, 4096]."""
    min_scale: Annotated[float, Range(0.05, 20)] = 0.5
    """The image's size is multiplied by at least this, [0.05, 20]."""
    max_scale: Annotated[float, Range(0.05, 20)] = 2.0
    """The image's size is multiplied by at most this, [0.05, 20]."""
    flip: Annotated[float, Range(0, 1)] = 0.5
    """Probability of a left-right flip, [0, 1]."""
    jitter: Annotated[float, Range(0, 1)] = 0.8
    """Probability of the colour jitter in a strong view, [0, 1]."""
    brightness: Annotated[float, Range(0, 1)] = 0.5
    """How far brightness may be moved, [0, 1]."""
    contrast: Annotated[float, Range(0, 1)] = 0.5
    """How far contrast may be moved, [0, 1]."""
    saturation: Annotated[float, Range(0, 1)] = 0.5
    """How far saturation may be moved, [0, 1]."""
    hue: Annotated[float, Range(0, 0.5)] = 0.25
    """How far hue may be moved, turns in [0, 0.5]."""
    grayscale: Annotated[float, Range(0, 1)] = 0.2
    """Probability of grey in a strong view, [0, 1]."""
    blur: Annotated[float, Range(0, 1)] = 0.5
    """Probability of a Gaussian blur in a strong view, [0, 1]."""
    blur_max_sigma: Annotated[float, Range(0.1, 20)] = 2.0
    """Widest blur, sigma in pixels in [0.1, 20]; the least is 0.1."""
    cutmix: Annotated[float, Range(0, 1)] = 0.5
    """Probability that a strong view gets a box of another image, [0, 1]."""

    def extra_checks(self) -> None:
        """Sizes are a range."""
        if self.max_scale < self.min_scale:
            rule = f">= augment.min_scale ({self.min_scale})"
            fix = "raise it or lower min_scale"
            raise ValueError(complain("augment.max_scale", rule, self.max_scale, fix))


@dataclass(frozen=True, kw_only=True)
class UnimatchConfig(Section):
    """The loss: (L_x + strong * (L_s1 + L_s2) + perturbed * L_fp) / 2."""

    PREFIX: ClassVar[str] = "unimatch."

    conf_thresh: Annotated[float, Range(0, 1)] = 0.95
    """Least confidence of the weak view's prediction that makes it a target, [0, 1]."""
    strong: Annotated[float, Range(0, 100)] = 0.25
    """Weight of each of the two strong views, [0, 100]."""
    perturbed: Annotated[float, Range(0, 100)] = 0.5
    """Weight of the view with perturbed features, [0, 100]."""
    feature_dropout: Annotated[float, Range(0, 0.99)] = 0.5
    """Share of the channels that the feature perturbation drops, [0, 0.99]."""
    label_smoothing: Annotated[float, Range(0, 0.99)] = 0.0
    """Share of each target's probability that is spread over all classes, [0, 0.99]."""
    same_image: bool = False
    """As UniMatch's released code: CutMix pastes from another crop of the same image, and the
    labelled images take part in the perturbed batch statistics; one more forward pass. Else CutMix
    pastes from another image of the batch."""


FusionRule = Literal[
    "unimatch", "zeroshot", "model_else_zeroshot", "zeroshot_else_model", "agree", "mix"
]


@dataclass(frozen=True, kw_only=True)
class FusionConfig(Section):
    """How the zero-shot label of an unlabelled pixel and the weak view's prediction make its
    target. Where there is no zero-shot label every rule is `unimatch`."""

    PREFIX: ClassVar[str] = "fusion."

    rule: FusionRule = "model_else_zeroshot"
    """unimatch: the prediction where it is confident (`unimatch.conf_thresh`);
    zeroshot: the zero-shot label;
    model_else_zeroshot: the prediction where it is confident, else the zero-shot label;
    zeroshot_else_model: the zero-shot label where its score passes `min_score`, else the prediction
    where it is confident;
    agree: where both say the same, the rest is ignored;
    mix: w * zero-shot label + (1 - w) * prediction, w going from `mix_start` to `mix_end`."""
    min_score: Annotated[float, Range(0, 1)] = 0.0
    """Zero-shot labels of a lower score are not used, [0, 1]. Background that no segment was
    painted on has score 0."""
    mix_start: Annotated[float, Range(0, 1)] = 1.0
    """For mix: weight of the zero-shot label at the first step, [0, 1]."""
    mix_end: Annotated[float, Range(0, 1)] = 0.0
    """For mix: weight of the zero-shot label at the last step, [0, 1]; linear in between."""
    warmup: Annotated[float, Range(0, 1)] = 0.0
    """Share of the steps, [0, 1], at the start in which the rule is `zeroshot`: until the model's
    confidence means something."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """SGD as UniMatch uses it."""

    PREFIX: ClassVar[str] = "optim."

    lr: Annotated[float, Range(0, 100)] = 1e-3
    """Learning rate of the backbone for 8 + 8 images a step, [0, 100]; scaled to
    (train.batch_labeled + train.batch_unlabeled) / 16."""
    head_lr: Annotated[float, Range(0, 1000)] = 10.0
    """The rest of the model learns this many times faster, [0, 1000]."""
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    """Momentum, [0, 0.9999]."""
    weight_decay: Annotated[float, Range(0, 1)] = 1e-4
    """Weight decay, [0, 1]."""
    poly_power: Annotated[float, Range(0, 10)] = 0.9
    """The learning rate falls as (1 - step / steps) to this power, [0, 10]."""
    ema_decay: Annotated[float | None, Range(0, 0.999999)] = None
    """A teacher, the moving average of the weights with this decay in [0, 0.999999], makes the
    targets and is what gets evaluated. None: the model itself, as published."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
    """Batches, epochs, arithmetic."""

    PREFIX: ClassVar[str] = "train."

    epochs: Annotated[int, Range(1, 1_000_000)] = 80
    """Passes over the unlabelled images (the labelled ones if there are no others), [1, 1e+06]."""
    batch_labeled: Annotated[int, Range(1, 65536)] = 8
    """Labelled images a step, over all workers, [1, 65536]."""
    batch_unlabeled: Annotated[int, Range(1, 65536)] = 8
    """Unlabelled images a step, over all workers, [1, 65536]."""
    accumulate: Annotated[int, Range(1, 4096)] = 1
    """Parts that a worker cuts its share of a step into, to save memory, [1, 4096]."""
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Seed of weights, order and views, [0, 2.14748e+09]."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model: float32, or bfloat16 where autocast allows it."""
    channels_last: bool = True
    """Channels are innermost in memory: faster, the same numbers."""
    compile: bool = False
    """torch.compile: slow to start, then faster on GPUs."""
    loader_workers: Annotated[int | None, Range(0, 256)] = None
    """Processes that read and crop images for each worker, [0, 256]. None: with a GPU 4, else 0."""
    holdout: Annotated[float, Range(0, 0.9)] = 0.2
    """Share of the labelled images, [0, 0.9], put aside for choosing the best epoch where no --val
    is given; at least one image. 0: none, and the last is the best."""
    validate_epochs: Annotated[int, Range(1, 1_000_000)] = 1
    """Epochs between validations and checkpoints, [1, 1e+06]; the last one always counts."""


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Section):
    """How training is spread: each worker is a process with a replica of the model."""

    PREFIX: ClassVar[str] = "workers."

    num: Annotated[int | None, Range(1, 4096)] = None
    """Workers, [1, 4096]. None: one for each GPU that is up now, else one."""
    min: Annotated[int | None, Range(1, 4096)] = None
    """Go on with as few as this many when nodes are lost, and with more when they come back,
    [1, 4096]. None: always `num`."""
    gpus: Annotated[float | None, Range(0, 64)] = None
    """GPUs a worker takes, [0, 64]. None: 1 where there are GPUs, else 0."""
    cpus: Annotated[float | None, Range(0, 1024)] = None
    """CPUs a worker takes, [0, 1024]. None: an even share of the cluster's, at most 8 with GPU."""
    resources: Annotated[dict[str, float], Range(1e-4, 1e6)] = field(default_factory=dict)
    """Custom resources of the nodes that a worker may stand on, amount by name (`train_node
    0.001`), each in [0.0001, 1e+06]; this is how `cluster.yaml` sends it to its own nodes."""
    max_failures: Annotated[int, Range(0, 1000)] = 3
    """How often training starts again from its last checkpoint after a worker died, [0, 1000]."""

    def extra_checks(self) -> None:
        """At most as many must run as may run."""
        if self.min is not None and self.num is not None and self.min > self.num:
            rule, fix = f"<= workers.num ({self.num})", "lower it or raise num"
            raise ValueError(complain("workers.min", rule, self.min, fix))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Few labelled images, many unlabelled ones and their zero-shot labels in; a model out:
    UniMatch on Ray Train. The same command again goes on from the last checkpoint."""

    labeled: str
    """SRC of labelled images: VOC root, split file of image and mask, COCO json; others with
    --labeled-masks."""
    labeled_masks: str | None = None
    """Their masks, where they do not come with --labeled: a folder of PNGs, a run's folder.
    None: they do."""
    unlabeled: str | None = None
    """SRC of unlabelled images; masks are not looked for. None: training on labelled ones only."""
    zeroshot: str | None = None
    """Folder of a `zsplg label` (or predict) run over the unlabelled images. None: plain
    UniMatch."""
    val: str | None = None
    """SRC of images with masks that decide which epoch is best. None: part of the labelled."""
    val_masks: str | None = None
    """Their masks, where they do not come with --val. None: they do."""
    out: str
    """The run's folder (made if missing), a path or URI."""
    classes: str | None = None
    """Class names (SPEC). None: those that masks or zero-shot labels carry."""
    root: str | None = None
    """Folder that the paths of split files or COCO jsons start from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of a worker: auto (a GPU if it has one), cpu, cuda."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """The whole of train.json on stdout instead of a summary."""
    student: StudentConfig = field(default_factory=StudentConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    unimatch: UnimatchConfig = field(default_factory=UnimatchConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    mlflow: ModelMlflowConfig = field(default_factory=ModelMlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Section):
    """How settings are searched for."""

    PREFIX: ClassVar[str] = "search."

    method: Annotated[Literal["tpe", "random", "grid"], arg(aliases=["--search"])] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator, which learns from trials before;
    random: drawn anew each time; grid: all combinations of as many levels as fit into `trials`."""
    over: tuple[str, ...] | None = None
    """Names of the settings to search over, such as compose.min_similarity. None: all that the verb
    knows how to search. The others stay as they are."""
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Seed of the search and of folds, [0, 2.14748e+09]."""
    concurrent: Annotated[int | None, Range(1, 4096)] = None
    """Trials at the same time, [1, 4096]. None: as many as the cluster has room for."""


TemplateSet = Literal["run", "photo", "seven", "scene"]


@dataclass(frozen=True, kw_only=True)
class TuneLabelsConfig(Section):
    """A run's segments and a few masks in, the compose settings that name them best out: no SAM, no
    GPU. Writes tuned.yaml into the run's folder, for `relabel --config` and `label --config`."""

    run: tuple[str, ...]
    """Folder of a `zsplg label` run. Several, over the same images (with another embedder, say),
    are tuned each and compared."""
    truth: str
    """Masks of the images that are labelled by hand: a folder of PNGs, VOC root, split file, COCO
    json. Never those of the test set."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    trials: Annotated[int, Range(1, 1_000_000)] = 500
    """Settings tried in a search, [1, 1e+06]."""
    folds: Annotated[int | None, Range(1, 100)] = None
    """Parts that the labelled images are cut into; each is held out once, [1, 100]. 1: a share of
    `holdout` is held out, once. None: 5 with under 100 images, else 1."""
    holdout: Annotated[float, Range(0.05, 0.9)] = 0.3
    """With one fold: share of the labelled images that the result is judged on, [0.05, 0.9]."""
    per_class: bool = True
    """After the search, look for a threshold of its own for each class; kept only if it wins on
    held-out images."""
    templates: tuple[TemplateSet, ...] = ("run",)
    """Sets of prompt templates to choose among: run (as the labels were made), photo (the paper's),
    seven (seven of CLIP's own), scene (sentences about scenes)."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """What each run's tune.json holds on stdout instead of a summary."""
    search: SearchConfig = field(default_factory=SearchConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def extra_checks(self) -> None:
        """There is a run, each once, and a set of templates."""
        for name, values in (("run", self.run), ("templates", self.templates)):
            if not values or len(set(values)) < len(values):
                fix = "name each once"
                raise ValueError(complain(name, "given, each once", " ".join(values), fix))


@dataclass(frozen=True, kw_only=True)
class AshaConfig(Section):
    """ASHA: trials that are behind others after as many epochs are stopped early."""

    PREFIX: ClassVar[str] = "asha."

    off: bool = False
    """All trials run to their end."""
    grace_epochs: Annotated[int | None, Range(1, 1_000_000)] = None
    """Epochs that every trial may run, [1, 1e+06]. None: a ninth of train.epochs, at least 1."""
    reduction: Annotated[int, Range(2, 100)] = 3
    """Of so many trials one goes on at each step, [2, 100]."""


@dataclass(frozen=True, kw_only=True)
class TuneTrainConfig(TrainConfig):
    """Training settings tried out by Ray Tune, each trial a `zsplg train` of its own. What is
    searched: unimatch.conf_thresh, fusion.rule, min_score, warmup and mix_end, optim.lr. Writes
    tuned.yaml, for `train --config`, and the best trial's best.pt."""

    out: str
    """The study's folder (made if missing), a path or URI; trials are in its trials/."""
    trials: Annotated[int, Range(1, 100_000)] = 20
    """Trials, [1, 100000]."""
    resume: bool = False
    """Go on with the study in `out`: finished trials stay, interrupted ones go on from their last
    checkpoint, failed ones are tried again."""
    search: SearchConfig = field(default_factory=SearchConfig)
    asha: AshaConfig = field(default_factory=AshaConfig)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Section):
    """A trained model and images in, labels/ out, each image exactly once. The same command again
    does only what is missing."""

    model: str
    """A model: best.pt of `zsplg train`, its folder, or a checkpoint that UniMatch released."""
    images: str
    """SRC: folder, glob, VOC root, split file, COCO json, Parquet, or s3:// gs:// of these."""
    out: str
    """The run's folder (made if missing), a path or URI."""
    fuse: str | None = None
    """Folder of a `zsplg label` run over the same images: labels become enhanced ones, by
    `fusion.rule`. None: the model's alone."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    classes: str | None = None
    """Class names (SPEC), for models that carry none; else they must be the model's. None: those
    of the model."""
    backbone: str | None = None
    """timm backbone, for checkpoints that do not tell it. None: found by its parameters."""
    conf_thresh: Annotated[float, Range(0, 1)] = 0.0
    """Pixels of lower confidence become 255 (ignore), [0, 1]; with --fuse what counts as
    confident (0 there stands for the model's own `unimatch.conf_thresh`)."""
    max_side_px: Annotated[int, Range(32, 65536)] = 2048
    """Images with a longer side are seen smaller, pixels in [32, 65536]; labels have full size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
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
    fusion: FusionConfig = field(default_factory=FusionConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Labels, or a model's predictions, against ground truth: IoU by class, mIoU, pixel accuracy,
    coverage, confusion."""

    labels: Positional[str]
    """A run's folder, a Parquet folder of labels, or a folder of PNG masks; or a model, as `predict
    --model` takes it."""
    truth: str
    """Masks: a folder of PNGs, VOC root, split file, COCO json."""
    images: str | None = None
    """For a model: SRC of the images. None: those of --truth, where it lists images too (VOC root,
    split file, COCO json)."""
    root: str | None = None
    """Folder that the paths of a split file or COCO json start from."""
    classes: str | None = None
    """Class names (SPEC). None: those that the labels or the model carry, else those of the
    truth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For a model: auto (a GPU if there is one), cpu, cuda."""
    json: bool = False
    """One JSON object on stdout instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(Section):
    """Scenes of the embedded world in VOC layout: JPEGImages/, SegmentationClass/."""

    out: str
    """Folder to write to, made if missing; scenes of the same seeds are written over."""
    n: Annotated[int, Range(1, 1_000_000)] = 100
    """Scenes, [1, 1e+06]."""
    seed: Annotated[int, Range(0, 999_000_000)] = 0
    """Seed of the first scene, [0, 9.99e+08]; the next ones follow. All are held out."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Section):
    """The whole pipeline on scenes of the embedded world: make scenes, label, train, evaluate."""

    out: str = "zsplg_demo"
    """Folder to write to. The same command again does only what is missing."""
    n: Annotated[int, Range(2, 10_000)] = 100
    """Scenes, [2, 10000]."""
    embedder: Literal["gem", "crop", "both"] = "both"
    """Which way of naming segments to show."""
    epochs: Annotated[int, Range(0, 10_000)] = 45
    """Epochs for which each of two students is trained, [0, 10000]; 0: none."""
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Section):
    """What this machine can do, and what to mend: a line each for packages, GPUs, weights, Ray,
    storage. Exit 1 if something that `label` needs is missing."""

    sam: SamConfig = field(default_factory=SamConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    out: str = "."
    """Folder or URI whose storage is tried."""
    json: bool = False
    """A JSON list on stdout instead of lines."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Section):
    """Any verb as a job on a Ray cluster: `zsplg submit --address URL [--wait] -- VERB ...`. The
    verb's settings are checked here first; the cluster runs the code that is installed here."""

    address: str | None = None
    """The cluster's dashboard, such as http://head:8265. None: RAY_API_SERVER_ADDRESS if it is set,
    else http://127.0.0.1:8265."""
    wait: bool = False
    """Follow the job's log until it ends and exit with its code; Ctrl-C asks whether to stop it."""
    working_dir: str | None = "."
    """Folder that the job gets a copy of and runs in: config files, class lists, split files.
    Hidden files, virtual environments, run folders, weights and images stay here. None (`None`
    on the command line): no folder."""
    exclude: tuple[str, ...] = ()
    """Further files of the working directory that stay here, patterns as in .gitignore."""
    max_working_dir_mib: Annotated[float, Range(0.1, 100)] = 50.0
    """Most that the copy may hold, MiB in [0.1, 100]; a cluster takes 100 at most, packed."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, such as MLFLOW_TRACKING_URI or AWS_REGION."""
    job_id: str | None = None
    """The job's name on the cluster, unique there. None: the verb, the time and some letters."""
    json: bool = False
    """A JSON object on stdout instead of lines."""
