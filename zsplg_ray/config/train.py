"""Settings of training and of its model's use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from zsplg_ray.config.shared import ActorsConfig, MlflowConfig, ModelMlflowConfig, RayConfig
from zsplg_ray.settings import Range, Section, complain


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
