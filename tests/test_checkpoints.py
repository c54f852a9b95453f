"""Weights from files: what is read, what is refused and how it is said, for any layout.

The layout of SigLIP's head stands for all; what each layout makes of its tensors is tested with its family.
"""

from __future__ import annotations

import json
import math
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from siglip import HEADS, PREFIX, SHAPES, D, F

import setattn
from setattn import CheckpointError, DTypeError, NamespaceError, OptionError, ParameterError
from setattn.checkpoints._layout import REQUIRED

KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "uint8": "U8"}


def weights(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def prefixed(tensors, prefix=PREFIX):
    return {prefix + name: a for name, a in tensors.items()}


def encode(tensors, *, header=None, length=None):
    """Write the bytes of a safetensors file after the format's description, or of a broken one."""
    entries, place = {}, 0
    for name, a in tensors.items():
        entries[name] = {
            "dtype": KINDS[a.dtype.name],
            "shape": list(a.shape),
            "data_offsets": [place, place + a.nbytes],
        }
        place += a.nbytes
    text = json.dumps(entries).encode() if header is None else header
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values())


def write(path, tensors, **broken):
    path.write_bytes(encode(tensors, **broken))
    return path


def leaves(params):
    found = []
    setattn.map_params(found.append, params)
    return found


def same_bits(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "model.safetensors", weights("float32"))


# --- what is read ---------------------------------------------------------------------------------------------------


def by_hand(w):
    """Calculate the head from its tensors as they are in the file."""

    def head(x):
        q, k, v = np.split(w["attention.in_proj_weight"], 3)
        bq, bk, bv = np.split(w["attention.in_proj_bias"], 3)
        q, k, v = (w["probe"][0] @ q.T + bq), x @ k.T + bk, x @ v.T + bv
        parts = []
        for i in range(HEADS):
            at = slice(i * D // HEADS, (i + 1) * D // HEADS)
            e = np.exp(q[:, at] @ k[:, at].T / math.sqrt(D // HEADS))
            parts.append(e / e.sum(axis=-1, keepdims=True) @ v[:, at])
        h = np.concatenate(parts, axis=-1) @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
        z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        z = (z * w["layernorm.weight"] + w["layernorm.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return h + z @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]

    return head


def test_a_mapping_becomes_a_block_that_computes_what_its_weights_say():
    w = weights()
    block = setattn.load(w, "siglip", num_heads=HEADS)
    x = np.random.default_rng(1).normal(size=(5, D))
    want = by_hand(w)(x)
    np.testing.assert_allclose(block(x), want, rtol=0, atol=1e-12 * np.abs(want).max())
    same = setattn.attention_pool(x, block.params, **block.options)
    assert same.tobytes() == block(x).tobytes()
    assert (block.function, block.layout) == ("attention_pool", "siglip")
    mask = np.arange(5) < 3
    assert block(x, mask=mask).tobytes() == block(np.where(mask[:, None], x, np.nan), mask=mask).tobytes()
    assert (block(x, eps=1.0) != block(x)).any()


def test_files_and_mappings_give_the_same_bits(tmp_path):
    w = weights("float32")
    want = setattn.load(w, num_heads=HEADS)
    write(tmp_path / "a.safetensors", w)
    np.savez(tmp_path / "b.npz", **w)
    np.savez_compressed(tmp_path / "c.npz", **w)
    np.savez(tmp_path / "d", **{name: np.asfortranarray(a.astype(a.dtype.newbyteorder())) for name, a in w.items()})
    for name in ("a.safetensors", "b.npz", "c.npz", "d.npz"):
        for path in (tmp_path / name, str(tmp_path / name)):
            block = setattn.load(path, "siglip", num_heads=HEADS)
            same_bits(setattn.convert_params(block.params, np, dtype=np.float32), want.params)
            assert block.options == want.options


def test_the_package_safetensors_and_this_one_read_each_other(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    w = weights("float16")
    package.save_file(w, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    block = setattn.load(tmp_path / "theirs.safetensors", num_heads=HEADS)
    same_bits(block.params, setattn.load(w, num_heads=HEADS).params)
    setattn.save(tmp_path / "ours.safetensors", block)
    theirs = package.load_file(tmp_path / "ours.safetensors")
    # As it lies in memory: a view of the tensor in the file.
    assert theirs["attention.key.weight"].tobytes() == w["attention.in_proj_weight"][D : 2 * D].tobytes()
    assert theirs["probe"].tobytes() == w["probe"].tobytes()


def test_nested_trees_are_named_by_their_paths():
    flat = {"a/b/probe": np.ones(2), "a/c": np.ones(3)}
    from setattn.checkpoints._sources import open_source

    assert open_source({"a": {"b": {"probe": np.ones(2)}, "c": np.ones(3)}}).shapes == open_source(flat).shapes


def test_a_weight_that_is_right_is_not_copied():
    w = weights("float32")
    block = setattn.load(w, num_heads=HEADS)
    for a in leaves(block.params):
        assert any(np.shares_memory(a, b) for b in w.values())


def test_only_the_tensors_of_the_block_are_read(tmp_path):
    w = prefixed(weights("float32")) | {"text.embedding": np.zeros((100_000, D), np.float32)}
    path = write(tmp_path / "model.safetensors", w)
    setattn.load(path, prefix=PREFIX, num_heads=HEADS)
    tracemalloc.start()
    setattn.load(path, prefix=PREFIX, num_heads=HEADS)
    assert tracemalloc.get_traced_memory()[1] < 200_000 < path.stat().st_size
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["safetensors", "npz", "bfloat16"])
def test_opening_takes_hardly_more_memory_than_the_weights(tmp_path, kind):
    big = 1500
    shapes = {name: tuple({D: big, 3 * D: 3 * big, F: 2 * big}.get(n, n) for n in s) for name, s in SHAPES.items()}
    stored = np.uint16 if kind == "bfloat16" else np.float32
    w = {name: np.ones(shape, stored) for name, shape in shapes.items()}
    path = tmp_path / f"big.{kind}"
    if kind == "npz":
        np.savez(path, **w)
    else:
        write(path, w)
    del w
    tracemalloc.start()
    block = setattn.load(path, num_heads=HEADS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = setattn.count_params(block.params) * 4
    assert size > 0.99 * path.stat().st_size * (4 / np.dtype(stored).itemsize)
    assert peak <= 1.1 * size


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = {name: (a.view(np.uint32) >> 16).astype(np.uint16) for name, a in weights("float32").items()}
    path = write(tmp_path / "model.safetensors", bits)
    block = setattn.load(path, num_heads=HEADS)
    assert block.params.probe.dtype == np.float32
    assert (block.params.probe.view(np.uint32) == bits["probe"][0].astype(np.uint32) << 16).all()


@pytest.mark.parametrize("name", ["torch", "jax", "dask", "strict"])
def test_parameters_go_to_the_library_that_is_asked_for(file, name):
    backend = BACKENDS[name]
    if reason := backend.missing():
        pytest.skip(reason)
    want = setattn.load(file, num_heads=HEADS)
    block = setattn.load(file, num_heads=HEADS, xp=backend.xp)
    same_bits(setattn.convert_params(block.params, np), want.params)
    x = backend.asarray(np.ones((3, 5, D)), "float32")
    got = setattn.convert_params(block(x), np)
    np.testing.assert_allclose(got, want(np.ones((3, 5, D), np.float32)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_bfloat16_stays_where_the_library_has_it(tmp_path, name):
    backend = BACKENDS[name]
    if reason := backend.missing():
        pytest.skip(reason)
    bits = {name: (a.view(np.uint32) >> 16).astype(np.uint16) for name, a in weights("float32").items()}
    path = write(tmp_path / "model.safetensors", bits)
    block = setattn.load(path, num_heads=HEADS, xp=backend.xp)
    assert str(block.params.probe.dtype).endswith("bfloat16")
    setattn.save(tmp_path / "again.safetensors", block)
    raw = (tmp_path / "again.safetensors").read_bytes()
    assert bits["probe"].tobytes() in raw
    again = setattn.load(tmp_path / "again.safetensors", xp=backend.xp)
    assert str(again.params.probe.dtype).endswith("bfloat16")
    same_bits(setattn.convert_params(again.params, np, dtype=np.float32), setattn.load(path, num_heads=HEADS).params)


def test_tensors_of_torch_keep_their_gradients():
    torch = pytest.importorskip("torch")
    w = {name: torch.tensor(a, requires_grad=True) for name, a in weights("float32").items()}
    block = setattn.load(w, num_heads=HEADS)
    block(torch.ones(5, D)).sum().backward()
    assert all(a.grad is not None for a in w.values())


# --- the library's own layout ---------------------------------------------------------------------------------------


def test_every_tree_is_saved_and_loaded_to_the_same_bits(tmp_path):
    import cases

    for name in cases.NAMES:
        case = cases.make(name)
        if case.params is None or case.function == "attention_weights":
            continue
        block = setattn.Block(case.function, case.params, {"eps": 1e-3 / 3, "scale": None})
        setattn.save(tmp_path / "block.safetensors", block)
        again = setattn.load(tmp_path / "block.safetensors")
        assert (again.function, again.options, again.layout) == (block.function, block.options, "")
        same_bits(again.params, block.params)
        assert repr(setattn.map_params(lambda a: a.shape, again.params)) == repr(
            setattn.map_params(lambda a: a.shape, block.params)
        )


def test_a_saved_block_computes_the_same_bits(tmp_path, file):
    """Its arrays lie in memory as before, which BLAS sees."""
    x = np.random.default_rng(2).normal(size=(3, 50, D)).astype(np.float32)
    block = setattn.load(file, num_heads=HEADS)
    setattn.save(tmp_path / "block.safetensors", block)
    again = setattn.load(tmp_path / "block.safetensors")
    assert again(x).tobytes() == block(x).tobytes()
    strides = [[a.strides for a in leaves(b.params)] for b in (block, again)]
    assert strides[0] == strides[1]


def test_saving_replaces_a_file_whole(tmp_path, file):
    block = setattn.load(file, num_heads=HEADS)
    setattn.save(file, block)
    same_bits(setattn.load(file).params, block.params)
    assert setattn.load(file).layout == "siglip"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    bad = setattn.Block("attention_pool", block.params._replace(probe=block.params.probe.astype(np.complex64)))
    before = file.read_bytes()
    with pytest.raises(DTypeError):
        setattn.save(file, bad)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


SAVING = [
    (
        "block",
        lambda b: (b.params,),
        setattn.ParameterError,
        "is a AttentionPool; wanted a setattn.Block",
    ),
    (
        "function",
        lambda b: (setattn.Block("nonsense", b.params),),
        setattn.ParameterError,
        "'nonsense' with a AttentionPool",
    ),
    ("tree", lambda b: (setattn.Block("isab", b.params),), ParameterError, "'isab' with a AttentionPool"),
    (
        "option",
        lambda b: (setattn.Block(b.function, b.params, {"mask": np.ones(3)}),),
        OptionError,
        "block.options['mask']",
    ),
    (
        "leaf",
        lambda b: (setattn.Block(b.function, b.params._replace(probe=3.0)),),
        setattn.ParameterError,
        "holding a float",
    ),
]


@pytest.mark.parametrize(("make", "error", "says"), [case[1:] for case in SAVING], ids=[case[0] for case in SAVING])
def test_what_cannot_be_saved(tmp_path, file, make, error, says):
    with pytest.raises(error) as caught:
        setattn.save(tmp_path / "out.safetensors", *make(setattn.load(file, num_heads=HEADS)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_cannot_be_written(tmp_path, file):
    block = setattn.load(file, num_heads=HEADS)
    for path in (tmp_path / "no" / "folder.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="wanted a file that can be written"):
            setattn.save(path, block)


def altered(path, **changes):
    """Change the description of a saved block, and leave its tensors."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    about = json.loads(header["__metadata__"]["setattn"]) | changes
    header["__metadata__"]["setattn"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"function": "init_isab"},
        {"function": ["isab"]},
        {"function": "isab"},
        {"options": {"eps": [1]}},
        {"options": 3},
        {"layout": 3},
        {"params": {"Nonsense": {}}},
        {"params": {"Linear": {"weight": "array", "nonsense": "array"}}},
        {"params": {"AttentionPool": {}}},
        {"params": {"AttentionPool": {"probe": "array"}}},
        {"params": {"AttentionPool": 3}},
        {"params": ["array"]},
        {"params": "array"},
        {"params": {"AttentionPool": {"probe": "array 0"}}},
        {"params": {"AttentionPool": {"probe": "array 0 0"}}},
        {"params": {"AttentionPool": {"probe": "array 0 x"}}},
        {"params": {"AttentionPool": {"probe": "nonsense 0 1"}}},
        {"params": None},
        {"params": {}},
        {"params": {"Linear": {}, "LayerNorm": {}}},
    ],
    ids=str,
)
def test_a_saved_block_whose_description_is_false(file, changes):
    setattn.save(file, setattn.load(file, num_heads=HEADS))
    with pytest.raises(CheckpointError) as caught:
        setattn.load(altered(file, **changes))
    assert "\n" not in str(caught.value)


def test_a_saved_block_has_its_options(file):
    setattn.save(file, setattn.load(file, num_heads=HEADS))
    for wrong in ({"num_heads": 2}, {"prefix": "x."}):
        with pytest.raises(OptionError, match="nothing, as the file holds one block with its options"):
            setattn.load(file, **wrong)
    with pytest.raises(CheckpointError, match=r"a file that setattn\.save wrote"):
        setattn.load(weights(), "setattn")


# --- names and shapes -----------------------------------------------------------------------------------------------


def test_all_that_is_missing_or_unexpected_is_named_at_once():
    w = weights()
    del w["probe"], w["mlp.fc1.bias"]
    w |= {f"extra.{i}.scale": np.ones(3) for i in range(12)} | {"other": np.ones(3)}
    with pytest.raises(CheckpointError) as caught:
        setattn.load(w, "siglip", num_heads=HEADS)
    says = str(caught.value)
    assert "missing probe, mlp.fc1.bias; unexpected extra.{0..11}.scale, other" in says
    assert "\n" not in says


def test_the_prefix_that_would_fit_is_named(tmp_path):
    path = write(tmp_path / "model.safetensors", prefixed(weights("float32")) | {"text.probe": np.ones((1, 1, D))})
    for layout in (None, "siglip"):
        with pytest.raises(CheckpointError) as caught:
            setattn.load(path, layout, num_heads=HEADS)
        assert "what would fit: layout='siglip' with prefix='vision_model.head.'" in str(caught.value)
    assert setattn.load(path, "siglip", prefix=PREFIX, num_heads=HEADS).layout == "siglip"
    assert setattn.load(path, prefix=PREFIX, num_heads=HEADS).layout == "siglip"


def test_tensors_of_no_known_layout():
    with pytest.raises(CheckpointError, match="those of no known layout"):
        setattn.load({"nonsense": np.ones(3)})
    with pytest.raises(CheckpointError, match="those of no known layout"):
        setattn.load({})


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_checked_exactly(name):
    """Also against shapes that would broadcast, and those of the transposed."""
    shape = SHAPES[name]
    wrong = [(1,) * len(shape), (*shape, 1), shape[:-1], (*shape[:-1], shape[-1] + 1), (*shape[:-1], 0), ()]
    wrong += [shape[::-1]] if shape[::-1] != shape else []
    for other in dict.fromkeys(wrong):
        if other == shape:
            continue
        with pytest.raises(CheckpointError) as caught:
            setattn.load(weights() | {name: np.ones(other)}, "siglip", num_heads=HEADS)
        assert "of shape" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_message_says_where_a_size_comes_from():
    with pytest.raises(CheckpointError) as caught:
        setattn.load(weights() | {"layernorm.weight": np.ones(9)}, "siglip", num_heads=HEADS)
    assert "layernorm.weight of shape (8 (dim of probe),), not (9,)" in str(caught.value)


def test_a_number_of_heads_that_does_not_divide():
    with pytest.raises(CheckpointError, match=r"attention\.in_proj_weight of shape"):
        setattn.load(weights(), "siglip", num_heads=3)


# --- options --------------------------------------------------------------------------------------------------------


def test_options_come_from_the_call_the_config_or_the_published_defaults(tmp_path):
    path = write(tmp_path / "model.safetensors", weights("float32"))
    config = {"vision_config": {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-5}}
    block = setattn.load(path, "siglip", config=config)
    assert block.params.attention.key.weight.shape == (D, 4, 2)
    assert block.options == {"activation": "gelu", "eps": 1e-5}
    assert setattn.load(path, "siglip", config=config, eps=1e-3).options["eps"] == 1e-3
    assert setattn.load(path, "siglip", num_heads=2).options == {"activation": "gelu_tanh", "eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_act": "gelu_pytorch_tanh"}))
    assert setattn.load(path, "siglip").params.attention.key.weight.shape == (D, 2, 4)
    assert setattn.load(path, "siglip", config=config).params.attention.key.weight.shape == (D, 4, 2)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    assert setattn.load(path, "siglip", config=other).options["activation"] == "gelu"


OPTIONS = [
    ({}, "argument 'num_heads' is not given; wanted an integer for layout 'siglip': number of heads"),
    ({}, "(in a config.json: vision_config.num_attention_heads or num_attention_heads)"),
    ({"num_heads": 0}, "argument 'num_heads' is 0; wanted an integer of at least 1"),
    ({"num_heads": True}, "wanted an integer of at least 1"),
    ({"num_heads": 2.0}, "wanted an integer of at least 1"),
    ({"num_heads": 2, "eps": -1.0}, "argument 'eps' is -1.0; wanted a finite number of at least 0"),
    ({"num_heads": 2, "eps": "x"}, "wanted a finite number of at least 0"),
    ({"num_heads": 2, "activation": "gelu_new"}, "wanted one of 'relu', 'squared_relu', 'gelu', 'gelu_tanh', 'silu'"),
    ({"num_heads": 2, "heads": 2}, "argument 'heads' is an unknown option; wanted one of layout 'siglip': num_heads"),
    ({"config": {"num_attention_heads": "four"}}, "argument 'config: num_attention_heads' is 'four'"),
    ({"config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"}}, "'config: hidden_act' is 'quick_gelu'"),
    ({"config": 3}, "argument 'config' is a int; wanted a mapping, or the path of a config.json"),
    ({"config": "/no/such/config.json"}, "wanted a file of JSON: No such file or directory"),
    ({"layout": "nonsense", "num_heads": 2}, "argument 'layout' is 'nonsense'; wanted one of"),
    ({"prefix": 3, "num_heads": 2}, "argument 'prefix' is 3"),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS)
def test_options_that_are_missing_or_wrong(options, says):
    with pytest.raises(OptionError) as caught:
        setattn.load(weights(), **({"layout": "siglip"} | options))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_must_be_given_says_where_it_is_found():
    for layout in setattn.layouts().values():
        for option in layout.options:
            if option.default is REQUIRED:
                told = option.config or re.search(r"the arguments? \w.* of the original", option.about)
                assert told, (layout.name, option.name)


@pytest.mark.parametrize("text", ["", "nonsense", "[1, 2]", "[" * 100_000])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OptionError, match=r"load: argument 'config' is '.*config.json'; wanted a file"):
        setattn.load(write(tmp_path / "model.safetensors", weights()), "siglip")


# --- values and dtypes ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_unless_allowed():
    for value in (math.nan, math.inf, -math.inf):
        w = weights()
        w["mlp.fc2.bias"][3] = value
        with pytest.raises(CheckpointError, match=r"finite numbers in tensor 'mlp.fc2.bias', or allow_nonfinite=True"):
            setattn.load(w, num_heads=HEADS)
        assert setattn.load(w, num_heads=HEADS, allow_nonfinite=True).params.ff.output.bias[3] != 0
    w = weights("float32")
    w["mlp.fc2.bias"][:] = np.finfo(np.float32).max  # finite, and their sum is not
    assert setattn.load(w, num_heads=HEADS).layout == "siglip"


def test_several_dtypes_need_one_that_is_asked_for():
    w = weights() | {"layernorm.bias": np.ones(D, np.float32)}
    with pytest.raises(DTypeError, match=r"as 'probe' is float64 and 'layernorm\.bias' is float32"):
        setattn.load(w, num_heads=HEADS)
    block = setattn.load(w, num_heads=HEADS, dtype=np.float32)
    assert {a.dtype for a in leaves(block.params)} == {np.dtype("float32")}


def test_integers_are_no_weights():
    w = {name: a.astype(np.int64) for name, a in weights().items()}
    with pytest.raises(CheckpointError, match="real floating numbers in tensor 'probe', not int64"):
        setattn.load(w, num_heads=HEADS)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (3, "a int; wanted the path of a file"),
        ("/no/such/file.safetensors", "a file that can be read: No such file or directory"),
        ({"a": 3}, "a mapping with a int as 'a'"),
        ({3: np.ones(3)}, "a mapping with the key 3"),
        ({"a": {"b": None}}, "a mapping with a NoneType as 'a/b'"),
    ],
)
def test_sources_that_are_none(source, says):
    with pytest.raises(CheckpointError) as caught:
        setattn.load(source)
    assert says in str(caught.value)


def test_an_unknown_library():
    with pytest.raises(NamespaceError):
        setattn.load(weights(), num_heads=HEADS, xp=math)


# --- broken and hostile files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.PTH", "model.pkl", "model.ckpt", "model"])
def test_pickled_files_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError) as caught:
        setattn.load(tmp_path / name)
    assert f"setattn.load(torch.load({str(tmp_path / name)!r}, weights_only=True), ...)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_way_out_of_a_pickled_file(tmp_path):
    """What the message says, on a file of several parts, as those of IP-Adapter are."""
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(a) for name, a in weights().items()}
    torch.save({"head": state, "other": {"weight": torch.ones(2)}}, tmp_path / "model.bin")
    nested = torch.load(tmp_path / "model.bin", weights_only=True)
    with pytest.raises(CheckpointError, match="layout='siglip' with prefix='head/'"):
        setattn.load(nested)
    setattn.save(tmp_path / "block.safetensors", setattn.load(nested, prefix="head/", num_heads=HEADS))
    same_bits(setattn.load(tmp_path / "block.safetensors").params, setattn.load(weights(), num_heads=HEADS).params)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


TWO = entry() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
HOSTILE = {
    "no length": (b"\x01\x02", "it has 2 bytes"),
    "empty": (b"", "it has 0 bytes"),
    "header beyond the file": (encode({}, header=b"{}", length=1000), "its header would be 1000 bytes from byte 8"),
    "largest length": (b"\xff" * 8 + b"{}", "its header would be 18446744073709551615 bytes"),
    "not UTF-8": (encode({}, header=b"\xff\xfe{}"), "JSON in bytes 8 to 12"),
    "not JSON": (encode({}, header=b"nonsense"), "JSON in bytes 8 to 16"),
    "deep": (encode({}, header=b"[" * 100_000), "JSON in bytes 8 to 100008"),
    "long number": (encode({}, header=b'{"a": ' + b"9" * 5000 + b"}"), "JSON in bytes"),
    "a list": (encode({}, header=b"[1]"), "an object of JSON"),
    "metadata": (encode({}, header=b'{"__metadata__": {"a": 1}}'), "metadata of text"),
    "twice": (encode({}, header=b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "twice within": (encode({}, header=b'{"a": {"dtype": "F32", "dtype": "F64"}}'), "'dtype' is there twice"),
    "no entry": (encode({}, header=b'{"a": 1}'), "a dtype, a shape and data_offsets of tensor 'a'"),
    "dtype": (encode({}, header=json.dumps(entry("F31")).encode()), "a known dtype of tensor 'a', not 'F31'"),
    "size below 0": (encode({}, header=json.dumps(entry(shape=(-2,))).encode()), "of tensor 'a'"),
    "size no integer": (encode({}, header=json.dumps(entry(shape=(2.0,))).encode()), "of tensor 'a'"),
    "size true": (encode({}, header=json.dumps(entry(shape=(True, 2))).encode()), "of tensor 'a'"),
    "one offset": (encode({}, header=json.dumps(entry(offsets=(8,))).encode()), "two offsets"),
    "offsets swapped": (encode({}, header=json.dumps(entry(offsets=(8, 0))).encode()), "8 bytes of tensor 'a'"),
    "offsets below 0": (encode({}, header=json.dumps(entry(offsets=(-8, 0))).encode()), "two offsets not below 0"),
    "span": (
        encode({}, header=json.dumps(entry(shape=(3,))).encode()) + b"\0" * 8,
        "12 bytes of tensor 'a' of F32 (3,)",
    ),
    "huge": (encode({}, header=json.dumps(entry(shape=(2**40, 2**40))).encode()), "bytes of tensor 'a'"),
    "hole": (
        encode({}, header=json.dumps(entry(offsets=(4, 12))).encode()) + b"\0" * 12,
        "tensor 'a' to begin at byte",
    ),
    "overlap": (
        encode({}, header=json.dumps(TWO | entry(offsets=(8, 16))).encode()) + b"\0" * 16,
        "to begin at byte",
    ),
    "truncated": (encode({}, header=json.dumps(TWO).encode()) + b"\0" * 12, "tensor 'b' up to byte"),
    "bytes behind": (encode({}, header=json.dumps(TWO).encode()) + b"\0" * 20, "no bytes behind the last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_files_are_refused_by_name_and_byte(tmp_path, name):
    content, says = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        setattn.load(path, "siglip", num_heads=HEADS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).count("wanted") == 1
    assert peak < 10_000_000


def test_a_dtype_that_is_not_read_is_refused_when_it_is_needed(tmp_path):
    odd, rest = "layernorm.bias", weights("float32")
    del rest[odd]
    header = {odd: {"dtype": "F8_E4M3", "shape": [D], "data_offsets": [0, D]}}
    place = D
    for name, a in rest.items():
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [place, place + a.nbytes]}
        place += a.nbytes
    raw = encode({}, header=json.dumps(header).encode()) + b"\0" * D + b"".join(a.tobytes() for a in rest.values())
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"tensor '{odd}' of a type other than F8_E4M3"):
        setattn.load(tmp_path / "model.safetensors", num_heads=HEADS)


@pytest.mark.parametrize("stored", [np.float32, np.uint16])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, stored):
    from setattn.checkpoints._sources import open_source

    path = write(tmp_path / "model.safetensors", {name: np.zeros(shape, stored) for name, shape in SHAPES.items()})
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tensor 'mlp.fc2.weight' up to byte \d+, where the file ends at \d+"):
        source.read("mlp.fc2.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match="a file that can be read: No such file"):
        source.read("probe")


def npz(path, members):
    """Write an archive of raw members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


NPZ = {
    "objects": (
        [("a.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x02."))],
        "a program can hide",
    ),
    "no array": ([("a.npy", b"nonsense")], "a whole array 'a'"),
    "huge": ([("a.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000,)}"))], "800000000"),
    "short": (
        [("a.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}", b"\0" * 8))],
        "of float64 (3,)",
    ),
    "below 0": ([("a.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"))], "'a'"),
    "program": ([("a.npy", npy("__import__('os').abort()"))], "a whole array 'a'"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", NPZ)
def test_broken_archives_are_refused(tmp_path, name):
    members, says = NPZ[name]
    with pytest.raises(CheckpointError) as caught:
        setattn.load(npz(tmp_path / "model.npz", members), "siglip", num_heads=HEADS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_member_that_is_there_twice(tmp_path):
    array = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", b"\0" * 8)
    with pytest.warns(UserWarning, match="Duplicate name"):
        npz(tmp_path / "model.npz", [("a.npy", array), ("a.npy", array)])
    with pytest.raises(CheckpointError, match="each name once, where 'a' is there twice"):
        setattn.load(tmp_path / "model.npz")


def test_members_that_overlap(tmp_path):
    """Of one file of zeros that is the content of several arrays, more could be made than it has bytes."""
    zeros = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (5000,)}", b"\0" * 5000)
    with zipfile.ZipFile(npz(tmp_path / "inner.npz", [("b.npy", zeros)])) as archive:
        [inner] = archive.infolist()
    raw = (tmp_path / "inner.npz").read_bytes()[: 30 + len("b.npy") + len(zeros)]
    head = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(raw)},)}}")
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("a.npy", head + raw)
        inner.header_offset = 30 + len("a.npy") + len(head)
        archive.filelist.append(inner)
    with pytest.raises(CheckpointError, match=r"(?i)overlap"):  # newer versions of Python say so themselves
        setattn.load(tmp_path / "model.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_that_is_cut_is_refused_by_name_and_byte(tmp_path, save):
    path = tmp_path / "model.npz"
    save(path, **weights("float32"))
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second, *_, last = archive.infolist()
        data = last.header_offset + 30 + len(last.filename) + 20 + last.compress_size
    for size, says in {
        data - 1: f"array {last.filename[:-4]!r} up to byte {data}, where the file ends at {data - 1}",
        second.header_offset - 1: f"array {first.filename[:-4]!r} up to byte {second.header_offset}, where",
        second.header_offset + 40: f"the rest of an archive from byte {second.header_offset} on, where the file ends",
        data + 10: f"the rest of an archive from byte {data} on, where the file ends at {data + 10}",
        10: "a whole .npz file: ",
    }.items():
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=re.escape(says)):
            setattn.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("altered")


@given(data=st.data())
@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed.npz"])
def test_a_file_that_is_altered_anywhere_is_refused_or_has_its_shapes(folder, kind, data):
    """A byte changed, removed or put in: one line of ours, or arrays of the shapes that are wanted."""
    path = folder / f"model.{kind}"
    if kind == "safetensors":
        write(path, weights("float32"))
    else:
        (np.savez_compressed if kind == "compressed.npz" else np.savez)(path, **weights("float32"))
    raw = bytearray(path.read_bytes())
    # The header of a safetensors file is at its start, the directory of an archive at its end.
    near = st.integers(0, min(700, len(raw) - 1))
    at = data.draw(st.one_of(st.integers(0, len(raw) - 1), near, near.map(lambda n: len(raw) - 1 - n)))
    what = data.draw(st.sampled_from(["change", "remove", "insert", "cut"]))
    value = data.draw(st.integers(0, 255))
    if what == "change":
        raw[at] = value
    elif what == "remove":
        del raw[at]
    elif what == "insert":
        raw.insert(at, value)
    else:
        del raw[at:]
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        block = setattn.load(path, "siglip", num_heads=HEADS)
    except (CheckpointError, DTypeError) as error:
        said = str(error)
    else:
        said = ""
        want = setattn.load(weights("float32"), "siglip", num_heads=HEADS)
        for a, b in zip(leaves(block.params), leaves(want.params), strict=True):
            assert a.shape == b.shape
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in said
    assert peak < 1_000_000 + 2 * len(raw)
