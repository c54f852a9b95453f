"""Names for the types that appear in signatures.

An array is whatever the namespace at hand calls an array; the standard has no common base class to annotate with, so
both names are transparent to a type checker and serve the reader.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Array: TypeAlias = Any
"""An array of any supported namespace."""

Namespace: TypeAlias = Any
"""An array-API namespace, such as ``numpy`` or ``array_api_compat.torch``."""

Absent: TypeAlias = tuple[()]
"""An optional part that is not there: always written ``()``, which JAX and PyTorch both take as an empty subtree."""

Shape: TypeAlias = tuple[int, ...]
