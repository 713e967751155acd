"""What may be written into CertificateSigningRequests: page csr-v1, fields status.conditions and
status.certificate."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from cryptography import x509

from apiserver.errors import invalid
from apiserver.store import Raw
from apiserver.target import Target

_CONDITIONS, _CERTIFICATE = "status.conditions", "status.certificate"
_TRUE_ONLY = ("Approved", "Denied", "Failed")


def check(target: Target, live: Raw, new: Raw) -> None:
    """422: this may not become of it at this endpoint."""
    status, before = new.get("status") or {}, live.get("status") or {}
    causes = [
        *_conditions(status.get("conditions") or ()),
        *_changes(target.subresource, before, status),
        *_certificate(before.get("certificate"), status.get("certificate")),
    ]
    if causes:
        raise invalid(target.resource, target.name, causes)


def _conditions(conditions: Any) -> list[tuple[str, str, str]]:
    types = [one.get("type") for one in conditions]
    causes = []
    for number, one in enumerate(conditions):
        where = f"{_CONDITIONS}[{number}]"
        # csr-v1: "Approved, Denied, and Failed conditions may not be "False" or "Unknown"".
        if one.get("type") in _TRUE_ONLY and one.get("status") != "True":
            text = f'Unsupported value: "{one.get("status", "")}": supported values: "True"'
            causes.append((f"{where}.status", "FieldValueNotSupported", text))
        # csr-v1: "Only one condition of a given type is allowed."
        if one.get("type") in types[:number]:
            text = f'Duplicate value: "{one["type"]}"'
            causes.append((f"{where}.type", "FieldValueDuplicate", text))
    # csr-v1: "Approved and Denied conditions are mutually exclusive."
    if {"Approved", "Denied"} <= set(types):
        text = "Invalid value: Approved and Denied conditions are mutually exclusive"
        causes.append((_CONDITIONS, "FieldValueInvalid", text))
    return causes


def _changes(endpoint: str, before: Raw, status: Raw) -> list[tuple[str, str, str]]:
    old, new = (
        {one.get("type"): one for one in given.get("conditions") or ()}
        for given in (before, status)
    )
    causes = []
    for kind in _TRUE_ONLY:
        # csr-v1: "Approved, Denied, and Failed conditions cannot be removed once added."
        if kind in old and kind not in new:
            text = f'Forbidden: updates may not remove a condition of type "{kind}"'
            causes.append((_CONDITIONS, "FieldValueForbidden", text))
        # csr-v1: Approved and Denied are "added via the /approval subresource".
        elif kind != "Failed" and endpoint != "approval" and old.get(kind) != new.get(kind):
            what = "modify" if kind in old else "add"
            text = f'Forbidden: updates may not {what} a condition of type "{kind}"'
            causes.append((_CONDITIONS, "FieldValueForbidden", text))
    return causes


def _certificate(before: str | None, given: str | None) -> list[tuple[str, str, str]]:
    if given == before:
        return []
    # csr-v1: "Once populated, this field is immutable."
    if before:
        text = "Forbidden: updates may not modify existing certificate content"
        return [(_CERTIFICATE, "FieldValueForbidden", text)]
    # csr-v1: "certificate must contain one or more PEM blocks", all of label CERTIFICATE.
    try:
        x509.load_pem_x509_certificates(base64.b64decode(given or "", validate=True))
    except (binascii.Error, ValueError) as error:
        return [(_CERTIFICATE, "FieldValueInvalid", f"Invalid value: {error}")]
    return []
