"""One commit on the Hub that holds a converted folder."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import NormconvertError, first_line
from normconvert.source.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import CommitOperationAdd

MANIFEST = "normconvert.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
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
    too. README.md becomes a model card (`normconvert.publish.card.model_card`). Without a `token`,
    that of `hf auth login` or HF_TOKEN is used. A push that was broken off can be repeated: what
    the Hub has is not sent again. `unverified` publishes what was not verified, or is an
    approximation.

    Returns the URL of the commit, or of the pull request.

    Raises:
        PushError: the folder is no verified conversion, or the Hub refuses it.
    """
    folder = Path(folder).expanduser()
    manifest = _manifest(folder)
    if not unverified:
        _require_verified(folder, manifest)
    upload = Upload(repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
    return upload.commit(folder, commit_message)


def require_possible(repo_id: str) -> None:
    """Ask nobody, and raise PushError where no push to `repo_id` can succeed."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with _refusals(repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise PushError(f"{repo_id!r} names no owner; give USER/NAME.")
    if get_token() is None:
        raise PushError(_NO_TOKEN)


class Upload:
    """A commit in the making on the Hub repository `repo_id`; see `push` for the arguments.

    Files may be sent one by one before the rest is there. None of them is seen before `commit`.

    Raises:
        PushError: the Hub refuses it, as every method may, or the repository holds something else.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        self._repo_id = repo_id
        self._where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        self._sent: list[CommitOperationAdd] = []
        with _refusals(repo_id):
            self._api = HfApi(token=token)
            self._api.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None and not create_pr:
                self._api.create_branch(repo_id, branch=revision, exist_ok=True)
            self._present = frozenset(
                self._api.list_repo_files(repo_id, revision=None if create_pr else revision)
            )
        if revision is None and not create_pr:
            self._require_ours()

    def send(self, path: Path) -> bool:
        """Send the file `path` of the checkpoint's folder; whether it may be removed here."""
        from huggingface_hub import CommitOperationAdd

        with _refusals(self._repo_id):
            file = CommitOperationAdd(path.name, path)
            self._api.preupload_lfs_files(self._repo_id, [file], **self._where)
        self._sent.append(file)
        return file.path_or_fileobj == b""  # a small file goes with the commit itself

    def commit(self, folder: Path, message: str | None = None) -> str:
        """Publish `folder` with all that was sent of it, and a model card, in one commit; its URL.

        Weights of another layout, which would be read in the place of these, are removed there.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        from normconvert.publish.card import model_card

        manifest = _manifest(folder)
        card = model_card(folder, manifest, self._repo_id).encode()
        sent = {file.path_in_repo for file in self._sent}
        rest = [(name, path) for name, path in _files(folder) if name not in sent]
        stale = self._present - sent - {name for name, _ in rest}
        with _refusals(self._repo_id):
            commit = self._api.create_commit(
                self._repo_id,
                operations=[
                    CommitOperationAdd("README.md", card),
                    *self._sent,
                    *(CommitOperationAdd(name, path) for name, path in rest),
                    *(CommitOperationDelete(name) for name in sorted(stale) if _is_weights(name)),
                ],
                commit_message=message or _message(manifest),
                **self._where,
            )
        return str(commit.pr_url or commit.commit_url)

    def _require_ours(self) -> None:
        others = sorted(name for name in self._present if not _is_of_any_repository(name))
        if others and MANIFEST not in self._present:
            raise PushError(
                f"{self._repo_id} is taken: it holds {others[0]!r} and is no conversion. Give "
                "another name, or use `normconvert push` with --revision or --create-pr."
            )


def _is_of_any_repository(name: str) -> bool:
    """Whether a repository that was only just made may have the file."""
    return name.startswith((".", "README", "LICENSE"))


def _is_weights(name: str) -> bool:
    """Whether transformers would read the file of that name for weights."""
    return "/" not in name and name.startswith("model") and name.endswith(_WEIGHTS)


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
