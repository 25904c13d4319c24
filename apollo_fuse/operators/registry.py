"""The table of operators: for each ONNX operator, the function that describes it."""

from __future__ import annotations

from collections.abc import Callable

from apollo_fuse.operators.opener import Opener, Tensor

Description = Callable[[Opener], Tensor | tuple[Tensor, ...]]

DESCRIPTIONS: dict[tuple[str, str], Description] = {}


def operator(*names: str, domain: str = "") -> Callable[[Description], Description]:
    """Registers a description under one or more operator names."""

    def register(description: Description) -> Description:
        for name in names:
            DESCRIPTIONS[domain, name] = description
        return description

    return register
