"""What the authority is given in files besides its own: an authority that is brought, and bundles
of federated trust domains. Read at start, and again whenever they change.

Knows files; errors name them and never quote a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from certs.brought import from_directory, from_secret
from certs.bundle import BadBundle, Bundle
from certs.errors import AuthorityError
from certs.state import Signer, check_private
from mesh.model.core import Secret
from mesh.sources.documents import read_objects
from mesh.sources.manifest import UnreadableError, read_documents


def read_brought(path: Path) -> Signer:
    """A directory with tls.crt, tls.key and ca.crt, or a manifest of such a Secret. AuthorityError:
    it cannot be read, or is no authority's."""
    if path.is_dir():
        return from_directory(path)
    try:
        check_private(path, "chmod 600")
        documents = read_documents(path.read_bytes(), is_json=path.suffix == ".json")
    except OSError as error:
        raise AuthorityError(f"{path} cannot be read: {error.strerror}") from None
    except UnreadableError as error:
        raise AuthorityError(f"{path}: {error}") from None
    objects, problems = read_objects(path.name, str(path), documents, {})
    secrets = [one.object for one in objects.values() if isinstance(one.object, Secret)]
    if len(secrets) != 1 or problems:
        why = problems[0].message if problems else f"it has {len(secrets)} Secrets instead of one"
        raise AuthorityError(f"{path}: {why}")
    return from_secret(secrets[0].data, str(path))


def read_federation(files: Mapping[str, Path]) -> dict[str, Bundle]:
    """Bundles by trust domain: PEM, or SPIFFE bundle documents. AuthorityError: one is neither."""
    result = {}
    for trust_domain, path in files.items():
        try:
            result[trust_domain] = Bundle.parse(trust_domain, path.read_bytes())
        except OSError as error:
            raise AuthorityError(f"{path} cannot be read: {error.strerror}") from None
        except BadBundle as error:
            raise AuthorityError(f"{path}: {error}") from None
    return result
