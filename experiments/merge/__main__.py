"""Slices of one experiment, run apart, as one run: `python -m experiments.merge RUN RUN --out DIR`."""

import dataclasses
import importlib
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from ..results.files import file_name, provenance, save
from ..running import signals
from ..running.devices import require_packages
from ..running.directory import refuse_used
from ..running.errors import UsageError
from ..running.terminal import console, execute


@dataclasses.dataclass(frozen=True)
class Config:
    """Join runs that differ only in their seeds, or only in their amplitudes and periods, into one.

    The directory is the one that a single run of all of them would have left: results.nc, summary, tables and figures,
    with paired differences over all seeds. Whatever else differs between the runs, versions of the code included, is
    refused by name. What several of them have trained, such as the static loss, has to be the same to the last bit.
    """

    runs: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    ]
    """Directories of finished runs of one command, all but bifurcation and compare, or of what was merged before."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A new or empty directory for the whole. It is there with everything in it, or not at all."""


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns True: there is nothing to go on with."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.merge", description=Config.__doc__)
    refuse_used(config.out, but=())
    require_packages()
    from .joining import Part, join

    if len(config.runs) < 2:
        raise UsageError("pass at least two RUNs, directories that an experiment has left.")
    parts = [Part.of(path) for path in config.runs]
    results, configuration = join(parts)
    made_by = {"command": shlex.join(["python", "-m", "experiments.merge", *arguments])} | provenance()
    results.attrs["command"] = made_by["command"]
    name = results.attrs["dataset"]
    command = importlib.import_module(f"experiments.{parts[0].experiment}.__main__")
    try:
        with signals.saving_first(console.print):
            config.out.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{config.out.name}.partial-", dir=config.out.parent))
            try:
                text = json.dumps(configuration | {"made_by": made_by}, indent=2)
                (partial / file_name(name, "config.json")).write_text(text + "\n", encoding="utf-8")
                save(results, partial / file_name(name, "results.nc"))
                written = command.write_outputs(results, partial)
                partial.chmod(0o755)
                partial.replace(config.out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {config.out} ({error.strerror}): make room or pass another directory with --out."
        ) from error
    console.print(f"{len(parts)} runs. {written}: {config.out}")
    return True


if __name__ == "__main__":
    execute(main)
