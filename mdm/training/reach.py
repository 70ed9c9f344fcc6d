"""What a trial can reach: a failure told apart from a hub that is not there, and said in a line with its place."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mdm.config import UserError
from mdm.config.errors import first_line, said


@dataclass
class Trial:
    """What was tried, and what could not be, each with its reason; what samples are in tokens; and the samples, by source."""

    tried: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    drawn: dict[str, list[Any]] = field(default_factory=dict)
    processor: Any = None

    def reach(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; None, and a note, where it needs something that cannot be reached.

        Raises UserError for all else that goes wrong, with the place in the user's own file.
        """
        try:
            return work()
        except Exception as error:
            if unreachable(error):
                why = first_line(error).removeprefix(f"{key}: ")
                self.skipped[key] = f"cannot be reached ({why})"
                return None
            if isinstance(error, UserError):
                raise
            raise UserError(said(error) if str(error).startswith(f"{key}:") else f"{key}: {said(error)}") from error

    def lines(self) -> list[str]:
        tried, seen = (f"tried: {what}" for what in self.tried), (f"seen: {what}" for what in self.seen)
        return [*tried, *seen, *(f"not tried: {key}: {why}" for key, why in self.skipped.items())]


PATIENCE = "MDM_PATIENCE"  # see `components.places`


@contextlib.contextmanager
def told_at_once() -> Iterator[None]:
    """Without a network the hub's clients try again for minutes: where its host is not reached, they are told so.

    Nor is a file system that does not answer then asked again (its client has tried a few times), unless $MDM_PATIENCE says so.
    Behind a proxy, or with a hub of one's own, they are left to find out.
    """
    from datasets import config
    from huggingface_hub import constants

    before, waits = (constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE), os.environ.get(PATIENCE)
    elsewhere = any(name.upper() in ("HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT") for name in os.environ)
    if not (constants.HF_HUB_OFFLINE or elsewhere or _reached("huggingface.co")):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
        os.environ[PATIENCE] = waits or "0"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
        os.environ.pop(PATIENCE, None)
        os.environ |= {} if waits is None else {PATIENCE: waits}


def _reached(host: str, seconds: float = 3.0) -> bool:
    try:
        socket.create_connection((host, 443), seconds).close()
    except OSError:
        return False
    return True


OFFLINE = {
    "ConnectError",
    "ConnectTimeout",
    "CredentialRetrievalError",
    "LocalEntryNotFoundError",
    "MaxRetryError",
    "NameResolutionError",
    "NoCredentialsError",
    "OfflineModeIsEnabled",
    "PartialCredentialsError",
    "ProxyError",
}
"""Names of exceptions of networks, and of a store that this machine has no key to; their packages need not be installed."""


def unreachable(error: BaseException | None) -> bool:
    """Whether an error comes of a network that is not there, or of credentials that another machine has."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, BrokenPipeError):
            return True
        if names & OFFLINE or ("ConnectionError" in names):
            return True
        error = error.__cause__ or error.__context__
    return False
