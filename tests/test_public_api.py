"""The public names, what an import costs and needs, and rules of the source that no linter knows."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import validate

import setattn
from setattn import streaming
from setattn.checkpoints._registry import FAMILIES

ROOT = Path(setattn.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
LIBRARY = {name: path for name, path in SOURCES.items() if not name.startswith(("demo/", "_commands/", "__main__"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in LIBRARY.items()}

PUBLIC = {name: getattr(setattn, name) for name in setattn.__all__}
API = (ROOT.parent / "docs" / "api.md").read_text(encoding="utf-8") if (ROOT.parent / "docs").is_dir() else ""
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
BLOCKS = {name: f for name, f in FUNCTIONS.items() if "params" in inspect.signature(f).parameters} | {
    name: getattr(setattn, name) for name in ("fourier_features", "sincos_features")
}
BLOCKS = {name: f for name, f in BLOCKS.items() if not name.endswith("_params")}


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | environment
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- names ----------------------------------------------------------------------------------------------------------


def test_all_is_exactly_what_is_public():
    public = {name for name, value in vars(setattn).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(setattn.__all__)
    assert len(set(setattn.__all__)) == len(setattn.__all__)


def test_every_block_has_its_init():
    special = {"attention_weights": "attention", "sab": "mab"}
    for name in BLOCKS.keys() - {"fourier_features", "sincos_features"}:
        assert f"init_{special.get(name, name)}" in FUNCTIONS


def test_version():
    assert [part.isdecimal() for part in setattn.__version__.split(".")] == [True, True, True]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented(name):
    doc = NumpyDocString(inspect.getdoc(FUNCTIONS[name]))
    sections = ["Summary", "Returns", "Examples"]
    sections += ["Parameters", "Raises"] if inspect.signature(FUNCTIONS[name]).parameters else []
    sections += ["Notes"] if name in BLOCKS else []
    for section in sections:
        assert doc[section], f"{name} lacks {section}"
    documented = [part.lstrip("*") for p in doc["Parameters"] for part in p.name.split(", ")]
    assert sorted(documented) == sorted(inspect.signature(FUNCTIONS[name]).parameters)
    # PR03 and PR04: arguments that are "as for" another function stand together, without types.
    ignored = {"EX01", "SA01", "ES01", "SA04", "RT03", "PR01", "PR02", "RT02", "PR03", "PR04"}
    assert not [error for error in validate(f"setattn.{name}")["errors"] if error[0] not in ignored]


@pytest.mark.parametrize("name", [n for n in streaming.__all__ if inspect.isfunction(getattr(streaming, n))])
def test_streams_are_documented(name):
    function = getattr(streaming, name)
    doc = NumpyDocString(inspect.getdoc(function))
    for section in ("Summary", "Parameters", "Returns", "Raises", "Examples"):
        assert doc[section], f"{name} lacks {section}"
    documented = [part.lstrip("*") for p in doc["Parameters"] for part in p.name.split(", ")]
    assert sorted(documented) == sorted(inspect.signature(function).parameters)
    assert not API or f"autofunction:: {name}\n" in API or f"autofunction:: setattn.streaming.{name}\n" in API


@pytest.mark.parametrize("name", [name for name, f in PUBLIC.items() if inspect.isclass(f)])
def test_classes_are_documented(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", BLOCKS)
def test_arrays_come_first_and_options_by_name(name):
    parameters = list(inspect.signature(BLOCKS[name]).parameters.values())
    kinds = [p.kind for p in parameters]
    names = [p.name for p in parameters]
    here = names.index("params") if "params" in names else kinds.index(inspect.Parameter.KEYWORD_ONLY)
    assert here >= 1
    assert all(kind is inspect.Parameter.POSITIONAL_ONLY for kind in kinds[:here])
    after = here + ("params" in names)
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in kinds[after:])
    assert all(p.default is not inspect.Parameter.empty for p in parameters[after:]) or name.endswith("_features")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("init_")])
def test_inits_take_widths_by_position_and_all_else_by_name(name):
    for p in inspect.signature(FUNCTIONS[name]).parameters.values():
        positional = p.name.startswith("dim") and p.kind is not inspect.Parameter.KEYWORD_ONLY
        assert p.kind is (inspect.Parameter.POSITIONAL_ONLY if positional else inspect.Parameter.KEYWORD_ONLY)


def test_typed():
    assert (ROOT / "py.typed").exists()
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.environment
def test_import_brings_no_backend_but_numpy():
    code = """
        import sys, setattn
        optional = {"torch", "jax", "cupy", "dask", "scipy", "safetensors", "matplotlib", "tqdm", "array_api_strict"}
        print(sorted(optional & {name.split(".")[0] for name in sys.modules}), "setattn.streaming" in sys.modules)
    """
    assert run(code) == "[] False"


@pytest.mark.environment
def test_import_loads_little_beside_numpy():
    """What an import costs is what it loads; ``python -m benchmarks imports`` measures the time."""
    code = """
        import sys, numpy
        before = set(sys.modules)
        import setattn
        added = set(sys.modules) - before
        own = {name for name in added if name.partition(".")[0] == "setattn"}
        print(len(own), *{name.partition(".")[0] for name in added - own})
    """
    own, *others = run(code).split()
    assert set(others) <= {"__future__", "array_api_compat", "threading"}
    assert int(own) <= 49


@pytest.mark.environment
def test_works_with_its_two_dependencies_alone():
    code = """
        import sys
        from importlib.metadata import packages_distributions

        allowed = {"numpy", "array_api_compat", "setattn"}

        class Only:
            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                if top in installed - allowed:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        installed = set(packages_distributions())
        sys.meta_path.insert(0, Only())
        import numpy as np, setattn

        x = np.ones((2, 5, 8), np.float32)
        params = setattn.init_isab(8, num_inducing=3, num_heads=2, rng=0)
        print(setattn.isab(x, params, activation="gelu").shape)
        print(setattn.pma(x, setattn.init_pma(8, num_heads=2, rng=0)).shape)
        params = setattn.init_perceiver_resampler(8, num_latents=3, num_layers=1, num_heads=2, rng=0)
        print(setattn.perceiver_resampler(x, setattn.convert_params(params, np)).shape)
        try:
            import torch
        except ModuleNotFoundError:
            print("alone")
    """
    assert run(code).split("\n") == ["(2, 5, 8)", "(2, 1, 8)", "(2, 3, 8)", "alone"]


def test_dependencies_are_two():
    file = ROOT.parent / "pyproject.toml"
    if not file.exists():
        pytest.skip("not a checkout")
    dependencies = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert sorted(d.split(">")[0] for d in dependencies) == ["array-api-compat", "numpy"]


# --- rules of the source --------------------------------------------------------------------------------------------

CREATION = {"zeros", "ones", "empty", "full", "arange", "eye", "linspace", "asarray", "tril", "triu", "meshgrid"}
BACKENDS = ("torch", "jax", "cupy", "dask", "strict", "numpy")
KNOWING = {"_adapters.py", "_namespace.py", "_kernels.py", "_memory.py"}  # the rooms that know backends apart


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr, node


def is_namespace(owner: str) -> bool:
    return owner in ("xp", "o.xp", "call.xp", "namespace")


def is_init(name: str) -> bool:
    return name.startswith("_init/")


def is_of_files(name: str) -> bool:
    """Files are read to NumPy, and their layouts are those of frameworks."""
    return name.startswith("checkpoints/") or name == "streaming/_files.py"


def test_arrays_are_created_with_dtype_and_device():
    probes = []
    for name, tree in TREES.items():
        for owner, attribute, node in calls(tree):
            if is_namespace(owner) and attribute in CREATION:
                if (name, ast.unparse(node)) == ("_namespace.py", "xp.zeros(1)"):
                    probes.append(node)  # normalize_namespace looks at what kind of array comes out, and drops it
                    continue
                assert {"dtype", "device"} <= {k.arg for k in node.keywords}, f"{name}:{node.lineno}"
    assert len(probes) == 1


def test_numpy_arrays_are_created_in_float32():
    for name, tree in TREES.items():
        for owner, attribute, node in calls(tree):
            if owner == "np" and attribute in CREATION - {"asarray"}:
                assert "np.float32" in ast.unparse(node), f"{name}:{node.lineno}"


def test_backends_are_known_in_four_rooms():
    """By names of modules, attributes or classes; and Dask, whose graphs are built by no other library, in one more."""
    for name, tree in TREES.items():
        if name in KNOWING or is_of_files(name):
            continue
        allowed = {"numpy", "np"} if is_init(name) else set()
        backends = set(BACKENDS) - ({"dask"} if name.startswith("_dask/") else set())
        for node in ast.walk(tree):
            words = {
                ast.Name: lambda n: [n.id],
                ast.Attribute: lambda n: [n.attr],
                ast.Import: lambda n: [a.name for a in n.names],
                ast.ImportFrom: lambda n: [n.module or "", *(a.name for a in n.names)],
            }.get(type(node), lambda n: [])(node)
            for word in words:
                word = word.removeprefix("setattn._dask")
                known = any(b in word.lower() for b in backends)
                assert word in allowed or not known, f"{name}:{node.lineno}: {word}"


def test_no_strings_name_a_backend():
    """Beside docstrings and messages, that is: no comparison with a name, but a class for each in one room."""
    for name, tree in TREES.items():
        if name in ("_adapters.py", "_namespace.py") or is_of_files(name):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare | ast.Subscript | ast.Dict):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        assert not any(b in part.value for b in BACKENDS), f"{name}:{part.lineno}"


def test_no_extrema_against_scalars_and_no_numpy_mathematics():
    for name, tree in TREES.items():
        for owner, attribute, node in calls(tree):
            here = f"{name}:{node.lineno}: {ast.unparse(node)}"
            assert not (is_namespace(owner) and attribute in ("maximum", "minimum", "clip")), here
            assert not (owner == "np" and not is_init(name) and attribute in ("sqrt", "exp", "log", "sum", "max")), here


WRITTEN = {
    "_namespace.py": {"_namespaces"},  # what has been looked up
    "_adapters.py": {"_made"},
    "_kernels.py": {"results"},  # that pieces are put into
    "_memory.py": {"out", "shape"},  # the result that blocks are put into; a list
}


def test_nothing_is_written_in_place():
    for name, tree in TREES.items():
        if is_init(name) or is_of_files(name):
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Subscript):
                    assert ast.unparse(target.value) in WRITTEN.get(name, ()), f"{name}:{node.lineno}"
            if isinstance(node, ast.AugAssign):
                # Only Python's own lists, dictionaries, strings and integers grow in place.
                assert ast.unparse(node.target) in ("parts", "size", "wanted", "got", "places", "tables"), (
                    f"{name}:{node.lineno}"
                )


def test_arrays_are_computed_in_place_in_one_room():
    """By argument, by PyTorch's methods, by Python's operators; ``into`` and its like know where that may be."""
    for name, tree in TREES.items():
        if is_init(name) or is_of_files(name) or name in ("_kernels.py", "_adapters.py"):
            continue
        for _, attribute, node in calls(tree):
            written = attribute.endswith("_") and not attribute.endswith("__")
            written |= "out" in {k.arg for k in node.keywords}
            assert not written, f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_products_are_computed_in_one_place():
    """NumPy's flags of products say nothing, and one function does not ask for them: no test has to ignore any."""
    for name, tree in TREES.items():
        if name in ("_adapters.py", "_kernels.py"):  # a library's own product; the function that asks for it
            continue
        for node in ast.walk(tree):
            product = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult)
            product |= isinstance(node, ast.Attribute) and node.attr in ("matmul", "vecdot", "tensordot", "dot", "vdot")
            assert not product, f"{name}:{node.lineno}"
    file = ROOT.parent / "pyproject.toml"
    if file.exists():
        options = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
        assert options["filterwarnings"] == ["error"]


LAYERS = [
    {"_typing"},
    {"_errors", "_erf", "_order", "_threads", "_files"},
    {"_params"},
    {"_adapters"},
    {"_namespace"},
    {"_record"},
    {"_program"},
    {"_kernels", "_memory"},
    {"_call", "_convert", "_blocks"},
    {"_check"},
    {"_parts"},
    {"_structure", "_positions", "_layers", "_init/_draw"},
    {"_embedding", "_init/_layers"},
    {"_context"},
    {"_state"},
    {"_attend"},
    {"_dask/_again", "_dask/_faults"},
    {"_dask/_sizes", "_dask/_tasks"},
    {"_dask/_graph"},
    {"_dask/__init__"},
    {"_attention", "_attention_pool", "_mab", "_perceiver_layers", "_resampler", "_flamingo"},
    {"_perceiver", "_set_transformer"},
    {"_init/_set_transformer", "_init/_perceiver", "_init/_flamingo"},
    {"_init/__init__"},
    {"checkpoints/__init__", "checkpoints/_block", "checkpoints/_safetensors", "checkpoints/_npz"},
    {"checkpoints/_layout", "checkpoints/_sources"},
    {"checkpoints/_weights", "checkpoints/_canonical", "checkpoints/_perceiver_names"},
    {"checkpoints/_torch"},
    {f"checkpoints/{family}" for family in FAMILIES},
    {"checkpoints/_registry"},
    {"checkpoints/_options"},
    {"checkpoints/_fit", "checkpoints/_words"},
    {"checkpoints/_load", "checkpoints/_inspect"},
    {"checkpoints/_public", "_trace"},
    {"__init__"},
    {"streaming/_passes", "streaming/_same", "streaming/_files"},
    {"streaming/_work"},
    {"streaming/_stream", "streaming/_sources"},
    {"streaming/_all_reduce", "streaming/_functions", "streaming/_save"},
    {"streaming/_fold"},
    {"streaming/__init__"},
]


def imports(tree: ast.AST) -> Iterator[str]:
    """Go through the modules of the library that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "setattn":
            inside = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                path = "/".join(filter(None, (inside, alias.name)))
                for candidate in (path, f"{path}/__init__", inside, f"{inside}/__init__"):
                    if candidate and f"{candidate}.py" in LIBRARY:
                        yield candidate
                        break


def test_dependencies_point_one_way():
    order = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    modules = {name.removesuffix(".py"): tree for name, tree in TREES.items()}
    for module, tree in modules.items():
        below = set(imports(tree))
        if module in order:
            unordered = [other for other in below if order.get(other, -1) >= order[module]]
            assert not unordered, f"{module} imports {unordered}"
    graph = {module: set(imports(tree)) for module, tree in modules.items()}
    while graph:
        leaves = {module for module, below in graph.items() if not below & graph.keys()}
        assert leaves, f"import cycle among {sorted(graph)}"
        graph = {module: below for module, below in graph.items() if module not in leaves}
