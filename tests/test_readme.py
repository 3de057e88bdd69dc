"""The three READMEs: every example runs, every command is one that there is, every link leads somewhere."""

import importlib
import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
import tyro

from experiments.running.flags import parse, parse_seeds

ROOT = Path(__file__).parents[1]
READMES = {name: ROOT / name for name in ("README.md", "experiments/README.md", "benchmarks/README.md")}


def found(pattern: str) -> list:
    """What a pattern finds in the READMEs, each with the name of the README."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in READMES.items()}
    matches = [(name, match) for name, text in texts.items() for match in re.findall(pattern, text, re.M | re.S)]
    return [pytest.param(name, match, id=f"{name}: {match.splitlines()[0][:60]}") for name, match in matches]


EXAMPLES = found(r"^```python\n(.*?)^```")
COMMANDS = [case for case in found(r"python -m experiments\.([^`#\n]*[^`#\s])") if not {"$", "*"} & set(case.values[1])]


@pytest.mark.parametrize("readme, example", EXAMPLES)
def test_example_runs(readme, example):
    exec(compile(example, readme, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("readme, command", COMMANDS)
def test_commands_are_understood(readme, command):
    """All their flags are; nothing is trained."""
    name, *arguments = shlex.split(command)
    config = importlib.import_module(f"experiments.{name}.__main__").Config
    assert isinstance(tyro.cli(config, args=arguments), config)


def test_the_job_array_trains_all_slices_and_then_joins_them(tmp_path):
    """In a shell whose scheduler runs jobs at once, and whose Python only writes down what it is asked to do."""
    (script,) = [match for name, match in map(lambda p: p.values, found(r"^```bash\n(.*?)^```")) if "sbatch" in match]
    stubs = {
        "sbatch": """
            for script; do :; done
            case "$*" in *--array*) tasks=$(seq 0 7); echo 17;; *afterok:17*) tasks=0;; esac
            for task in $tasks; do SLURM_ARRAY_TASK_ID=$task bash "$script"; done
        """,
        "python": 'echo "$*" >> commands; mkdir -p "${@: -1}"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + textwrap.dedent(body))
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, check=True, env=os.environ | {"PATH": path})
    *slices, joined = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    config = importlib.import_module("experiments.cifar.__main__").Config
    assert {parse(config, part[2:], "cifar").preset for part in slices} == {"short"}
    trained = [seed for part in slices for seed in parse_seeds(part[part.index("--seeds") + 1])]
    assert trained == list(range(64))
    outs = [part[part.index("--out") + 1] for part in slices]
    assert sorted(joined[2:-2]) == sorted(outs) and joined[1] == "experiments.merge"


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) >= 3 and len(COMMANDS) >= 15


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
