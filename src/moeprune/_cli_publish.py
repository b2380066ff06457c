"""``moeprune push`` and ``moeprune card``: a pruned checkpoint on the Hub, and the card it gets there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune import _cli_options as opt
from moeprune import _cli_output as out
from moeprune import _files

if TYPE_CHECKING:
    from moeprune.publish.push import PushResult

Output = Annotated[Path, typer.Argument(metavar="OUT", help="Pruned checkpoint.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The original: compare every tensor with it, and say so on the card."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME[@REV]", help="The original's name on the Hub, if not recorded."),
]
LicenceId = Annotated[
    str | None,
    typer.Option("--license", "--licence", metavar="ID", help="The original's licence, if its card does not name it."),
]


def push(
    output: Output,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: org/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who sees a new repository.")] = True,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to write.")] = None,
    base: Base = None,
    base_model: BaseModel = None,
    licence: LicenceId = None,
    card: Annotated[
        Path | None, typer.Option("--card", metavar="FILE", help="Send this as README.md, not the card that is made.")
    ] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Send lm-eval's documents and answers too.")] = False,
    commit_message: Annotated[str | None, typer.Option("--commit-message", metavar="TEXT", help="Its title.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what else the repository holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Push a pruned checkpoint to the Hub, with a card made from what was measured."""
    from moeprune.publish import push as publishing

    done = publishing.push(
        output,
        repo,
        private=private,
        create_pr=create_pr,
        revision=revision,
        base=base,
        base_model=base_model,
        licence=licence,
        card=card,
        samples=samples,
        commit_message=commit_message,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if publishing.OWN_CARD in done.files:
        out.say_notes([f"README.md of {output} is sent as {publishing.OWN_CARD}: the card takes its place"])
    if as_json:
        out.print_json(_push_object(done, dry_run=dry_run))
    else:
        out.show(_render_push(done, output, dry_run=dry_run))


def card(
    output: Output,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Of the model.  [default: OUT's]")] = None,
    base: Base = None,
    base_model: BaseModel = None,
    licence: LicenceId = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Print the card that a push would send: what was removed, what it cost, and what is not known."""
    from moeprune.publish.push import make_card

    text = make_card(output, name, base=base, base_model=base_model, licence=licence)
    out.show(text.rstrip("\n"))


def _render_push(done: PushResult, output: Path, *, dry_run: bool) -> str:
    total = f"{len(done.files)} files, {_files.human_bytes(done.nbytes)}"
    seen = "private" if done.private else "public"
    if not dry_run:
        if not done.changed:
            return f"nothing to send: {done.url} has all {total}"
        return f"pushed: {total} ({seen})\n{done.pull_request or done.url}"
    width = max(map(len, done.files))
    lines = [f"{name:<{width}}  {_files.human_bytes(nbytes):>9}" for name, nbytes in done.files.items()]
    return "\n".join(
        [
            *lines,
            f"would push {total} to {done.repo}, branch {done.revision}, {seen} if new",
            f"dry run: nothing was sent; read README.md with: moeprune card {output}",
        ]
    )


def _push_object(done: PushResult, *, dry_run: bool) -> dict[str, Any]:
    return {
        "repo": done.repo,
        "private": done.private,
        "revision": done.revision,
        "pushed": not dry_run,
        "changed": done.changed,
        "url": done.url,
        "commit": done.commit,
        "pull_request": done.pull_request,
        "bytes": done.nbytes,
        "files": dict(done.files),
        "card": done.card,
    }
