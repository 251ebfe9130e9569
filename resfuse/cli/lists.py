"""`resfuse list`: the names that other commands take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from resfuse import backends, models
from resfuse.bench.peers import OURS, PEERS
from resfuse.bench.unit_peers import PACKAGES
from resfuse.bench.units import UNITS
from resfuse.cli.common import DTYPES, console, one_of, say


def names(
    kind: Annotated[str | None, typer.Argument(help="models, units, peers, unit-peers, backends or dtypes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the names that other commands take; torchvision's networks are known too where it is installed."""
    found = {
        "models": models.list_models(),
        "units": list(UNITS),
        "peers": [*PEERS, *OURS],
        "unit-peers": list(PACKAGES),
        "backends": list(backends.BACKENDS),
        "dtypes": list(DTYPES),
    }
    if kind is not None:
        found = {kind: found[one_of("kind", kind, found)]}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    about = {name: f"  {peer.what}" for name, peer in {**PEERS, **OURS}.items()}
    for title, entries in found.items():
        if kind is None:
            console.print(f"[bold]{title}[/]")
        for name in entries:
            say(f"{'' if kind else '  '}{name:22}{about.get(name, '') if title == 'peers' else ''}".rstrip())
