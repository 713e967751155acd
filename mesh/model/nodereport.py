"""What a node tells the controller of itself: how far its data plane has come, and what it refuses.

It travels as JSON in an annotation of the node's Lease: the Lease's renewal says that the node
lives, its namespace is what agents may write to, and it changes without touching Node objects.
"""

from __future__ import annotations

import msgspec

LEASE_PREFIX = "weft-node."
ANNOTATION = "weft.dev/report"
# The signer of CertificateSigningRequests, and the ConfigMap with the trust bundle
# (certs.wire.BundleAnswer as JSON, and each trust domain's roots in PEM beside it).
SIGNER = "weft.dev/workload"
BUNDLE_NAME = "weft-trust-bundle"
BUNDLE_KEY = "bundle.json"
AGENT_ACCOUNT = "weft-agent"
LABELS = {"weft.dev/component": "agent"}
# An object's annotations may have 256 KiB altogether (Kubernetes, "Annotations"): texts beyond this
# are cut, to fewer still where there are many, and refusals that do not fit are only counted.
MAX_TEXT = 300
MAX_REPORT = 240 * 1024
_SHORT_TEXT = 60


class NodeReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """`versions`: by kind, the resourceVersion up to which objects are in force in all workers and
    the kernel. `ports`: ADDRESS:PORT to "" (bound) or why not; the node's own mesh addresses stand
    as 127.0.0.1 and ::1. `refused`: section keys and why; `unnamed`: refusals that did not fit.
    `addresses`: where clients reach Gateways that name no address. `ready`: the node serves;
    `bundle`: tag of the trust bundle that it has in force; `mesh`: it steers and filters its pods
    (--steer), and refuses policies where it cannot."""

    node: str
    ready: bool = False
    versions: dict[str, int] = {}
    ports: dict[str, str] = {}
    refused: dict[str, str] = {}
    unnamed: int = 0
    addresses: tuple[str, ...] = ()
    bundle: str = ""
    mesh: bool = False


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(NodeReport)


def encode_report(report: NodeReport) -> str:
    """In at most MAX_REPORT bytes, as far as versions and ports alone allow."""
    if len(text := _encoder.encode(report)) <= MAX_REPORT:
        return text.decode()
    refused = {key: why[:_SHORT_TEXT] for key, why in report.refused.items()}
    ports = {port: why[:_SHORT_TEXT] for port, why in report.ports.items()}
    report = msgspec.structs.replace(report, ports=ports, refused={}, unnamed=len(refused))
    left = MAX_REPORT - len(_encoder.encode(report))
    kept: dict[str, str] = {}
    for key, why in refused.items():
        left -= len(_encoder.encode({key: why}))
        if left < 0:
            break
        kept[key] = why
    unnamed = len(refused) - len(kept)
    return _encoder.encode(msgspec.structs.replace(report, refused=kept, unnamed=unnamed)).decode()


def decode_report(text: str) -> NodeReport:
    """msgspec.DecodeError: it is none, or one of another version."""
    return _decoder.decode(text)
