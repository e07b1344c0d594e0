"""What is promised about the distribution, and the rules that hold between the files of the repository."""

import ast
import email
import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import attnres
from attnres import registration

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnres"

# What lies beside the flat files that travel to the Hub, and stays here.
SHARED = {"hub", "folders", "messages"}  # by all commands, and not by the model
NOT_REMOTE_CODE = {"__init__", "__main__", "demo", "plots", "registration", *SHARED}
REMOTE_CODE = sorted({path.stem for path in PACKAGE.glob("*.py")} - NOT_REMOTE_CODE)
MODEL = {"attnres", *REMOTE_CODE, *SHARED}  # "attnres" are the public names

# Which top-level module of the package may import which. eval evaluates any causal language model: it knows no AttnRes,
# and asks conversion for what transformers loads where a checkpoint has another layout.
MAY_IMPORT = {
    "plots": set(),
    **{name: set() for name in SHARED},
    "hub": {"messages"},
    "kernels": set(),  # depth_kernels reaches them by name
    **{name: set(REMOTE_CODE) for name in REMOTE_CODE},
    "registration": set(REMOTE_CODE),
    "__init__": {*REMOTE_CODE, "analysis"},  # whose callback it hands out on demand
    "conversion": MODEL,
    "analysis": MODEL | {"plots"},
    "parallel": MODEL | {"conversion"},  # for the index and the names of files in a checkpoint
    "bench": MODEL | {"plots"},
    "training": MODEL,
    "eval": {"plots", "conversion", *SHARED},
    # conversion reads a checkpoint's headers, copies its files and puts a folder in place; a card needs the same.
    "hub_card": MODEL | {"plots", "eval", "analysis", "conversion"},
}
MAY_IMPORT["demo"] = {*MODEL, "plots", "conversion", "analysis", "parallel", "eval", "hub_card"}
MAY_IMPORT["cli"] = MAY_IMPORT["demo"] | {"demo", "bench", "training", "registration"}
MAY_IMPORT["__main__"] = {"cli"}


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def package_sources():
    return sorted(PACKAGE.rglob("*.py"))


def top_level_module(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported_modules(path):
    """Top-level modules of the package that a file imports, and "attnres" for its public names."""
    package = ("attnres", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = list(package[: len(package) - node.level + 1]) if node.level else []
            prefix += node.module.split(".") if node.module else []
            names = [[*prefix, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "attnres":
                is_module = len(name) > 1 and ((PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").is_file())
                found.add(name[1] if is_module else "attnres")
    return found - {top_level_module(path)}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel and an sdist, built from a copy so that the checkout stays clean."""
    top = tmp_path_factory.mktemp("distributions")
    for path in tracked_files():
        target = top / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    code = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    built = subprocess.run([sys.executable, "-c", code], cwd=top / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = top.glob("*.whl"), top.glob("*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(sdist)


@pytest.fixture(scope="module")
def metadata(distributions):
    wheel, _ = distributions
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_version_is_read_from_the_source(metadata):
    assert metadata["Version"] == attnres.__version__
    assert "version" not in (ROOT / "setup.py").read_text()
    assert not re.search(r'^version\s*=\s*"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "extra", "specifier"),
    [
        ("torch", None, ">=2.11"),
        ("transformers", None, "<6,>=5.17"),
        ("accelerate", None, ">=1.15"),
        ("safetensors", None, ">=0.8"),
        ("numba", "cpu", "<1,>=0.64"),
        ("huggingface_hub", None, "<3,>=1.5"),
        ("lm-eval", "eval", "<0.5,>=0.4.13"),
        ("datasets", "eval", ">=4.7"),
        ("matplotlib", "eval", ">=3.10.8"),
        ("matplotlib", "hub", ">=3.10.8"),
        ("triton", "triton", ">=3.6"),
    ],
)
def test_required_version_is_the_promised_range(metadata, name, extra, specifier):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    (found,) = (
        requirement
        for requirement in requirements
        if requirement.name == name
        and (requirement.marker is None if extra is None else requirement.marker.evaluate({"extra": extra}))
    )
    assert str(found.specifier) == specifier


def test_the_floor_that_is_tested_is_the_lowest_version_that_is_declared(metadata):
    pinned = {}
    for name in ("common.txt", "floor.txt"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if "==" in line and not line.startswith("#"):
                pin = Requirement(line)
                if pin.marker is None or pin.marker.evaluate():
                    pinned[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    extras = {"cpu", "eval", "gguf", "hub", "train", "triton"}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        extra = next(
            (each for each in extras if requirement.marker and f'extra == "{each}"' in str(requirement.marker)), None
        )
        if requirement.marker is None or extra:
            least = [each.version for each in requirement.specifier if each.operator == ">="]
            assert least, f"{requirement}: has no lowest version"
            assert Version(least[0]) == Version(pinned[canonicalize_name(requirement.name)]), requirement


def test_metadata_name_licence_and_python(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_wheel_and_sdist_hold_licence_and_every_file_of_the_package(distributions):
    wheel, sdist = distributions
    in_wheel = set(wheel.namelist())
    in_sdist = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    package = {path.relative_to(ROOT).as_posix() for path in tracked_files() if PACKAGE in path.parents}
    assert package <= in_wheel
    assert package | {"LICENSE", "pyproject.toml"} <= in_sdist
    assert any(name.endswith("/licenses/LICENSE") for name in in_wheel)
    assert not [name for name in in_wheel if not name.startswith(("attnres/", "attention_residuals-"))]


def test_console_script_is_the_command_line(distributions):
    wheel, _ = distributions
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "attnres = attnres.cli:main" in wheel.read(name).decode()


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_remote_code_file_imports_only_its_like(name):
    """The Hub copies these files beside each other into a folder without the package."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            what = f"line {node.lineno} of {name}.py"
            assert node.level == 1, f"{what} imports from outside the folder"
            assert node.module in REMOTE_CODE, f"{what}: only `from .x import y`, x one of {REMOTE_CODE}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {module.split(".")[0] for module in modules}
            installed_with_it = {"torch", "transformers", "numpy", "huggingface_hub"}
            assert roots <= {*installed_with_it, *sys.stdlib_module_names}, ast.unparse(node)


def test_remote_code_files_import_each_other_in_one_direction():
    graph = {name: imported_modules(PACKAGE / f"{name}.py") for name in REMOTE_CODE}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle
    assert graph["backbones"] == {"configuration_kimi_k3", "modeling_kimi_k3"}  # the family that transformers lacks
    assert not graph["configuration_kimi_k3"] and not graph["depth_variants"]


def test_imports_of_the_package_run_one_way():
    wrong = []
    for path in package_sources():
        module, where = top_level_module(path), path.relative_to(ROOT)
        assert module in MAY_IMPORT, f"{where} is new: say in MAY_IMPORT what it may import"
        wrong += [f"{where} imports {name}" for name in sorted(imported_modules(path) - MAY_IMPORT[module])]
    assert not wrong


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"(?<![\w.*])/(?:root|work|opt)/\w", id="machine-path"),
        pytest.param(r"--(?:extra-)?index-url|--find[-]links|https?://\S+/simple\b|file[:]//", id="package-index"),
        pytest.param(r"T[O]DO|FIX[M]E", id="unfinished"),
    ],
)
def test_no_tracked_file_contains(pattern):
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        matches = (number for number, line in enumerate(lines, 1) if re.search(pattern, line))
        found += [f"{path.relative_to(ROOT)}:{number}" for number in matches]
    assert not found


# What a name that is imported is called on the index, where that differs.
DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval"}
OPTIONAL = {"fla"}  # a rival to be measured, where someone has it
BROUGHT_ALONG = {"pyarrow": "datasets", "PIL": "matplotlib"}  # by what is declared


def test_every_import_is_declared(metadata):
    declared = {Requirement(text).name.lower().replace("_", "-") for text in metadata.get_all("Requires-Dist")}
    used = set()
    for path in package_sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            used |= {name.split(".")[0] for name in names}
    siblings = {path.stem for path in package_sources()}  # of a script that runs in a process of its own
    used -= {*sys.stdlib_module_names, "attnres", *OPTIONAL, *siblings}
    missing = {
        name
        for name in used
        if DISTRIBUTIONS.get(name, BROUGHT_ALONG.get(name, name)).lower().replace("_", "-") not in declared
    }
    assert not missing


def test_the_wheel_says_that_it_is_typed(distributions):
    assert "attnres/py.typed" in distributions[0].namelist()


def test_another_package_of_the_same_module_is_not_silent(tmp_path, monkeypatch):
    info = tmp_path / "fast_attnres-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-attnres\nVersion: 2.1.0\n")
    (info / "RECORD").write_text("attnres/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="fast-attnres is installed too, and both put files in attnres/"):
        importlib.reload(registration)
