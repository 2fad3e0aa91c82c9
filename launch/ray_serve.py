"""Serve a model with Ray Serve: replicas of the HTTP service (docs/serve.md) that share a database and a folder.

    pip install 'likeness[ray]'
    serve run --app-dir launch ray_serve:application model=mmface-mini-fast data=/shared/likeness \\
        database=postgresql+psycopg://likeness@HOST/likeness min_replicas=1 max_replicas=8

Each replica loads the model once. Ray starts another when each has more than `target` requests in progress. The other
arguments are the options of `likeness serve`; `cors` has its origins separated by commas.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from click import UsageError
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ray import serve

from likeness.cli.serve import Serve
from likeness.types import InputError

MANAGED = ("host", "port", "replica")
"""Options that Ray decides."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Number and resources of the replicas."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target: float = Field(4, gt=0)
    """Requests in progress per replica above which Ray starts another."""
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)


def application(arguments: dict[str, str]) -> serve.Application:
    """Return the application for the `key=value` arguments of `serve run`.

    Raises:
        UsageError: an argument is unknown or invalid, or replicas have no database to share.
    """
    try:
        return deployment_of(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{first['loc'][0]}={first['input']}: {first['msg']}") from error
    except InputError as error:
        raise UsageError(str(error)) from error


def deployment_of(arguments: dict[str, str]) -> serve.Application:
    """Return the application. Raises `InputError` and `ValidationError`."""
    scale_names = [field.name for field in fields(Scale)]
    option_names = [field.name for field in fields(Serve) if field.name not in MANAGED]
    if unknown := [name for name in arguments if name not in (*scale_names, *option_names)]:
        available = ", ".join((*scale_names, *option_names))
        raise InputError(f"Unknown argument {unknown[0]!r}. Available: {available}")
    scale = TypeAdapter(Scale).validate_python({name: arguments[name] for name in scale_names if name in arguments})
    given: dict[str, Any] = {name: arguments[name] for name in option_names if name in arguments}
    if "cors" in given:
        given["cors"] = tuple(given["cors"].split(","))
    options = TypeAdapter(Serve).validate_python(given)
    options.check()
    if options.database is None:
        raise InputError("Replicas share their jobs: give database=postgresql+psycopg://... and a shared data=FOLDER")

    def build() -> Any:
        """Load the model in the process of a replica."""
        return options.application(serve.get_replica_context().replica_id.unique_id)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="likeness",
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": max(scale.min_replicas, scale.max_replicas),
            "target_ongoing_requests": scale.target,
        },
        max_ongoing_requests=options.queue + 36,  # also requests for states and results
        graceful_shutdown_timeout_s=options.shutdown_timeout + 5,
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
    )
    return deployment.bind()
