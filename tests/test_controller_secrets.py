"""Secrets reach nodes as copies of those that listeners refer to, and of no others."""

import base64

import pytest
from controller_world import controller_world
from kube_world import GROUP, following, gateway, gateway_class, needs_crds, tls_secret

from mesh.model.meta import ObjectKey

pytestmark = needs_crds

COPIES = "weft-secrets"


def https(*refs):
    obj = gateway(port=443)
    tls = {"certificateRefs": list(refs)}
    obj["spec"]["listeners"] = [{"name": "https", "port": 443, "protocol": "HTTPS", "tls": tls}]
    return obj


@pytest.fixture
async def world(tmp_path):
    async with controller_world(tmp_path) as found:
        for name in (COPIES, "other"):
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            found.server.create(namespace)
        found.report(ports={"0.0.0.0:443": ""})
        found.server.create(gateway_class())
        yield found


def copies(world):
    store = world.server.store
    return {key.name: obj for key, obj in store.list("/secrets", COPIES, store.revision)}


def resolved(world):
    (listener,) = world.status("gateways", "gw")["listeners"]
    return next(
        (one["status"], one["reason"])
        for one in listener["conditions"]
        if one["type"] == "ResolvedRefs"
    )


async def test_what_is_referred_to_is_copied_and_nothing_else(world, tmp_path):
    for obj in (tls_secret("used"), tls_secret("unused"), tls_secret("theirs", "other")):
        world.server.create(obj)
    world.server.create(https({"name": "used"}))
    seen = world.server.store.watch(f"{GROUP}/gateways")
    world.start(secrets_namespace=COPIES)
    await world.until(lambda: resolved(world) == ("True", "ResolvedRefs"))
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    (copy,) = copies(world).values()
    assert copy["type"] == "kubernetes.io/tls"
    assert sorted(copy["data"]) == ["tls.crt", "tls.key"]
    # It was never said that the certificate is missing.
    while not seen.empty():
        said = str(seen.get_nowait().new.get("status"))
        assert "does not exist" not in said
    # A node reads the copy under the Secret's own name.
    only = frozenset(("Secret",))
    async with following(world.server, tmp_path, kinds=only, secrets_namespace=COPIES) as source:
        key = ObjectKey("default", "used")
        assert list(source.state["Secret"]) == [key]
        # Renewed.
        renewed = tls_secret("used")
        world.server.change(renewed, {"data": renewed["data"]})
        wanted = base64.b64decode(renewed["data"]["tls.crt"])
        await source.until(lambda: source.state["Secret"][key].data["tls.crt"] == wanted)
        # Replaced by one that is none, of the same name.
        world.server.delete(renewed)
        world.server.create(tls_secret("used", type="Opaque", data={"password": "eA=="}))
        await source.until(
            lambda: (
                key in source.state["Secret"]
                and source.state["Secret"][key].type != "kubernetes.io/tls"
            )
        )
        assert source.state["Secret"][key].data == {}
        await world.until(lambda: resolved(world) == ("False", "InvalidCertificateRef"))
        # Not permitted, permitted, no more.
        world.server.change(
            https(), {"spec": https({"name": "theirs", "namespace": "other"})["spec"]}
        )
        await source.until(lambda: not source.state["Secret"])
        await world.until(lambda: resolved(world) == ("False", "RefNotPermitted"))
        assert not copies(world)
        world.server.create(GRANT)
        await world.until(lambda: resolved(world) == ("True", "ResolvedRefs"))
        assert list(copies(world)) == ["other.theirs"]
        world.server.delete(GRANT)
        await world.until(lambda: resolved(world) == ("False", "RefNotPermitted"))
        await world.until(lambda: not copies(world))
    # Of none but these has anything but metadata been asked for.
    read = {
        path for method, path in world.server.requests if "/secrets/" in path and method == "GET"
    }
    assert {path.rpartition("/")[2] for path in read} == {"used", "theirs"}


GRANT = {
    "apiVersion": f"{GROUP}/v1beta1",
    "kind": "ReferenceGrant",
    "metadata": {"name": "g", "namespace": "other"},
    "spec": {
        "from": [{"group": GROUP, "kind": "Gateway", "namespace": "default"}],
        "to": [{"group": "", "kind": "Secret"}],
    },
}


async def test_a_copy_that_cannot_be_made_holds_nothing_else_up(world):
    world.server.create(tls_secret("used"))
    world.server.create(https({"name": "used"}))
    faults = world.server.faults
    faults.about, faults.refuse, faults.codes = f"/{COPIES}/secrets/", 1.0, (403,)
    world.start(secrets_namespace=COPIES)
    await world.until(lambda: resolved(world) == ("False", "InvalidCertificateRef"))
    assert copies(world) == {}
    # Then it can be.
    faults.refuse = 0.0
    await world.until(lambda: resolved(world) == ("True", "ResolvedRefs"))


async def test_the_next_controller_takes_away_what_nobody_refers_to(world):
    for name in ("used", "unused"):
        world.server.create(tls_secret(name))
    world.server.create(https({"name": "used"}, {"name": "unused"}))
    _, first = world.start(secrets_namespace=COPIES)
    await world.until(lambda: len(copies(world)) == 2)
    await world.until(lambda: resolved(world) == ("True", "ResolvedRefs"))
    first.cancel()
    world.server.change(https(), {"spec": https({"name": "used"})["spec"]})
    world.start("two", secrets_namespace=COPIES)
    await world.until(lambda: list(copies(world)) == ["default.used"])
