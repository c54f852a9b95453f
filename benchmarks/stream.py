"""``python -m benchmarks stream``: a set that is never in memory, through a Set Transformer with two layers of ISAB."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

import setattn
from setattn import streaming

DIM, WIDTH, INDUCING, HEADS = 32, 32, 16, 4


def chunks(elements: int, size: int) -> Iterator[np.ndarray]:
    """Generate the elements, the same ones every time."""
    for number, start in enumerate(range(0, elements, size)):
        rng = np.random.Generator(np.random.SFC64([1, number]))
        yield rng.standard_normal((min(size, elements - start), DIM), dtype=np.float32)


def memory() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks stream", description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**8, help="1e8 if not given")
    parser.add_argument("--chunk", type=int, default=2**16, help="elements of a chunk")
    parser.add_argument("--checkpoint", help="a .safetensors file to go on from, if it is there")
    parser.add_argument("--progress", action="store_true", help="show a bar")
    args = parser.parse_args(arguments)

    params = setattn.init_set_transformer(
        DIM, WIDTH, 8, num_heads=HEADS, num_inducing=INDUCING, num_encoders=2, num_decoders=1, rng=0
    )
    before = memory()
    start = time.perf_counter()
    y = streaming.fold(
        "set_transformer",
        params,
        lambda: chunks(args.elements, args.chunk),
        checkpoint=args.checkpoint,
        progress=args.progress,
    )
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in chunks(min(args.elements, 20 * args.chunk), args.chunk):
        pass
    made = 3 * (time.perf_counter() - start) * args.elements / min(args.elements, 20 * args.chunk)
    size = args.elements * DIM * 4 / 1e9
    print(f"{args.elements:.3g} elements of {DIM} numbers ({size:.3g} GB), 3 passes: {seconds:.1f} s, of which about")
    print(f"{made:.1f} s make the elements; peak memory {memory():.0f} MB, {before:.0f} MB before")
    print("result", " ".join(f"{number:.6f}" for number in y[0]))
    return 0
