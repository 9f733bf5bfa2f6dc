"""What methods share. `from methods.parts import Method, Views, mlp` gives every public name; `public.py` lists them.

The names come with torch when the first of them is asked for: `methods.parts.errors` and `.fields` alone stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.parts.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Return a public name, once for each: Python asks here for what the package does not hold yet."""
        if name.startswith("_") or name == "public":
            raise AttributeError(name)
        value = globals()[name] = getattr(importlib.import_module("methods.parts.public"), name)
        return value
