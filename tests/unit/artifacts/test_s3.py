"""What only S3 has: refusals, lost answers, broken connections, services that ignore conditions, settings."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.cache import ActionCache, blob_path
from artifacts.errors import AddressError, IntegrityError, NotFoundError, StoreError, UnavailableError
from artifacts.s3_limit import bound
from artifacts.store import Store, open_store
from tests.servers import Faults
from tests.unit.artifacts.large import ref_of

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://", "s3:///prefix", "s3://ab", "s3://Upper/x", "s3://under_score", "s3://bucket?x=1", "s3://-bucket",
        "s3://bucket/a//b", "s3://bucket/../b", "s3://bucket/" + "x" * 121, "s3://bucket/a\\b",
    ],
)  # fmt: skip
def test_addresses_that_are_none(uri: str) -> None:
    with pytest.raises(StoreError, match=r"not an S3 address|not a prefix"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAOPENER:5es@me0@bucket/prefix", "s3://AKIAOPENER:5es/@me0/@bucket", "https://AKIAOPENER:5es@me0@host/bucket",
        "s3://AKIAOPENER:5esme0@", "file://AKIAOPENER:5esme0@host/folder",
    ],
)  # fmt: skip
def test_a_password_in_a_stores_address_is_not_said(uri: str, tmp_path: Path) -> None:
    with pytest.raises(AddressError) as caught:
        open_store(uri)
    said = "".join(traceback.format_exception(caught.value)).replace(uri, "")  # the line of this test
    assert not [secret for secret in ("AKIA", "5es", "me0") if secret in str(caught.value) or secret in said]
    if uri.endswith("@bucket/prefix"):
        assert "s3://bucket/prefix: not an S3 address" in str(caught.value)
        assert "credentials come from the environment" in str(caught.value)


def test_opening_sends_nothing(s3_store_uri: str, faults: Faults) -> None:
    store = open_store(s3_store_uri)
    assert store.uri.startswith("s3://")
    assert faults.requests == []


def test_without_boto3() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["boto3"] = None  # what an import of an absent package meets
import artifacts.s3, artifacts.s3_faults
from artifacts.cache import ActionCache, blob_path
from artifacts.errors import StoreError
from artifacts.store import open_store
try:
    open_store("s3://bucket/prefix")
except StoreError as err:
    print(err)
assert not any(name.split(".")[0] == "botocore" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "s3://bucket/prefix: S3 needs boto3; install it with: pip install 'enginery[s3]'"


def test_a_write_whose_answer_is_lost_counts(store: Store, faults: Faults) -> None:
    assert store.write("warm", b"", if_absent=True) is True
    faults.lost_answers = 1
    assert store.write("a", b"mine", if_absent=True) is True
    assert store.read("a") == b"mine"
    # Somebody else's object is not taken for one's own, even though the request was sent twice.
    faults.lost_answers = 1
    assert store.write("a", b"mine", if_absent=True) is False


def test_a_versioned_write_whose_answer_is_lost_counts(store: Store, faults: Faults) -> None:
    store.write("a", b"first", if_absent=True)
    version = store.read_versioned("a")[1]
    assert store.write("a", b"never", if_version='"0"') is False
    faults.lost_answers = 1
    assert store.write("a", b"second", if_version=version) is True
    assert store.read("a") == b"second"
    faults.lost_answers = 1
    assert store.write("a", b"third", if_version=version) is False
    assert store.read("a") == b"second"
    # Sent again after it was done, and gone since: it is said not to be there.
    version = store.read_versioned("a")[1]
    store.delete("a")
    faults.lost_answers = 1
    assert store.write("a", b"fourth", if_version=version) is False


def test_whether_conditions_are_honoured_is_asked_once(store: Store, faults: Faults) -> None:
    assert store.write("a", b"1", if_absent=True) is True
    bucket, _slash, prefix = store.uri.removeprefix("s3://").partition("/")
    probe = f"PUT /{bucket}/{prefix}/tmp/conditional-writes"
    assert faults.requests == [probe, probe, f"PUT /{bucket}/{prefix}/a"]
    faults.requests.clear()
    assert open_store(store.uri).write("b", b"1", if_absent=True) is True
    assert faults.requests == [f"GET /{bucket}/{prefix}/store.json", f"PUT /{bucket}/{prefix}/b"]
    faults.requests.clear()
    assert store.write("b", b"2", if_version=store.read_versioned("b")[1]) is True
    assert store.write("b", b"3", if_version=store.read_versioned("b")[1]) is True
    assert [line.split("/")[-1] for line in faults.requests] == ["b", "conditional-writes", "b", "b", "b"]
    assert [found.path for found in store.list("")] == ["a", "b"]


def test_a_service_that_wants_versions_without_quotes_gets_them(store: Store, faults: Faults) -> None:
    faults.refuses_quotes = True
    store.write("a", b"0", if_absent=True)
    first = store.read_versioned("a")[1]
    assert store.write("a", b"1", if_version=first)
    assert not store.write("a", b"2", if_version=first)
    second = store.read_versioned("a")[1]
    faults.requests.clear()
    assert store.write("a", b"3", if_version=second)
    assert [line.split()[0] for line in faults.requests] == ["PUT"]  # what it wants is known
    assert store.read("a") == b"3"


def test_two_conditional_writes_at_once_are_tried_again(store: Store, faults: Faults) -> None:
    store.write("warm", b"", if_absent=True)
    faults.answers.extend([(409, "ConditionalRequestConflict")] * 2)
    assert store.write("a", b"1", if_absent=True) is True
    faults.answers.extend([(409, "ConditionalRequestConflict")] * 5)
    with pytest.raises(StoreError, match="ConditionalRequestConflict"):
        store.write("b", b"1", if_absent=True)


def test_a_service_that_ignores_conditions_is_refused(careless_s3_store_uri: str) -> None:
    store = open_store(careless_s3_store_uri)
    store.write("there", b"1")
    said = r"http://127.0.0.1:\d+ ignores conditional writes \({}\).*or set ENGINERY_S3_LOCKS to a folder that every writer"
    for path in ("there", "new"):
        with pytest.raises(StoreError, match=said.format("If-None-Match")):
            store.write(path, b"2", if_absent=True)
    with pytest.raises(StoreError, match=said.format("If-Match")):
        store.write("there", b"2", if_version=store.read_versioned("there")[1])
    assert [found.path for found in store.list("")] == ["there"]
    assert store.read("there") == b"1"


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_each_condition_is_tried_out_by_itself(store: Store, faults: Faults, header: str) -> None:
    """Some services honour one of the two."""
    faults.dropped_headers = frozenset({header})
    store.write("a", b"1")
    version = store.read_versioned("a")[1]
    if header == "if-match":
        assert store.write("b", b"1", if_absent=True) is True
        with pytest.raises(StoreError, match=r"ignores conditional writes \(If-Match\)"):
            store.write("a", b"2", if_version=version)
    else:
        assert store.write("a", b"2", if_version=version) is True
        with pytest.raises(StoreError, match=r"ignores conditional writes \(If-None-Match\)"):
            store.write("b", b"1", if_absent=True)


def test_a_service_without_conditions_says_so(store: Store, faults: Faults) -> None:
    store.write("warm", b"", if_absent=True)
    faults.answers.append((501, "NotImplemented"))
    with pytest.raises(StoreError, match="does not offer this"):
        store.write("a", b"1", if_absent=True)


def test_a_service_that_refuses_conditions_needs_locks(
    store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults.answers.extend([(501, "NotImplemented")] * 2)
    with pytest.raises(StoreError, match="ENGINERY_S3_LOCKS"):
        store.write("a", b"1", if_absent=True)
    monkeypatch.setenv("ENGINERY_S3_LOCKS", str(tmp_path / "locks"))
    assert store.write("a", b"1", if_absent=True) is True
    assert store.write("a", b"2", if_absent=True) is False
    monkeypatch.setenv("ENGINERY_S3_LOCKS", "/dev/null/locks")
    with pytest.raises(StoreError, match="ENGINERY_S3_LOCKS=/dev/null/locks: "):
        store.write("b", b"1", if_absent=True)


_KILLED = """
import os, signal, sys
from artifacts.store import open_store
store = open_store(sys.argv[1])
version = store.read_versioned("a")[1]
def dies(params, **_more):
    if params["url"].endswith("/a"):
        os.kill(os.getpid(), signal.SIGKILL)
store._client.meta.events.register("before-call.s3.PutObject", dies)
store.write("a", b"late", if_version=version)
"""


@pytest.mark.slow
def test_what_a_killed_writer_had_sent_under_a_lock_is_waited_for(
    store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its lock is gone with it, and its request may still come: it must not overwrite what is written after it."""
    faults.dropped_headers = frozenset({"if-none-match", "if-match"})
    locks = tmp_path / "locks"
    monkeypatch.setenv("ENGINERY_S3_LOCKS", str(locks))
    monkeypatch.setattr("artifacts.s3_conditions.UNDER_WAY_SECONDS", 1.0)
    store.write("a", b"1", if_absent=True)
    assert not list(locks.glob("*.sent"))
    killed = subprocess.run([sys.executable, "-c", _KILLED, store.uri], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    (mark,) = locks.glob("*.sent")
    left = mark.read_text().split()[0]
    mark.write_text(f"{left} 0")
    began = time.monotonic()
    assert store.write("a", b"2", if_version=store.read_versioned("a")[1]) is True
    assert time.monotonic() - began > 0.9
    assert not list(locks.glob("*.sent"))
    # Where it does come, whoever waited sees it, and does not write over it what they decided before.
    mark.write_text(left)
    monkeypatch.setattr("artifacts.s3_conditions.UNDER_WAY_SECONDS", 60.0)
    version, late = store.read_versioned("a")[1], threading.Timer(0.3, open_store(store.uri).write, ("a", b"late"))
    late.start()
    assert store.write("a", b"3", if_version=version) is False
    late.join()
    assert store.read("a") == b"late"
    assert store.write("a", b"3", if_version=store.read_versioned("a")[1]) is True


def test_broken_downloads_go_on_where_they_broke(store: Store, faults: Faults, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    store.write("blob", data)
    faults.requests.clear()
    faults.cuts.extend([0, 3_000_000, 100])
    store.get_file("blob", ref_of(data), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert len(faults.requests) == 4
    faults.cuts.append(1000)
    assert store.read("blob") == data
    faults.cuts.extend([10] * 5)
    with pytest.raises(StoreError, match=r"cannot reach http://127.0.0.1") as caught:
        store.get_file("blob", ref_of(data), tmp_path / "again")
    assert not isinstance(caught.value.__cause__, IntegrityError)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_object_that_changes_while_it_is_read(store: Store, faults: Faults, tmp_path: Path) -> None:
    store.write("blob", b"1" * 2_000_000)
    faults.cuts.append(1_500_000)
    client = store._client

    def replace(**_kwargs: object) -> None:
        if any(line.startswith("GET") for line in faults.requests):
            client.meta.events.unregister("before-call.s3.GetObject", replace)
            store.write("blob", b"2" * 2_000_000)

    client.meta.events.register("before-call.s3.GetObject", replace)
    with pytest.raises(StoreError, match="changed while it was read"):
        store.get_file("blob", ref_of(b"1" * 2_000_000), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_while_it_is_sent(store: Store, faults: Faults, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"right")

    def change(**_kwargs: object) -> None:
        source.write_bytes(b"wrong")

    store._client.meta.events.register("before-call.s3.PutObject", change)
    store.put_file("blob", source, ref_of(b"right"))
    assert source.read_bytes() == b"wrong"
    assert store.read("blob") == b"right"  # what was hashed is what was sent


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", r": access denied \(said the proxy\); these credentials need s3:GetObject"),
        (403, "InvalidAccessKeyId", r"the credentials were refused \(said the proxy\); check them and the clock"),
        (403, "ExpiredToken", "the credentials were refused"),
        (400, "AuthorizationHeaderMalformed", "in another region .*; set AWS_REGION"),
        (
            404,
            "NoSuchBucket",
            r"no bucket 'enginery-tests' at http://127.*; make it with: aws s3 mb s3://enginery-tests",
        ),
        (400, "StrangeThing", "answered StrangeThing: said the proxy; run again"),
    ],
)
def test_refusals(store: Store, faults: Faults, tmp_path: Path, status: int, code: str, said: str) -> None:
    (tmp_path / "source").write_bytes(b"x" * 6)
    faults.answers.append((status, code))
    with pytest.raises(StoreError, match=said) as refused:
        store.read("blob")
    assert not isinstance(refused.value, UnavailableError)  # no second try mends it
    # An upload's refusal comes through boto3's transfer library, which wraps it.
    store.info("blob")
    faults.answers.extend([(404, "NotFound"), (status, code)])
    with pytest.raises(StoreError, match=said):
        store.put_file("blob", tmp_path / "source", ref_of(b"x" * 6))
    faults.answers.append((status, code))
    with pytest.raises(StoreError, match=said):
        list(store.list(""))
    faults.answers.append((403, "AccessDenied"))
    with pytest.raises(StoreError, match="access denied"):
        store.info("blob")


@pytest.mark.parametrize(
    ("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (503, "Whatever"), (400, "RequestTimeout")]
)
def test_what_may_succeed_later(
    s3_store_uri: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = open_store(s3_store_uri)
    store.write("first", b"")
    (tmp_path / "source").write_bytes(b"x" * 6)
    faults.answers.append((status, code))
    with pytest.raises(UnavailableError, match=f"answered {code}"):
        store.read("first")
    faults.answers.extend([(404, "NotFound"), (status, code)])
    with pytest.raises(UnavailableError, match=f"answered {code}"):
        store.put_file("blob", tmp_path / "source", ref_of(b"x" * 6))


def test_a_bit_that_flips_on_the_way(store: Store, faults: Faults, tmp_path: Path) -> None:
    bucket, _slash, prefix = store.uri.removeprefix("s3://").partition("/")
    for checksum in ("CRC32", None):  # found by boto3 itself, or only by our digest
        extra = {"ChecksumAlgorithm": checksum} if checksum else {}
        store._client.put_object(Bucket=bucket, Key=f"{prefix}/blob", Body=b"right", **extra)
        faults.flips = 1
        with pytest.raises(IntegrityError, match="did not match calculated" if checksum else "SHA-256"):
            store.get_file("blob", ref_of(b"right"), tmp_path / "target")
        assert list(tmp_path.iterdir()) == []
    store.get_file("blob", ref_of(b"right"), tmp_path / "target")


def test_a_damaged_blob_that_may_not_be_removed_is_still_called_damaged(
    store: Store, faults: Faults, tmp_path: Path
) -> None:
    ref = ref_of(b"right")
    store.write(blob_path(ref.digest), b"wrong")
    faults.answers.extend([None, (403, "AccessDenied")])
    with pytest.raises(IntegrityError, match=r"SHA-256.*could not be removed \(.*access denied.*\): remove it by hand"):
        ActionCache(store).get_blob(ref, tmp_path / "target")
    assert store.read(blob_path(ref.digest)) == b"wrong"


def test_missing_bucket(s3_environ: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/x")
    (tmp_path / "source").write_bytes(b"x")
    for call in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.write("a", b"", if_absent=True),
        lambda: store.put_file("a", tmp_path / "source", ref_of(b"x")),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreError, match="aws s3 mb s3://no-such-bucket --endpoint-url http://127"):
            call()


def test_unreachable_endpoint(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(
            UnavailableError, match=f"cannot reach {address} .* check the network, and AWS_ENDPOINT_URL_S3"
        ):
            open_store(s3_store_uri).read("a")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://bad host"])
def test_a_password_in_the_endpoint_is_not_said(
    address: str, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address.replace("://", "://opener:5es@me0@"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3") as caught:
        open_store(s3_store_uri).read("a")
    said = "".join(traceback.format_exception(caught.value))
    assert address.removeprefix("http://") in str(caught.value)
    assert "opener" not in said
    assert "me0" not in said


@pytest.mark.parametrize("fault", ["stall", "drops"])
def test_a_service_that_stalls_or_answers_in_drops_is_given_up_in_time(
    store: Store, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store.write("blob", b"x" * 5000, if_absent=True)
    slow = open_store(store.uri)
    slow.read("blob")
    monkeypatch.setenv("ENGINERY_S3_TIMEOUT", "0.4")
    bound(slow._client, 0.4)  # as the setting does, once it has told its layout: this machine may be slow
    faults.stalls, faults.drops = (100, 0.0) if fault == "stall" else (0, 0.05)
    (tmp_path / "source").write_bytes(b"y" * 5000)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: slow.read("blob"),
        "list": lambda: list(slow.list("")),
        "get": lambda: slow.get_file("blob", ref_of(b"x" * 5000), tmp_path / "target"),
    }
    if fault == "stall":  # what is written has no body in its answer
        calls |= {
            "write": lambda: slow.write("small", b"1", if_absent=True),
            "put": lambda: slow.put_file("new", tmp_path / "source", ref_of(b"y" * 5000)),
            "info": lambda: slow.info("blob"),
        }
    for name, call in calls.items():
        begin = time.monotonic()
        with pytest.raises(UnavailableError, match=r"within 0.4 s, with all tries; .* raise ENGINERY_S3_TIMEOUT"):
            call()
        assert time.monotonic() - begin < 10, name
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    faults.stalls, faults.drops = 0, 0.0
    assert store.read("blob") == b"x" * 5000


@pytest.mark.slow
def test_one_stall_costs_a_try_and_not_the_request(
    store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("blob", b"x")
    monkeypatch.setenv("ENGINERY_S3_TIMEOUT", "9")
    slow = open_store(store.uri)
    slow.read("blob")
    faults.stalls = 1
    assert slow.read("blob") == b"x"


def test_threads_share_a_store(s3_store_uri: str) -> None:
    store = open_store(s3_store_uri)
    won: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(store.write(f"a/{n % 2}", b"x" * n, if_absent=True)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 6 + [True] * 2
    with pytest.raises(NotFoundError):
        store.read("a/2")
