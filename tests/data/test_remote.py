"""Object stores: the same images as on the disk, and errors that say what to do within seconds."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources import parquet, webdataset
from pipeline.data.sources.base import is_local_path, open_source
from pipeline.storage import files, stores
from tests.data.pictures import png, write_tar

moto = pytest.importorskip("moto.server", reason="needs moto[server]; pip install -e .[dev]")
boto3 = pytest.importorskip("boto3", reason="needs boto3; pip install -e .[dev]")

KEY, SECRET = "AKIADUMMYDUMMY", "secret-never-to-be-shown"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    store = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    yield f"http://{host}:{port}"
    store.stop()


def forget() -> None:
    """Drop what a process keeps, as a new process would."""
    for cached in (stores._file_system, files._handle, parquet._footer):
        cached.cache_clear()
    parquet._row_groups.clear()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("MANYVIEWS_CACHE", str(tmp_path / "cache"))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def s3(server: str, environment: pytest.MonkeyPatch) -> Iterator[object]:
    environment.setenv("AWS_ENDPOINT_URL", server)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    for item in client.list_objects_v2(Bucket="pictures").get("Contents", []):
        client.delete_object(Bucket="pictures", Key=item["Key"])


def upload(s3: object, folder: Path, prefix: str) -> str:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            s3.upload_file(str(file), "pictures", f"{prefix}/{file.relative_to(folder)}")  # type: ignore[attr-defined]
    s3.put_object(Bucket="pictures", Key=f"{prefix}/", Body=b"")  # type: ignore[attr-defined]  # as consoles make folders
    return f"s3://pictures/{prefix}"


def open_path(path: Path | str, **settings: object) -> ImageDataset:
    return open_source(DataConfig(path=str(path), **settings))


def make_folder(root: Path) -> None:
    for name, value in {"cat/b c+%41?#.png": 1, "cat/ä.JPG": 2, "cat/deep/c.webp": 3, "ant/z.png": 4, "loose.png": 5}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    (root / "notes.txt").write_text("no")
    (root / ".hidden").mkdir()
    (root / ".hidden/x.png").write_bytes(png(6))


def make_parquet(root: Path) -> None:
    root.mkdir()
    for name, first in (("b.parquet", 10), ("a.parquet", 0)):
        cells = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(10)]
        pq.write_table(pa.table({"image": cells, "label": list(range(10))}), root / name, row_group_size=4)
    (root / "README.md").write_text("no")


def make_tars(root: Path) -> None:
    root.mkdir()
    for shard in range(2):
        write_tar(
            root / f"{shard}.tar",
            {f"{i}.{e}": png(100 * shard + i) if e == "png" else b"%d" % i for i in range(20) for e in ("cls", "png")},
        )


@pytest.mark.parametrize("make", [make_folder, make_parquet, make_tars])
def test_a_bucket_holds_the_same_as_the_disk(tmp_path: Path, s3: object, make: object) -> None:
    root = tmp_path / "data"
    make(root)  # type: ignore[operator]
    local, remote = open_path(root), open_path(upload(s3, root, "some/my data") + "/")
    assert remote.fingerprint == local.fingerprint and remote.class_names == local.class_names
    assert remote.labels.tolist() == local.labels.tolist() and remote.spans.tolist() == local.spans.tolist()
    remote = pickle.loads(pickle.dumps(remote))
    forget()
    ids = [*range(len(local) - 1, -1, -1), 0]
    here, there = local.read(ids), remote.read(ids)
    assert [row[:3] for row in there] == [row[:3] for row in here] and all(row.image for row in here)
    assert [row.path.removeprefix("s3://pictures/some/my data") for row in there] == [row.path.removeprefix(str(root)) for row in here]
    assert [path.removeprefix("s3://pictures/some/my data") for path, _ in remote.skipped] == [
        path.removeprefix(str(root)) for path, _ in local.skipped
    ]


def test_a_whole_bucket(s3: object) -> None:
    for key in ("a/x.png", "b/y.png", "z.png"):
        s3.put_object(Bucket="pictures", Key=key, Body=png(ord(key[0])))  # type: ignore[attr-defined]
    for path in ("s3://pictures", "s3://pictures/"):
        dataset = open_path(path)
        assert dataset.class_names == ["a", "b"] and [row.image for row in dataset.read([0, 1, 2])] == [png(ord(c)) for c in "abz"]
        assert dataset.path(0) == "s3://pictures/a/x.png"


@pytest.mark.parametrize("make", [make_parquet, make_tars])
def test_one_object_and_a_pattern(tmp_path: Path, s3: object, make: object) -> None:
    root = tmp_path / "data"
    make(root)  # type: ignore[operator]
    uri = upload(s3, root, "one")
    name = sorted(file.name for file in root.iterdir() if file.suffix in (".tar", ".parquet"))[1]
    for path in (f"{uri}/{name}", f"{uri}/{name[0]}*"):
        assert open_path(path).read([3])[0].image == open_path(root / name).read([3])[0].image
        assert open_path(path).fingerprint == open_path(root / name).fingerprint


def test_a_bucket_is_listed_once(tmp_path: Path, s3: object) -> None:
    make_folder(tmp_path / "data")
    uri = upload(s3, tmp_path / "data", "once")
    system, _ = stores.at(uri, files.OPEN_ATTEMPTS)
    asked: list[object] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            asked.append(name)
            return getattr(system, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_file_system", lambda *_: Counting())
        assert len(open_path(uri)) == 5
    assert asked == ["get_file_info", "get_file_info"]  # what the path is, and what lies below it


def test_the_index_of_a_shard_is_kept(tmp_path: Path, s3: object, environment: pytest.MonkeyPatch) -> None:
    make_tars(tmp_path / "data")
    uri = upload(s3, tmp_path / "data", "kept")
    made: list[str] = []
    original = webdataset._index
    environment.setattr(webdataset, "_index", lambda path: made.append(path) or original(path))
    first = open_path(uri)
    again = open_path(uri)
    assert sorted(made) == [f"{uri}/0.tar", f"{uri}/1.tar"]
    assert again.fingerprint == first.fingerprint and again.read(range(40)) == first.read(range(40)) and again.skipped == first.skipped
    for kept in (tmp_path / "cache/tars").iterdir():
        kept.write_text(kept.read_text()[:-20])  # cut short
    write_tar(tmp_path / "data/1.tar", {"new.png": png(7)})
    upload(s3, tmp_path / "data", "kept")
    assert [row.image for row in open_path(uri).read([0, 20])] == [png(0), png(7)] and len(made) == 4


def test_reads_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(part: files.Part) -> bytes:
        time.sleep(0.1)
        return part.path.encode()

    monkeypatch.setattr(files, "_read_remote", slow)
    begin = time.perf_counter()
    parts = [files.Part(f"s3://b/{i}") for i in range(2 * files.THREADS)]
    assert files.read_all(parts) == [part.path.encode() for part in parts]
    assert time.perf_counter() - begin < 0.1 * files.THREADS


@pytest.mark.parametrize("make", [make_folder, make_parquet, make_tars])
def test_a_deleted_object_is_a_bad_image(tmp_path: Path, s3: object, make: object) -> None:
    root = tmp_path / "data"
    make(root)  # type: ignore[operator]
    dataset = open_path(upload(s3, root, "gone"))
    victim = dataset.path(0).partition("#")[0].removeprefix("s3://pictures/") if make is not make_folder else "gone/ant/z.png"
    s3.delete_object(Bucket="pictures", Key=victim)  # type: ignore[attr-defined]
    forget()
    first, last = dataset.read([0, len(dataset) - 1])
    assert first.image == b"" and last.image != b""


def test_training_goes_on_past_a_deleted_object(tmp_path: Path, s3: object) -> None:
    from methods.parts.views import CropGroup
    from pipeline.data.crop_task import make_crops

    make_folder(tmp_path / "data")
    dataset = open_path(upload(s3, tmp_path / "data", "gone"))
    s3.delete_object(Bucket="pictures", Key="gone/ant/z.png")  # type: ignore[attr-defined]
    columns = make_crops(dataset.read([0, 4]), 0, {"global": CropGroup(count=1, size=8)}, 0, 1)
    assert columns["planned"].tolist() == [0, 4] and columns["id"].tolist() == [4, 4] and columns["reason"][0]


def test_a_store_that_stops_answering_is_no_bad_image(tmp_path: Path, s3: object, environment: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "data")
    dataset = open_path(upload(s3, tmp_path / "data", "down"))
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    environment.setattr(files, "READ_ATTEMPTS", 1)
    with pytest.raises(OSError, match="cannot be read") as caught:
        dataset.read([0])
    assert not isinstance(caught.value, FileNotFoundError) and SECRET not in str(caught.value)


# ---------------------------------------------------------------------------- errors


def refused(path: str, within_s: float = 20.0) -> str:
    begin = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        open_path(path)
    words = str(caught.value)
    assert time.perf_counter() - begin < within_s
    assert "\n" not in words and ";" in words and SECRET not in words and KEY not in words
    assert caught.value.__cause__ is None
    return words


def test_wrong_names(s3: object) -> None:
    assert "s3://no-such-bucket/x: there is no such bucket" in refused("s3://no-such-bucket/x")
    assert "nothing of this name" in refused("s3://pictures/nowhere")
    assert "nothing of this name" in refused("s3://pictures/nowhere.parquet")
    assert "options after ? are not read" in refused("s3://pictures/nowhere?region=eu-west-1")
    assert "use s3://, gs://, hf://" in refused("wasb://x/y")
    assert "names no bucket" in refused("s3://") and "names no bucket" in refused("s3:///x")


def test_what_lies_there_is_no_data(s3: object) -> None:
    for key in ("text/a.txt", "bad/a.parquet", "tar/a.tar"):
        s3.put_object(Bucket="pictures", Key=key, Body=b"no data of any kind")  # type: ignore[attr-defined]
    assert "no images among a.txt" in refused("s3://pictures/text")
    assert "must be .parquet or .tar" in refused("s3://pictures/text/a.txt")
    assert "s3://pictures/bad/a.parquet: not a readable Parquet file" in refused("s3://pictures/bad")
    assert "s3://pictures/tar/a.tar: not a readable tar file" in refused("s3://pictures/tar")


def test_no_rights(server: str, s3: object) -> None:
    import urllib.request

    s3.put_object(Bucket="pictures", Key="a/x.png", Body=png(1))  # type: ignore[attr-defined]
    dataset = open_path("s3://pictures/a")

    def let(calls: int) -> None:
        request = urllib.request.Request(f"{server}/moto-api/reset-auth", str(calls).encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()

    let(0)  # from now on every key is unknown
    try:
        assert "may not be read with the credentials found; set AWS_ACCESS_KEY_ID" in refused("s3://pictures/a")
        with pytest.raises(OSError, match=r"s3://pictures/a/x\.png: cannot be read") as caught:
            dataset.read([0])  # credentials that expire do not make images bad
        assert SECRET not in str(caught.value) and KEY not in str(caught.value)
    finally:
        let(10**9)


def test_unreachable_store(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "does not answer; check the network, and AWS_ENDPOINT_URL" in refused("s3://pictures/a")


def test_the_endpoint_of_s3_alone_goes_first(server: str, s3: object, environment: pytest.MonkeyPatch) -> None:
    s3.put_object(Bucket="pictures", Key="a/x.png", Body=png(1))  # type: ignore[attr-defined]
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    environment.setenv("AWS_ENDPOINT_URL_S3", server)
    assert len(open_path("s3://pictures/a")) == 1


def test_a_public_bucket_needs_no_credentials(s3: object, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3.put_object(Bucket="pictures", Key="a/x.png", Body=png(1), ACL="public-read")  # type: ignore[attr-defined]
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    environment.setenv("HOME", str(tmp_path))
    assert open_path("s3://anonymous@pictures/a").read([0])[0].image == png(1)


def test_credentials_inside_a_uri_are_refused() -> None:
    words = refused(f"s3://{KEY}:{SECRET}@pictures/a")
    assert "holds credentials" in words and "AWS_PROFILE" in words


def test_secrets_in_an_answer_are_hidden(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught, files.explained("s3://b/x"):
        raise OSError(f"strange answer about {KEY} and {SECRET} (Request ID: 123)\nmore")
    assert "strange answer about *** and ***)" in str(caught.value)


def test_the_command_line_says_it_and_returns_2(s3: object, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import manyviews

    code = manyviews.main(["pretrain", "swav-small", "--data.path", "s3://no-such-bucket/x", "--runs-dir", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: data.path=s3://no-such-bucket/x: there is no such bucket") and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_doctor_looks_into_a_bucket(s3: object, tmp_path: Path) -> None:
    from pipeline.doctor.report import diagnose

    def look(path: str) -> dict[str, tuple[str, str, str]]:
        checks = diagnose(data=DataConfig(path=path), runs_dir=tmp_path, ray=False)
        return {check.name: (check.ok, check.found, check.remedy) for check in checks}

    make_folder(tmp_path / "data")
    good = look(upload(s3, tmp_path / "data", "some"))
    assert good["data"][0] == "ok" and good["data"][1].startswith("5 images, 4 labelled in 2 classes") and good["decode"][0] == "ok"
    bad = look("s3://no-such-bucket/x")["data"]
    assert bad[:2] == ("fail", "data.path=s3://no-such-bucket/x") and bad[2].startswith("there is no such bucket")


# ---------------------------------------------------------------------------- paths and the hub


def test_which_paths_are_local() -> None:
    assert all(is_local_path(path) for path in ("photos", "/data/x.parquet", "~/patches", "./cifar10", "a:b"))
    assert not any(is_local_path(path) for path in ("patches", "patches:pixels=24", "cifar10:split=test", "s3://b/x", "hf://datasets/a/b"))


def test_prepare_leaves_uris_and_names_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipeline.build import with_absolute_paths
    from pipeline.config import override
    from pipeline.recipes import load_recipe

    monkeypatch.chdir(tmp_path)
    for path, kept in {"s3://b/x": "s3://b/x", "cifar10": "cifar10", "photos": str(tmp_path / "photos")}.items():
        config = with_absolute_paths(override(load_recipe("swav-small"), {"data.path": path, "evaluate.path": path}))
        assert config.data.path == config.evaluate.path == kept


@pytest.fixture
def hub(tmp_path: Path, environment: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the hub's own file system."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    environment.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(tmp_path / "hub"), LocalFileSystem()))
    root = tmp_path / "hub/datasets/owner/name"
    (root / "data").mkdir(parents=True)
    make_parquet(tmp_path / "data")
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        shutil.copy(tmp_path / "data" / ("a.parquet" if name[1] == "r" else "b.parquet"), root / f"data/{name}.parquet")
    (root / "README.md").write_text("no")
    return root


def test_a_data_set_of_the_hub(hub: Path, tmp_path: Path) -> None:
    train = open_path("hf://datasets/owner/name")
    local = open_path(tmp_path / "data/a.parquet")
    assert len(train) == 10 and train.labels.tolist() == local.labels.tolist()
    assert [row[:3] for row in train.read(range(10))] == [row[:3] for row in local.read(range(10))]
    assert train.test_path == "hf://datasets/owner/name/data/test-*"
    test = open_path(train.test_path)
    assert [row.image for row in test.read([0, 9])] == [png(10), png(19)] and test.test_path is None
    assert open_path("hf://datasets/owner/name/data").fingerprint != test.fingerprint
    assert len(open_path("hf://datasets/owner/name/data/test-00000-of-00001.parquet")) == 10


def test_errors_of_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing of this name" in refused("hf://datasets/owner/other")
    assert "use hf://datasets/OWNER/NAME" in refused("hf://owner/name")
    (hub / "more").mkdir()
    shutil.copy(tmp_path / "data/a.parquet", hub / "more/a.parquet")
    assert "give one of data, more" in refused("hf://datasets/owner/name")
    shutil.rmtree(hub / "more")
    shutil.rmtree(hub / "data")
    assert "try hf://datasets/owner/name@refs/convert/parquet" in refused("hf://datasets/owner/name")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    forget()
    assert refused("hf://datasets/owner/name").endswith("-m pip install huggingface_hub")
