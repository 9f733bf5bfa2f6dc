"""An image model of Manyviews in one file: the sources of the modules that it needs, and their import under a unique name.

`pipeline.export.model_code` fills in the sources, and MLflow runs the file (models from code). The name is a hash of the sources, so
they do not collide with modules of users or of other versions.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import re
import sys
from typing import Any

import mlflow.models

SOURCES: dict[str, str] = {}  # by full name of the module
PACKAGE = f"manyviews_{hashlib.sha256(repr(sorted(SOURCES.items())).encode()).hexdigest()[:16]}"
IMPORT = re.compile(r"^( *from )(?=(?:methods|pipeline)\b)", re.MULTILINE)
MODULES = {PACKAGE: ""} | {f"{PACKAGE}.{name}": IMPORT.sub(rf"\1{PACKAGE}.", text) for name, text in SOURCES.items()}


class Importer(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Finds and loads the modules of this file, and no others."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MODULES else None

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(f"{fullname}.") for name in MODULES)

    def get_source(self, fullname: str) -> str:
        return MODULES[fullname]

    def get_filename(self, fullname: str) -> str:
        return f"{__file__}/{fullname.replace('.', '/')}.py"  # for tracebacks


if SOURCES:
    if PACKAGE not in sys.modules:
        sys.meta_path.append(Importer())
    mlflow.models.set_model(importlib.import_module(f"{PACKAGE}.pipeline.export.pyfunc").Embedder())
