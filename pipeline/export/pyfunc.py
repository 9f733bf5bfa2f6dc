"""The registered model. It uses a GPU if there is one. `pipeline.export.model_code` makes one file of this module and its imports.

Input: a DataFrame with the column `image`, each cell an encoded image of any format and size as `bytes`, the same in base64 as
`str`, or decoded pixels as a uint8 array `(H, W, 3)`. Output: `(N, D)` float32 embeddings. MLflow's environment variable
`MLFLOW_DEFAULT_PREDICTION_DEVICE` sets another device, such as `cpu`.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from pipeline.data.decode import BadImage, decode, evaluation_crop
from pipeline.evaluate.features import extract
from pipeline.export.weights import load_export

BATCH = 64  # images of one forward pass


class Embedder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Embeds images with an exported backbone."""

    def load_context(self, context: Any) -> None:
        asked = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        self.device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        backbone, self.spec = load_export(Path(context.artifacts["export"]))
        self.backbone = backbone.to(self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        cells = list(model_input["image"])
        embeddings = np.empty((len(cells), self.spec.features), np.float32)
        for start in range(0, len(cells), BATCH):
            crops = [self._crop(cell, start + i) for i, cell in enumerate(cells[start : start + BATCH])]
            images = torch.from_numpy(np.stack(crops))
            features = extract(self.backbone, images, mean=self.spec.mean, std=self.spec.std, device=self.device)
            embeddings[start : start + BATCH] = features.numpy()
        return embeddings

    def _crop(self, cell: Any, position: int) -> np.ndarray:
        try:
            return evaluation_crop(_pixels(cell), self.spec.size)
        except BadImage as error:
            reason = str(error)
        except (binascii.Error, TypeError) as error:
            reason = f"{error}; give encoded bytes, base64 text, or a uint8 array (H, W, 3)"
        raise MlflowException(f"image {position} (counted from 0): {reason}", error_code=INVALID_PARAMETER_VALUE)


def _pixels(cell: Any) -> np.ndarray:
    if isinstance(cell, str):
        cell = base64.b64decode("".join(cell.split()), validate=True)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return decode(bytes(cell))
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8 and cell.ndim == 3 and cell.shape[2] == 3 and cell.size:
        return np.ascontiguousarray(cell)
    raise TypeError(f"array {cell.shape} of {cell.dtype}" if isinstance(cell, np.ndarray) else f"a {type(cell).__name__}")
