"""The command `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normconvert.cli.options import (
    Branch,
    CreatePr,
    Debug,
    Json,
    Message,
    Private,
    Token,
    Unverified,
)


def push(
    folder: Annotated[Path, typer.Argument(help="The output of a conversion.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub.")],
    private: Private = False,
    revision: Branch = None,
    create_pr: CreatePr = False,
    commit_message: Message = None,
    token: Token = None,
    unverified: Unverified = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a conversion on the Hub."""
    from normconvert.publish import push as publish

    url = publish(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        unverified=unverified,
    )
    if as_json:
        from normconvert.cli.show import show_json

        show_json({"url": url})
    else:
        typer.echo(f"Pushed: {url}")
