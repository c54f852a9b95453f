"""A set that is larger than the memory of the workers: time, tasks and memory of two Dask processes.

``python -m benchmarks.dask_cluster pma 1e7 --chunk 1e5`` makes the set on the workers, chunk by chunk. It needs
``distributed``.
"""

from __future__ import annotations

import argparse
import resource
import time

import dask.array as da
import numpy as np

import setattn

DIM = 32


def chunk(block_info=None):
    """Make a chunk of the set from its place."""
    start, stop = block_info[None]["array-location"][0]
    return np.random.default_rng(start).standard_normal((stop - start, DIM), dtype=np.float32)


def source(n, size):
    sizes = (size,) * (n // size) + ((n % size,) if n % size else ())
    return da.map_blocks(chunk, chunks=(sizes, (DIM,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))


def peak():
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


WORKLOADS = {
    "pma": lambda x: setattn.pma(x, setattn.init_pma(DIM, num_seeds=16, num_heads=4, rng=0)),
    "isab": lambda x: setattn.isab(x, setattn.init_isab(DIM, num_inducing=16, num_heads=4, rng=0)).mean(axis=0),
    "set_transformer": lambda x: setattn.set_transformer(
        x, setattn.init_set_transformer(DIM, DIM, DIM, num_inducing=16, num_heads=4, rng=0)
    ),
}


def main():
    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("elements", type=float)
    parser.add_argument("--chunk", type=float, default=1e5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="400MB", help="limit of one worker")
    given = parser.parse_args()
    options = {"threads_per_worker": 1, "memory_limit": given.memory, "dashboard_address": None}
    with LocalCluster(n_workers=given.workers, **options) as cluster, Client(cluster) as client:
        out = WORKLOADS[given.workload](source(int(given.elements), int(given.chunk)))
        print(f"{len(dict(out.__dask_graph__()))} tasks")
        start = time.perf_counter()
        out.compute()
        print(f"{time.perf_counter() - start:.1f} s, most memory of a worker {max(client.run(peak).values())} MB")


if __name__ == "__main__":
    main()
