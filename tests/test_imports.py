"""Import statements, read from the source, against the table of layers below (docs/architecture.md draws it).

What must not be loaded at run time (torch by `import moe`, ...) is looked up in a fresh process.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from its own entry and from every line below it, never from a line above, nor from a neighbour.
LAYERS = (
    ("recipes",),
    ("moe.__main__",),
    ("moe.cli",),
    ("moe.evaluation",),
    ("moe.experiments", "moe.show", "moe.plan", "moe.profile", "moe.generate"),
    ("moe.opened",),
    ("moe.hf",),
    ("moe.surgery",),
    ("moe.train",),
    ("moe.analysis", "moe.data", "moe.optim", "moe.checkpoint"),
    ("moe.metrics", "moe.muon"),
    ("moe.model",),
    ("moe.attention", "moe.loss", "moe.lora"),
    ("moe.moe_layer",),
    ("moe.routers", "moe.experts"),
    ("moe.parallel",),
    ("moe.balance", "moe.init"),
    ("moe.random",),
    ("moe.routing",),
    ("moe.backend",),
    ("moe.cost",),
    ("moe.config",),
    ("moe.files",),
    ("moe.errors",),
    ("moe_triton",),
    ("moe_cpu",),
)
# Narrower than its place above: works on a laptop from files alone.
ONLY = {"moe.analysis": ("moe.cost", "moe.config", "moe.files", "moe.errors", "moe_triton.chips")}
# Packages of others that these may import; the first entry that fits counts, and whoever has none is free.
FOREIGN = {
    "moe.analysis": {"numpy", "scipy", "matplotlib", "plotly"},
    "moe.cost": {"numpy"},
    "moe.config": {"pydantic", "pydantic_core", "annotated_types"},
    "moe.errors": set(),
    "moe_triton.chips": set(),
    "moe_triton.reference": {"torch"},
    "moe_triton": {"torch", "triton"},
    "moe_cpu": {"torch"},
}
FACADE = "moe"  # moe/__init__.py gives names of all layers away, lazily; inside the project nobody imports from it
PACKAGES = {"recipes": "recipes", "moe": "moe", "moe_triton": "kernels/moe_triton", "moe_cpu": "kernels/moe_cpu"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all the source under `root`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, module: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def entry_of(name: str, table) -> str | None:
    """The entry of a table that a dotted name falls under."""
    return next((entry for entry in table if name == entry or name.startswith(f"{entry}.")), None)


def problem(module: str, target: str) -> str | None:
    """Why `module` may not import `target`; None if it may."""
    depth = {entry: i for i, layer in enumerate(LAYERS) for entry in layer}
    top = target.split(".")[0]
    if top == "kernels":
        return "kernels/ is a folder, not a package: import moe_triton"
    if top not in PACKAGES:
        allowed = FOREIGN.get(entry_of(module, FOREIGN) or "")
        if allowed is None or top in allowed or top in sys.stdlib_module_names:
            return None
        return f"of other packages it may import only {', '.join(sorted(allowed)) or 'none'}"
    if module == FACADE:
        return None
    source, aim = entry_of(module, depth), entry_of(target, depth)
    if source is None:
        return f"{module} has no place in LAYERS of tests/test_imports.py: give it one"
    if aim is None:
        if target != FACADE:
            return f"{target} has no place in LAYERS of tests/test_imports.py: give it one"
        return None if source == "recipes" else "inside the project, import from the module that defines the name"
    if source == aim or source == "recipes":
        return None
    if depth[source] >= depth[aim]:
        return f"wrong arrow: {source} stands {'beside' if depth[source] == depth[aim] else 'below'} {aim}"
    if source in ONLY and entry_of(target, ONLY[source]) is None:
        return f"of this project it may import only {', '.join(ONLY[source])}"
    return None


def wrong_imports(root: Path) -> list[str]:
    """One line `file:line: importer -> imported: why not` for each import that the tables above forbid."""
    known = modules(root)
    found = []
    for module, path in known.items():
        for line, target in imported(path, module, known):
            why = problem(module, target)
            if why:
                found.append(f"{path.relative_to(root)}:{line}: {module} -> {target}: {why}")
    return found


def test_every_import_goes_one_way():
    wrong = wrong_imports(ROOT)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_module_has_a_place():
    layered = [entry for layer in LAYERS for entry in layer]
    homeless = [name for name in modules(ROOT) if name != FACADE and entry_of(name, layered) is None]
    assert not homeless, f"without a place in LAYERS: {homeless}"


@pytest.mark.parametrize(
    ("path", "statement", "complaint"),
    [
        ("moe/cost.py", "import torch", "moe.cost -> torch: of other packages"),
        ("moe/cost.py", "from moe.model import Model", "wrong arrow: moe.cost stands below moe.model"),
        ("moe/routing.py", "from .model import Model", "wrong arrow: moe.routing stands below moe.model"),
        (
            "moe/routers/topk.py",
            "from ..experts import torch_backend",
            "wrong arrow: moe.routers stands beside moe.exp",
        ),
        ("moe/data/files.py", "def f():\n    import moe.train", "moe/data/files.py:2: moe.data.files -> moe.train"),
        ("moe/model.py", "from moe import MoELayer", "import from the module that defines the name"),
        ("moe/analysis/report.py", "from moe.model import Model", "may import only moe.cost"),
        ("moe/train.py", "from recipes import smoke", "wrong arrow: moe.train stands below recipes"),
        ("moe/train.py", "from kernels import moe_triton", "kernels/ is a folder"),
        ("moe/unheard_of.py", "import moe.cost", "has no place in LAYERS"),
        ("kernels/moe_triton/gemm.py", "import moe.errors", "wrong arrow: moe_triton stands below moe.errors"),
        ("kernels/moe_triton/gemm.py", "import numpy", "may import only torch, triton"),
        ("kernels/moe_triton/chips.py", "import torch", "may import only none"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path, path, statement, complaint):
    for name in ("moe/model.py", "moe/experts/__init__.py", "moe/experts/torch_backend.py", "recipes/smoke.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert wrong_imports(tmp_path) == []
    (tmp_path / path).write_text(f"{statement}\n")
    (found,) = wrong_imports(tmp_path)
    assert complaint in found


def test_right_imports_are_not_flagged(tmp_path):
    (tmp_path / "moe/routers").mkdir(parents=True)
    (tmp_path / "moe/routers/topk.py").write_text(
        "import math\nimport torch\nfrom moe.routing import Routing\nfrom . import a\n"
    )
    (tmp_path / "moe/routers/a.py").write_text("from moe_triton import reference\nfrom ..errors import UserError\n")
    assert wrong_imports(tmp_path) == []


def test_nothing_imports_the_name_kernels():
    pattern = re.compile(r"^\s*(?:from|import)\s+kernels\b", re.MULTILINE)
    sources = [
        path for folder in ("moe", "kernels", "recipes", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    assert sources
    assert [str(path) for path in sources if pattern.search(path.read_text("utf-8"))] == []
    assert not (ROOT / "kernels/__init__.py").exists()


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(
            r
            for extra in ("tensorboard", "hf", "harness", "energy", "quantise", "gguf")
            for r in project["optional-dependencies"][extra]
        ),
    ]
    names = {re.split(r"[^\w.-]", requirement)[0].replace("-", "_") for requirement in declared}
    names |= {"pydantic_core"}  # pydantic requires exactly one version of it
    known = modules(ROOT)
    foreign = {
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for module, path in known.items()
        for line, target in imported(path, module, known)
        if target.split(".")[0] not in names | sys.stdlib_module_names | set(PACKAGES)
    }
    assert not foreign, f"not in pyproject.toml: {sorted(foreign)}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import moe", ("torch", "numpy", "pydantic", "wandb", "datasets")),
        ("import moe.cli", ("transformers", "datasets", "wandb", "triton", "tensorboard")),
        ("import moe.model", ("triton", "transformers", "datasets", "wandb", "matplotlib", "sympy")),
        ("import moe.train", ("triton", "transformers", "datasets", "wandb", "tensorboard", "matplotlib")),
        ("import moe.analysis.report", ("torch", "triton")),
        ("import moe.analysis.doctor", ("torch", "triton", "matplotlib")),
        ("import moe.cost", ("torch", "triton")),
        ("import moe_triton.reference", ("triton", "moe")),
        ("import moe_triton.chips", ("torch", "triton", "moe")),
        ("import moe_cpu.product", ("triton", "moe")),
        ("import moe_cpu.attention", ("triton", "moe")),
    ],
)
def test_an_import_leaves_what_it_does_not_need_unloaded(statement, absent):
    code = f"{statement}; import sys; print(*(n for n in {absent!r} if n in sys.modules))"
    # In a folder of its own: the working directory must not be what makes the packages importable.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
