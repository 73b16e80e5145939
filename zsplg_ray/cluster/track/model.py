"""MLflow's models: best.pt as a pyfunc that can be served, and its name in the registry.

What enters: a folder with best.pt, and the MLflow run that made it. What leaves: a logged model of
that run; where it is asked for, a registered version of it with an alias. Either is done once,
however often it is asked for.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

from zsplg_ray import __version__
from zsplg_ray.cluster.track.store import Store
from zsplg_ray.config import ModelMlflowConfig
from zsplg_ray.rundir import RunFolder


def log_model(store: Store, run_id: str, folder: RunFolder) -> str:
    """Log best.pt to a run; by the client alone, for the fluent API has a global state.

    Returns: The logged model's id; that of the first one if the run has one.

    Raises: FileNotFoundError, and whatever MLflow raises.
    """
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    client = store.client
    run = client.get_run(run_id)
    if run.outputs is not None and run.outputs.model_outputs:
        return run.outputs.model_outputs[0].model_id
    best = folder.read_bytes("best.pt")
    if best is None:
        raise FileNotFoundError("best.pt")
    made = client.create_logged_model(run.info.experiment_id, "model", run_id)
    model = Model(made.artifact_location, run_id, model_id=made.model_id)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses an example input; there is a signature
        path = Path(place, "best.pt")
        path.write_bytes(best)
        pyfunc.save_model(Path(place, "model"), mlflow_model=model, **served(path))
        client.log_model_artifacts(made.model_id, str(Path(place, "model")))
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
    return made.model_id


def publish(store: Store, run_id: str, folder: RunFolder, config: ModelMlflowConfig) -> str | None:
    """Log the folder's best.pt, and register it if the config asks for that.

    Returns: `NAME/VERSION` of the registered model.
    """
    made = log_model(store, run_id, folder)
    if config.register is None:
        return None
    version = register(store, run_id, made, config.register, config.alias)
    return f"{config.register}/{version}"


def register(store: Store, run_id: str, model_id: str, name: str, alias: str) -> str:
    """Make a logged model the newest version of a registered one, and give it the alias.

    Returns: Its version; that of the first time if the run's model is registered already, whose
        alias is then left where it is.
    """
    client = store.client
    found = client.search_model_versions(f"run_id = '{run_id}'")
    for version in found:  # the name may have quotes in it, which a filter takes none of
        if version.name == name:
            return str(version.version)
    with contextlib.suppress(Exception):  # it is there; if not, the next call says why
        client.create_registered_model(name)
    source = f"models:/{model_id}"
    if not store.remote:  # a database would look such a source up in MLflow's global store
        source = client.get_logged_model(model_id).artifact_location
    made = client.create_model_version(name, source, run_id, model_id=model_id)
    client.set_registered_model_alias(name, alias, made.version)
    return str(made.version)


def served(best: Path) -> dict[str, Any]:
    """What MLflow needs to log or save the model of a best.pt so that it can be served."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, DataType

    columns = {"label_png": "binary", "width": "long", "height": "long"}
    outputs: list[Any] = [ColSpec(kind, name) for name, kind in columns.items()]
    outputs.append(ColSpec(Array(DataType.string), "classes"))
    return {
        "python_model": str(Path(__file__).with_name("served.py")),
        "artifacts": {"model": str(best)},
        "signature": ModelSignature(Schema([ColSpec("binary", "image")]), Schema(outputs)),
        "pip_requirements": [f"zsplg_ray=={__version__}"],
    }
