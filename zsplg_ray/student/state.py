"""The state of a training run: model, teacher, optimiser, how far it is; and who takes part.

What enters: the run's settings. What leaves: an object that steps, saves and loads. Saved, it is
plain containers and tensors, so that `torch.load(weights_only=True)` reads it. Order, views and
feature dropout follow from the seed and the step (draws.py), so the step is all that has to be
remembered of them.

Source of the schedule: UniMatch (github.com/LiheYoung/UniMatch, unimatch.py, MIT).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from zsplg_ray.config import TrainConfig
from zsplg_ray.student.checkpoint import load_init
from zsplg_ray.student.convolutions import make_lean
from zsplg_ray.student.model import DeepLabV3Plus

REFERENCE_IMAGES = 16
"""Images a step (8 labelled, 8 not) that the learning rate is given for."""


def images_a_step(config: TrainConfig) -> int:
    """Labelled and unlabelled images that a step takes, over all workers."""
    loop = config.train
    return loop.batch_labeled + (loop.batch_unlabeled if config.unlabeled is not None else 0)


def first_learning_rate(config: TrainConfig) -> float:
    """The backbone's learning rate at the first step, scaled to the images of a step."""
    return config.optim.lr * images_a_step(config) / REFERENCE_IMAGES


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process of a training run this is."""

    rank: int = 0
    world: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def lead(self) -> bool:
        """Whether this is the one that tells and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is: an epoch sees each unlabelled image about once (labelled ones, if there
    are no others); rounded down, as UniMatch does."""

    steps_per_epoch: int
    epochs: int

    @classmethod
    def of(cls, config: TrainConfig, n_labelled: int, n_unlabelled: int) -> Schedule:
        """The schedule of a run over so many images."""
        loop = config.train
        images, batch = n_unlabelled, loop.batch_unlabeled
        if config.unlabeled is None:
            images, batch = n_labelled, loop.batch_labeled
        return cls(max(1, images // batch), loop.epochs)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs


class TrainState:
    """Model, teacher, optimiser and step of a run, on one rank.

    Args:
        config: The run's settings.
        n_classes: K, background included.
        schedule: How long the run is.
        ranks: Which rank this is.
        saved: What `save` gave; None to start anew.
    """

    def __init__(
        self,
        config: TrainConfig,
        n_classes: int,
        schedule: Schedule,
        ranks: Ranks,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.schedule, self.ranks = config, schedule, ranks
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        torch.manual_seed(config.train.seed)
        pretrained = config.student.pretrained and saved is None and config.student.init is None
        model: nn.Module = DeepLabV3Plus(config.student, n_classes, pretrained=pretrained)
        if config.student.init is not None and saved is None:
            load_init(model, config.student.init)
        make_lean(model)
        if ranks.world > 1 and ranks.device.type == "cuda":
            model = convert_sync_batchnorm(model)  # torch's own loses timm's activations
        self._format = torch.channels_last if config.train.channels_last else None
        model.to(ranks.device, memory_format=self._format)  # type: ignore[call-overload]
        self.model = cast("DeepLabV3Plus", model)
        decay = config.optim.ema_decay
        self.teacher = self.model if decay is None else copy.deepcopy(self.model).eval()
        self.teacher.requires_grad_(decay is None)
        self.optimizer = self._optimizer()
        if saved is not None:
            self._load(saved)
        self.net = self._wrapped()

    @property
    def progress(self) -> float:
        """Share of the steps that are done, [0, 1)."""
        return self.step / self.schedule.steps

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.step // self.schedule.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """The backbone's learning rate at this step."""
        power = self.config.optim.poly_power
        return first_learning_rate(self.config) * (1 - self.progress) ** power

    def set_learning_rate(self) -> None:
        """Give the optimiser the learning rates of this step."""
        backbone, head = self.optimizer.param_groups
        backbone["lr"] = self.learning_rate
        head["lr"] = self.learning_rate * self.config.optim.head_lr

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic that `train.precision` asks for."""
        wanted = self.config.train.precision == "bfloat16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=wanted)

    def laid_out(self, image_BCHW: Tensor) -> Tensor:
        """The images in the model's memory format."""
        if self._format is None:
            return image_BCHW
        return image_BCHW.contiguous(memory_format=self._format)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Gradients are only added up, not exchanged: for all micro batches but a step's last."""
        net = getattr(self.net, "_orig_mod", self.net)
        return net.no_sync() if isinstance(net, DDP) else contextlib.nullcontext()

    @torch.no_grad()
    def teach(self, image_BCHW: Tensor, only: Tensor | None = None) -> Tensor:
        """Logits float32 [B, K, H, W] by the teacher as it is used, in evaluation mode.

        `only`: bool [B]; the other images' logits are 0 and cost nothing.
        """
        chosen = image_BCHW if only is None else image_BCHW[only]
        was_training = self.teacher.training
        self.teacher.eval()
        n_classes = self.teacher.classifier.out_channels
        size_hw = image_BCHW.shape[-2:]
        out = image_BCHW.new_zeros((len(image_BCHW), n_classes, *size_hw))
        if len(chosen):
            with self.autocast():
                logits = self.teacher(self.laid_out(chosen))[0].float()
            out[slice(None) if only is None else only] = logits
        self.teacher.train(was_training)
        return out

    def apply(self) -> None:
        """Let the optimiser move the weights by the gradients there are; one step is done."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = self.config.optim.ema_decay
        if decay is None:
            return
        decay = min(decay, 1 - 1 / (self.step + 1))  # the first steps count little
        with torch.no_grad():
            ours, theirs = self.model.state_dict(), self.teacher.state_dict()
            for name, mean in theirs.items():
                if mean.is_floating_point():
                    mean.lerp_(ours[name], 1 - decay)
                else:
                    mean.copy_(ours[name])

    def settle(self) -> None:
        """Give every rank the same running statistics, their mean, before they are used."""
        if self.ranks.world == 1:
            return
        for module in {id(m): m for m in (self.model, self.teacher)}.values():
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.ranks.world

    def weights(self) -> dict[str, Tensor]:
        """The state dict that is evaluated and handed on: the teacher's if there is one; on the
        CPU, a copy."""
        return _on_cpu(self.teacher.state_dict())

    def save(self) -> dict[str, Any]:
        """All that `TrainState(saved=...)` needs to go on, on the CPU."""
        return {
            "step": self.step,
            "steps": self.schedule.steps,
            "model": _on_cpu(self.model.state_dict()),
            "teacher": None if self.teacher is self.model else _on_cpu(self.teacher.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
        }

    def _load(self, saved: Mapping[str, Any]) -> None:
        assert saved["steps"] == self.schedule.steps, "a run's length is part of its settings"
        self.model.load_state_dict(saved["model"])
        if self.teacher is not self.model:
            self.teacher.load_state_dict(saved["teacher"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        self.history = list(saved["history"])

    def _optimizer(self) -> torch.optim.SGD:
        optim = self.config.optim
        backbone = list(self.model.backbone.parameters())
        ids = {id(p) for p in backbone}
        head = [p for p in self.model.parameters() if id(p) not in ids]
        return torch.optim.SGD(
            [{"params": backbone}, {"params": head}],
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
        )

    def _wrapped(self) -> Any:
        net: Any = self.model
        if self.ranks.world > 1:
            # Two forward passes come before each backward: buffers must not be sent in between.
            net = DDP(net, broadcast_buffers=False, gradient_as_bucket_view=True)
        return torch.compile(net) if self.config.train.compile else net


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
