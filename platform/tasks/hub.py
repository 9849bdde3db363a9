"""Names on the Hugging Face Hub: `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` (a branch, a tag or a commit).

What a branch points to is asked once, when the data are read, and the commit is recorded; what was read is kept under the name as
it was given. Every reading asks the Hub first, with a short time limit, because `datasets` would try for half a minute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, shown

PREFIX = "hub:"
_SECONDS = 5.0  # for the first answer of the Hub
_NAME = re.compile(r"hub:((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@([\w.][\w./-]*))?")
_ELSEWHERE = "Without a network, give a local file or folder"


@dataclass(frozen=True)
class HubName:
    """A repository and a revision of it."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}"


class HubError(Exception):
    """The Hub, or what is asked of it, is not there; the text says what, why and what else one can do."""


def parse_hub_name(text: str, where: str) -> HubName:
    """`hub:allenai/c4@main`. `UserError` (starting with `where`) for another form."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: {shown(text)} is no name on the Hub; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return HubName(match[1], match[2] or "main")


def looks_like_hub_name(text: str) -> bool:
    """Whether `hub:` was probably forgotten: OWNER/NAME."""
    return text.count("/") == 1 and not text.startswith((".", "~")) and _NAME.fullmatch(PREFIX + text) is not None


def offline() -> bool:
    """Whether the user asked for no network: only what lies in the caches of `datasets` and `huggingface_hub` is read."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def resolve(name: HubName, kind: str) -> str:
    """The commit that a "dataset" or "model" is read at, 40 hexadecimal digits. `HubError`."""
    from huggingface_hub import HfApi

    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        commit = ask(name.repo, revision=name.revision, timeout=_SECONDS).sha
    except Exception as error:  # the HTTP client's own kinds beside those of huggingface_hub
        raise HubError(_fault(error, name, kind, api.endpoint)) from error
    assert commit, f"{name} has no commit"
    return str(commit)


def download(name: HubName, files: tuple[str, ...]) -> list[Path | None]:
    """Files of a model's repository in the cache of `huggingface_hub`; None for those it has not. The first must be there.

    Where the Hub cannot be reached, what an earlier download left there is taken. `HubError`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: HubError | None = None
    try:
        if not offline():
            resolve(name, "model")
    except HubError as error:
        unreachable = error
    found: list[Path | None] = []
    for file in files:
        try:
            local = offline() or unreachable is not None
            found.append(Path(hf_hub_download(name.repo, file, revision=name.revision, local_files_only=local)))
        except LocalEntryNotFoundError:
            if not found:
                raise unreachable or HubError(f"HF_HUB_OFFLINE is set, and its {file} is not in the cache") from None
            found.append(None)
        except EntryNotFoundError:
            if not found:
                raise HubError(f"the repository has no file {file}") from None
            found.append(None)
        except Exception as error:
            raise HubError(_reason(error)) from error
    return found


def _fault(error: Exception, name: HubName, kind: str, endpoint: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"one must ask for access on the page of this {kind} at {endpoint}, and then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no {kind} {name.repo!r}, or it is private and one must log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"this {kind} has no revision {name.revision!r}"
    if isinstance(error, errors.HFValidationError):
        return _reason(error)
    cached = ", or download it on a machine that has one into the cache of Hugging Face and set HF_HUB_OFFLINE=1 here"
    return f"{endpoint} cannot be reached ({_reason(error)}). {_ELSEWHERE}{cached}"


def _reason(error: BaseException) -> str:
    """The first line of a message, without the numbers in brackets that requests carry."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\[Errno -?\d+\] ", "", lines[0]) if lines else type(error).__name__
