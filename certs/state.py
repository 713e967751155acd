"""What an authority must not forget, in one file: its issuers with their keys, and its roots.

One file, replaced at once: whoever kills the process at any moment leaves the state before or after
a step, never half of one. The directory is 0700 and the file 0600, or they are not used. Knows
files and shapes; what the steps are is known in `certs.authority`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

import msgspec

from certs.errors import AuthorityError

_FORMAT = 1


class Signer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A root and what issues SVIDs under it; PEM. `chain`: the issuer's certificate, then those
    between it and the root. `root_key` "": the issuer was brought, and makes no others.
    `issuer_key` "": the root has issued nothing yet. `brought`: the root was not made here."""

    root: str
    root_key: str = ""
    chain: str = ""
    issuer_key: str = ""
    brought: bool = False

    def __repr__(self) -> str:
        return "Signer(…)"


class Retiring(msgspec.Struct, frozen=True):
    """A root that issues no more; `until` (seconds since 1970 UTC) everything under it has
    expired."""

    root: str
    until: float


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """`version` rises whenever the published roots change. `next` was published with version
    `next_version` at `next_since`. `longest_life_s`: of any SVID that may still be valid."""

    trust_domain: str
    version: int
    signer: Signer
    longest_life_s: float
    next: Signer | None = None
    next_version: int = 0
    next_since: float = 0.0
    retiring: tuple[Retiring, ...] = ()
    format: int = _FORMAT


class StateFile:
    """The file, and the directory that only its owner may look into. One process at a time."""

    def __init__(self, directory: Path) -> None:
        """AuthorityError: the directory cannot be used, or another process uses it."""
        self.directory = directory
        self._file = directory / "authority.json"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(directory, "chmod 700")
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise AuthorityError(f"{directory} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise AuthorityError(f"another authority runs in {directory}: stop it first") from None

    def read(self) -> State | None:
        """None: there is no authority yet. AuthorityError: it cannot be read or understood."""
        try:
            check_private(self._file, "chmod 600")
            state = msgspec.json.decode(self._file.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise AuthorityError(f"{self._file} cannot be read: {error.strerror}") from None
        except msgspec.MsgspecError:
            # Its own words could quote the file.
            raise self.damaged() from None
        if state.format != _FORMAT:
            raise AuthorityError(f"{self._file} is of another version of Weft")
        return state

    def write(self, state: State) -> None:
        """Durable when it returns. AuthorityError: it is not, and what was there before stays."""
        new = self.directory / ".authority.json.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode(state))
                file.flush()
                os.fsync(fd)
            new.replace(self._file)
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise AuthorityError(f"{self._file} cannot be written: {error.strerror}") from None

    def damaged(self) -> AuthorityError:
        """What to say of a file that cannot be understood."""
        return AuthorityError(
            f"{self._file} is not what an authority writes: put back a copy of it, or remove it to "
            "begin with a new root, which nobody trusts yet"
        )

    def close(self) -> None:
        os.close(self._lock)


def check_private(path: Path, remedy: str) -> None:
    """AuthorityError: it belongs to somebody else, or others have any right to it."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        raise AuthorityError(f"{path} belongs to user {found.st_uid}: only its owner may use it")
    if mode & 0o077:
        raise AuthorityError(f"{path} has mode {mode:04o}, so others may use it: {remedy} {path}")
