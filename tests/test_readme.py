"""The three READMEs: every example runs, every command is one that there is, every link leads somewhere."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments.running.flags import parse

ROOT = Path(__file__).parents[1]
READMES = {name: ROOT / name for name in ("README.md", "experiments/README.md", "benchmarks/README.md")}


def found(pattern: str) -> list:
    """What a pattern finds in the READMEs, each with the name of the README."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in READMES.items()}
    matches = [(name, match) for name, text in texts.items() for match in re.findall(pattern, text, re.M | re.S)]
    return [pytest.param(name, match, id=f"{name}: {match.splitlines()[0][:60]}") for name, match in matches]


EXAMPLES = found(r"^```python\n(.*?)^```")
COMMANDS = found(r"python -m experiments\.([^`#\n]*[^`#\s])")


@pytest.mark.parametrize("readme, example", EXAMPLES)
def test_example_runs(readme, example):
    exec(compile(example, readme, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("readme, command", COMMANDS)
def test_commands_are_understood(readme, command):
    """All their flags are; nothing is trained."""
    name, *arguments = shlex.split(command)
    config = importlib.import_module(f"experiments.{name}.__main__").Config
    if "--resume" in arguments:
        assert any(field.name == "run" for field in dataclasses.fields(config))
    elif name == "compare":
        assert [argument for argument in arguments if not argument.startswith("-")]
    else:
        assert isinstance(parse(config, arguments, name), config)


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) >= 4 and len(COMMANDS) >= 15


@pytest.mark.parametrize("readme, link", found(r"\]\((?!https?:)([^)]+)\)"))
def test_links_lead_somewhere(readme, link):
    path, _, heading = link.partition("#")
    target = (READMES[readme].parent / path).resolve() if path else READMES[readme]
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]


def test_the_first_one_is_short():
    assert len(READMES["README.md"].read_text(encoding="utf-8").splitlines()) <= 150
