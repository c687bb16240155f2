"""Every code block and every command that a page names is checked: it would run, parse, load or compile today."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.docs.blocks import LANGUAGES, Block, all_blocks, commands, inline_commands, read_blocks, shell_lines
from tests.test_pages import ROOT, pages
from turbolm.cli import app
from turbolm.errors import UserError
from turbolm.recipe.load import load_recipe

TURBOLM: Any = typer.main.get_command(app)
QUICKSTART = "recipes/quickstart/config.yaml"
PLACEHOLDERS = {"RECIPE": QUICKSTART, "OTHER": QUICKSTART, "NAME": "muon", "N": "2"}
# Recipes that a reader of a page writes, or that a command of the page writes for them.
EXAMPLES = re.compile(r"mine\S*\.yaml|recipes/mine/config\.yaml|more-code\.yaml|runs/\S+/recipe\.yaml")
OTHER_PROGRAMS = {
    ".", "source", "export", "printf", "pip", "python3.11", "pre-commit", "ls", "cat", "mkdir", "cp", "torchfrtrace",
    "/tmp/rivals/bin/pip", "/tmp/rivals/bin/python",
}  # fmt: skip
WRAPPERS = {"salloc", "srun", "taskset"}
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
# What a part of a recipe may be laid over: a small model here, a large one on GPUs, and one with weights.
BASES = ("quickstart", "llama3.2-1b/pretrain", "llama3.1-8b/long-64k")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a command, if anything; what it does is not done."""
    program, *arguments = words
    if program in WRAPPERS:
        started = [place for place, word in enumerate(words) if word in ("turbolm", "python")]
        return problem_of(words[started[0] :]) if started else f"{program} starts nothing that a test knows"
    if program in ("turbolm", ".venv/bin/turbolm"):
        return problem_of_turbolm(arguments)
    if program == "make":
        unknown = [word for word in arguments if "=" not in word and word not in TARGETS]
        return f"no target {unknown[0]}" if unknown else None
    if program in ("python", ".venv/bin/python"):
        return problem_of_python(arguments)
    if program in ("sh", "bash"):
        program, *arguments = arguments
    if program.endswith((".sh", ".py")):
        return problem_of_script(program, arguments)
    if program in ("pytest", "accelerate"):
        named = [word.partition("::")[0] for word in arguments if "/" in word]
        return next((f"there is no {name}" for name in named if not (ROOT / name).exists()), None)
    return None if program in OTHER_PROGRAMS else f"{program} is a program that no test knows"


def without_brackets(word: str) -> str:
    """`[--option` and `VALUE]` of an optional part; a list in a recipe keeps its own."""
    return word if "=" in word else word.removeprefix("[").removesuffix("]")


def problem_of_turbolm(arguments: list[str]) -> str | None:
    """Parse a command line with the real command; its recipe must exist, and its overrides must be a recipe's."""
    given = [PLACEHOLDERS.get(word, word) for word in map(without_brackets, arguments) if word != "..."]
    try:
        context = TURBOLM.make_context("turbolm", list(given))
        name, command, rest = TURBOLM.resolve_command(context, given)
        parameters = command.make_context(name, rest, parent=context).params
        recipe = parameters.get("recipe") or QUICKSTART
        if not Path(recipe).exists():
            if not EXAMPLES.fullmatch(recipe):
                return f"there is no recipe {recipe}"
            recipe = QUICKSTART
        overrides = [value for value in parameters.get("overrides") or () if "$" not in value]
        if "=" not in "".join(value for value in overrides if value.isupper()):
            load_recipe(recipe, overrides)
    except typer.Exit:  # --help and --version
        return None
    except UserError as error:
        return str(error)
    except Exception as error:
        if "UsageError" in [kind.__name__ for kind in type(error).__mro__]:
            return str(error)
        raise
    return None


def problem_of_python(arguments: list[str]) -> str | None:
    match arguments:
        case ["-c", code, *_]:
            compile(code, "-c", "exec")
            return None
        case ["-m", module, *rest]:
            if importlib.util.find_spec(module) is None:
                return f"there is no module {module}"
            return problem_of(["pytest", *rest]) if module == "pytest" else None
        case [script, *rest]:
            return problem_of_script(script, rest)
    return None


def problem_of_script(script: str, arguments: list[str]) -> str | None:
    """A script is there, and each option stands in it."""
    path = ROOT / script
    if not path.is_file():
        return f"there is no {script}"
    text = path.read_text(encoding="utf-8")
    if 'exec "$python"' in text or "gpu.sh" in script:  # passes its options on
        text += (ROOT / "benchmarks/gpu.py").read_text(encoding="utf-8")
    options = [word for word in map(without_brackets, arguments) if word.startswith("--")]
    return next((f"{script} has no {option}" for option in options if f'"{option}"' not in text), None)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_is_right(page: Path, tmp_path: Path) -> None:
    problems = []
    for block in read_blocks(page):
        if block.language not in LANGUAGES:
            problems.append(f"{block}: the language {block.language!r} is none of {', '.join(LANGUAGES)}")
        problems += [f"{block}: {problem}" for problem in problems_of(block, tmp_path)]
    problems += [f"`{text}`: {problem}" for text in inline_commands(page) if (problem := problem_of_inline(text))]
    assert not problems, "\n".join(problems)


def problems_of(block: Block, folder: Path) -> list[str]:
    match block.language:
        case "sh" | "text":
            lines = list(shell_lines(block))
            found = [f"`{line.strip()}`: {p}" for line in lines for words in commands(line) if (p := problem_of(words))]
            looks_like_one = re.search(r"^(turbolm|make|\.venv/bin/\w+) ", block.text, re.M)
            if block.language == "text" and looks_like_one:
                found.append("a command is in a block of text; it would not be checked")
            return found
        case "python":
            compile(block.text, str(block), "exec")
        case "json":
            json.loads(block.text)
        case "yaml":
            return problems_of_recipe(block.text, folder)
    return []


def problems_of_recipe(text: str, folder: Path) -> list[str]:
    """Load a recipe, or a part of one over one of `BASES`."""
    home = folder / "recipes"
    if not home.exists():
        (home / "mine").mkdir(parents=True)
        for path in (ROOT / "recipes").iterdir():
            (home / path.name).symlink_to(path)
    problems = []
    for base in BASES:
        extends = "" if "extends" in yaml.safe_load(text) else f"extends: [../{base}/config.yaml]\n"
        (home / "mine/config.yaml").write_text(extends + text, encoding="utf-8")
        try:
            load_recipe(home / "mine/config.yaml")
            return []
        except UserError as error:
            problems.append(str(error).replace(str(home), "recipes"))
    return problems[-1:]


def problem_of_inline(text: str) -> str | None:
    """A command in running text names a command, and options of it."""
    program, name, *words = text.replace("[", " ").replace("]", " ").split()
    if program == "make":
        return None if name in TARGETS or "=" in name or name.isupper() else f"no target {name}"
    if name.startswith("-") or name.isupper():
        return None
    command = TURBOLM.commands.get(name)
    if command is None:
        return f"no command {name}"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    return next(
        (f"no option {word}" for word in words if word.startswith("--") and word.strip(".,") not in known), None
    )


def test_shell_blocks_are_shell() -> None:
    for block in all_blocks("sh"):
        text = re.sub(r"\[(--[^\]]*)\]", r"\1", block.text)  # an optional part
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert not done.stderr, f"{block}: {done.stderr}"


def test_a_wrong_command_is_found(tmp_path: Path) -> None:
    """What the checks above would miss, they would miss in silence."""
    wrong = {
        "turbolm plan quickstart --serch": "No such option",
        "turbolm plan quickstrat": "did you mean",
        "turbolm train recipes/none/config.yaml": "there is no recipe",
        "turbolm train quickstart train.budgets=1M": "unknown key",
        "turbolm plam quickstart": "No such command",
        "make trains": "no target",
        "python benchmarks/packing.py --corpora x": "has no --corpora",
        "sh launch/none.sh": "there is no",
        "python -m turbolm.none": "there is no module",
        "FOO=1 frobnicate x": "no test knows",
        "salloc --nodes=2 turbolm doctor --timeouts 3": "No such option",
    }
    for line, problem in wrong.items():
        assert problem in str(problem_of(commands(line)[0])), line
    assert problem_of_inline("turbolm plan RECIPE [--searches]") == "no option --searches"
    assert problem_of_inline("turbolm plans") == "no command plans"
    assert "unknown key" in problems_of_recipe("train: {budgets: 1M}\n", tmp_path)[0]
    assert problems_of_recipe("train: {budget: 1M}\n", tmp_path) == []
