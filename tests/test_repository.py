"""What is in the repository against what it says of itself: READMEs, links, golden configs, traces of one machine."""

import difflib
import re
import runpy
from pathlib import Path

import pytest
import torch

from moe.config.load import dump

ROOT = Path(__file__).parents[1]
FOLDERS = ("moe", "kernels", "recipes", "scripts", "tests", "docs")
golden = runpy.run_path(str(ROOT / "scripts/update_golden.py"))
VARIANTS = golden["variants"]()


def text_files() -> list[Path]:
    """Every file that people wrote, caches and binary files left out."""
    inside = [path for folder in (*FOLDERS, ".ci") for path in (ROOT / folder).rglob("*")]
    at_top = [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt", ""}]
    return [
        p for p in (*inside, *at_top) if p.is_file() and "__pycache__" not in p.parts and b"\0" not in p.read_bytes()
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_readme_that_names_its_files(folder):
    readme = (ROOT / folder / "README.md").read_text("utf-8")
    # tests mirror modules by name, so their README explains the naming and not each file
    hidden = (".", "__", "README.md", "test_")
    entries = [path for path in (ROOT / folder).iterdir() if not path.name.startswith(hidden)]
    filled = [path for path in entries if path.is_file() or any(path.iterdir())]
    unnamed = sorted(path.name for path in filled if path.name not in readme)
    assert not unnamed, f"{folder}/README.md has no line about {unnamed}"


def test_a_readme_names_only_files_that_exist():
    for folder in FOLDERS:
        readme = (ROOT / folder / "README.md").read_text("utf-8")
        listed = re.findall(r"^\| *\[?`([\w./-]+)`", readme, re.MULTILINE)
        gone = [name for name in listed if not (ROOT / folder / name).exists()]
        assert not gone, f"{folder}/README.md has lines about {gone}"


def test_relative_links_lead_somewhere():
    broken = []
    for path in ROOT.glob("**/*.md"):
        if ".venv" in path.parts or "runs" in path.parts:
            continue
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", path.read_text("utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken, broken


def test_no_file_knows_the_machine_it_was_written_on():
    # Home and work folders; a path under /tmp or /path/to is an example.
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|opt)/|\.\./" + "shared")
    found = []
    for path in text_files():
        if path.name not in (Path(__file__).name, ".git"):  # of a git worktree, .git is a file
            lines = path.read_text("utf-8").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
                for n, line in enumerate(lines, 1)
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)


def test_every_recipe_has_a_variant():
    with_variants = {source.split(":")[0] for source in VARIANTS.values()}
    recipes = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    assert recipes
    assert with_variants == recipes


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shipped_recipe_resolves_to_its_golden_config(name):
    path = ROOT / f"tests/golden/{name}.json"
    stored = path.read_text("utf-8").splitlines() if path.exists() else []
    diff = list(difflib.unified_diff(stored, golden["text_of"](name).splitlines(), "golden", "now", n=1, lineterm=""))
    if diff:
        shown = "\n".join(diff[:40])
        pytest.fail(f"{path.name} differs; if meant: python scripts/update_golden.py\n{shown}", pytrace=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shipped_recipe_survives_being_written_and_read(name):
    config = golden["loaded"](str(ROOT / VARIANTS[name]), name)
    assert golden["loaded"](dump(config), name) == config


def test_no_golden_config_is_left_of_a_recipe_that_is_gone():
    assert {path.stem for path in (ROOT / "tests/golden").glob("*.json")} == set(VARIANTS)


def test_fresh_memory_holds_nan():
    assert torch.empty(7).isnan().all()
    assert torch.ones(3).new_empty(7).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.plain_memory
def test_the_marker_plain_memory_leaves_torch_as_it_is():
    assert not torch.are_deterministic_algorithms_enabled()
