"""``python -m benchmarks gpu``: CuPy, PyTorch and JAX on a CUDA GPU, in every precision.

Each row is set against the best of PyTorch's and JAX's own kernels in the same precision. Float32 is measured twice:
with products in float32, and in TF32 where the library offers it. Results are checked against float64 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import setattn
from benchmarks import machine
from benchmarks.contestants import ROWS, error_of
from benchmarks.floor import Floor, Rates
from benchmarks.problem import Problem, Row
from benchmarks.report import digits
from benchmarks.timing import QUICK, Settings, Spread, in_turns, ratio

# The largest error, as a part of the largest entry. In half precision the inputs themselves are rounded.
PRECISIONS = {"float32": 1e-4, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}
DEVICE = "cuda"
TARGETS = {"pooling": 5.0, "other": 1.0}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name has this regular expression")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="for all calls of a row in a precision; default: 3")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory, too
    try:
        import torch
    except ImportError:
        raise SystemExit("measuring on a GPU needs PyTorch with CUDA: python -m pip install torch") from None
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU that PyTorch can use")
    settings = dataclasses.replace(QUICK if options.quick else Settings(), pause=0.0, seconds=options.seconds)
    results = machine.describe() | {"card": torch.cuda.get_device_name(), "rates": {}, "rows": []}
    print("\n".join([*machine.lines(results), results["card"], ""]))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{results['date'][:10]}.json"
    rates = {precision: measure_rates(precision) for precision in options.precisions.split(",")}
    results["rates"] = {precision: vars(r) for precision, r in rates.items()}
    print("\n".join(rates_line(precision, r) for precision, r in rates.items()), f"\n\n{HEADER}", flush=True)
    with torch.inference_mode():
        for row in (row for row in ROWS if re.search(options.only, row.name, re.IGNORECASE)):
            problem = row.problem()
            reference = problem.reference()
            for precision, of_precision in rates.items():
                measured = measure(row, problem, reference, precision, of_precision, settings)
                results["rows"].append(measured)
                print("\n".join(table_lines(measured)), flush=True)
            whole = path.with_suffix(".part")  # a run that is cut off leaves the rows that it has measured
            whole.write_text(json.dumps(results, indent=1) + "\n")
            whole.replace(path)
    print(f"written: {path}")
    return 0


def measure(
    row: Row, problem: Problem, reference: np.ndarray, precision: str, rates: Rates, settings: Settings
) -> dict[str, Any]:
    """Check and time everything that computes a row in a precision."""
    runs, errors, wrong, launches = {}, {}, {}, {}
    with precise(precision):
        for name, build in CONTESTANTS.items():
            try:
                run, to_numpy = build(problem, precision)
                error = error_of(to_numpy(run()), reference)
            except (ImportError, NotImplementedError) as reason:
                wrong[name] = f"left out: {reason}"
                continue
            except Exception as failure:  # one library's failure must not end an hour on a card
                wrong[name] = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
                continue
            if not error <= PRECISIONS[precision]:
                wrong[name] = f"differs by {error:.1e}"
                continue
            runs[name], errors[name] = run, error
        samples = in_turns(runs, settings)
        for name, run in runs.items():
            launches[name] = count_launches(run)
    spreads = {name: Spread.of(times) for name, times in samples.items()}
    peers = [name for name in runs if not name.startswith("setattn")]
    best = min(peers, key=lambda name: spreads[name].median, default=None)
    floor = Floor.of(problem, reference.size, rates, itemsize=2 if "16" in precision else 4)
    contestants = {
        name: {
            "error": errors[name],
            "seconds": vars(spreads[name]),
            "launches": launches[name],
            "of_copy_bandwidth": floor.work.bytes / spreads[name].median / rates.bytes,
            "of_matrix_rate": floor.work.multiplications / spreads[name].median / rates.multiplications,
            "ratio": vars(ratio(samples[best], samples[name])) if best else None,
        }
        for name in runs
    }
    target = TARGETS["pooling" if re.search("head|PMA, ", row.name) else "other"]
    return {
        "name": row.name,
        "size": row.size,
        "precision": precision,
        "target": target,
        "floor": floor.as_dict(),
        "best_peer": best,
        "contestants": contestants,
        "wrong": wrong,
    }


# --- contestants: a call that returns when the device is done, and the way of its result to NumPy -------------------

Built = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]


def dtype_name(precision: str) -> str:
    return "float32" if precision == "tf32" else precision


def on_cupy(problem: Problem, precision: str) -> Built:
    import cupy

    if precision == "bfloat16":
        raise NotImplementedError("CuPy has no bfloat16")
    dtype = getattr(cupy, dtype_name(precision))
    inputs = [cupy.asarray(x, dtype=dtype) for x in problem.inputs]
    params = setattn.convert_params(problem.params, cupy, dtype=dtype)
    call = functools.partial(problem.function, *inputs, params, **problem.options)
    stream = cupy.cuda.get_current_stream()
    return Finished(call, stream.synchronize), lambda x: x.get().astype(np.float64)


def on_torch(problem: Problem, precision: str) -> Built:
    import torch

    dtype = getattr(torch, dtype_name(precision))
    inputs = [torch.from_numpy(x).to(DEVICE, dtype) for x in problem.inputs]
    params = setattn.convert_params(problem.params, torch, device=DEVICE, dtype=dtype)
    call = functools.partial(problem.function, *inputs, params, **problem.options)
    return Finished(call, torch.cuda.synchronize), lambda x: x.double().cpu().numpy()


def torch_peer(problem: Problem, precision: str, core: str) -> Built:
    import torch

    from benchmarks import torch_forms

    call = torch_forms.build(problem, core, DEVICE, getattr(torch, dtype_name(precision)))
    return Finished(call, torch.cuda.synchronize), lambda x: x.double().cpu().numpy()


def on_jax(problem: Problem, precision: str) -> Built:
    jax = jax_with_gpu()
    dtype = getattr(jax.numpy, dtype_name(precision))
    jitted = jax.jit(functools.partial(problem.function, **problem.options))
    arguments = [jax.numpy.asarray(x, dtype=dtype) for x in problem.inputs]
    arguments.append(setattn.convert_params(problem.params, jax.numpy, dtype=dtype))
    return lambda: jax.block_until_ready(jitted(*arguments)), lambda x: np.asarray(x, dtype=np.float64)


def jax_peer(problem: Problem, precision: str) -> Built:
    jax = jax_with_gpu()
    from benchmarks import jax_forms

    return jax_forms.build(problem, getattr(jax.numpy, dtype_name(precision))), lambda x: np.asarray(x, np.float64)


def jax_with_gpu() -> Any:
    import jax

    if jax.default_backend() != "gpu":
        raise NotImplementedError("JAX sees no GPU: python -m pip install 'jax[cuda13]'")
    return jax


@dataclasses.dataclass(frozen=True)
class Finished:
    """A call that returns when the device is done."""

    call: Callable[[], Any]
    synchronize: Callable[[], Any]

    def __call__(self) -> Any:
        result = self.call()
        self.synchronize()
        return result


def on_torch_graph(build: Callable[[Problem, str], Built], problem: Problem, precision: str) -> Built:
    """Record the kernels of a call once, and launch them all at once, as ``jax.jit`` does; CuPy records no products."""
    import torch

    run, to_numpy = build(problem, precision)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run.call()

    def replay(recorded: Any = run) -> Any:  # whose arrays the graph reads
        graph.replay()
        return result

    return Finished(replay, torch.cuda.synchronize), to_numpy


SDPA, MATMUL, MODULE = (functools.partial(torch_peer, core=core) for core in ("sdpa", "matmul", "module"))

CONTESTANTS: dict[str, Callable[[Problem, str], Built]] = {
    "setattn, cupy": on_cupy,
    "setattn, torch": on_torch,
    "setattn, torch, CUDA graph": functools.partial(on_torch_graph, on_torch),
    "setattn, jax": on_jax,
    "torch scaled_dot_product_attention": SDPA,
    "torch scaled_dot_product_attention, CUDA graph": functools.partial(on_torch_graph, SDPA),
    "torch matmul and softmax": MATMUL,
    "torch matmul and softmax, CUDA graph": functools.partial(on_torch_graph, MATMUL),
    "torch.nn.MultiheadAttention": MODULE,
    "jax.nn.dot_product_attention": jax_peer,
}


# --- precision, rates, launches -------------------------------------------------------------------------------------


@contextlib.contextmanager
def precise(precision: str) -> Iterator[None]:
    """Let float32 products use TF32, or not, in every library that is there."""
    import torch

    tf32 = precision == "tf32"
    with contextlib.ExitStack() as stack:
        before = torch.get_float32_matmul_precision()
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        if _installed("jax"):
            import jax

            name = {"float32": "float32", "tf32": "tensorfloat32"}.get(precision, "default")
            stack.enter_context(jax.default_matmul_precision(name))
        if _installed("cupy"):
            # CuPy reads its setting once, from CUPY_TF32; afterwards only this function changes it.
            from cupy._core import _routines_linalg as routines

            kind = routines.COMPUTE_TYPE_TF32 if tf32 else routines.COMPUTE_TYPE_DEFAULT
            stack.callback(routines.set_compute_type, np.float32, routines.get_compute_type(np.float32))
            routines.set_compute_type(np.float32, kind)
        yield


def _installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def measure_rates(precision: str) -> Rates:
    """Measure the rate of large products in a precision, and the bandwidth of a copy, read and written."""
    import torch

    dtype = getattr(torch, dtype_name(precision))
    a = torch.randn(8192, 8192, device=DEVICE, dtype=dtype)
    source = torch.empty(1 << 28, device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    with precise(precision):
        products, copy = best(lambda: a @ a), best(lambda: target.copy_(source))
    return Rates(multiplications=a.shape[0] ** 3 / products, bytes=2 * 4 * source.numel() / copy)


def count_launches(run: Callable[[], Any]) -> int:
    """Count the kernels of a call, whichever library launches them: PyTorch's profiler sees the whole process."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.lower().startswith(("memcpy", "memset")) for e in on_device)


HEADER = """\
| workload | precision | who | ratio to the best peer (target) | ms | launches | of copy bandwidth | of matrix rate |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def rates_line(precision: str, rates: Rates) -> str:
    return f"{precision}: {2e-12 * rates.multiplications:.0f} Tflop/s, {1e-9 * rates.bytes:.0f} GB/s copying"


def table_lines(row: dict[str, Any]) -> list[str]:
    """Return the lines of one row in one precision, the fastest first."""
    start = f"| {row['name']} | {row['precision']} |"
    lines = []
    for name, c in sorted(row["contestants"].items(), key=lambda pair: pair[1]["seconds"]["median"]):
        ours = name.startswith("setattn")
        times = digits(c["ratio"]["median"]) + (f" ({row['target']:g})" if ours else "") if c["ratio"] else "-"
        shares = f"{c['of_copy_bandwidth']:.2f} | {c['of_matrix_rate']:.2f}"
        lines.append(
            f"{start} {name} | {times} | {digits(1e3 * c['seconds']['median'])} | {c['launches']} | {shares} |"
        )
    return lines + [f"{start} {name} | {reason} | | | | |" for name, reason in row["wrong"].items()]
