"""What `mlflow models serve` runs: an image file in, a mask out. MLflow reads this file as code.

What enters: rows with `image`, the bytes of an encoded image (base64 in JSON). What leaves: a row
each with `label_png` (an 8-bit PNG of class indices at the image's size as shown; base64 in JSON),
`width`, `height`, and `classes`, the names of the indices.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from zsplg_ray.images import decode_image
from zsplg_ray.records import encode_png
from zsplg_ray.settings import complain
from zsplg_ray.student.checkpoint import load_student
from zsplg_ray.student.predict import Predictor


class ServedStudent(PythonModel):
    """A trained model behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read best.pt, which lies beside this file in the logged model."""
        student = load_student(context.artifacts["model"])
        self.predictor = Predictor(student)
        self.names = list(student.classes.names)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: PythonModelContext | None,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A mask for each row's image."""
        rows = []
        for image in model_input["image"]:
            image_HWC = decode_image(_bytes(image))
            label_HW, _ = self.predictor.predict(image_HWC)
            height, width = label_HW.shape
            row = {"label_png": encode_png(label_HW), "width": width, "height": height}
            rows.append({**row, "classes": self.names})
        return pd.DataFrame(rows)


def _bytes(image: bytes | str) -> bytes:
    """The bytes of an image, which some clients send as base64 text."""
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as e:
        rule = "an image file as bytes or base64"
        raise ValueError(complain("image", rule, str(image)[:20], str(e))) from e


set_model(ServedStudent())
