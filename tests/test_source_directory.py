"""The directory source on real directories: what changes, what stays, what is reported."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from mesh.model.meta import ObjectKey
from mesh.sources.directory import DirectorySource, Manifests

WAIT_S = 20


def config_map(name, value="1", **metadata):
    body = {"name": name, **metadata}
    return json.dumps(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": body, "data": {"v": value}}
    )


def key(name, namespace="default"):
    return ObjectKey(namespace, name)


def values(update):
    """Name -> value (None: gone) of the ConfigMaps that changed."""
    changes = update.changes.get("ConfigMap", {})
    return {k.name: None if obj is None else obj.data["v"] for k, obj in changes.items()}


def messages(update):
    return [problem.message for problem in update.problems]


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "manifests"
    path.mkdir()
    return path


@asynccontextmanager
async def watching(root):
    """The first update, and a function that awaits the next."""
    updates = DirectorySource(root).updates()

    async def following():
        async with asyncio.timeout(WAIT_S):
            return await anext(updates)

    try:
        yield await following(), following
    finally:
        await updates.aclose()


# --- reading, without watching -------------------------------------------------------------------


def test_everything_in_a_tree(root):
    (root / "a.yaml").write_text(f"{config_map('a1')}\n---\n{config_map('a2')}")
    (root / "sub/deep").mkdir(parents=True)
    (root / "sub/deep/b.yml").write_text(config_map("b"))
    (root / "c.json").write_text(config_map("c"))
    for ignored in ("README.md", ".hidden.yaml", "#d.yaml", "e.yaml~", ".e.yaml.swp"):
        (root / ignored).write_text(config_map("ignored"))
    (root / ".git").mkdir()
    (root / ".git/f.yaml").write_text(config_map("ignored"))
    update = Manifests(root).scan()
    assert values(update) == dict.fromkeys(("a1", "a2", "b", "c"), "1")
    assert update.problems == ()
    assert update.complete


def test_lists_are_unwrapped(root):
    inner = f"{{kind: List, apiVersion: v1, items: [{config_map('b')}]}}"
    (root / "a.yaml").write_text(
        f"{{kind: List, apiVersion: v1, items: [{config_map('a')}, {inner}, 7]}}"
    )
    update = Manifests(root).scan()
    assert values(update) == {"a": "1", "b": "1"}
    (problem,) = update.problems
    assert (problem.path, problem.rule) == ("items[2]", "object")


def test_a_wrong_object_is_reported_with_its_place_and_affects_only_itself(root):
    wrong = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: w, namespace: x}\nfoo: 1"
    twice = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: t}\ndata: {a: b, a: c}"
    text = "\n---\n".join((config_map("a"), wrong, twice, config_map("b"), "just text"))
    (root / "a.yaml").write_text(text)
    update = Manifests(root).scan()
    assert values(update) == {"a": "1", "b": "1"}
    assert {(p.file, p.level) for p in update.problems} == {(str(root / "a.yaml"), "error")}
    assert [(p.document, p.namespace, p.name, p.path, p.rule) for p in update.problems] == [
        (2, "x", "w", "foo", "unknown field"),
        (3, "default", "t", "data.a", "yaml"),
        (5, "default", "", "", "object"),
    ]


def test_kinds_that_are_not_ours(root):
    (root / "a.yaml").write_text(
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: d}}\n---\n"
        "{apiVersion: cilium.io/v2, kind: CiliumEgressGatewayPolicy, metadata: {name: p}}\n---\n"
        "{apiVersion: v2, kind: Service, metadata: {name: s}}"
    )
    update = Manifests(root).scan()
    assert update.changes == {}
    assert [(p.kind, p.level) for p in update.problems] == [
        ("Deployment", "note"),
        ("CiliumEgressGatewayPolicy", "unsupported"),
        ("Service", "unsupported"),
    ]


def test_statuses_in_files_count_for_pods_and_nodes_only(root):
    (root / "a.yaml").write_text(
        "{apiVersion: v1, kind: Pod, metadata: {name: p}, status: {podIP: 10.0.0.1}}\n---\n"
        "{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses:"
        " [{type: InternalIP, address: 192.0.2.1}]}}\n---\n"
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop}, status: {phase: Active}}"
    )
    changes = Manifests(root).scan().changes
    assert changes["Pod"][ObjectKey("default", "p")].status.pod_ip == "10.0.0.1"
    assert changes["Node"][ObjectKey("", "n1")].status.addresses[0].address == "192.0.2.1"
    assert changes["Namespace"][ObjectKey("", "shop")].status is None


def test_files_that_cannot_be_read_spoil_nothing_else(root):
    (root / "a.yaml").write_text(config_map("a"))
    (root / "b.yaml").write_bytes(b"\xff\xfe")
    (root / "c.yaml").write_bytes(b"x" * (16 * 1024 * 1024 + 1))
    (root / "d.yaml").write_text("a: b: c")
    os.mkfifo(root / "e.yaml")
    (root / "f.yaml").symlink_to("nowhere.yaml")
    (root / "g.yaml").mkdir()
    (root / "loop").symlink_to(".")
    update = Manifests(root).scan()
    assert values(update) == {"a": "1"}
    found = {Path(p.file).name: p.message for p in update.problems}
    assert found.keys() == {"b.yaml", "c.yaml", "d.yaml", "e.yaml", "f.yaml"}
    assert found["e.yaml"] == "not a regular file"
    assert found["f.yaml"] == "a symbolic link to nothing"
    assert "split it" in found["c.yaml"]


def test_the_first_of_duplicates_counts_and_the_next_takes_over(root):
    manifests = Manifests(root)
    (root / "b.yaml").write_text(config_map("x", "b"))
    (root / "c.yaml").write_text(f"{config_map('x', 'c1')}\n---\n{config_map('x', 'c2')}")
    update = manifests.scan()
    assert values(update) == {"x": "b"}
    assert [(Path(p.file).name, p.document, p.rule) for p in update.problems] == [
        ("c.yaml", 1, "duplicate"),
        ("c.yaml", 2, "duplicate"),
    ]
    assert str(root / "b.yaml") in update.problems[0].message
    (root / "a.yaml").write_text(config_map("x", "a"))
    update = manifests.read(["a.yaml"])
    assert values(update) == {"x": "a"}
    assert [Path(p.file).name for p in update.problems] == ["b.yaml", "c.yaml", "c.yaml"]
    (root / "a.yaml").unlink()
    (root / "b.yaml").unlink()
    update = manifests.read(["a.yaml", "b.yaml"])
    assert values(update) == {"x": "c1"}
    assert [p.document for p in update.problems] == [2]
    (root / "c.yaml").write_text("")
    update = manifests.read(["c.yaml"])
    assert values(update) == {"x": None}
    assert update.problems == ()


def test_generation_follows_the_spec_and_status_in_files_is_ignored(root):
    manifests = Manifests(root)
    file = root / "gc.yaml"

    def write(controller, labels="{}", extra=""):
        file.write_text(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\n"
            f"metadata: {{name: c, labels: {labels}{extra}}}\n"
            f"spec: {{controllerName: {controller}}}\nstatus: {{nonsense: 1}}\n"
        )
        changes = manifests.read(["gc.yaml"]).changes.get("GatewayClass", {})
        return changes.get(ObjectKey("", "c"))

    first = write("a.b/c")
    assert first.metadata.generation == 1
    labelled = write("a.b/c", "{x: z}")
    assert labelled.metadata.generation == 1
    assert labelled.metadata.resource_version != first.metadata.resource_version
    assert write("a.b/c", "{x: z}") is None
    assert write("a.b/d").metadata.generation == 2
    given = write("a.b/d", extra=", generation: 7, creationTimestamp: '2024-01-01T00:00:00Z'")
    assert given.metadata.generation == 7
    assert given.metadata.creation_timestamp == "2024-01-01T00:00:00Z"
    assert write("a.b/e", extra=", generation: 3").metadata.generation == 8


def test_last_good_versions_stay_until_deletion(root):
    manifests = Manifests(root)
    file = root / "a.yaml"
    file.write_text(f"{config_map('a')}\n---\n{config_map('b')}")
    manifests.scan()
    file.write_text(f"{config_map('a', '2')}\n---\n{config_map('b', '2')}\n---\n[")
    update = manifests.read(["a.yaml"])
    assert values(update) == {}
    assert "last good version stays in force" in update.problems[0].message
    bad = json.loads(config_map("b", "3")) | {"oops": 1}
    file.write_text(f"{config_map('a', '3')}\n---\n{json.dumps(bad)}")
    update = manifests.read(["a.yaml"])
    assert values(update) == {"a": "3"}
    assert update.problems[0].name == "b"
    assert "last good version stays in force" in update.problems[0].message
    file.write_text(json.dumps(bad))
    update = manifests.read(["a.yaml"])
    assert values(update) == {"a": None}
    file.unlink()
    update = manifests.read(["a.yaml"])
    assert values(update) == {"b": None}
    assert update.problems == ()


def test_last_good_versions_outlive_their_reader(root, tmp_path):
    kept = tmp_path / "run" / "kept"
    wrong = json.dumps(json.loads(config_map("b", "9")) | {"oops": 1})

    def read():
        update = Manifests(root, kept=kept).scan()
        assert update.complete
        return values(update), messages(update)

    a, c = root / "a.yaml", root / "c.json"
    a.write_text(f"{config_map('a')}\n---\n{config_map('b')}")
    c.write_text(config_map("c"))
    assert read() == ({"a": "1", "b": "1", "c": "1"}, [])
    assert (kept.stat().st_mode & 0o777, len(list(kept.iterdir()))) == (0o700, 2)
    assert {file.stat().st_mode & 0o777 for file in kept.iterdir()} == {0o600}
    # What is broken when the next one starts: one object, whole files.
    a.write_text(f"{config_map('a', '2')}\n---\n{wrong}")
    c.write_text("{")
    for _ in range(2):
        found, told = read()
        assert found == {"a": "2", "b": "1", "c": "1"}
        assert all("last good version stays in force" in one for one in told)
        assert len(told) == 2
    # Of each object the last good version, not of the file.
    a.write_text("[")
    assert read()[0] == {"a": "2", "b": "1", "c": "1"}
    a.write_text(config_map("a", "3"))
    assert read()[0] == {"a": "3", "c": "1"}
    # What is deleted meanwhile is, and what never was good is not there.
    c.unlink()
    (root / "d.yaml").write_text("[")
    assert read()[0] == {"a": "3"}
    assert len(list(kept.iterdir())) == 1
    c.write_text("{")
    assert read()[0] == {"a": "3"}
    c.unlink()
    # Nor is anything of another tree.
    root.rename(tmp_path / "other")
    root.mkdir()
    (root / "a.yaml").write_text("[")
    (tmp_path / "other" / "a.yaml").write_text("[")
    assert values(Manifests(tmp_path / "other", kept=kept).scan()) == {}
    assert read()[0] == {}


@pytest.mark.parametrize("bad", [b"", b"{}", b'{"root": 1}\n', None])
def test_last_good_versions_that_are_not_whole_are_none(root, tmp_path, bad):
    kept = tmp_path / "kept"
    (root / "a.yaml").write_text(config_map("a"))
    Manifests(root, kept=kept).scan()
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-1] if bad is None else bad)
    (kept / "draft~").touch()
    (root / "a.yaml").write_text("[")
    assert values(Manifests(root, kept=kept).scan()) == {}
    assert list(kept.iterdir()) == []


def test_last_good_versions_that_cannot_be_kept_are_only_warned_of(root, tmp_path, caplog):
    (tmp_path / "kept").touch()
    for name in ("a", "b"):
        (root / f"{name}.yaml").write_text(config_map(name))
    manifests = Manifests(root, kept=tmp_path / "kept")
    assert values(manifests.scan()) == {"a": "1", "b": "1"}
    (root / "a.yaml").unlink()
    assert values(manifests.read(["a.yaml"])) == {"a": None}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a.yaml cannot be kept" in caplog.text


def test_a_new_file_that_is_invalid_lets_a_later_one_count(root):
    (root / "a.yaml").write_text(json.dumps(json.loads(config_map("x", "a")) | {"oops": 1}))
    (root / "b.yaml").write_text(config_map("x", "b"))
    assert values(Manifests(root).scan()) == {"x": "b"}


def test_ten_thousand_objects_and_one_change(root):
    for number in range(20):
        text = "\n---\n".join(config_map(f"m{number}-{i}") for i in range(500))
        (root / f"{number}.yaml").write_text(text)
    manifests = Manifests(root)
    assert len(manifests.scan().changes["ConfigMap"]) == 10_000
    (root / "one.yaml").write_text(config_map("one"))
    assert manifests.affected([str(root / "one.yaml")]) == ["one.yaml"]
    assert values(manifests.read(["one.yaml"])) == {"one": "1"}


def test_incremental_reading_gives_what_reading_everything_gives(root):
    """Whatever the order of changes, the objects in force are those of a fresh scan."""
    manifests = Manifests(root)
    steps = [("b", "x", "1"), ("a", "x", "2"), ("c", "y", "3"), ("b", "y", "4"), ("a", None, "")]
    steps += [("c", "x", "5"), ("b", None, ""), ("a", "y", "6"), ("c", None, "")]
    objects = {}
    for file, name, value in steps:
        path = root / f"{file}.yaml"
        path.write_text("" if name is None else config_map(name, value))
        objects.update(values(manifests.read([path.name])))
        fresh = values(Manifests(root).scan())
        assert {k: v for k, v in objects.items() if v is not None} == fresh


# --- watching ------------------------------------------------------------------------------------


async def test_written_changed_renamed_deleted(root):
    (root / "a.yaml").write_text(config_map("a"))
    async with watching(root) as (first, following):
        assert values(first) == {"a": "1"}
        (root / "b.yaml").write_text(config_map("b"))
        assert values(await following()) == {"b": "1"}
        (root / "b.yaml").write_text(config_map("b", "2"))
        assert values(await following()) == {"b": "2"}
        (root / "b.yaml").rename(root / "c.yaml")
        # Nothing changes for the object; what comes next is the next change.
        (root / "d.yaml").write_text(config_map("d"))
        update = await following()
        while "d" not in values(update):
            assert values(update) == {}
            update = await following()
        assert values(update) == {"d": "1"}
        (root / "c.yaml").unlink()
        assert values(await following()) == {"b": None}


async def test_directories_come_and_go(root, tmp_path):
    prepared = tmp_path / "prepared"
    (prepared / "deep").mkdir(parents=True)
    (prepared / "deep/a.yaml").write_text(config_map("a"))
    async with watching(root) as (first, following):
        assert first.changes == {}
        prepared.rename(root / "sub")
        assert values(await following()) == {"a": "1"}
        (root / "sub/deep/b.yaml").write_text(config_map("b"))
        assert values(await following()) == {"b": "1"}
        (root / "sub").rename(tmp_path / "away")
        assert values(await following()) == {"a": None, "b": None}


async def test_half_written_files_wait_for_their_writer(root):
    """A file that is open for writing is left alone, even when what it holds would parse."""
    (root / "a.yaml").write_text(f"{config_map('a1')}\n---\n{config_map('a2')}")
    async with watching(root) as (_, following):
        with open(root / "a.yaml", "w") as half:
            half.write(config_map("a1", "2"))
            half.flush()
            (root / "b.yaml").write_text(config_map("b"))
            assert values(await following()) == {"b": "1"}
            half.write(f"\n---\n{config_map('a2', '2')}")
        assert values(await following()) == {"a1": "2", "a2": "2"}


def test_a_first_reading_is_whole_once_nothing_is_being_written(root):
    manifests = Manifests(root, settled=True)
    (root / "b.yaml").write_text(config_map("b"))
    with open(root / "a.yaml", "w") as half:
        half.write(config_map("a"))
        half.flush()
        update = manifests.scan()
        assert (values(update), update.complete) == ({"b": "1"}, False)
    update = manifests.read(["a.yaml"])
    assert (values(update), update.complete) == ({"a": "1"}, True)


async def test_a_writer_that_never_closes_is_not_waited_for_for_ever(root):
    async with watching(root) as (_, following):
        with open(root / "a.yaml", "w") as kept:
            kept.write(config_map("a"))
            kept.flush()
            assert values(await following()) == {"a": "1"}


async def test_broken_and_mended(root):
    file = root / "a.yaml"
    file.write_text(config_map("a"))
    async with watching(root) as (_, following):
        file.write_text("a: [")
        update = await following()
        assert values(update) == {}
        assert len(update.problems) == 1
        file.write_text(config_map("a", "2"))
        update = await following()
        assert values(update) == {"a": "2"}
        assert update.problems == ()


async def test_saved_as_editors_do(root):
    """Moved to a backup, written anew, backup deleted; or written beside and moved over."""
    file = root / "a.yaml"
    file.write_text(config_map("a"))
    async with watching(root) as (_, following):
        file.rename(root / "a.yaml~")
        file.write_text(config_map("a", "2"))
        (root / "a.yaml~").unlink()
        assert values(await following()) == {"a": "2"}
        (root / ".a.yaml.new").write_text(config_map("a", "3"))
        (root / ".a.yaml.new").rename(file)
        assert values(await following()) == {"a": "3"}


async def test_kubernetes_volume(root):
    """Files are links into ..data, which is a link to the current version, replaced atomically."""
    for version in ("1", "2"):
        (root / f"..v{version}").mkdir()
        (root / f"..v{version}/a.yaml").write_text(config_map("a", version))
    (root / "..data").symlink_to("..v1")
    (root / "a.yaml").symlink_to("..data/a.yaml")
    async with watching(root) as (first, following):
        assert values(first) == {"a": "1"}
        (root / "..new").symlink_to("..v2")
        (root / "..new").rename(root / "..data")
        assert values(await following()) == {"a": "2"}
        shutil.rmtree(root / "..v1")
        (root / "b.yaml").write_text(config_map("b"))
        assert values(await following()) == {"b": "1"}


async def test_links_out_of_the_tree(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "real.yaml").write_text(config_map("a"))
    (outside / "dir").mkdir()
    (root / "a.yaml").symlink_to(outside / "real.yaml")
    (root / "dir").symlink_to(outside / "dir")
    async with watching(root) as (first, following):
        assert values(first) == {"a": "1"}
        (outside / "real.yaml").write_text(config_map("a", "2"))
        assert values(await following()) == {"a": "2"}
        (outside / "new").write_text(config_map("a", "3"))
        (outside / "new").rename(outside / "real.yaml")
        assert values(await following()) == {"a": "3"}
        (outside / "dir/b.yaml").write_text(config_map("b"))
        assert values(await following()) == {"b": "1"}
        (outside / "real.yaml").unlink()
        update = await following()
        assert values(update) == {"a": None}
        assert messages(update) == ["a symbolic link to nothing"]


async def test_a_root_that_comes_later_and_goes(tmp_path):
    root = tmp_path / "later"
    async with watching(root) as (first, following):
        assert not first.complete
        assert messages(first) == ["no such file or directory"]
        root.mkdir()
        (root / "a.yaml").write_text(config_map("a"))
        update = await following()
        while "a" not in values(update):
            update = await following()
        assert update.complete
        assert update.problems == ()
        root.rename(tmp_path / "away")
        update = await following()
        assert values(update) == {}
        assert messages(update) == ["no such file or directory"]
        (tmp_path / "away").rename(root)
        assert (await following()).problems == ()


async def test_a_root_that_is_replaced(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.yaml").write_text(config_map("b"))
    (root / "a.yaml").write_text(config_map("a"))
    async with watching(root) as (_, following):
        root.rename(tmp_path / "away")
        other.rename(root)
        seen = {}
        while seen != {"a": None, "b": "1"}:
            seen.update(values(await following()))
        (root / "c.yaml").write_text(config_map("c"))
        assert values(await following()) == {"c": "1"}


async def test_many_files_at_once_arrive_whole(root):
    async with watching(root) as (_, following):
        for number in range(300):
            (root / f"{number}.yaml").write_text(config_map(f"m{number}"))
        seen = {}
        while len(seen) < 300:
            seen.update(values(await following()))
        assert set(seen.values()) == {"1"}


# --- permissions ---------------------------------------------------------------------------------

AS_NOBODY = """
import json, os, sys
from pathlib import Path
from mesh.sources.directory import Manifests
root = Path(sys.argv[1])
manifests = Manifests(root, settled=True, kept=root / ".kept")
first = manifests.scan()
print(json.dumps([sorted(k.name for k in first.changes.get("ConfigMap", {})),
                  [[p.file, p.message] for p in first.problems]]), flush=True)
sys.stdin.readline()
second = manifests.scan()
found = second.changes.get("ConfigMap", {})
print(json.dumps([{k.name: v and v.data["v"] for k, v in found.items()},
                  [[p.file, p.message] for p in second.problems]]), flush=True)
"""


WATCHING_AS_NOBODY = """
import asyncio, json, sys
from pathlib import Path
from mesh.sources.directory import DirectorySource

async def main():
    async for update in DirectorySource(Path(sys.argv[1])).updates():
        changes = update.changes.get("ConfigMap", {})
        print(json.dumps([{k.name: v and v.data["v"] for k, v in changes.items()},
                          [p.message for p in update.problems]]), flush=True)

asyncio.run(main())
"""


@contextmanager
def as_nobody(script, root):
    """A process that reads the directory without root's rights."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user="nobody" if os.geteuid() == 0 else None,
        cwd=Path(__file__).parent.parent,
    )
    timer = threading.Timer(WAIT_S, process.kill)
    timer.start()
    try:
        with process:
            yield process
    finally:
        timer.cancel()
        timer.join()


@pytest.fixture
def public():
    """A directory that everybody may enter, unlike pytest's own."""
    base = Path(tempfile.mkdtemp(prefix="weft-test-"))
    base.chmod(0o755)
    yield base
    for directory, _, _ in os.walk(base):
        os.chmod(directory, 0o755)
    shutil.rmtree(base)


def test_a_directory_that_becomes_readable_is_watched_from_then_on(public):
    (public / "a").mkdir(mode=0)
    (public / "a").chmod(0)
    with as_nobody(WATCHING_AS_NOBODY, public) as process:
        changes, (problem,) = json.loads(process.stdout.readline())
        assert changes == {}
        assert "permission denied" in problem
        (public / "a").chmod(0o755)
        assert json.loads(process.stdout.readline()) == [{}, []]
        (public / "a/x.yaml").write_text(config_map("x"))
        assert json.loads(process.stdout.readline()) == [{"x": "1"}, []]
        process.kill()


def test_what_may_not_be_read_is_reported_and_stays_as_it_was(public):
    for name in ("open", "closed"):
        (public / name).mkdir()
        (public / name / f"{name}.yaml").write_text(config_map(name))
    (public / "file.yaml").write_text(config_map("file"))
    (public / "never.yaml").write_text(config_map("never"))
    (public / "never.yaml").chmod(0)
    (public / ".kept").mkdir()
    (public / ".kept").chmod(0o777)
    with as_nobody(AS_NOBODY, public) as process:
        names, problems = json.loads(process.stdout.readline())
        assert names == ["closed", "file", "open"]
        ((file, message),) = problems
        assert file == str(public / "never.yaml")
        assert "permission denied: let user" in message
        (public / "file.yaml").chmod(0)
        (public / "closed").chmod(0)
        (public / "open/open.yaml").write_text(config_map("open", "2"))
        process.stdin.write("\n")
        process.stdin.flush()
        changes, problems = json.loads(process.stdout.readline())
    assert changes == {"open": "2"}
    assert [Path(file).name for file, _ in problems] == ["closed", "file.yaml", "never.yaml"]
    assert process.returncode == 0
    # To the next reader too.
    with as_nobody(AS_NOBODY, public) as process:
        names, _ = json.loads(process.stdout.readline())
        assert names == ["closed", "file", "open"]
        process.kill()
