"""Every setting of the product, written once.

What enters: defaults (here), a YAML file, flags, dotted overrides (settings.py). What leaves:
frozen dataclasses whose values have been checked. The field is the YAML key, the flag
(`--compose.min-similarity`), the Tune key and the MLflow parameter (`compose.min_similarity`); the
command line is generated from these classes by tyro (flags.py), and its help text is the docstring
under each field.

A setting that is None means "what suits the chosen model"; `label.presets.resolve` fills it in.
"""

from zsplg_ray.config.estimate import EstimateConfig
from zsplg_ray.config.export import ExportConfig
from zsplg_ray.config.label import (
    ClipConfig,
    ComposeConfig,
    LabelConfig,
    LabellingConfig,
    PromptsConfig,
    RelabelConfig,
    SamConfig,
)
from zsplg_ray.config.report import ReportConfig
from zsplg_ray.config.review import ReviewExportConfig, ReviewImportConfig, ReviewWeights
from zsplg_ray.config.shared import ActorsConfig, MlflowConfig, ModelMlflowConfig, RayConfig
from zsplg_ray.config.tools import DemoConfig, DoctorConfig, ShapesConfig, SubmitConfig
from zsplg_ray.config.train import (
    AugmentConfig,
    FusionConfig,
    FusionRule,
    LoopConfig,
    OptimConfig,
    PredictConfig,
    StudentConfig,
    TrainConfig,
    UnimatchConfig,
    WorkersConfig,
)
from zsplg_ray.config.tune import (
    AshaConfig,
    SearchConfig,
    TemplateSet,
    TuneLabelsConfig,
    TuneTrainConfig,
)
from zsplg_ray.config.views import EvaluateConfig

__all__ = [
    "ActorsConfig",
    "AshaConfig",
    "AugmentConfig",
    "ClipConfig",
    "ComposeConfig",
    "DemoConfig",
    "DoctorConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FusionConfig",
    "FusionRule",
    "LabelConfig",
    "LabellingConfig",
    "LoopConfig",
    "MlflowConfig",
    "ModelMlflowConfig",
    "OptimConfig",
    "PredictConfig",
    "PromptsConfig",
    "RayConfig",
    "RelabelConfig",
    "ReportConfig",
    "ReviewExportConfig",
    "ReviewImportConfig",
    "ReviewWeights",
    "SamConfig",
    "SearchConfig",
    "ShapesConfig",
    "StudentConfig",
    "SubmitConfig",
    "TemplateSet",
    "TrainConfig",
    "TuneLabelsConfig",
    "TuneTrainConfig",
    "UnimatchConfig",
    "WorkersConfig",
]
