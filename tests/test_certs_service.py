"""The authority process as agents, attackers and administrators meet it: real sockets and files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
from authority_world import DOMAIN, GATEWAY, Connection, ask, authority_in, pod, spiffe, until
from certs_world import LONG, TODAY, chain_der, request
from cryptography.hazmat.primitives.serialization import Encoding

from certs.bundle import Bundle
from certs.issue import Issuer
from certs.spiffe import parse
from certs.svid import new_request, peer_identity
from certs.wire import MAX_BODY, MAX_REQUESTS
from mesh.authority.options import OptionError
from mesh.authority.options import parse as parse_options
from mesh.authority.service import BURST, RATE_PER_S, Allowance

_WEFT = [sys.executable, "-c", "from mesh.cli.main import main; main()"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Two nodes: web and cart on a, cart on b; a job on a has ended."""
    with authority_in(tmp_path_factory.mktemp("authority")) as process:
        process.write("a", pod("web-1", "a", "web"), pod("cart-1", "a", "cart"))
        process.write("b", pod("cart-2", "b", "cart"), pod("job", "b", "job", "Succeeded"))
        process.start()
        yield process


def weft(*arguments):
    return subprocess.run([*_WEFT, *arguments], capture_output=True, text=True, timeout=60)


def identity(authority, answer, node="a"):
    """Whose certificate an answer is, as peers see it; the reason, if it is refused."""
    if answer.get("refused"):
        return answer["refused"]
    bundles = authority.bundle(node)["bundles"]
    known = {name: Bundle.from_pem(name, pem) for name, pem in bundles.items()}
    return str(peer_identity(chain_der(answer["chain_pem"]), known, time.time()))


def test_a_node_gets_the_identities_of_its_own_pods(authority):
    asked = (spiffe("web"), spiffe("cart"), GATEWAY)
    answers = authority.sign("a", *(new_request(parse(one))[1] for one in asked))
    assert [identity(authority, one) for one in answers] == list(asked)
    assert authority.state()["issued"]["a"] >= 3


ATTACKS = {
    "a service account of another node's": (lambda: request(spiffe("web")), "not_on_this_node"),
    "one that no pod has": (lambda: request(spiffe("admin")), "not_on_this_node"),
    "one of a pod that has ended": (lambda: request(spiffe("job")), "not_on_this_node"),
    "the same name in another namespace": (
        lambda: request(spiffe("cart", "bank")),
        "not_on_this_node",
    ),
    "two URIs": (lambda: request(spiffe("cart"), spiffe("web")), "not_one_uri"),
    "another trust domain": (
        lambda: request(spiffe("cart", domain="example.org")),
        "wrong_trust_domain",
    ),
    "garbage": (lambda: "garbage", "malformed"),
    "an oversized one": (lambda: request(*[spiffe("cart")] * 200), "too_large"),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_what_a_node_does_not_get(authority, what):
    make, reason = ATTACKS[what]
    before = authority.refused().get(("b", reason), 0)
    good, refused = authority.sign("b", request(spiffe("cart")), make())
    assert refused["refused"] == reason
    assert "chain_pem" not in refused
    assert authority.refused()["b", reason] == before + 1
    # Each answer counts for itself.
    assert identity(authority, good, "b") == spiffe("cart")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"garbage", 400),
        (b"", 400),
        (b'{"requests": "x"}', 400),
        (b'{"requests": [1]}', 400),
        (b"[" * 100_000, 400),
        (json.dumps({"requests": ["x"] * (MAX_REQUESTS + 1)}).encode(), 413),
        (json.dumps({"requests": ["x" * MAX_BODY]}).encode(), 413),
    ],
)
def test_bodies_that_are_no_request(authority, body, status):
    found, answer = ask(authority.nodes["a"], "POST", "/v1/svids", body)
    assert found == status
    assert answer["error"]
    assert identity(authority, authority.sign("a", request(spiffe("web")))[0]) == spiffe("web")


def test_the_sockets_of_nodes_do_not_rotate(authority):
    for path in ("/v1/rotate/root", "/v1/state"):
        assert ask(authority.nodes["a"], "POST", path)[0] == 404
    assert authority.admin("POST", "/v1/rotate/leaf")[0] == 404
    assert authority.admin("GET", "/v1/rotate/root")[0] == 405


def test_only_the_owner_can_ask(authority):
    sockets = [*authority.nodes.values(), authority.directory / "admin.sock"]
    assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    program = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: socket.socket(socket.AF_UNIX).connect(path)\n"
        "    except PermissionError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, sockets)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["refused"] * len(sockets)


def test_a_node_may_ask_so_much_at_once():
    allowance = Allowance(0.0)
    assert allowance.take(BURST, 0.0) == 0
    assert allowance.take(64, 0.0) == pytest.approx(64 / RATE_PER_S)
    assert allowance.take(64, 64 / RATE_PER_S) == 0
    assert allowance.take(1, 64 / RATE_PER_S) > 0
    # What is saved up has an end.
    assert allowance.take(BURST + 1, 1e6) > 0
    assert allowance.take(BURST, 1e6) == 0


def test_too_much_at_once(authority):
    body = json.dumps({"requests": ["x"] * MAX_REQUESTS}).encode()
    found = [ask(authority.nodes["a"], "POST", "/v1/svids", body)[0] for _ in range(16)]
    assert 429 in found
    assert authority.refused()["a", "too_many"] >= 1
    # Of that node only.
    assert identity(authority, authority.sign("b", request(GATEWAY))[0], "b") == GATEWAY


def test_pods_that_come_and_go(authority):
    def asked():
        answer = authority.sign("b", request(spiffe("new")))[0]
        return "issued" if "chain_pem" in answer else answer["refused"]

    assert asked() == "not_on_this_node"
    authority.write("new", pod("new-1", "b", "new"), pod("new-2", "b", "new"))
    until(lambda: asked() == "issued")
    authority.write("new", pod("new-1", "b", "new", "Failed"), pod("new-2", "b", "new"))
    authority.write("marker", pod("marker", "b", "marker"))
    until(lambda: "chain_pem" in authority.sign("b", request(spiffe("marker")))[0])
    assert asked() == "issued"
    authority.write("new", pod("new-2", "a", "new"))
    until(lambda: asked() == "not_on_this_node")


def test_rotation_by_command(authority):
    """Nobody here follows the bundle, so the next root waits; both nodes say that they have it,
    then it issues."""
    directory = str(authority.directory)
    done = weft("certs", "rotate", "intermediate", "--authority", directory)
    assert done.returncode == 0, done.stderr
    tag = authority.bundle("a")["tag"]
    done = weft("certs", "rotate", "root", "--authority", directory)
    assert "next" in done.stdout
    refused = weft("certs", "rotate", "root", "--authority", directory)
    assert refused.returncode == 1
    assert "a rotation of the root is under way" in refused.stderr

    both = authority.bundle("a", have=tag)
    assert both["tag"] != tag
    assert both["bundles"][DOMAIN].count("BEGIN CERTIFICATE") == 2
    issuer = authority.sign("b", request(GATEWAY))[0]["chain_pem"].split("-----BEGIN")[2]

    # Each question with the current tag is held until there is another one, so it is not awaited.
    with (
        waiting(authority.nodes["a"], f"/v1/bundle?have={both['tag']}"),
        waiting(authority.nodes["b"], f"/v1/bundle?have={both['tag']}"),
    ):
        until(lambda: any(one["state"] == "retiring" for one in authority.state()["certificates"]))
        answer = authority.sign("b", request(GATEWAY))[0]["chain_pem"]
        assert answer.split("-----BEGIN")[2] != issuer
        listed = weft("certs", "list", "--authority", directory)
        assert listed.returncode == 0
        assert "retiring, goes in 59m" in listed.stdout
        assert listed.stdout.count("current") == 2


def waiting(path, what):
    """A question that is held."""

    connection = Connection(path)
    connection.request("GET", what)
    return contextlib.closing(connection)


def test_what_it_tells_holds_no_key(authority):
    answers = [
        json.dumps(authority.state()),
        json.dumps(authority.bundle("a")),
        "".join(authority.said),
        json.dumps(authority.admin("GET", "/v1/bundle")[1]),
        weft("certs", "list", "--authority", str(authority.directory), "-o", "json").stdout,
    ]
    file = (authority.directory / "authority.json").read_text()
    lines = {line for line in file.split("\\n") if len(line) == 64}
    keys = [part.split("-----END")[0] for part in file.split("BEGIN PRIVATE KEY-----\\n")[1:]]
    secrets = [line for line in lines if any(line in key for key in keys)]
    assert len(keys) >= 2
    assert len(secrets) >= 2
    for answer in answers:
        assert answer
        assert "PRIVATE" not in answer
        assert not any(secret in answer for secret in secrets)


def test_roots_for_others(authority):
    done = weft("certs", "export", "--authority", str(authority.directory))
    assert done.returncode == 0
    own = Bundle.from_pem(DOMAIN, authority.bundle("a")["bundles"][DOMAIN])
    assert Bundle.from_document(DOMAIN, done.stdout).roots == own.roots
    nobody = weft("certs", "export", "--authority", "/tmp")
    assert nobody.returncode == 3
    assert "no authority answers in /tmp" in nobody.stderr


def test_it_goes_on_where_it_was_killed(tmp_path):
    with authority_in(tmp_path) as authority:
        authority.write("a", pod("web-1", "a", "web"))
        authority.start()
        before = authority.bundle("a")
        svid = authority.sign("a", request(spiffe("web")))[0]
        authority.end(kill=True)
        authority.start()
        assert authority.bundle("a") == before
        assert identity(authority, svid) == spiffe("web")
        second = subprocess.run(
            [sys.executable, "-m", "mesh.authority.main", *authority.arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert "another authority runs in" in second.stderr
        assert authority.end() == 0
        authority.directory.chmod(0o755)
        third = weft("authority", *authority.arguments)
        assert third.returncode == 1
        assert "chmod 700" in third.stderr


def test_federation_and_an_authority_that_is_brought(tmp_path):
    """Files that change are taken over; what cannot be used leaves what is in force."""
    away = Issuer.new_root("away", LONG)
    company = Issuer.new_root("company", TODAY)
    federated, brought = tmp_path / "away.json", tmp_path / "brought"
    federated.write_bytes(Bundle("example.org", [away.certificate]).to_document(1, 60))
    brought.mkdir()

    def bring(issuer):
        for name, content in (
            ("tls.key", issuer.key_pem()),
            ("tls.crt", issuer.certificate.public_bytes(Encoding.PEM)),
        ):
            (brought / name).write_bytes(content)
            (brought / name).chmod(0o600)

    bring(company)
    with authority_in(
        tmp_path, f"--ca={brought}", f"--federation=example.org={federated}"
    ) as authority:
        authority.start()
        first = authority.bundle("a")
        assert Bundle.from_pem(DOMAIN, first["bundles"][DOMAIN]).roots == (company.certificate,)
        assert Bundle.from_pem("x", first["bundles"]["example.org"]).roots == (away.certificate,)
        assert authority.admin("POST", "/v1/rotate/root")[0] == 409

        federated.write_text("garbage")
        authority.await_line("holds no PEM certificates")
        assert authority.bundle("a")["tag"] == first["tag"]
        moved = Issuer.new_root("moved", LONG)
        federated.write_text(Bundle("example.org", [moved.certificate]).to_pem())
        second = authority.bundle("a", have=first["tag"])
        assert Bundle.from_pem("x", second["bundles"]["example.org"]).roots == (moved.certificate,)

        other = Issuer.new_root("company 2", TODAY)
        bring(other)
        third = authority.bundle("a", have=second["tag"])
        assert set(Bundle.from_pem(DOMAIN, third["bundles"][DOMAIN]).roots) == {
            company.certificate,
            other.certificate,
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trust-domain=Upper"], "--trust-domain: 'Upper' is no trust domain"),
        (["--node=a"], "--node a: give NAME=SOCKET"),
        (["--node=a=/x", "--node=a=/y"], "each name once"),
        (["--svid-life=1y"], "--svid-life: '1y' is not a duration"),
        (["--svid-life=10ms"], "live a second or longer"),
        (["--svid-life=10h", "--intermediate-life=5h"], "may not live longer than its issuer"),
        (["--federation=cluster.local=/x"], "own trust domain"),
        (["--federation=X=/x"], "--federation: 'X' is no trust domain"),
    ],
)
def test_options_that_cannot_be_used(arguments, message):
    with pytest.raises(OptionError) as caught:
        parse_options(["--dir=/x", "--manifests=/y", *arguments])
    assert message in str(caught.value)
