"""`python -m zsplg_ray.student.benchmark`: a training step of ours against UniMatch's own.

Both sides have the same weights and weak views and take turns; medians are told, with how far loss
and gradients agree on the same feature dropout. Seconds are CPU seconds of this process on a CPU
(one thread unless told), seconds on a GPU. Nothing is downloaded: weights and images are random.

- `official`: the transcription in `official`, float32, torch's own memory format.
- `exact`: our step with `unimatch.same_image`, which is the original's: CutMix from another view of
  the same image, and a labelled half that is perturbed too, though it gets no logits.
- `default`: our step as it is set by default, CutMix from another image of the batch.
- `contiguous`, `bfloat16`, `compile`: the default with other settings.

Strong views are copies of the weak ones on both sides: making them is not measured, putting CutMix
boxes into them is. Of our side also the normalisation is. Three images of four have a CutMix box in
one of their two strong views, as they have on average.

`--tuned-malloc` starts again with glibc told to keep its memory; both sides gain from it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsplg_ray.config import (
    AugmentConfig,
    FusionConfig,
    LoopConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
    UnimatchConfig,
)
from zsplg_ray.measure import clock_of, peak_gib, restart_with_tuned_malloc
from zsplg_ray.student import official
from zsplg_ray.student.augment import channel_keep, cutmix_boxes
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.model import DeepLabV3Plus, Perturbation
from zsplg_ray.student.state import REFERENCE_IMAGES, Ranks, Schedule, TrainState
from zsplg_ray.student.step import train_step

BOXED = 0.75
"""Share of the images with a CutMix box in at least one of two views, each at probability 1/2."""


@dataclass(frozen=True)
class Variant:
    """One way of taking a step of ours."""

    same_image: bool = False
    bfloat16: bool = False
    channels_last: bool = True
    compile: bool = False


VARIANTS = {
    "exact": Variant(same_image=True),
    "default": Variant(),
    "contiguous": Variant(channels_last=False),
    "bfloat16": Variant(bfloat16=True),
    "compile": Variant(compile=True),
    "bfloat16 compile": Variant(bfloat16=True, compile=True),
}
UNASKED = {
    "cpu": ["exact", "default", "contiguous", "bfloat16"],
    "cuda": list(VARIANTS),
}
"""What is measured unless it is told."""


@dataclass(frozen=True)
class Size:
    """What is measured on."""

    backbone: str
    crop_px: int
    batch: int
    """Labelled images, and as many unlabelled ones."""
    classes: int
    frozen_bn: bool
    device: str

    @property
    def optim(self) -> OptimConfig:
        """Settings under which our learning rate is 1e-3, as is the original's."""
        return OptimConfig(lr=1e-3 * REFERENCE_IMAGES / (2 * self.batch))

    def config(self, variant: Variant) -> TrainConfig:
        """The settings of a run."""
        return TrainConfig(
            labeled="-",
            unlabeled="-",
            out="-",
            student=StudentConfig(
                backbone=self.backbone, pretrained=False, frozen_bn=self.frozen_bn
            ),
            augment=AugmentConfig(crop_px=self.crop_px, jitter=0.0, grayscale=0.0, blur=0.0),
            # Random weights are never confident: every pixel takes part.
            unimatch=UnimatchConfig(same_image=variant.same_image, conf_thresh=0.0),
            fusion=FusionConfig(rule="unimatch"),
            optim=self.optim,
            train=LoopConfig(
                batch_labeled=self.batch,
                batch_unlabeled=self.batch,
                precision="bfloat16" if variant.bfloat16 else "float32",
                channels_last=variant.channels_last,
                compile=variant.compile,
            ),
        )


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    step: str
    seconds: float
    ratio: float
    """How many steps are taken in the time of an official one."""
    images_per_s: float
    peak_gib: float
    """Highest memory in the first step, beyond what was held before."""
    same: str
    """How far loss and gradients are from the official ones, where that can be asked."""


class Side(Protocol):
    """Something that takes training steps."""

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        """The step to be timed."""
        ...


class Official:
    """The transcription."""

    def __init__(self, size: Size, weights: dict[str, Tensor]) -> None:
        self.config, self.optim = size.config(VARIANTS["exact"]), OptimConfig(lr=1e-3)
        self.model = official.OfficialModel(self.config.student, size.classes).to(size.device)
        self.model.load_state_dict(weights)
        self.optimizer = official.optimiser(self.model, self.optim)

    def prepare(self, batch: Batch) -> Callable[[], official.Told]:
        """A step on the views of a batch."""
        views = official.views_of(batch, self.config.augment)
        unimatch = self.config.unimatch
        return lambda: official.step(self.model, self.optimizer, views, unimatch, self.optim)


class Ours:
    """Our own step, as `zsplg train` takes it."""

    def __init__(self, size: Size, variant: Variant, weights: dict[str, Tensor]) -> None:
        self.config, self.variant = size.config(variant), variant
        self.ranks = Ranks(device=torch.device(size.device))
        self.state = TrainState(self.config, size.classes, Schedule(100, 100), self.ranks)
        self.state.model.load_state_dict(weights)

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """A step on a batch."""
        if not self.variant.same_image:
            names = [f.name for f in dataclasses.fields(batch)]
            mix = [name for name in names if name.startswith("mix_") or name == "x_seed_B"]
            batch = dataclasses.replace(batch, **dict.fromkeys(mix))
        return lambda: train_step(self.state, [batch], self.config, self.ranks)


def random_weights(size: Size) -> dict[str, Tensor]:
    """A state dict with running statistics, and in which no factor is zero: that hides errors."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DeepLabV3Plus(size.config(Variant()).student, size.classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics are those of the one batch below
            module.weight.data.uniform_(0.2, 0.6, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    model.classifier.weight.data.normal_(0, 1, generator=generator)  # not one class everywhere
    with torch.no_grad():
        model.train()(fog(4, 97, generator) / 255)
    return model.state_dict()


def fog(images: int, side_px: int, generator: torch.Generator) -> Tensor:
    """Soft spots of colour, float32 [B, 3, H, W] in [0, 255]."""
    coarse = torch.rand(images, 3, 7, 7, generator=generator) * 255
    return F.interpolate(coarse, (side_px, side_px), mode="bicubic").clamp(0, 255)


def random_batch(size: Size, number: int) -> Batch:
    """Fog, random labels, some padding; the same for the same number."""
    g = torch.Generator().manual_seed(number)
    n, crop = size.batch, size.crop_px

    label = torch.randint(size.classes, (n, crop, crop), generator=g, dtype=torch.uint8)
    label[:, :, : crop // 10] = 255
    padding = torch.zeros(n, crop, crop, dtype=torch.bool)
    padding[:, -crop // 8 :] = True
    none = torch.full((n, crop, crop), 255, dtype=torch.uint8)
    boxed = round(BOXED * n * (number + 1)) - round(BOXED * n * number)
    seed_B = torch.tensor(_seeds(size, number, [i < boxed for i in range(n)]))
    batch = Batch(
        fog(n, crop, g).byte(),
        label,
        fog(n, crop, g).byte(),
        padding,
        none,
        torch.zeros_like(none),
        seed_B,
    )
    batch = dataclasses.replace(
        batch,
        mix_image_BCHW=fog(n, crop, g).byte(),
        mix_padding_BHW=padding.flip(1),
        mix_label_BHW=none,
        mix_score_BHW=batch.u_score_BHW,
        mix_seed_B=seed_B + 1,
        x_seed_B=seed_B + 2**40,
    )
    return batch.to(size.device)


def _seeds(size: Size, number: int, boxed: list[bool]) -> list[int]:
    """Seeds of images with and without a CutMix box."""
    config, seed, found = size.config(Variant()).augment, number * 2**20, []
    for wanted in boxed:
        while True:
            seed += 1
            one = torch.tensor([seed])
            if wanted == any(cutmix_boxes(one, size.crop_px, config, i).any() for i in (0, 1)):
                found.append(seed)
                break
    return found


def agreement(size: Size, variant: Variant, weights: dict[str, Tensor]) -> str:
    """How far loss and gradients are from the official ones with the same feature dropout.

    The model computes in float64 (the loss of ours in float32): batch normalisation of so few
    numbers blows rounding up, which would hide what is really different. After one step from the
    same weights the momentum is the gradient (with weight decay).
    """
    if not variant.same_image or variant.bfloat16:
        return ""
    theirs, ours = Official(size, weights), Ours(size, variant, weights)
    for model in (theirs.model, ours.state.model):
        model.double().backbone.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    batch = random_batch(size, 0)
    channels, dropout = ours.state.model.channels, ours.config.unimatch.feature_dropout

    assert batch.x_seed_B is not None
    seed_B = torch.cat([batch.x_seed_B, batch.u_seed_B])
    keep = (channel_keep(seed_B, n, dropout, i).to(size.device) for i, n in enumerate(channels))
    theirs.model.dropout = official.GivenDropout(Perturbation(*keep, wanted=len(seed_B)))
    told, sums = theirs.prepare(batch)(), ours.prepare(batch)()
    loss = abs(float(sums[0]) - told.loss) / told.loss
    gap = gradient_gap(
        momentum(theirs.model, theirs.optimizer), momentum(ours.state.model, ours.state.optimizer)
    )
    return f"loss {loss:.1e}, gradients {gap:.1e}"


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameter name -> its momentum."""
    named = model.named_parameters()
    return {name: optimizer.state[weight]["momentum_buffer"] for name, weight in named}


def gradient_gap(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Length of the difference over the length of theirs."""
    off = sum(((ours[name] - part).double() ** 2).sum() for name, part in theirs.items())
    whole = sum((part.double() ** 2).sum() for part in theirs.values())
    return float((torch.as_tensor(off) / whole) ** 0.5)


def rows(size: Size, names: list[str], rounds: int) -> Iterator[Row]:
    """Run all sides in turn; the table, line by line."""
    weights = random_weights(size)
    sides: dict[str, Side] = {"official": Official(size, weights)}
    sides |= {name: Ours(size, VARIANTS[name], weights) for name in names}
    batches = [random_batch(size, number) for number in range(rounds)]
    peaks = {name: peak_of(side.prepare(batches[0]), size) for name, side in sides.items()}
    clock = clock_of(size.device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for batch in batches:
        for name, side in sides.items():
            step = side.prepare(batch)
            began = clock()
            step()
            seconds[name].append(clock() - began)
    whole = statistics.median(seconds["official"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        same = agreement(size, VARIANTS[name], weights) if name in VARIANTS else ""
        yield Row(name, median, whole / median, 2 * size.batch / median, peaks[name], same)


def peak_of(step: Callable[[], Any], size: Size) -> float:
    """GiB that a step takes at its highest, beyond what was held before; it also warms up."""
    if size.device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what other sides have freed would be used again unseen
    return peak_gib(step, size.device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zsplg_ray.student.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = "; on a GPU"
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--backbone", help=f"default: resnet50s{gpu} resnet101s")
    parser.add_argument("--crop", type=int, help=f"pixels; default: 193{gpu} 321")
    parser.add_argument("--batch", type=int, help=f"labelled = unlabelled; default: 2{gpu} 8")
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--steps", nargs="+", choices=VARIANTS, help="which of ours; see above")
    parser.add_argument(
        "--frozen-bn", action="store_true", help="batch statistics stay as they are"
    )
    parser.add_argument("--tuned-malloc", action="store_true", help="see above")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu on this machine, got {args.device}; no GPU is found")
    on_gpu = args.device != "cpu"
    args.backbone = args.backbone or ("resnet101s" if on_gpu else "resnet50s")
    args.crop = args.crop or (321 if on_gpu else 193)
    args.batch = args.batch or (8 if on_gpu else 2)
    args.steps = args.steps or UNASKED["cuda" if on_gpu else "cpu"]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the steps and print a table."""
    args = parse(argv)
    if args.tuned_malloc:
        restart_with_tuned_malloc("zsplg_ray.student.benchmark", argv)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as the original has it
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on both sides
    size = Size(
        args.backbone, args.crop, args.batch, args.classes, args.frozen_bn, str(args.device)
    )
    say: Callable[[str], Any] = sys.stdout.write
    unit = "CPU s" if args.device == "cpu" else "s"
    if not args.json:
        malloc = "tuned" if args.tuned_malloc else "default"
        say(f"{size.backbone}, crop {size.crop_px}, {size.batch} + {size.batch} images, ")
        say(f"{args.device}, {args.threads} threads, {malloc} malloc, medians of {args.rounds}\n")
        say(f"{'step':<18} {unit:>9} {'ratio':>7} {'images/s':>9} {'peak GiB':>9}  off by\n")
    done = []
    for row in rows(size, args.steps, args.rounds):
        done.append(asdict(row))
        if not args.json:
            figures = f"{row.seconds:>9.4g} {row.ratio:>6.2f}x {row.images_per_s:>9.3g}"
            say(f"{row.step:<18} {figures} {row.peak_gib:>9.2f}  {row.same}\n")
            sys.stdout.flush()
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        say(json.dumps({**settings, "unit": unit, "rows": done}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
