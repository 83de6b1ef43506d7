"""One commit on the Hub that holds a converted folder."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import NormconvertError, first_line
from normconvert.source.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "normconvert.json"
_LEFT_OUT = frozenset({".git", ".cache"})


class PushError(NormconvertError):
    """The Hub does not take it, or it is not fit to be published."""

    code = "push"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    unverified: bool = False,
) -> str:
    """Upload the converted checkpoint in `folder` to the Hub repository `repo_id`, in one commit.

    The repository is made if there is none (`private`: for you alone), and the branch `revision`
    too. README.md becomes a model card; see `normconvert.push.card`. Without a `token`, that of
    `hf auth login` or HF_TOKEN is used. A push that was broken off can be repeated: what the Hub
    has is not sent again. `unverified` publishes what was not verified, or is an approximation.

    Returns the URL of the commit, or of the pull request.

    Raises:
        PushError: the folder is no verified conversion, or the Hub refuses it.
    """
    folder = Path(folder).expanduser()
    manifest = _manifest(folder)
    if not unverified:
        _require_verified(folder, manifest)
    from huggingface_hub import CommitOperationAdd, HfApi

    from normconvert.push.card import model_card

    card = model_card(folder, manifest, repo_id).encode()
    with _refusals(repo_id):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[
                CommitOperationAdd("README.md", card),
                *(CommitOperationAdd(name, path) for name, path in _files(folder)),
            ],
            commit_message=commit_message or _message(manifest),
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise PushError(
            f"{folder} has no {MANIFEST}, so it is no conversion; give the output of one."
        )
    manifest = read_json(folder / MANIFEST)
    parts = ("normconvert", "source", "options", "plan")
    if not all(part in manifest for part in parts):
        raise PushError(f"{folder / MANIFEST} is not complete; convert again.")
    return manifest


def _require_verified(folder: Path, manifest: dict[str, Any]) -> None:
    report = manifest.get("verification")
    if report is None:
        raise PushError(
            f"{folder} was not verified; convert again without --no-verify, or give --unverified."
        )
    if not report.get("equivalent"):
        raise PushError(
            f"{folder} is not equivalent to its original; give --unverified to publish it as it is."
        )


def _message(manifest: dict[str, Any]) -> str:
    rewrites = ", ".join(manifest["options"]["rewrites"])
    return f"{manifest['source']['model']} rewritten by normconvert ({rewrites})"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and str(relative) != "README.md" and not _LEFT_OUT & set(relative.parts):
            yield relative.as_posix(), path


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What the Hub may answer, as one sentence each."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PushError(_NO_TOKEN) from error
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not a name for a repository; give USER/NAME.") from error
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set; unset it to push.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = _ANSWERS.get(status, "The Hub did not take {}: {}. Try again later.")
        raise PushError(said.format(repo_id, first_line(error))) from error
    except Exception as error:  # what its HTTP library raises is another class in every version
        raise PushError(
            f"Pushing to {repo_id} failed ({first_line(error)}); check your connection and push "
            "again: what has arrived is not sent twice."
        ) from error


_NO_TOKEN = "There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN."
_ANSWERS = {
    401: "The Hub does not know you as anyone who may write to {}; log in with `hf auth login`, or "
    "give a valid token.",
    403: "Your token may not write to {}; give one with the permission to write there.",
    404: "The Hub has no {} that you may see, or no such branch; check the name.",
    409: "The Hub has another commit on {} meanwhile; push again.",
    429: "The Hub asks you to wait before you push to {} again; try in a few minutes.",
}
