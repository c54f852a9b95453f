"""Train the weights of the demo: ``python -m setattn.demo.train``.

The model runs through :func:`setattn.set_transformer` on PyTorch tensors, and PyTorch differentiates it. Only the 1297
training images are used, never the 500 that the demo shows. The choices below (blocks, augmentation, epochs)
were made in the same way, by leaving a fifth of the training images out and counting the errors on them, as
``--validate`` does. On one machine and one version of PyTorch, the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import setattn
from setattn._commands._errors import CommandError, to_install, whole_number
from setattn._commands._files import check_writable, write_whole
from setattn.demo._data import load_digits, to_sets
from setattn.demo._model import WEIGHTS, flatten, init_model, logits

BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
LARGEST_GRADIENT = 1.0
LARGEST_SEED = 2**64 - 1  # of PyTorch


def augment(
    x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], rng: np.random.Generator
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Turn, stretch, shear and shift every set a little, jitter its elements, and let one in ten of them go."""
    n = len(x)
    angle, shear = rng.uniform(-0.25, 0.25, (2, n))
    height, width = rng.uniform(0.85, 1.15, (2, n))
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(n)
    turn = np.stack([cos, -sin, sin, cos], axis=-1).reshape(n, 2, 2)
    stretch = np.stack([height, shear, zero, width], axis=-1).reshape(n, 2, 2)
    position = x[..., :2] @ (turn @ stretch) + rng.uniform(-0.25, 0.25, (n, 1, 2))  # 0.25 is 7/8 of a pixel
    noise = rng.normal(0.0, (0.03, 0.03, 0.1), x.shape)
    moved = np.concatenate([position, x[..., 2:]], axis=-1) + noise
    return moved.astype(np.float32), mask & (rng.random(mask.shape) >= 0.1)


def train(
    images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], *, epochs: int, seed: int
) -> tuple[setattn.SetTransformer, list[float]]:
    """Train the model on images.

    Returns
    -------
    params : SetTransformer
        Arrays of NumPy.
    losses : list of float
        The mean loss of each epoch.
    """
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    x, mask = to_sets(images)
    y = torch.from_numpy(labels.astype(np.int64))
    params = setattn.convert_params(init_model(seed), torch)
    params = setattn.map_params(lambda a: a.requires_grad_(), params)
    leaves = list(flatten(params).values())
    optimizer = torch.optim.AdamW(leaves, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short warm-up, then a cosine
        optimizer, LEARNING_RATE, total_steps=steps * epochs, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    with _one_thread(), tqdm(total=steps * epochs, unit="step") as bar:
        for _ in range(epochs):
            total = 0.0
            for chosen in np.array_split(rng.permutation(len(x)), steps):
                elements, present = (torch.from_numpy(a) for a in augment(x[chosen], mask[chosen], rng))
                loss = torch.nn.functional.cross_entropy(
                    logits(elements, present, params), y[chosen], label_smoothing=LABEL_SMOOTHING
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(leaves, LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update()
            losses.append(total / steps)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return setattn.convert_params(params, np), losses


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one core: the arrays are small, and sums then do not depend on how many cores there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def validation_part(labels: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Choose a fifth of the images of each digit."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        chosen[rng.permutation(np.flatnonzero(labels == digit))[::5]] = True
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m setattn.demo.train", description="Train the weights of the demo.")
    parser.add_argument(
        "--epochs",
        type=whole_number(1),
        default=160,
        metavar="N",
        help="passes over the training images (default: 160)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="seed of weights, order and augmentation (default: 0)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--validate",
        action="store_true",
        help="leave a fifth of the training images out, say how well they are read, and write nothing",
    )
    group.add_argument(
        "--out", type=Path, default=Path(__file__).parent / WEIGHTS, help="file to write (default: the bundled one)"
    )
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except CommandError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    try:
        import torch
        import tqdm  # noqa: F401, to see that it is there
        from safetensors.numpy import save
    except ImportError as error:
        install = to_install("demo,torch")
        raise CommandError(
            f"training needs the package {error.name}, which is missing; install it: {install}"
        ) from error

    digits = load_digits(held_out=False)
    if args.validate:
        left_out = validation_part(digits.labels, args.seed)
        params, _ = train(digits.images[~left_out], digits.labels[~left_out], epochs=args.epochs, seed=args.seed)
        said = logits(*to_sets(digits.images[left_out]), params).argmax(axis=-1)
        wrong = int(np.count_nonzero(said != digits.labels[left_out]))
        print(f"{wrong} of {len(said)} validation images read wrongly")
        return 0

    target = check_writable(args.out)
    params, losses = train(digits.images, digits.labels, epochs=args.epochs, seed=args.seed)
    metadata = {
        "made_by": f"python -m setattn.demo.train --epochs {args.epochs} --seed {args.seed}",
        "made_with": f"setattn {setattn.__version__}, torch {torch.__version__}, numpy {np.__version__}",
        "model": f"Set Transformer, {setattn.count_params(params)} parameters, logits of 10 digits",
        "data": f"{len(digits.labels)} training images of setattn/demo/data/digits.npz",
        "loss": f"{losses[-1]:.4f} (cross-entropy, mean of the last epoch, with augmentation and label smoothing)",
    }
    write_whole(target, save(flatten(params), metadata))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
