"""What an agent keeps for the one after it: SVIDs with their keys, and trust bundles.

An agent that starts anew tells the workers everything anew; without this they would have no
identities until the authority has answered, or none at all while it is away. The file is in the
run directory, mode 0600. Knows the file; whether what is in it may be used is the reader's to say.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from certs.errors import AuthorityError
from certs.state import check_private
from mesh.model.nodeconfig import SvidSection

_log = logging.getLogger("weft.agent")


class Kept(msgspec.Struct, frozen=True):
    """`bundles`: PEM by trust domain."""

    bundles: dict[str, str] = {}
    svids: tuple[SvidSection, ...] = ()


class SvidFile:
    """The file. `problem`: why the last change could not be written, "" if it could."""

    def __init__(self, path: Path) -> None:
        self.problem = ""
        self._path = path

    def read(self) -> Kept:
        """Empty where there is nothing that can be used."""
        try:
            check_private(self._path, "chmod 600")
            return msgspec.json.decode(self._path.read_bytes(), type=Kept)
        except FileNotFoundError:
            pass
        except (OSError, AuthorityError) as error:
            _log.warning("SVIDs of the agent before are not used: %s", error)
        except msgspec.MsgspecError:  # its words could quote a key
            _log.warning("SVIDs of the agent before are not used: %s is damaged", self._path)
        return Kept()

    def write(self, kept: Kept) -> None:
        """Replace it at once. A failure is a `problem`, of the agent's next life only."""
        new = self._path.with_suffix(".new")
        try:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode(kept))
            new.replace(self._path)
            self.problem = ""
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {error.strerror}"
            _log.error("%s", self.problem)
