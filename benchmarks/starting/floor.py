"""The least that a first evaluation needs of Ray and of libraries: a program of its own, for `first_evaluation.py`.

    python benchmarks/starting/floor.py [--workers 2 [--address HOST:PORT]]

Imports what a worker imports for a language model: here, or in actors of a Ray that it starts or joins.
"""

from __future__ import annotations

import argparse
from typing import Any


def libraries() -> None:
    """Import what every worker needs, and nothing of ours."""
    import torch  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401


def in_actors(workers: int, address: str | None) -> None:
    """Import it in so many actors, in a Ray that is started or joined exactly as for a search."""
    import ray

    from cluster.local_ray import open_session

    session = open_session(address, cpus=workers)

    class Importer:
        def run(self) -> None:
            import torch  # noqa: F401
            from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    remote: Any = ray.remote(num_cpus=0 if session.own else 1)(Importer)
    ray.get([remote.remote().run.remote() for _ in range(workers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.workers:
        in_actors(arguments.workers, arguments.address)
    else:
        libraries()
    print("done", flush=True)


if __name__ == "__main__":
    main()
