"""A TLS 1.3 client that goes on by itself after the handshake, as OpenSSL lets none: key updates
one after another (RFC 8446 §4.6.3)."""

from __future__ import annotations

import struct
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_DATA, _HANDSHAKE = 23, 22
_UPDATE_REQUESTED = bytes((24, 0, 0, 1, 1))


class Rekeyer:
    """Makes the records of a client that has written nothing since its handshake, with
    TLS_AES_256_GCM_SHA384. `key_log`: its context's `keylog_filename`."""

    def __init__(self, key_log: Path) -> None:
        lines = key_log.read_text().splitlines()
        secrets = [one.split()[2] for one in lines if one.startswith("CLIENT_TRAFFIC_SECRET_0")]
        self._take(bytes.fromhex(secrets[-1]))

    def _take(self, secret: bytes) -> None:
        self._secret, self._number = secret, 0
        self._key, self._iv = self._expand(b"key", 32), self._expand(b"iv", 12)

    def _expand(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label without a context (§7.1)."""
        info = struct.pack(">HB", size, 6 + len(label)) + b"tls13 " + label + b"\0"
        return HKDFExpand(hashes.SHA384(), size, info).derive(self._secret)

    def _record(self, kind: int, content: bytes) -> bytes:
        """§5.2, §5.3"""
        head = struct.pack(">BHH", _DATA, 0x0303, len(content) + 1 + 16)
        nonce = int.from_bytes(self._iv, "big") ^ self._number
        self._number += 1
        sealed = AESGCM(self._key).encrypt(
            nonce.to_bytes(12, "big"), content + bytes((kind,)), head
        )
        return head + sealed

    def data(self, content: bytes) -> bytes:
        return self._record(_DATA, content)

    def key_updates(self, count: int) -> bytes:
        """Each asks the peer for new keys too."""
        result = b""
        for _ in range(count):
            result += self._record(_HANDSHAKE, _UPDATE_REQUESTED)
            self._take(self._expand(b"traffic upd", 48))
        return result
