"""The command ``demo``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import setattn
from setattn._commands._backends import BACKENDS, load_backend
from setattn._commands._errors import CommandError, to_install, whole_number
from setattn._commands._files import check_writable, write_whole
from setattn.demo._data import load_digits, shuffle, to_images, to_sets
from setattn.demo._model import load_model, logits, seed_attention

HELD_OUT = 500
BATCH = 100


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of a command line."""
    parser = commands.add_parser(
        "demo",
        help="read handwritten digits with a small trained Set Transformer",
        description="Read handwritten digits as sets of pixels with a small trained Set Transformer, see whether the "
        "order of the pixels matters, and draw where the model looks.",
    )
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="numpy", help="array library (default: numpy)")
    parser.add_argument(
        "--out", type=_png, default="digits.png", metavar="FILE", help="picture to write (default: digits.png)"
    )
    parser.add_argument(
        "--sets",
        type=whole_number(1, HELD_OUT),
        default=HELD_OUT,
        metavar="N",
        help=f"read only the first N of the {HELD_OUT} images (default: {HELD_OUT})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        _require("matplotlib", "safetensors", "tqdm")
        out = check_writable(args.out)
        xp, version = load_backend(args.backend)
        _demo(xp, f"{args.backend} {version}", args.sets, args.out, out)
    except CommandError as error:
        print(f"python -m setattn demo: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(xp: Any, backend: str, number: int, name: Path, out: Path) -> None:
    from tqdm import tqdm

    images, labels = (a[:number] for a in load_digits(held_out=True))
    x, mask = to_sets(images)
    sizes = mask.sum(axis=1)
    params = setattn.convert_params(load_model(), xp)
    print(f"backend  {backend}")
    print(f"model    Set Transformer, {setattn.count_params(params)} parameters, float32")
    print(f"sets     {number} handwritten digits that the training never saw; the elements are the pixels with ink")
    print(f"sizes    {sizes.min()} to {sizes.max()} elements, median {np.median(sizes):.0f}", flush=True)

    def read(x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        parts = []
        for start in range(0, len(x), BATCH):
            part = slice(start, start + BATCH)
            y = logits(xp.asarray(x[part]), xp.asarray(mask[part]), params)
            parts.append(setattn.convert_params(y, np))  # a lazy library computes here
            bar.update(len(parts[-1]))
        return np.concatenate(parts)

    with tqdm(total=2 * number, unit="set", delay=1, leave=False, disable=None) as bar:
        start = time.perf_counter()
        y = read(x, mask)
        seconds = time.perf_counter() - start
        shuffled = read(*shuffle(x, mask, np.random.default_rng(0)))

    said = y.argmax(axis=1)
    changes = np.count_nonzero(shuffled.argmax(axis=1) != said)
    rounding = np.finfo(np.float32).eps / 2 * np.abs(y).max()
    print(f"accuracy {100 * np.mean(said == labels):.1f} %")
    print(f"time     {seconds:.2f} s")
    print(
        f"shuffled the elements of every set: label changes {changes}; "
        f"largest output change {np.abs(shuffled - y).max() / rounding:.1f} roundings (u * max |logit|)",
        flush=True,
    )

    from setattn.demo._picture import draw

    shown = np.sort(np.unique(labels, return_index=True)[1])  # the first image of each digit, whatever came out
    shown = shown[labels[shown].argsort()]
    heads = setattn.convert_params(seed_attention(xp.asarray(x[shown]), xp.asarray(mask[shown]), params), np)
    attention = to_images(x[shown], mask[shown], heads.mean(axis=-2))
    write_whole(out, draw(images[shown], labels[shown], _softmax(y[shown]), attention))
    print(f"picture  {name}")


def _softmax(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(y - y.max(axis=-1, keepdims=True))
    p: np.ndarray[Any, Any] = e / e.sum(axis=-1, keepdims=True)
    return p


def _require(*packages: str) -> None:
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise CommandError(f"missing {', '.join(missing)}; install what the demo needs: {to_install('demo')}")


def _png(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)
