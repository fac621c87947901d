"""What Prefect's forms say of a flow's parameters: titles, descriptions, choices, examples; and the parameters that flows share.

Prefect takes a parameter's title and description from its name and its function's docstring, and forgets those of pydantic's
`Field`. What a field adds to its JSON schema it keeps, and so both are said there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import Field

from recipes.schema import GPUS

TARGETS: Final = tuple(f"{runtime}:{gpu}" for runtime, gpus in GPUS.items() for gpu in gpus)


def form(
    title: str, description: str, *, choices: Sequence[str] = (), examples: Sequence[Any] = (), **limits: Any
) -> Any:
    """Return a pydantic field that shows as this in Prefect's forms; `limits` are those of `Field`."""
    said: dict[str, Any] = {"title": title, "description": description}
    said |= {"enum": list(choices)} if choices else {}
    said |= {"examples": list(examples)} if examples else {}
    return Field(json_schema_extra=said, **limits)


RecipePath = Annotated[str, form("Recipe", "The recipe's path in the checkout.", examples=["recipes/digits.yaml"])]
StoreAddress = Annotated[
    str | None,
    form(
        "Store",
        "A folder or s3://bucket/prefix; default: ENGINERY_STORE of the worker.",
        examples=["s3://models/engines"],
    ),
]
Target = Annotated[
    str,
    form("Target", "RUNTIME:GPU, of those that the recipe has.", choices=TARGETS, examples=["tensorrt:sm90"]),
]
_OneTarget = Annotated[str, Field(json_schema_extra={"enum": [*GPUS, *TARGETS]})]
Targets = Annotated[
    list[_OneTarget] | None,
    form("Targets", "Only these: RUNTIME or RUNTIME:GPU; none: all.", examples=[["tensorrt:sm90", "onnxruntime"]]),
]
Jobs = Annotated[int, form("Jobs", "How many stages run at once on a host.", ge=1, le=64)]
Versions = Annotated[
    dict[str, str | None] | None,
    form("Versions", "Versions of the packages that made the portable stages; builds fill it in."),
]
HostName = Annotated[
    str | None,
    form("Host", "Only on this host, whose workers take its own work queue; none: on any.", examples=["gpu-node-17"]),
]
Reason = Annotated[str | None, form("Reason", "Why; kept in the history.", examples=["0.3 ms faster on L4"])]
Recipes = Annotated[
    Sequence[str],
    form("Recipes", "Recipes, or folders of them, whose engines are looked at.", examples=[["recipes"]]),
]
Pools = Annotated[
    bool, form("Pools", "Rebuilds go through the work pools of the fleet, and not through this host's own deployment.")
]
Canary = Annotated[
    int, form("Canary", "So many engines of the first host have to pass before others follow; 0: all of them.", ge=0)
]
RolloutName = Annotated[
    str, form("Rollout", "Its name, as `enginery rollout` lists it.", examples=["tensorrt-rtx-1.7.1.116-0a1b2c3d"])
]
