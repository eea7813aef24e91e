"""The section `cluster` of a config."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def is_head_address(text: str) -> bool:
    """Whether a text has the form `host:port`, in which the head of a Ray cluster is named."""
    return re.fullmatch(r"[^:/\s]+:[0-9]{1,5}", text) is not None


def can_be_reserved(gpus: float) -> bool:
    """Whether Ray can reserve so many GPUs for one worker: a fraction of one, or a whole number."""
    return 0 <= gpus <= 1 or gpus == int(gpus) > 1


class ClusterConfig(BaseModel):
    """Where the search runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: Literal["ray", "local"] = Field("ray", description="ray: a process per worker; local: this process, no Ray")
    workers: int = Field(
        2,
        ge=1,
        le=10_000,
        description="most candidates evaluated at the same time; on a cluster with less room the others start "
        "when nodes join, and beside other runs there are as many as a fair share of it",
    )
    address: str | None = Field(None, description="address of a running Ray cluster; by default one is started here")
    gpus_per_worker: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="GPUs that a worker reserves: a fraction of one, or a whole number, all of them on one node; over "
        "several it lays its model, for models that are larger than one",
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of a worker; part of the run, sums depend on it")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$", description="auto, cpu, cuda, ...")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="dtype of the merged model; by default that of the base"
    )
    shards: Literal["auto", "shared", "copy"] = Field(
        "auto",
        description="how nodes of a cluster get at models and data. auto: those that do not see the same files get "
        "copies from the driver's node once; shared: none do; copy: all do",
    )
    reuse_gib: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="most memory, on its GPU if it has one, in which a worker keeps hidden states of candidates for "
        "others that share their first layers; 0: none. By default half of what its node has left beside workers and "
        "models, at most 4. Scores do not depend on it",
    )
    candidates_per_forward: int = Field(
        1,
        ge=1,
        le=1024,
        description="for small models: so many candidates go through one forward pass of likelihood evaluators, which "
        "takes the memory of as many models; part of the run, the last bits of scores depend on it; pool: local only. "
        "On a CPU it pays where a pass reads some 50 tokens, hardly where it reads 500 or more. "
        "Where some are scored on some of the items (search.fitness: racing, rotate), candidates go alone",
    )
    check_memory: bool = Field(True, description="whether what does not fit into memory is refused before it starts")
    trial_seconds: float = Field(3600, gt=0, description="time limit of one evaluation; kept by the Ray pool")

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is not None and not is_head_address(address):
            raise ValueError(f"'{address}' is not the address of a Ray head; expected host:port")
        return address

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if not can_be_reserved(gpus):
            raise ValueError(f"expected a fraction of one GPU or a whole number of GPUs, found {gpus:g}")
        return gpus

    @model_validator(mode="after")
    def _local_has_no_cluster(self) -> Self:
        if self.pool == "local" and (self.address is not None or self.gpus_per_worker):
            raise ValueError("pool: local knows no address and no gpus_per_worker; use pool: ray, or leave them out")
        if self.pool == "local" and self.shards == "copy":
            raise ValueError("pool: local copies nothing; use pool: ray, or leave shards out")
        if self.candidates_per_forward > 1 and self.pool != "local":
            raise ValueError("candidates_per_forward above 1 needs pool: local; workers on Ray take one at a time")
        if self.gpus_per_worker > 1 and self.device.startswith("cuda:"):
            raise ValueError(
                f"device: {self.device} is one GPU and gpus_per_worker is {self.gpus_per_worker:g}; write device: cuda"
            )
        return self
