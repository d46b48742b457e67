"""The data: the right images whatever their source, damaged files named, bytes kept, batches from (seed, step).

The subsets that ship with the package are always there; what needs the full Fashion-MNIST is skipped where it is not
installed.
"""

import gzip
import hashlib
import http.client
import shutil
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_minimal import data
from ldm_minimal.data import DataError, batch_index, class_ids, load, to_float, to_uint8

SUBSET, DIGITS = data.ASSETS / "fashion-mnist-subset", data.ASSETS / "mnist-subset"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
NAMES = [name for pair in data.FILES.values() for name in pair]
complete = all((SYSTEM / name).is_file() for name in NAMES)
with_full_set = pytest.mark.skipif(not complete, reason="no full Fashion-MNIST here")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No LDM_DATA, an empty cache, no network, nothing on the system; gives the folder that stands for the system's."""
    def path(*parts):
        return tmp_path / "system" if parts == ("/usr/share/datasets",) else Path(*parts)

    monkeypatch.delenv("LDM_DATA", raising=False)
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "fetch", lambda name, folder: False)
    monkeypatch.setattr(data, "Path", path)
    return tmp_path


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """A copy of the subset that LDM_DATA points at, to be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(SUBSET, folder)
    monkeypatch.setenv("LDM_DATA", str(folder))
    return folder


@pytest.fixture(scope="module")
def subset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(SUBSET))
        return load(split="train"), load(split="test")


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(DIGITS))
        return load("mnist", "train"), load("mnist", "test")


@pytest.fixture(scope="module")
def full():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(SYSTEM))
        return load(split="train"), load(split="test")


def give(folder, source=SUBSET):
    shutil.copytree(source, folder)
    return folder


# --- the images ------------------------------------------------------------------------------------------------------


def test_the_bundled_subset_holds_ten_balanced_classes(subset):
    for part, n in zip(subset, (10_000, 2_000)):
        assert part.images.shape == (n, 1, 28, 28) and part.images.dtype == torch.uint8
        assert part.labels.shape == (n,) and part.labels.dtype == torch.int64 and len(part) == n
        assert part.labels.bincount().tolist() == [n // 10] * 10
        assert part.name == "fashion-mnist" and len(part.classes) == 10


def test_the_bundled_digits_are_balanced_and_have_about_mnists_mean_and_standard_deviation(digits):
    for part, n in zip(digits, (4_000, 1_000)):
        assert part.images.shape == (n, 1, 28, 28) and part.labels.bincount().tolist() == [n // 10] * 10
        assert part.name == "mnist" and part.classes == tuple("0123456789")
    pixels = digits[0].images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=0.005)
    assert pixels.std().item() == pytest.approx(0.3081, abs=0.005)


def test_the_subsets_pixels_have_about_the_mean_and_standard_deviation_of_the_full_set(subset):
    pixels = subset[0].images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.2860, abs=0.005)
    assert pixels.std().item() == pytest.approx(0.3530, abs=0.005)


def test_labels_belong_to_their_images(digits, subset):
    for train, test in (digits, subset):
        centres = torch.stack([train.images[train.labels == c].double().mean(0).flatten() for c in range(10)])
        nearest = torch.cdist(test.images.double().flatten(1), centres).argmin(1)
        assert (nearest == test.labels).double().mean() > 0.6  # the nearest class mean is right for 7 or 8 of 10 images


def test_the_subsets_images_are_the_right_way_up(subset):
    images, labels = subset[0].images.double().mean(1), subset[0].labels
    trousers = images[labels == 1].mean(0)  # two legs: darker between them, below the middle
    assert trousers[20:, 13:15].mean() < 0.5 * trousers[20:, 9:12].mean()
    assert trousers[2:6, 13:15].mean() > 100
    sneakers = images[labels == 7].mean(0)  # toes to the left, soles below
    assert sneakers[16:20].mean() > 5 * sneakers[2:6].mean()
    boots = images[labels == 9].mean(0)
    assert boots[3:8, 14:24].mean() > 2 * boots[3:8, :10].mean()  # the shaft is at the heel's side, the right


def test_no_image_of_a_subset_occurs_twice_and_none_is_in_both_parts(subset, digits):
    for parts, n in ((subset, 12_000), (digits, 5_000)):
        seen = [image.tobytes() for part in parts for image in part.images.numpy()]
        assert len(set(seen)) == len(seen) == n


def test_a_dataset_carries_the_checksum_of_its_images(subset):
    for part in subset:
        assert part.sha256 == hashlib.sha256(part.images.numpy().tobytes()).hexdigest()


@with_full_set
def test_the_full_set_has_the_known_mean_and_standard_deviation(full):
    train, test = full
    pixels = train.images.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.2860, 0.3530)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10 and test.labels.bincount().tolist() == [1000] * 10


@with_full_set
def test_no_image_of_the_full_set_occurs_twice_and_none_is_in_both_parts(full):
    seen = {image.tobytes() for part in full for image in part.images.numpy()}
    assert len(seen) == 70_000


@with_full_set
def test_the_subset_is_the_first_images_of_each_class_of_the_full_set_bit_for_bit(subset, full):
    for mine, whole, each in zip(subset, full, (1000, 200)):
        places = torch.cat([(whole.labels == c).nonzero()[:each, 0] for c in range(10)]).sort().values
        assert torch.equal(mine.images, whole.images[places]) and torch.equal(mine.labels, whole.labels[places])


# --- where they are found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bundled", [("fashion-mnist", SUBSET), ("mnist", DIGITS)])
def test_the_folders_are_asked_in_the_documented_order(alone, monkeypatch, name, bundled):
    fetched = []

    def fetch(name, folder):
        fetched.append(folder)
        return bool(give(folder))

    cache, system, mine = (alone / place / name for place in ("cache", "system", "mine"))
    assert data.find(name)[0] == bundled
    give(system)
    assert data.find(name)[0] == system
    give(cache)
    assert data.find(name)[0] == cache
    monkeypatch.setenv("LDM_DATA", str(give(mine)))
    assert data.find(name)[0] == mine and str(mine) in data.find(name)[1]
    monkeypatch.delenv("LDM_DATA"), monkeypatch.setattr(data, "fetch", fetch)
    shutil.rmtree(system), shutil.rmtree(cache)
    assert data.find(name, download=False)[0] == bundled and not fetched
    for _ in range(2):  # the second time it is there already
        assert data.find(name)[0] == cache and fetched == [cache]


@pytest.mark.parametrize("name, n", [("fashion-mnist", 10_000), ("mnist", 4_000)])
def test_without_any_full_copy_the_bundled_subset_is_taken_and_the_source_says_so(alone, name, n):
    found = load(name)
    assert len(found) == n and "subset that ships with the package" in found.source


def test_ldm_data_may_hold_the_files_or_a_folder_of_the_data_sets_name(alone, monkeypatch):
    give(alone / "all" / "fashion-mnist")
    for folder in (alone / "all", alone / "all" / "fashion-mnist"):
        monkeypatch.setenv("LDM_DATA", str(folder))
        assert data.find("fashion-mnist")[0] == alone / "all" / "fashion-mnist"


def test_ldm_data_without_the_files_is_an_error_that_names_folder_files_and_remedy(alone, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(alone / "nowhere"))
    with pytest.raises(DataError) as error:
        load()
    for part in (str(alone / "nowhere"), *NAMES, "unset LDM_DATA"):
        assert part in str(error.value)


@pytest.mark.parametrize("missing", NAMES)
def test_one_missing_file_is_noticed(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(DataError, match=missing):
        load()


def test_mnist_where_ldm_data_has_none_is_an_error_with_the_remedy(alone, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(alone))
    with pytest.raises(DataError) as error:
        load("mnist")
    for part in ("mnist is not there", *NAMES, str(alone), "Put them there", "unset LDM_DATA"):
        assert part in str(error.value)


@pytest.mark.parametrize("name, split", [("cifar10", "train"), ("fashion-mnist", "validation"), ("", "test")])
def test_an_unknown_data_set_or_split_is_refused_and_the_known_ones_are_named(name, split):
    with pytest.raises(ValueError) as error:
        load(name, split)
    assert not isinstance(error.value, DataError)
    for part in (repr(name), repr(split), "fashion-mnist", "mnist", "train", "test"):
        assert part in str(error.value)


# --- damaged files ---------------------------------------------------------------------------------------------------


def refused(copied, name, split="test"):
    with pytest.raises(DataError) as error:
        load(split=split)
    assert str(copied / name) in str(error.value) and "Delete it" in str(error.value) and "LDM_DATA" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("keep", [0, 7, 300, -1], ids=["empty", "header only", "cut off", "last byte missing"])
def test_a_truncated_file_is_named(copied, name, keep):
    (copied / name).write_bytes((copied / name).read_bytes()[:keep])
    message = refused(copied, name)
    assert "not a complete gzip file" in message or keep == 0  # gzip takes an empty file for empty contents


@pytest.mark.parametrize("place", [0, 30, 5000, -6], ids=["magic", "start", "middle", "checksum"])
def test_an_altered_byte_is_noticed(copied, place):
    packed = bytearray((copied / NAMES[2]).read_bytes())
    packed[place] ^= 0x10
    (copied / NAMES[2]).write_bytes(packed)
    refused(copied, NAMES[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_value_in_an_intact_gzip_file_is_noticed(copied, name):
    content = bytearray(gzip.decompress((copied / name).read_bytes()))
    content[-1] ^= 1
    (copied / name).write_bytes(gzip.compress(bytes(content), 1))
    refused(copied, name, "train" if name.startswith("train") else "test")


@pytest.mark.parametrize("other", [NAMES[0], NAMES[3]], ids=["training images", "labels"])
def test_another_file_under_that_name_is_noticed(copied, other):
    shutil.copy(copied / other, copied / NAMES[2])
    refused(copied, NAMES[2])


@pytest.mark.parametrize("content", [b"<html>404</html>", gzip.compress(b""), gzip.compress(b"\0\0\x08\x01\0\0\0\0")])
def test_something_else_under_that_name_is_noticed(copied, content):
    (copied / NAMES[2]).write_bytes(content)
    refused(copied, NAMES[2])


def test_a_repacked_file_with_the_same_contents_is_accepted(copied, subset):
    packed = (copied / NAMES[2]).read_bytes()
    repacked = gzip.compress(gzip.decompress(packed), 1)
    assert repacked != packed
    (copied / NAMES[2]).write_bytes(repacked)
    assert torch.equal(load(split="test").images, subset[1].images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_not_taken_for_mnist_nor_mnist_for_fashion_mnist(monkeypatch, split):
    for name, folder in (("mnist", SUBSET), ("fashion-mnist", DIGITS)):
        monkeypatch.setenv("LDM_DATA", str(folder))
        with pytest.raises(DataError, match=f"not the {name} file"):
            load(name, split)


@with_full_set
def test_images_of_the_full_set_with_labels_of_the_subset_are_refused(copied):
    shutil.copy(SYSTEM / NAMES[2], copied / NAMES[2])  # each file is intact, but they do not belong together
    with pytest.raises(DataError, match="10000.*2000"):
        load(split="test")


# --- the download ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [
    urllib.error.URLError("no network"), TimeoutError("too slow"), RuntimeError("File not found or corrupted."),
    http.client.BadStatusLine("a proxy's nonsense"), http.client.IncompleteRead(b"half"),
], ids=lambda error: type(error).__name__)
def test_a_download_that_fails_gives_up_quietly_and_leaves_nothing(monkeypatch, tmp_path, failure):
    tried = []

    def download_url(url, root, filename, md5):
        tried.append(url)
        (Path(root) / filename).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(data.datasets.utils, "download_url", download_url)
    before = socket.getdefaulttimeout()
    assert data.fetch("fashion-mnist", tmp_path / "cache") is False
    assert tried and not (tmp_path / "cache").exists() and socket.getdefaulttimeout() == before


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_a_download_takes_all_four_files_from_the_first_mirror_that_works_and_checks_them(monkeypatch, tmp_path, name):
    got = {}

    def download_url(url, root, filename, md5):
        assert socket.getdefaulttimeout() is not None  # a dead network must not hang
        if name == "mnist" and url.startswith(data.SOURCES[name].mirrors[0]):
            raise RuntimeError("File not found or corrupted.")
        got[filename] = md5
        (Path(root) / filename).write_bytes(b"")

    monkeypatch.setattr(data.datasets.utils, "download_url", download_url)
    assert data.fetch(name, tmp_path / "cache") is True
    assert got == dict(data.SOURCES[name].resources) and sorted(got) == sorted(NAMES)


def test_a_download_leaves_the_files_that_are_there_and_shows_none_that_is_half_done(monkeypatch, tmp_path):
    mine, seen = tmp_path / NAMES[0], []
    mine.write_bytes(b"a repacked copy, of another checksum")

    def download_url(url, root, filename, md5):
        seen.append(filename)
        assert not (tmp_path / filename).exists()
        (Path(root) / filename).write_bytes(b"half")
        if len(seen) == 3:
            raise TimeoutError("too slow")

    monkeypatch.setattr(data.datasets.utils, "download_url", download_url)
    data.fetch("fashion-mnist", tmp_path)
    assert mine.read_bytes() == b"a repacked copy, of another checksum" and NAMES[0] not in seen and len(seen) >= 3
    assert all(path.name in NAMES for path in tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_no_download(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert data.fetch("mnist", tmp_path / "file" / "cache") is False


# --- bytes and floats ------------------------------------------------------------------------------------------------


def test_every_byte_survives_the_way_to_floats_and_back():
    values = torch.arange(256).to(torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32 and (x[0].item(), x[-1].item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), values)
    torch.testing.assert_close(x.diff(), torch.full((255,), 2 / 255), atol=1e-6, rtol=0)


def test_floats_are_rounded_to_the_nearest_byte_and_not_cut_off():
    levels = torch.arange(256, dtype=torch.float64)
    for shift in (-0.4, 0.4):
        x = ((levels + shift) / 127.5 - 1).float()
        assert torch.equal(to_uint8(x), levels.to(torch.uint8))


def test_floats_beyond_the_range_are_clamped_and_not_wrapped_round():
    x = torch.tensor([-100.0, -1.01, 1.01, 3.0, float("inf"), -float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 255, 0]


def test_half_precision_images_are_rounded_in_float32():
    x = torch.linspace(-1, 1, 500).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_and_of_nothing_before_it():
    forwards = [batch_index(step, 7, 50, seed=3) for step in range(40)]
    data._order.cache_clear()
    backwards = [batch_index(step, 7, 50, seed=3) for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batch_index(77, 7, 50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither used nor moved


def test_changing_a_batch_in_place_does_not_change_the_next_one():
    first = batch_index(0, 7, 50, seed=3)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_index(0, 7, 50, seed=3), kept)


@pytest.mark.parametrize("batch, n", [(7, 50), (10, 50), (50, 50), (1, 5), (26, 50)])
def test_each_epoch_visits_each_image_at_most_once_and_leaves_out_less_than_a_batch(batch, n):
    per_epoch = n // batch
    for epoch in range(4):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = torch.cat([batch_index(step, batch, n, seed=1) for step in steps])
        assert len(seen) == len(seen.unique()) == per_epoch * batch > n - batch
        assert seen.min() >= 0 and seen.max() < n and seen.dtype == torch.int64


def test_epochs_and_seeds_have_different_orders_and_none_is_the_files_order():
    orders = [batch_index(epoch, 50, 50, seed) for seed in range(3) for epoch in range(4)] + [torch.arange(50)]
    assert len({tuple(order.tolist()) for order in orders}) == 13


def test_what_one_epoch_leaves_out_another_takes():
    seen = torch.cat([batch_index(step, 26, 50, seed=0) for step in range(30)])  # 26 of 50 images an epoch
    assert len(seen.unique()) == 50  # a given image is left out of all 30 epochs once in 10^9 orders


@pytest.mark.parametrize("batch", [51, 0, -1])
def test_a_batch_that_cannot_be_filled_is_refused_with_both_numbers(batch):
    with pytest.raises(ValueError) as error:
        batch_index(0, batch, 50, seed=0)
    assert "50" in str(error.value) and str(batch) in str(error.value)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_every_name_in_any_case_is_its_id():
    for i, name in enumerate(data.CLASSES["fashion-mnist"]):
        for spelling in (name, name.lower(), name.upper(), f" {name} "):
            assert class_ids(spelling).tolist() == [i]


def test_the_first_class_goes_by_each_of_its_two_names():
    assert class_ids(["T-shirt", "top", "t-shirt/top", "T-SHIRT", "Shirt"]).tolist() == [0, 0, 0, 0, 6]


@pytest.mark.parametrize("given, expected", [
    (3, [3]), ("3", [3]), ([3, 0, 9], [3, 0, 9]), (["Bag", 8, "8"], [8, 8, 8]), ((1, 2), [1, 2]), ([], []),
    (range(10), list(range(10))), (torch.tensor([4, 5]), [4, 5]), (torch.tensor(6), [6]),
    (torch.tensor([4], dtype=torch.int32), [4]), (np.array([4, 5]), [4, 5]), ([np.int64(7)], [7]), (np.int64(7), [7]),
], ids=str)
def test_ids_digits_lists_and_tensors_are_ids(given, expected):
    ids = class_ids(given)
    assert ids.dtype == torch.int64 and ids.tolist() == expected


def test_mnists_classes_are_its_digits():
    assert class_ids(["7", 0, "3"], "mnist").tolist() == [7, 0, 3]
    with pytest.raises(ValueError, match="Bag"):
        class_ids("Bag", "mnist")


@pytest.mark.parametrize("bad", [
    "Sock", "", "-1", "10", "1.0", "T", "shoe", "²", -1, 10, 1000, True, False, [True], 1.0, [1.0],
    [3, 2.5], None, [None], [[1]],
    torch.tensor([1.0]), torch.tensor([True]), torch.tensor([-1]), torch.tensor([10]), np.array([1.5]), ["Bag", "Sock"],
], ids=str)
def test_what_is_no_class_is_refused_and_the_names_are_listed(bad):
    with pytest.raises(ValueError) as error:
        class_ids(bad)
    assert all(name in str(error.value) for name in data.CLASSES["fashion-mnist"]) and "0 ... 9" in str(error.value)
