"""The agent process under its supervisor: API, admin port, options."""

import http.client
import json
import os
import socket
import stat

import pytest

from certs.spiffe import gateway as gateway_identity
from mesh.agent.options import OptionError, parse, parse_admin, read_settings
from mesh.agent.ports import is_here
from mesh.agent.target import Target, TargetError, parse_client, parse_target
from mesh.cli.client import UsageError
from mesh.model.nodeconfig import Settings
from tests.support.running import free_port, gateway, route, running, service, tls_secret

SECRET = json.dumps(
    {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "stringData": {"password": "xyzzy"},
    }
)


@pytest.fixture
def manifests(tmp_path):
    path = tmp_path / "manifests"
    path.mkdir()
    return path


def fetch(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


def started(tmp_path, manifests, *more, env=None):
    return running(tmp_path / "run", f"--manifests={manifests}", "--workers=1", *more, env=env)


def test_api_and_admin_port(tmp_path, manifests):
    port, admin = free_port(), free_port()
    (manifests / "a.yaml").write_text(gateway(port))
    (manifests / "b.yaml").write_text(f"{route('r', path='/x')}\n---\n{service()}\n---\n{SECRET}")
    (manifests / "c.yaml").write_text("nonsense")
    with started(tmp_path, manifests, f"--admin=127.0.0.1:{admin}") as weft:
        status = weft.await_status(lambda status: status["ready"])
        assert status["objects"]["HTTPRoute"] == 1
        assert status["problems"] == {"error": 1}
        assert status["admin"] == f"127.0.0.1:{admin}"
        assert stat.S_IMODE(weft.run_dir.api_socket.stat().st_mode) == 0o600

        assert fetch(admin, "/healthz") == (200, "ok\n")
        assert fetch(admin, "/readyz") == (200, "ok\n")
        code, text = fetch(admin, "/metrics")
        assert code == 200
        assert 'weft_objects{kind="HTTPRoute"} 1.0' in text
        assert "weft_workers 1.0" in text
        assert 'weft_source_problems{level="error"} 1.0' in text
        assert "weft_config_ack_seconds_count" in text
        names = {item["name"] for item in weft.ask("/metrics-json")["items"]}
        assert {"weft_config_version", "weft_objects"} <= names

        (item,) = weft.ask("/objects", kind="HTTPRoute", namespace="default", name="r")["items"]
        conditions = item["status"]["parents"][0]["conditions"]
        assert {c["type"]: c["status"] for c in conditions} == {
            "Accepted": "True",
            "ResolvedRefs": "True",
        }
        assert all(c["lastTransitionTime"] for c in conditions)
        assert weft.ask("/objects", kind="HTTPRoute", namespace="other")["items"] == []
        (secret,) = weft.ask("/objects", kind="Secret")["items"]
        assert "xyzzy" not in json.dumps(secret)
        (problem,) = weft.ask("/problems")["items"]
        assert problem["file"] == str(manifests / "c.yaml")

        found = weft.ask("/explain", method="GET", url=f"http://h:{port}/x/y")
        assert found["route"] == "HTTPRoute/default/r"
        assert found["backends"][0]["endpoints"] == ["127.0.0.1:9000"]
        with pytest.raises(UsageError, match="not a URL"):
            weft.ask("/explain", url="ftp://x")
        with pytest.raises(UsageError, match="write NAMESPACE/NAME"):
            weft.ask("/explain", url="http://x", **{"from": "a/b/c"})
        found = weft.ask("/explain", url="http://x", **{"from": "shop/cart"})
        assert found["detail"] == "there is no pod shop/cart with an address"
        config = weft.ask("/config")
        assert config["version"] == status["config"]["version"]
        assert f"port/0.0.0.0|{port}" in config["sections"]


def test_manifests_are_never_written(tmp_path, manifests):
    """Statuses live with the gateway: what the user wrote stays to the byte and the moment."""

    def state():
        files = sorted(manifests.rglob("*"))
        return [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]

    (manifests / "a.yaml").write_text(
        f"{gateway(free_port())}\n---\n{route('r')}\n---\n{service()}"
    )
    (manifests / "b.yaml").write_text("nonsense")
    before = state()
    with started(tmp_path, manifests, "--admin=off") as weft:
        weft.await_status(lambda status: status["ready"])
        (shown,) = weft.ask("/objects", kind="Gateway")["items"]
        assert shown["status"]["conditions"]
        assert state() == before
    assert state() == before


def test_keys_are_never_shown(tmp_path, manifests):
    secret, key = tls_secret("cert", "a.example")
    port = free_port()
    tls = {"certificateRefs": [{"name": "cert"}]}
    (manifests / "a.yaml").write_text(gateway(port, protocol="HTTPS", tls=tls))
    (manifests / "b.yaml").write_text(secret)
    with started(tmp_path, manifests, "--admin=off") as weft:
        weft.await_status(lambda status: status["ready"] and not status["degraded"])
        config = weft.ask("/config")
        section = config["sections"]["certificate/default/cert"]
        assert "BEGIN CERTIFICATE" in section["chain_pem"]
        assert section["key_pem"] == "<redacted>"
        everything = json.dumps([config, weft.ask("/objects", kind="Secret")])
        assert not any(line in everything for line in key.splitlines() if len(line) > 20)


def test_refusals_of_workers_reach_the_status(tmp_path, manifests):
    (manifests / "a.yaml").write_text(
        f"{gateway(free_port())}\n---\n{route('r')}\n---\n{service()}"
    )
    env = {"WEFT_STUB_REFUSE": "route/"}
    with started(tmp_path, manifests, "--admin=off", env=env) as weft:
        status = weft.await_status(lambda status: status["ready"] and status["degraded"])
        assert status["degraded"] == [
            "route/HTTPRoute/default/r is refused by the proxy: the stub refuses it"
        ]
        (item,) = weft.ask("/objects", kind="HTTPRoute")["items"]
        (accepted,) = (
            c for c in item["status"]["parents"][0]["conditions"] if c["type"] == "Accepted"
        )
        assert accepted["status"] == "False"
        assert "the stub refuses it" in accepted["message"]


def test_not_ready_while_a_worker_has_not_acknowledged(tmp_path, manifests):
    admin = free_port()
    (manifests / "a.yaml").write_text(gateway(free_port()))
    options = (f"--admin=127.0.0.1:{admin}",)
    with started(tmp_path, manifests, *options, env={"WEFT_STUB_MUTE": "1"}) as weft:
        weft.await_status(lambda status: status["workers"] and status["config"]["version"])
        code, text = fetch(admin, "/readyz")
        assert code == 503
        assert "has not acknowledged configuration 1" in text
        assert fetch(admin, "/healthz")[0] == 200
        assert (
            weft.ask("/objects", kind="Gateway")["items"][0]["status"]["conditions"][0]["status"]
            == "Unknown"
        )


def test_an_admin_port_that_is_taken_stops_nothing(tmp_path, manifests):
    port = free_port()
    (manifests / "a.yaml").write_text(gateway(port))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        started(tmp_path, manifests, f"--admin=127.0.0.1:{taken.getsockname()[1]}") as weft,
    ):
        status = weft.await_status(lambda status: status["ready"])
        (why,) = status["degraded"]
        assert "cannot be bound: address already in use by" in why
        assert f"(pid {os.getpid()})" in why
        assert "--admin" in why


# --- options and targets -------------------------------------------------------------------------


def test_options(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("idle_timeout_s: 5\ntrusted_ranges: [10.0.0.0/8]\naccess_log: text\n")
    options = parse(
        [
            *("--control-fd=3", f"--manifests={tmp_path}", f"--settings={settings}"),
            *("--address-pool=192.0.2.0/28", "--address-pool=192.0.2.77", "--advertise=192.0.2.1"),
            *("--access-log=off", "--admin=[::1]:1"),
        ]
    )
    assert options.plane.addresses == ("192.0.2.0/28", "192.0.2.77/32")
    assert options.plane.advertise == ("192.0.2.1",)
    assert options.plane.settings == Settings(
        idle_timeout_s=5, trusted_ranges=("10.0.0.0/8",), access_log="off"
    )
    assert options.admin == ("::1", 1)


def plane(tmp_path, *options):
    return parse(["--control-fd=3", f"--manifests={tmp_path}", *options]).plane


def test_identities_come_with_an_authority(tmp_path):
    assert plane(tmp_path, "--node=a", "--trust-domain=lab.test").mesh.trust_domain == ""
    mesh = plane(tmp_path, "--node=a", "--trust-domain=lab.test", "--authority=/x").mesh
    assert mesh.gateway_spiffe_id == str(gateway_identity("lab.test"))
    with pytest.raises(OptionError, match="--trust-domain: 'A' is no trust domain"):
        plane(tmp_path, "--trust-domain=A")


def test_the_mesh_comes_with_steering(tmp_path):
    assert plane(tmp_path).mesh_addresses == ()
    steered = plane(tmp_path, "--steer=/x", "--proxy-cgroup=/y")
    assert steered.mesh_addresses == tuple(filter(is_here, ("127.0.0.1", "::1")))
    assert steered.node == socket.gethostname().lower()
    named = plane(tmp_path, "--steer=/x", "--node=n1", "--mesh-address=10.0.0.1")
    assert (named.node, named.mesh_addresses) == ("n1", ("10.0.0.1",))
    with pytest.raises(OptionError, match="--mesh-address goes with --steer"):
        plane(tmp_path, "--mesh-address=127.0.0.1")
    with pytest.raises(OptionError, match="--mesh-address here: "):
        plane(tmp_path, "--steer=/x", "--mesh-address=here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("idle_timeot_s: 5", "there is no setting idle_timeot_s; the settings are access_log, "),
        ("max_headers: many", "Expected `int`, got `str` - at `$.max_headers`"),
        ("idle_timeout_s: 0", "idle_timeout_s is 0.0; it must be 0.001 or more"),
        ("max_headers: -1", "max_headers is -1; it must be"),
        ("head_timeout_s: .inf", "head_timeout_s is inf; it must be"),
        ("body_timeout_s: .nan", "body_timeout_s is nan; it must be"),
        ("trusted_ranges: [banana]", "trusted_ranges[0]: 'banana' is not a range"),
        ("[1]", "must be one mapping"),
        ("a: [", "not YAML"),
        ("max_headers: 1\n---\nmax_headers: 2", "must be one mapping"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_settings(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_settings_at_their_least(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "max_body_bytes: 0\ndrain_timeout_s: 0\ntrusted_hops: 0\nmerge_slashes: false\n"
    )
    assert read_settings(path) == Settings(max_body_bytes=0, drain_timeout_s=0, merge_slashes=False)


def test_empty_settings_are_the_defaults(tmp_path):
    (tmp_path / "settings.yaml").touch()
    assert read_settings(tmp_path / "settings.yaml") == read_settings(None) == Settings()


@pytest.mark.parametrize("text", ["80", "host:80", "127.0.0.1:x", "127.0.0.1:65536", ""])
def test_admin_addresses_that_cannot_be_used(text):
    with pytest.raises(OptionError, match="not ADDRESS:PORT"):
        parse_admin(text)


@pytest.mark.parametrize(
    ("url", "headers", "expected"),
    [
        ("http://a.example", [], ("http", "a.example", "a.example", 80, "/", ())),
        ("a.example/x?y=1", [], ("http", "a.example", "a.example", 80, "/x?y=1", ())),
        (
            "https://A.example:8443/",
            [],
            ("https", "a.example", "A.example:8443", 8443, "/", ()),
        ),
        ("http://[::1]:81/", [], ("http", "::1", "[::1]:81", 81, "/", ())),
        ("http://127.0.0.1:81/", ["Host: b"], ("http", "127.0.0.1", "b", 81, "/", ())),
        ("http://a", ["X-A:  b:c "], ("http", "a", "a", 80, "/", (("x-a", "b:c"),))),
    ],
)
def test_targets(url, headers, expected):
    assert parse_target("get", url, headers) == Target("GET", *expected)


@pytest.mark.parametrize(
    ("text", "expected"), [("shop/cart", ("shop", "cart")), ("cart", ("default", "cart"))]
)
def test_clients(text, expected):
    assert parse_client(text) == expected


@pytest.mark.parametrize("text", ["", "shop/", "/cart", "a/b/c"])
def test_clients_that_are_none(text):
    with pytest.raises(TargetError, match="not a pod; write NAMESPACE/NAME"):
        parse_client(text)


@pytest.mark.parametrize(
    ("method", "url", "headers"),
    [
        ("GET", "ftp://x", []),
        ("GET", "http://", []),
        ("GET", "http://x:port", []),
        ("G T", "http://x", []),
        ("GET", "http://x", ["novalue"]),
        ("GET", "http://x", [": v"]),
    ],
)
def test_targets_that_are_none(method, url, headers):
    with pytest.raises(TargetError):
        parse_target(method, url, headers)
