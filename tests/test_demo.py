import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tolerances import product

import setattn

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from setattn.demo._data import load_digits, shuffle, to_images, to_sets
from setattn.demo._model import WEIGHTS, flatten, init_model, load_model, logits, seed_attention, unflatten

HELP = 'python -m pip install "setattn[{0}]" (in a clone: ".[{0}]")'


def run(folder, *arguments, code="", module="setattn", strict=True):
    """Run the command line in a folder, after some code, and return its exit code and what it printed."""
    lines = f"import runpy, sys\n{code}\nsys.argv = ['setattn', *{arguments!r}]\n"
    lines += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, *(["-W", "error"] if strict else []), "-c", lines]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def without(*modules):
    return f"import sys\nfor name in {modules!r}: sys.modules[name] = None"


def accuracy(output):
    [value] = re.findall(r"^accuracy (\d+\.\d) %$", output, re.MULTILINE)
    return float(value)


def size_of_png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_demo(tmp_path):
    # As users start it, not through run().
    command = [sys.executable, "-W", "error", "-m", "setattn", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"backend  numpy {np.__version__}\n")
    assert accuracy(done.stdout) >= 97.0
    assert "label changes 0;" in done.stdout
    [roundings] = re.findall(r"largest output change (\S+) roundings", done.stdout)
    assert float(roundings) < 64
    assert "500 handwritten digits" in done.stdout
    assert f"{setattn.count_params(load_model())} parameters" in done.stdout
    assert done.stdout.endswith("picture  digits.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]
    width, height = size_of_png(tmp_path / "digits.png")
    assert 600 <= width <= 2000
    assert 300 <= height <= 2000


@pytest.mark.parametrize("library", ["torch", "jax", "dask", "cupy"])
def test_every_installed_library_reads_the_same(library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "cupy" and not _has_gpu():
        pytest.skip("no GPU")
    arguments = ("demo", "--sets", "60", "--out", "picture.png")
    # The warnings of another library while it is imported are not ours.
    code, output, _ = run(tmp_path, *arguments, "--backend", library, strict=False)
    assert code == 0
    assert output.startswith(f"backend  {library} ")
    assert "label changes 0;" in output
    assert size_of_png(tmp_path / "picture.png")[0] > 600
    assert accuracy(output) == accuracy(run(tmp_path, *arguments)[1])


def _has_gpu():
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def test_weights_are_small_and_read_the_held_out_digits():
    content = resources.files("setattn.demo").joinpath(WEIGHTS).read_bytes()
    assert len(content) < 500_000
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert "encoder.0.mab_set.attention.query.weight" in header
    assert "setattn.demo.train" in header["__metadata__"]["made_by"]
    images, labels = load_digits(held_out=True)
    x, mask = to_sets(images)
    params = load_model()
    assert all(array.dtype == np.float32 for array in flatten(params).values())
    y = setattn.set_transformer(x, params, mask=mask)[:, 0, :]
    assert np.mean(y.argmax(axis=1) == labels) >= 0.97


def test_data_are_the_1797_digits_and_the_held_out_ones_are_apart():
    ours, others = load_digits(held_out=True), load_digits(held_out=False)
    assert (len(ours.labels), len(others.labels)) == (500, 1297)
    assert not {image.tobytes() for image in ours.images} & {image.tobytes() for image in others.images}
    share = np.bincount(ours.labels) / (np.bincount(ours.labels) + np.bincount(others.labels))
    assert np.allclose(share, 500 / 1797, atol=0.005)
    for images, labels in (ours, others):
        assert images.dtype == labels.dtype == np.uint8
        assert (images.shape[1:], images.max()) == ((8, 8), 16)


def test_sets_are_the_pixels_with_ink():
    images = np.zeros((3, 8, 8), dtype=np.uint8)
    images[0, 0, 7], images[0, 7, 0], images[1, 7, 7] = 16, 8, 4
    x, mask = to_sets(images)
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    assert x[mask].tolist() == [[-1, 1, 1], [1, -1, 0], [1, 1, -0.5]]
    assert np.array_equal(to_images(x, mask, (x[..., 2] + 1) * 8), images)


def test_shuffling_keeps_every_set():
    x, mask = to_sets(load_digits(held_out=True).images[:20])
    y, shuffled = shuffle(x, mask, np.random.default_rng(0))
    assert not np.array_equal(x, y)
    for a, b, before, after in zip(x, y, mask, shuffled, strict=True):
        assert sorted(a[before].tolist()) == sorted(b[after].tolist())


def test_seed_attention_is_what_the_pooling_weighs_with():
    params = load_model()
    x, mask = to_sets(load_digits(held_out=True).images[:5])
    weights = seed_attention(x, mask, params)
    assert weights.shape == (5, 4, mask.shape[1])
    assert np.allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert not weights[~np.broadcast_to(mask[:, None], weights.shape)].any()
    # Pooling by hand with these weights gives the model's own answer.
    h = x
    for block in params.encoder:
        h = setattn.isab(h, block, mask=mask)
    value, output = params.pma.mab.attention.value, params.pma.mab.attention.output
    heads = np.einsum("bhn,bnd,dhe->bhe", weights, h, value.weight) + value.bias
    pooled = np.einsum("bhe,hed->bd", heads, output.weight) + output.bias
    block, width = params.pma.mab, params.pma.seeds.shape[-1]
    nothing = block.attention._replace(
        value=setattn.Linear(np.zeros_like(value.weight)), output=setattn.Linear(np.zeros_like(output.weight))
    )
    rest = block._replace(attention=nothing)
    by_hand = setattn.mab(params.pma.seeds + pooled[:, None], np.zeros((5, 1, width), np.float32), rest)
    by_hand = product(by_hand, params.output.weight) + params.output.bias
    assert np.allclose(by_hand[:, 0], logits(x, mask, params), atol=1e-4)


def test_flatten_and_unflatten_are_inverse():
    params = init_model(1)
    arrays = flatten(params)
    assert "encoder.1.inducing_points" in arrays
    again = unflatten(dict(reversed(arrays.items())), init_model(2))
    assert flatten(again).keys() == arrays.keys()
    assert all(a is b for a, b in zip(flatten(again).values(), arrays.values(), strict=True))


@pytest.mark.parametrize("library", ["torch", "jax", "dask"])
def test_missing_library(library, tmp_path):
    code, output, error = run(tmp_path, "demo", "--backend", library, code=without(library))
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert HELP.format(library) in error
    assert not list(tmp_path.iterdir())


def test_missing_cupy_names_both_extras(tmp_path):
    code, _, error = run(tmp_path, "demo", "--backend", "cupy", code=without("cupy"))
    assert (code, error.count("\n")) == (2, 1)
    assert 'pip install "setattn[cupy-cuda12x]" or "setattn[cupy-cuda13x]"' in error
    assert '(in a clone: ".[cupy-cuda12x]" or ".[cupy-cuda13x]")' in error


def test_cupy_without_a_gpu(tmp_path):
    (tmp_path / "fake").mkdir()
    fake = "import warnings\n__version__ = '14.0'\nwarnings.warn('CUDA path could not be detected')\n"
    fake += "def ones(shape): raise RuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')\n"
    (tmp_path / "fake" / "cupy.py").write_text(fake)
    code, output, error = run(tmp_path, "demo", "--backend", "cupy", code="import sys\nsys.path.insert(0, 'fake')")
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "no CUDA-capable device" in error


def test_missing_packages_of_the_demo(tmp_path):
    code, output, error = run(tmp_path, "demo", code=without("matplotlib", "safetensors", "tqdm"))
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "matplotlib, safetensors, tqdm" in error
    assert HELP.format("demo") in error
    for arguments in (["--help"], ["demo", "--help"]):
        assert run(tmp_path, *arguments, code=without("matplotlib", "safetensors", "tqdm"))[0] == 0


def test_unknown_words_name_the_known_ones(tmp_path):
    code, _, error = run(tmp_path, "demo", "--backend", "tensorflow")
    assert code == 2
    assert all(name in error for name in ("numpy", "cupy", "torch", "jax", "dask"))
    code, _, error = run(tmp_path, "dmo")
    assert code == 2
    assert "demo" in error
    for number in ("0", "501", "-1", "many"):
        code, _, error = run(tmp_path, "demo", "--sets", number)
        assert code == 2
        assert "1 to 500" in error or "expected one argument" in error


def test_help_names_the_defaults(tmp_path):
    code, output, _ = run(tmp_path, "demo", "--help")
    assert code == 0
    words = " ".join(output.split())
    assert all(f"(default: {default})" in words for default in ("numpy", "digits.png", "500"))


@pytest.mark.parametrize("out", ["missing/digits.png", "folder.png", "file/digits.png"])
def test_unwritable_picture(out, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    code, output, error = run(tmp_path, "demo", "--out", out)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert f"cannot write {Path(out)}" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_failing_write_leaves_the_old_picture(tmp_path):
    (tmp_path / "digits.png").write_text("old")
    fail = "import os, pathlib\ndef fail(*_): raise OSError(28, 'No space left on device')\npathlib.Path.replace = fail"
    code, _, error = run(tmp_path, "demo", "--sets", "5", code=fail)
    assert (code, error.count("\n")) == (2, 1)
    assert "No space left" in error
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]
    assert (tmp_path / "digits.png").read_text() == "old"


def test_interrupt_shows_no_traceback(tmp_path):
    interrupt = "import setattn.demo._command as c\ndef stop(*_, **__): raise KeyboardInterrupt\nc.to_sets = stop"
    assert run(tmp_path, "demo", code=interrupt) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_importing_the_library_does_not_import_the_demo():
    code = "import setattn, sys; assert not [m for m in sys.modules if m.startswith(('setattn.demo', 'matplotlib'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_without_torch(tmp_path):
    code, output, error = run(tmp_path, module="setattn.demo.train", code=without("torch"))
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert HELP.format("demo,torch") in error


@pytest.mark.parametrize("option", ["--epochs", "--seed"])
def test_training_names_the_numbers_it_takes(option, tmp_path):
    for number in ("-1", "many", "1.5", "") + (("0",) if option == "--epochs" else (str(2**64),)):
        code, output, error = run(tmp_path, option, number, module="setattn.demo.train", code=without("torch"))
        assert (code, output) == (2, "")
        allowed = "of at least 1" if option == "--epochs" else f"from 0 to {2**64 - 1}"
        assert error.endswith(f"error: argument {option}: {number!r} is no whole number {allowed}\n")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # see tolerances.product
def test_training_lowers_the_loss_and_can_be_repeated():
    pytest.importorskip("torch", reason="training runs on PyTorch")
    from setattn.demo.train import augment, train

    images, labels = (a[:128] for a in load_digits(held_out=False))
    params, losses = train(images, labels, epochs=8, seed=0)  # 16 steps
    assert losses[-1] < 0.95 * losses[0]
    assert all(type(array) is np.ndarray for array in flatten(params).values())
    assert train(images, labels, epochs=8, seed=0)[1] == pytest.approx(losses, rel=1e-3)

    x, mask = to_sets(images)
    moved, kept = augment(x, mask, np.random.default_rng(0))
    assert moved.dtype == np.float32
    assert not (kept & ~mask).any()
    assert 0.85 < kept.sum() / mask.sum() < 0.95


def test_training_writes_weights_with_their_origin(tmp_path):
    pytest.importorskip("torch", reason="training runs on PyTorch")
    from safetensors.numpy import load

    arguments = ("--epochs", "1", "--out", "weights.safetensors")
    shorten = "import setattn.demo._data as d\nf = d.load_digits\n"
    shorten += "d.load_digits = lambda held_out: d.Digits(*(a[:128] for a in f(held_out=held_out)))"
    code, output, _ = run(tmp_path, *arguments, module="setattn.demo.train", code=shorten, strict=False)
    assert (code, output) == (0, "wrote weights.safetensors\n")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    content = (tmp_path / "weights.safetensors").read_bytes()
    assert load(content).keys() == flatten(init_model(0)).keys()
    assert b"--epochs 1 --seed 0" in content
    code, output, _ = run(
        tmp_path, "--epochs", "1", "--validate", module="setattn.demo.train", code=shorten, strict=False
    )
    assert code == 0
    assert re.fullmatch(r"\d+ of \d+ validation images read wrongly\n", output)


def test_picture_is_drawn_from_arrays():
    from setattn.demo._picture import draw

    images, labels = (a[:3] for a in load_digits(held_out=True))
    wrong = np.eye(10)[(labels + 1) % 10]
    content = draw(images, labels, wrong, images / images.sum())
    assert io.BytesIO(content).read(8) == b"\x89PNG\r\n\x1a\n"
