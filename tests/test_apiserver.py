"""The test API server by the real client: what a client may rely on holds. The same tests run on a
real server where WEFT_TEST_KUBECONFIG names a kubeconfig for one (Gateway API CRDs installed)."""

import asyncio
import base64
import contextlib
import json
import os
import uuid

import pytest
from apiserver.server import ApiServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kube_world import CRDS, GROUP, WAIT_S, gateway, needs_crds, route
from kubernetes.aio import client, config, watch
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic import DynamicClient

REAL = os.environ.get("WEFT_TEST_KUBECONFIG")
pytestmark = needs_crds


@pytest.fixture
async def server(tmp_path):
    """None where the tests run on a real one."""
    if REAL:
        yield None
        return
    async with ApiServer(tls=True, bookmark_s=0.05) as found:
        found.install_crds(CRDS)
        yield found


@pytest.fixture
async def api(server, tmp_path):
    """A client, and a namespace of its own in `default_namespace`."""
    file = REAL or str(server.kubeconfig(tmp_path / "kubeconfig"))
    async with await config.new_client_from_config(file, persist_config=False) as found:
        name = f"weft-test-{uuid.uuid4().hex[:8]}"
        core = client.CoreV1Api(found)
        await core.create_namespace({"metadata": {"name": name}})
        found.namespace = name
        yield found
        await core.delete_namespace(name)


@pytest.fixture
def core(api):
    return client.CoreV1Api(api)


@contextlib.contextmanager
def refused(status, reason=None):
    with pytest.raises(ApiException) as caught:
        yield caught
    assert caught.value.status == status
    if reason is not None:
        assert json.loads(caught.value.body)["reason"] == reason


def config_map(name, value="1", **metadata):
    return {"metadata": {"name": name, **metadata}, "data": {"v": value}}


async def patch(api, path, body, content_type, **query):
    """A PATCH as it goes over the wire; the object."""
    request = await api.param_serialize(
        "PATCH",
        path,
        query_params=list(query.items()),
        header_params={"Content-Type": content_type, "Accept": "application/json"},
        body=body,
        auth_settings=["BearerToken"],
    )
    answer = await api.call_api(*request)
    data = await answer.read()
    if answer.status >= 300:
        raise ApiException(status=answer.status, body=data.decode())
    return json.loads(data)


async def get(api, path, accept="application/json", **query):
    request = await api.param_serialize(
        "GET",
        path,
        query_params=list(query.items()),
        header_params={"Accept": accept},
        auth_settings=["BearerToken"],
    )
    answer = await api.call_api(*request)
    data = await answer.read()
    if answer.status >= 300:
        raise ApiException(status=answer.status, body=data.decode())
    return json.loads(data)


def custom_path(api, plural, name=""):
    return f"/apis/{GROUP}/v1/namespaces/{api.namespace}/{plural}/{name}".rstrip("/")


async def create_custom(api, obj):
    obj["metadata"]["namespace"] = api.namespace
    plural = f"{obj['kind'].lower()}s"
    custom = client.CustomObjectsApi(api)
    return await custom.create_namespaced_custom_object(GROUP, "v1", api.namespace, plural, obj)


# --- objects -------------------------------------------------------------------------------------


async def test_the_server_gives_identity_and_version(api, core):
    made = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    assert made.metadata.uid
    assert made.metadata.creation_timestamp
    again = await core.patch_namespaced_config_map("a", api.namespace, {"data": {"v": "2"}})
    assert int(again.metadata.resource_version) > int(made.metadata.resource_version)
    same = await core.patch_namespaced_config_map("a", api.namespace, {"data": {"v": "2"}})
    # What changes nothing is no write.
    assert same.metadata.resource_version == again.metadata.resource_version
    await core.delete_namespaced_config_map("a", api.namespace)
    with refused(404, "NotFound"):
        await core.read_namespaced_config_map("a", api.namespace)
    recreated = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    assert recreated.metadata.uid != made.metadata.uid


async def test_names_are_generated(api, core):
    body = {"metadata": {"generateName": "a-"}}
    names = [
        (await core.create_namespaced_config_map(api.namespace, body)).metadata.name
        for _ in range(3)
    ]
    assert len(set(names)) == 3
    assert all(name.startswith("a-") and len(name) > 2 for name in names)


async def test_conflicts(api, core):
    made = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    with refused(409, "AlreadyExists"):
        await core.create_namespaced_config_map(api.namespace, config_map("a"))
    await core.patch_namespaced_config_map("a", api.namespace, {"data": {"v": "2"}})
    version = made.metadata.resource_version
    body = config_map("a", "3", resourceVersion=version)
    with refused(409, "Conflict"):
        await core.replace_namespaced_config_map("a", api.namespace, body)
    patch_body = {"metadata": {"resourceVersion": version}, "data": {"v": "3"}}
    with refused(409, "Conflict"):
        await core.patch_namespaced_config_map("a", api.namespace, patch_body)
    options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid="another"))
    with refused(409, "Conflict"):
        await core.delete_namespaced_config_map("a", api.namespace, body=options)


async def test_what_is_invalid_is_refused_by_field(api):
    wrong = route("r")
    wrong["spec"]["rules"][0]["backendRefs"] = [{"name": "s", "port": 99999}]
    with refused(422, "Invalid") as caught:
        await create_custom(api, wrong)
    causes = json.loads(caught.value.body)["details"]["causes"]
    assert any("port" in cause["field"] for cause in causes)


async def test_namespaces(api, core):
    with refused(404):
        await core.create_namespaced_config_map("weft-test-none", config_map("a"))
    with refused(400, "BadRequest"):
        body = config_map("a", namespace="default")
        await core.create_namespaced_config_map(api.namespace, body)


async def test_defaults_and_unknown_fields_of_custom_resources(api):
    obj = route("r")
    obj["spec"]["unknown"] = 1
    obj["spec"]["parentRefs"] = [{"name": "gw"}]
    made = await create_custom(api, obj)
    assert "unknown" not in made["spec"]
    (ref,) = made["spec"]["parentRefs"]
    assert ref == {"group": GROUP, "kind": "Gateway", "name": "gw"}


async def test_generation_is_of_the_spec(api):
    made = await create_custom(api, route("r"))
    assert made["metadata"]["generation"] == 1
    path = custom_path(api, "httproutes", "r")
    merge = "application/merge-patch+json"
    labelled = await patch(api, path, {"metadata": {"labels": {"a": "b"}}}, merge)
    assert labelled["metadata"]["generation"] == 1
    changed = await patch(api, path, {"spec": {"hostnames": ["a.example"]}}, merge)
    assert changed["metadata"]["generation"] == 2
    with_status = await patch(api, f"{path}/status", {"status": {"parents": []}}, merge)
    assert with_status["metadata"]["generation"] == 2


async def test_the_status_is_written_by_its_own_endpoint_only(api):
    obj = gateway("gw")
    made = await create_custom(api, obj)
    path, merge = custom_path(api, "gateways", "gw"), "application/merge-patch+json"
    before = made.get("status")
    body = {"status": {"addresses": [{"value": "192.0.2.1"}]}}
    assert (await patch(api, path, body, merge)).get("status") == before
    body["spec"] = {"gatewayClassName": "other"}
    written = await patch(api, f"{path}/status", body, merge)
    assert written["status"]["addresses"][0]["value"] == "192.0.2.1"
    assert written["spec"]["gatewayClassName"] == "weft"


async def test_finalizers_hold_an_object(api, core):
    body = config_map("a", finalizers=["weft.dev/test"])
    await core.create_namespaced_config_map(api.namespace, body)
    await core.delete_namespaced_config_map("a", api.namespace)
    found = await core.read_namespaced_config_map("a", api.namespace)
    assert found.metadata.deletion_timestamp
    path = f"/api/v1/namespaces/{api.namespace}/configmaps/a"
    with refused(422, "Invalid"):
        operations = [{"op": "add", "path": "/metadata/finalizers/-", "value": "weft.dev/more"}]
        await patch(api, path, operations, "application/json-patch+json")
    operations = [{"op": "remove", "path": "/metadata/finalizers/0"}]
    await patch(api, path, operations, "application/json-patch+json")
    with refused(404):
        await core.read_namespaced_config_map("a", api.namespace)


async def test_json_patches(api, core):
    await core.create_namespaced_config_map(api.namespace, config_map("a"))
    path = f"/api/v1/namespaces/{api.namespace}/configmaps/a"
    kind = "application/json-patch+json"
    found = await patch(api, path, [{"op": "add", "path": "/data/x~1y", "value": "z"}], kind)
    assert found["data"] == {"v": "1", "x/y": "z"}
    with refused(422):
        await patch(api, path, [{"op": "test", "path": "/data/v", "value": "2"}], kind)
    with refused(422):
        await patch(api, path, [{"op": "remove", "path": "/data/none"}], kind)


async def test_services_get_addresses_and_keep_them(api, core):
    body = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}}
    made = await core.create_namespaced_service(api.namespace, body)
    assert made.spec.cluster_ip
    assert made.spec.cluster_ips == [made.spec.cluster_ip]
    assert made.spec.ports[0].target_port == 80
    # By strategic merge, ports are the same by their number.
    change = {"spec": {"ports": [{"port": 80, "name": "web"}, {"port": 81, "name": "more"}]}}
    path = f"/api/v1/namespaces/{api.namespace}/services/s"
    found = await patch(api, path, change, "application/strategic-merge-patch+json")
    assert [(one["port"], one["name"]) for one in found["spec"]["ports"]] == [
        (80, "web"),
        (81, "more"),
    ]
    assert found["spec"]["clusterIP"] == made.spec.cluster_ip


# --- lists ---------------------------------------------------------------------------------------


async def test_pages_show_one_moment(api, core):
    for number in range(7):
        body = config_map(f"c{number}", labels={"page": "yes"})
        await core.create_namespaced_config_map(api.namespace, body)
    select = {"label_selector": "page=yes", "limit": 3}
    page = await core.list_namespaced_config_map(api.namespace, **select)
    assert [item.metadata.name for item in page.items] == ["c0", "c1", "c2"]
    version = page.metadata.resource_version
    await core.delete_namespaced_config_map("c4", api.namespace)
    names = []
    while page.metadata._continue:
        page = await core.list_namespaced_config_map(
            api.namespace, _continue=page.metadata._continue, **select
        )
        assert page.metadata.resource_version == version
        names += [item.metadata.name for item in page.items]
    assert names == ["c3", "c4", "c5", "c6"]


async def test_selectors(api, core):
    for name, labels in {"a": {"t": "x"}, "b": {"t": "y", "u": "1"}, "c": {}}.items():
        body = config_map(name, labels=labels, annotations={"weft": "test"})
        await core.create_namespaced_config_map(api.namespace, body)
    for selector, expected in (
        ("t=x", "a"),
        ("t!=x,u", "b"),
        ("t in (x, y)", "ab"),
        ("t notin (x),u", "b"),
        ("t,!u", "a"),
    ):
        found = await core.list_namespaced_config_map(api.namespace, label_selector=selector)
        assert "".join(one.metadata.name for one in found.items) == expected, selector
    found = await core.list_namespaced_config_map(api.namespace, field_selector="metadata.name=b")
    assert [one.metadata.name for one in found.items] == ["b"]
    with refused(400):
        await core.list_namespaced_config_map(api.namespace, field_selector="data.v=1")


async def test_versions_from_the_future_and_exact_ones(api, core):
    made = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    version = made.metadata.resource_version
    await core.create_namespaced_config_map(api.namespace, config_map("b"))
    exact = await core.list_namespaced_config_map(
        api.namespace,
        resource_version=version,
        resource_version_match="Exact",
        field_selector="metadata.name!=kube-root-ca.crt",
    )
    assert [one.metadata.name for one in exact.items] == ["a"]
    with refused(504):
        await core.list_namespaced_config_map(api.namespace, resource_version=str(10**15))


async def test_metadata_alone(api, core):
    await core.create_namespaced_config_map(api.namespace, config_map("a"))
    accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
    path = f"/api/v1/namespaces/{api.namespace}/configmaps"
    found = await get(api, path, accept, fieldSelector="metadata.name=a")
    assert found["kind"] == "PartialObjectMetadataList"
    (item,) = found["items"]
    assert item["metadata"]["name"] == "a"
    assert "data" not in item


# --- watches -------------------------------------------------------------------------------------


async def events(api, core, count, **options):
    """The next events of ConfigMaps that are the test's own."""
    found = []
    options.setdefault("field_selector", "metadata.name!=kube-root-ca.crt")
    async with asyncio.timeout(WAIT_S), watch.Watch() as watching:
        async for event in watching.stream(
            core.list_namespaced_config_map, api.namespace, timeout_seconds=WAIT_S, **options
        ):
            obj = event["raw_object"]
            found.append((event["type"], obj["metadata"].get("name"), obj))
            if len(found) == count:
                return found
    raise AssertionError(f"only {found}")


async def test_a_watch_continues_where_a_list_or_another_watch_ended(api, core):
    await core.create_namespaced_config_map(api.namespace, config_map("a"))
    listed = await core.list_namespaced_config_map(api.namespace)
    version = listed.metadata.resource_version
    await core.create_namespaced_config_map(api.namespace, config_map("b"))
    await core.patch_namespaced_config_map("a", api.namespace, {"data": {"v": "2"}})
    await core.delete_namespaced_config_map("b", api.namespace)
    seen = await events(api, core, 3, resource_version=version)
    assert [one[:2] for one in seen] == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
    versions = [int(obj["metadata"]["resourceVersion"]) for _, _, obj in seen]
    assert versions == sorted(set(versions))
    (later,) = await events(api, core, 1, resource_version=str(versions[1]))
    assert later[:2] == ("DELETED", "b")


async def test_a_watch_without_version_begins_with_what_is_there(api, core):
    await core.create_namespaced_config_map(api.namespace, config_map("a"))
    (first,) = await events(api, core, 1)
    assert first[:2] == ("ADDED", "a")


async def test_selectors_of_a_watch_add_and_delete(api, core):
    made = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    for value in ("yes", "no"):
        body = {"metadata": {"labels": {"shown": value}}}
        await core.patch_namespaced_config_map("a", api.namespace, body)
    seen = await events(
        api,
        core,
        2,
        resource_version=made.metadata.resource_version,
        label_selector="shown=yes",
    )
    assert [one[:2] for one in seen] == [("ADDED", "a"), ("DELETED", "a")]


async def test_bookmarks_and_410(server, api, core):
    if server is None:
        pytest.skip("nobody compacts a real server for a test")
    made = await core.create_namespaced_config_map(api.namespace, config_map("a"))
    (bookmark,) = await events(
        api,
        core,
        1,
        allow_watch_bookmarks=True,
        resource_version=made.metadata.resource_version,
    )
    assert bookmark[0] == "BOOKMARK"
    await core.create_namespaced_config_map(api.namespace, config_map("b"))
    server.store.compact()
    with refused(410):
        await events(api, core, 1, resource_version=made.metadata.resource_version)
    for body in (config_map("c"), config_map("d")):
        await core.create_namespaced_config_map(api.namespace, body)
    page = await core.list_namespaced_config_map(api.namespace, limit=1)
    await core.delete_namespaced_config_map("d", api.namespace)
    server.store.compact()
    with refused(410, "Expired"):
        await core.list_namespaced_config_map(
            api.namespace, limit=1, _continue=page.metadata._continue
        )


# --- server-side apply ---------------------------------------------------------------------------

APPLY = "application/apply-patch+yaml"


def condition(kind, status="True", message=""):
    return {
        "type": kind,
        "status": status,
        "reason": kind.rpartition("/")[2],
        "message": message,
        "lastTransitionTime": "2025-01-01T00:00:00Z",
    }


def status_of(api, name, **status):
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": api.namespace},
        "status": status,
    }


async def test_managers_of_a_status_own_their_conditions(api):
    await create_custom(api, gateway("gw"))
    path = custom_path(api, "gateways", "gw/status")
    one = status_of(api, "gw", conditions=[condition("Accepted"), condition("example.com/One")])
    await patch(api, path, one, APPLY, fieldManager="one")
    two = status_of(api, "gw", conditions=[condition("example.com/Two")])
    found = await patch(api, path, two, APPLY, fieldManager="two")
    types = [found["type"] for found in found["status"]["conditions"]]
    assert {"Accepted", "example.com/One", "example.com/Two"} <= set(types)
    # What its manager applies no more goes, what others own stays.
    one["status"]["conditions"].pop()
    found = await patch(api, path, one, APPLY, fieldManager="one")
    types = {found["type"] for found in found["status"]["conditions"]}
    assert "example.com/One" not in types
    assert "example.com/Two" in types


async def test_another_value_for_what_somebody_owns_is_a_conflict(api):
    await create_custom(api, gateway("gw"))
    path = custom_path(api, "gateways", "gw/status")
    mine = status_of(api, "gw", conditions=[condition("Accepted")])
    await patch(api, path, mine, APPLY, fieldManager="one")
    # The same value is owned by both.
    await patch(api, path, mine, APPLY, fieldManager="two")
    other = status_of(api, "gw", conditions=[condition("Accepted", "False")])
    with refused(409, "Conflict") as caught:
        await patch(api, path, other, APPLY, fieldManager="three")
    causes = json.loads(caught.value.body)["details"]["causes"]
    assert {cause["reason"] for cause in causes} == {"FieldManagerConflict"}
    assert any(cause["field"].endswith(".status") for cause in causes)
    found = await patch(api, path, other, APPLY, fieldManager="three", force="true")
    (accepted,) = [one for one in found["status"]["conditions"] if one["type"] == "Accepted"]
    assert accepted["status"] == "False"
    with refused(409, "Conflict"):
        await patch(api, path, mine, APPLY, fieldManager="one")


async def test_apply_refuses_what_the_schema_does_not_declare(api):
    """Where every other write prunes it."""
    await create_custom(api, gateway("gw"))
    path = custom_path(api, "gateways", "gw/status")
    about = [{**condition("Accepted"), "more": 1}]
    with pytest.raises(ApiException) as caught:
        await patch(api, path, status_of(api, "gw", conditions=about), APPLY, fieldManager="one")
    # 400 is asked for (kubernetes/kubernetes issue 139253).
    assert caught.value.status in (400, 500)
    said = json.loads(caught.value.body)["message"]
    assert '.status.conditions[type="Accepted"].more: field not declared in schema' in said
    merge = "application/merge-patch+json"
    found = await patch(api, path, status_of(api, "gw", conditions=about), merge)
    assert found["status"]["conditions"] == [condition("Accepted")]


async def test_the_parents_of_a_route_are_one_list_for_all(api):
    await create_custom(api, route("r"))
    path = custom_path(api, "httproutes", "r/status")

    def entry(controller, parent):
        return {
            "parentRef": {"name": parent},
            "controllerName": controller,
            "conditions": [condition("Accepted")],
        }

    def body(*parents):
        return {
            "apiVersion": f"{GROUP}/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "r", "namespace": api.namespace},
            "status": {"parents": list(parents)},
        }

    first = body(entry("example.com/one", "a"))
    found = await patch(api, path, first, APPLY, fieldManager="one")
    with refused(409, "Conflict"):
        await patch(api, path, body(entry("example.com/two", "b")), APPLY, fieldManager="two")
    # So whoever writes it writes others' entries back, to the version they were read at.
    both = body(entry("example.com/one", "a"), entry("example.com/two", "b"))
    both["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
    query = {"fieldManager": "two", "force": "true"}
    found = await patch(api, path, both, APPLY, **query)
    assert len(found["status"]["parents"]) == 2
    both["status"]["parents"].pop()
    with refused(409, "Conflict"):
        await patch(api, path, both, APPLY, **query)


async def test_apply_creates_what_is_not_there(api, core):
    path = f"/api/v1/namespaces/{api.namespace}/configmaps/a"
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"v": "1"}}
    made = await patch(api, path, body, APPLY, fieldManager="one")
    (entry,) = made["metadata"]["managedFields"]
    assert (entry["manager"], entry["operation"]) == ("one", "Apply")
    assert entry["fieldsV1"] == {"f:data": {"f:v": {}}}
    with refused(400):
        await patch(api, path, body, APPLY)
    again = await patch(api, path, body, APPLY, fieldManager="one")
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    # Another write takes what it changes from its owner.
    await core.patch_namespaced_config_map("a", api.namespace, {"data": {"v": "2"}})
    with refused(409, "Conflict"):
        await patch(api, path, body, APPLY, fieldManager="one")


# --- Leases, signatures, discovery ---------------------------------------------------------------


async def test_one_of_two_gets_a_lease(api):
    leases = client.CoordinationV1Api(api)
    body = {"metadata": {"name": "l"}, "spec": {"holderIdentity": "one"}}
    made = await leases.create_namespaced_lease(api.namespace, body)
    body["metadata"]["resourceVersion"] = made.metadata.resource_version
    won = await leases.replace_namespaced_lease("l", api.namespace, body | {"spec": {}})
    assert won.spec.holder_identity is None
    with refused(409, "Conflict"):
        await leases.replace_namespaced_lease("l", api.namespace, body)


def signing_request():
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weft-test")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return base64.b64encode(pem).decode()


async def test_signing_requests(api):
    certificates = client.CertificatesV1Api(api)
    name = f"weft-test-{uuid.uuid4().hex[:8]}"
    body = {
        "metadata": {"name": name},
        "spec": {
            "request": signing_request(),
            "signerName": "weft.dev/test",
            "usages": ["digital signature", "client auth"],
            "username": "somebody-else",
        },
    }
    made = await certificates.create_certificate_signing_request(body)
    # Who asks is what the server knows.
    assert made.spec.username != "somebody-else"
    approved = {
        **condition("Approved", message="by a test"),
        "lastUpdateTime": "2025-01-01T00:00:00Z",
    }
    path = f"/apis/certificates.k8s.io/v1/certificatesigningrequests/{name}"
    change = {"status": {"conditions": [approved], "certificate": "eA=="}}
    merge = "application/merge-patch+json"
    found = await patch(api, f"{path}/approval", change, merge)
    assert found["status"]["conditions"][0]["type"] == "Approved"
    assert not found["status"].get("certificate")
    # What is decided stays so, and is either.
    denied, failed = ({**approved, "type": kind} for kind in ("Denied", "Failed"))
    for endpoint, conditions in (
        ("approval", [approved, denied]),
        ("approval", [denied]),
        ("approval", [approved, approved]),
        ("approval", [approved, {**failed, "status": "False"}]),
        ("status", [approved, denied]),
        ("status", [{**approved, "message": "by nobody"}]),
        ("status", []),
    ):
        with refused(422, "Invalid"):
            await patch(api, f"{path}/{endpoint}", {"status": {"conditions": conditions}}, merge)
    with refused(422, "Invalid"):
        await patch(api, f"{path}/status", {"status": {"certificate": "eA=="}}, merge)
    change = {"status": {"conditions": [approved, failed]}}
    found = await patch(api, f"{path}/status", change, merge)
    assert [one["type"] for one in found["status"]["conditions"]] == ["Approved", "Failed"]
    await certificates.delete_certificate_signing_request(name)


async def test_the_dynamic_client_finds_kinds(api):
    dynamic = await DynamicClient(api)
    routes = await dynamic.resources.get(api_version=f"{GROUP}/v1", kind="HTTPRoute")
    assert (routes.name, routes.namespaced) == ("httproutes", True)
    obj = route("r", namespace=api.namespace)
    await dynamic.create(routes, body=obj, namespace=api.namespace)
    found = await dynamic.get(routes, name="r", namespace=api.namespace)
    assert found.spec.rules[0].matches[0].path.value == "/"


async def test_what_is_owned_goes_with_its_owner(api, core):
    owner = await core.create_namespaced_config_map(api.namespace, config_map("owner"))
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "owner",
        "uid": owner.metadata.uid,
    }
    await core.create_namespaced_config_map(
        api.namespace, config_map("owned", ownerReferences=[reference])
    )
    await core.delete_namespaced_config_map("owner", api.namespace)
    async with asyncio.timeout(WAIT_S):
        while True:
            listed = await core.list_namespaced_config_map(api.namespace)
            if not any(one.metadata.name == "owned" for one in listed.items):
                break
            await asyncio.sleep(0.1)
