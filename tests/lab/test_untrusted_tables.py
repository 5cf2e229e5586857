"""Which columns of a table are meant, what its classes are, and whether the two splits agree: right, or refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import DataError, sources
from tests.lab.test_cli import invoke

SIDE = 4


def png(grey: int) -> bytes:
    """An image of one grey, by which it is known again."""
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": png(start + i), "path": None} for i in range(n)]


def greys(images: torch.Tensor) -> list[int]:
    return [int(x) for x in (images[:, 0, 0, 0] * 255).round()]


def described(columns: dict[str, Any], **features: Any) -> pyarrow.Table:
    """A table with Hugging Face's description of some columns."""
    table = pyarrow.table(columns)
    noted = datasets.Features(datasets.Features.from_arrow_schema(table.schema) | features).to_dict()
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": noted}})})


def labelled(labels: list[Any], names: list[str], **columns: list[Any]) -> pyarrow.Table:
    """A table in the Hub's schema."""
    columns = {"image": pictures(len(labels)), **columns, "label": labels}
    return described(columns, image=datasets.Image(), label=datasets.ClassLabel(names=names))


def plain(labels: Any, **columns: Any) -> pyarrow.Table:
    """A table that says nothing of its columns."""
    return pyarrow.table({"image": pictures(len(labels)), **columns, "label": labels})


def write(folder: Path, train: pyarrow.Table, test: pyarrow.Table | None = None) -> Path:
    (folder / "odd").mkdir(parents=True, exist_ok=True)
    for split, table in (("train", train), ("test", train if test is None else test)):
        pyarrow.parquet.write_table(table, folder / "odd" / f"{split}.parquet")
    return folder


TRAIN = [2, 0, 1, 2]
NAMES = ["ant", "bee", "cat"]
LABELS: dict[str, tuple[pyarrow.Table, tuple[str, ...], list[int]]] = {
    "ClassLabel": (labelled(TRAIN, NAMES), ("ant", "bee", "cat"), TRAIN),
    "ClassLabel, not sorted": (labelled(TRAIN, ["c", "a", "b"]), ("c", "a", "b"), TRAIN),
    "ClassLabel, a class without rows": (labelled([0, 2], NAMES), ("ant", "bee", "cat"), [0, 2]),
    "integers": (plain(TRAIN), ("0", "1", "2"), TRAIN),
    "integers from 1": (plain([3, 1, 2]), ("1", "2", "3"), [2, 0, 1]),
    "integers with gaps": (plain([10, 9, 100]), ("9", "10", "100"), [1, 0, 2]),
    "8-bit integers": (plain(pyarrow.array(TRAIN, pyarrow.int8())), ("0", "1", "2"), TRAIN),
    "unsigned integers": (plain(pyarrow.array([2**64 - 1, 0], pyarrow.uint64())), ("0", str(2**64 - 1)), [1, 0]),
    "strings": (plain(["cat", "ant", "bee", "cat"]), ("ant", "bee", "cat"), TRAIN),
    "strings of digits": (plain(["10", "9"]), ("10", "9"), [0, 1]),
    "large strings": (plain(pyarrow.array(["b", "a"], pyarrow.large_string())), ("a", "b"), [1, 0]),
    "a pandas category": (plain(pyarrow.array(["b", "a", "b"]).dictionary_encode()), ("a", "b"), [1, 0, 1]),
    "a category of integers": (plain(pyarrow.array([7, 3]).dictionary_encode()), ("3", "7"), [1, 0]),
    "booleans": (plain([True, False]), ("False", "True"), [1, 0]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind(tmp_path: Path, kind: str) -> None:
    table, classes, numbers = LABELS[kind]
    loaded = data.load("odd", write(tmp_path, table))
    assert loaded.classes == classes
    for split in (loaded.train, loaded.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == numbers
        assert greys(split.images) == list(range(len(numbers)))


@pytest.mark.parametrize("labels", [[2, 0, 1], ["cat", "ant", "bee"]])
@pytest.mark.parametrize("index", [None, [7, 8, 9], ["x", "y", "z"]])
def test_what_pandas_writes(tmp_path: Path, labels: list[Any], index: list[Any] | None) -> None:
    """Its index is a column too, and no class."""
    frame = pandas.DataFrame({"image": [png(i) for i in range(3)], "label": labels}, index=index)
    unnamed = frame.rename(columns={"label": "kind"})
    (tmp_path / "odd").mkdir()
    for written in (frame, unnamed):
        for split in ("train", "test"):
            written.to_parquet(tmp_path / "odd" / f"{split}.parquet")
        loaded = data.load("odd", tmp_path)
        assert loaded.classes == tuple(str(label) for label in sorted(labels))
        assert loaded.train.labels.tolist() == [2, 0, 1]
        assert greys(loaded.train.images) == [0, 1, 2]


AGREE: dict[str, tuple[pyarrow.Table, pyarrow.Table, list[int]]] = {
    "names in another order": (labelled([0, 1, 2], NAMES), labelled([0, 1, 2], ["cat", "bee", "ant"]), [2, 1, 0]),
    "fewer names": (labelled([0, 1, 2], NAMES), labelled([0, 1], ["bee", "cat"]), [1, 2]),
    "one more name, without rows": (labelled([0, 1, 2], NAMES), labelled([1, 3], ["a", "ant", "b", "cat"]), [0, 2]),
    "a class that only train has": (plain(["ant", "bee", "cat"]), plain(["cat", "bee"]), [2, 1]),
    "integers that only train has": (plain([3, 5, 4]), plain([5, 5]), [2, 2]),
    "strings and large strings": (plain(["b", "a"]), plain(pyarrow.array(["b"], pyarrow.large_string())), [1]),
}


@pytest.mark.parametrize("kind", AGREE)
def test_the_tests_classes_are_found_by_name(tmp_path: Path, kind: str) -> None:
    train, test, numbers = AGREE[kind]
    loaded = data.load("odd", write(tmp_path, train, test))
    assert len(loaded.classes) == 3 or kind == "strings and large strings"
    assert loaded.test.labels.tolist() == numbers


BAD_LABELS: dict[str, tuple[pyarrow.Table, pyarrow.Table, str]] = {
    "hidden": (labelled([0, 1], NAMES), labelled([0, -1], NAMES), "test.parquet.*row 1 .*class is -1, .*take a split"),
    "hidden integers": (plain([0, 1]), plain([-1, -1]), "test.parquet, column 'label', row 0 .*class is -1"),
    "hidden in train": (plain([0, -100]), plain([0, 1]), "train.parquet, column 'label', row 1 .*class is -100"),
    "out of range": (
        labelled([0, 3], NAMES),
        labelled([0], NAMES),
        "train.parquet.*row 1 .*class is 3, .*names the classes 0 to 2 .'ant', 'bee', 'cat'.. Name all of them",
    ),
    "out of the test's range": (labelled([0], NAMES), labelled([9], NAMES), "test.parquet.*row 0 .*class is 9"),
    "another name": (
        labelled([0], NAMES),
        labelled([0, 2], ["ant", "bee", "dog"]),
        "test.parquet, column 'label', row 1 .*class 'dog' is none of those of .*train.parquet.*'ant', 'bee', 'cat'",
    ),
    "numbers for names": (labelled([0], NAMES), labelled([1], ["0", "1", "2"]), "class '1' is none of those of"),
    "another string": (plain(["ant", "bee"]), plain(["bee", "dog"]), "row 1 .*class 'dog' is none of .*'ant', 'bee'"),
    "a string with a space": (plain(["ant"]), plain(["ant "]), "class 'ant ' is none of .*'ant'"),
    "another integer": (plain([0, 2]), plain([0, 1]), "row 1 .*class '1' is none of .*'0', '2'"),
    "many classes": (plain(list(range(20))), plain([20]), r"'0', '1', .*'7', … \(20\)"),
    "null": (labelled([0, 1], NAMES), labelled([0, None], NAMES), "row 1 .*there is no class .None.. Leave such rows"),
    "null integer": (plain([0, None]), plain([0]), "train.parquet.*row 1 .*no class .None"),
    "null string": (plain(["a"]), plain(["a", None]), "test.parquet.*row 1 .*no class .None"),
    "empty string": (plain(["a", ""]), plain(["a"]), "train.parquet.*row 1 .*no class .''"),
    "all null": (plain([0, 1]), plain([None, None]), "test.parquet needs a column 'label' of classes"),
    "integers and strings": (
        plain([0, 1]),
        plain(["0", "1"]),
        "plain integers in .* and plain strings in .*both alike",
    ),
    "named and plain": (labelled([0], NAMES), plain([0]), "has ClassLabel in .*train.* plain integers in .*test"),
    "floats": (
        plain([0.0, 1.0]),
        plain([0.0]),
        "train.parquet.*needs a ClassLabel column, or one of integers .*double",
    ),
    "lists": (plain([[0], [1]]), plain([[0]]), "train.parquet.*needs a ClassLabel column, .*'label' .list<"),
    "empty train": (plain([0])[:0], plain([0]), "train.parquet has no rows"),
    "empty test": (plain([0]), plain([0])[:0], "test.parquet has no rows"),
    "no label in the test": (plain([0]), plain([0]).drop(["label"]), "test.parquet needs a column 'label' of classes"),
    "no image in the test": (plain([0]), plain([0]).drop(["image"]), "test.parquet needs a column 'image' of images"),
    "no label": (plain([0]).drop(["label"]), plain([0]), "train.parquet.*needs a ClassLabel column.*has 'image'"),
    "no image": (
        plain([0]).drop(["image"]),
        plain([0]),
        "train.parquet.*needs an Image column, and has 'label' .int64",
    ),
    "pixels as numbers": (
        pyarrow.table({"image": [[0.5, 0.2]], "label": [0]}),
        plain([0]),
        "train.parquet.*needs an Image column, and has 'image' .list<",
    ),
    "two columns of one name": (
        pyarrow.Table.from_arrays([pyarrow.array(pictures(1))] * 2 + [pyarrow.array([0])], ["image", "image", "label"]),
        plain([0]),
        "has two columns that are called 'image': rename one",
    ),
    "a broken description": (
        plain([0]).replace_schema_metadata({"huggingface": '{"info": {"features": {"image": {"_type": "Picture"}}}}'}),
        plain([0]),
        "train.parquet: the description of its columns .*cannot be read",
    ),
    "no JSON": (
        plain([0]),
        plain([0]).replace_schema_metadata({"huggingface": "{"}),
        "test.parquet: the description of its columns .*cannot be read",
    ),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_what_does_not_agree_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    train, test, message = BAD_LABELS[kind]
    with pytest.raises(DataError, match=message):
        data.load("odd", write(tmp_path, train, test))


def masks(n: int) -> list[dict[str, Any]]:
    return pictures(n, start=100)


PICTURE = {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
IMAGES: dict[str, pyarrow.Table] = {
    "masks first": described({"mask": masks(3), "image": pictures(3), "label": [0, 1, 2]}, **PICTURE),
    "masks last": described({"image": pictures(3), "mask": masks(3), "label": [0, 1, 2]}, **PICTURE),
    "called img": described(
        {"mask": masks(3), "img": pictures(3), "label": [0, 1, 2]},
        mask=PICTURE["mask"], img=datasets.Image(), label=PICTURE["label"],
    ),
    "called so by nobody else": described(
        {"sum": [b"x"] * 3, "picture": pictures(3), "label": [0, 1, 2]},
        picture=datasets.Image(), label=PICTURE["label"],
    ),
    "masks first, without description": pyarrow.table({"mask": masks(3), "image": pictures(3), "label": [0, 1, 2]}),
    "bytes": pyarrow.table({"label": [0, 1, 2], "picture": [png(i) for i in range(3)]}),
    "large bytes": pyarrow.table({
        "label": [0, 1, 2], "x": pyarrow.array([png(i) for i in range(3)], pyarrow.large_binary()),
    }),
    "only the masks are described": described(
        {"mask": masks(3), "image": [png(i) for i in range(3)], "label": [0, 1, 2]}, mask=datasets.Image()
    ),
    "other columns": plain([0, 1, 2], file=["a", "b", "c"], number=[5, 6, 7]),
    "another ClassLabel first": described(
        {"image": pictures(3), "writer": [2, 2, 2], "label": [0, 1, 2]},
        image=datasets.Image(), writer=PICTURE["label"], label=PICTURE["label"],
    ),
    "a ClassLabel among integers": described(
        {"number": [5, 6, 7], "image": pictures(3), "kind": [0, 1, 2]},
        image=datasets.Image(), kind=PICTURE["label"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_the_columns_that_are_meant(tmp_path: Path, kind: str) -> None:
    loaded = data.load("odd", write(tmp_path, IMAGES[kind]))
    assert greys(loaded.train.images) == [0, 1, 2]
    assert loaded.train.labels.tolist() == [0, 1, 2]


def test_several_columns_are_refused_until_one_is_named(tmp_path: Path) -> None:
    columns = {"left": masks(2), "right": pictures(2), "kind": ["b", "a"], "place": [4, 3]}
    for table in (pyarrow.table(columns), described(columns, left=datasets.Image(), right=datasets.Image())):
        folder = write(tmp_path, table)
        with pytest.raises(DataError, match=r"train\.parquet has several .* 'left', 'right': name .* --image-column"):
            data.load("odd", folder)
        with pytest.raises(DataError, match=r"train\.parquet has several .* 'kind', 'place': name .* --label-column"):
            data.load("odd", folder, image_column="right")
        loaded = data.load("odd", folder, image_column="right", label_column="place")
        assert (greys(loaded.test.images), loaded.classes) == ([0, 1], ("3", "4"))
        loaded = data.load("odd", folder, image_column="left", label_column="kind")
        assert (greys(loaded.test.images), loaded.classes) == ([100, 101], ("a", "b"))
        for options in ({"image_column": "kind"}, {"image_column": "middle"}):
            with pytest.raises(DataError, match=r"--image-column must name .*'(kind|middle)' is not.* It has 'left' "):
                data.load("odd", folder, **options)  # type: ignore[arg-type]
        for column in ("left", "nothing"):
            with pytest.raises(DataError, match=r"--label-column must name .*'(left|nothing)' is not.* It has 'left' "):
                data.load("odd", folder, image_column="left", label_column=column)


def test_the_fine_classes_of_cifar100(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=NAMES)
    columns = {"img": pictures(2), "coarse_label": [0, 0], "fine_label": [1, 2]}
    table = described(columns, img=datasets.Image(), coarse_label=names, fine_label=names)
    write(tmp_path, table)
    shutil.move(tmp_path / "odd", tmp_path / "cifar100")
    assert data.load("cifar100", tmp_path).train.labels.tolist() == [1, 2]
    assert data.load("cifar100", tmp_path, label_column="coarse_label").train.labels.tolist() == [0, 0]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets.load_dataset` gives it, without asking the Hub."""
    monkeypatch.delenv("RELAXPROP_DATA", raising=False)
    for labels in ([0, 2, 1], [0, 2, -1]):
        split = datasets.Dataset(labelled(labels, NAMES))
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, split=split: {"train": split, "test": split})
        sources._from_hub.cache_clear()
        if min(labels) < 0:
            with pytest.raises(
                DataError, match=r"train of huggingface\.co/datasets/ylecun/mnist, .*row 2 .*class is -1"
            ):
                data.load("mnist")
        else:
            loaded = data.load("mnist")
            assert greys(loaded.test.images) == [0, 1, 2]
            assert (loaded.classes, loaded.train.labels.tolist()) == (tuple(NAMES), labels)
    sources._from_hub.cache_clear()


def test_the_mode_that_a_column_asks_for(tmp_path: Path) -> None:
    for mode, shape in (("RGB", (3, SIDE, SIDE)), ("L", (1, SIDE, SIDE)), (None, (1, SIDE, SIDE))):
        table = described({"image": pictures(2), "label": [0, 1]}, image=datasets.Image(mode=mode))
        assert data.load("odd", write(tmp_path, table)).image_shape == shape
    table = described({"image": pictures(2), "label": [0, 1]}, image=datasets.Image(mode="F"))
    with pytest.raises(DataError, match=r"description asks for mode F, .* Pass --colour L or RGB"):
        data.load("odd", write(tmp_path, table))
    assert data.load("odd", tmp_path, colour="L").image_shape == (1, SIDE, SIDE)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20:60] = b"\xff" * 40
    path.write_bytes(content)


def other_encoding(path: Path) -> None:
    table = pyarrow.parquet.read_table(path).drop(["label"])
    labels = pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string())
    pyarrow.parquet.write_table(table.append_column("label", labels), path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pointer": (pointer, "is a Git LFS pointer and not the data: run `git lfs pull`"),
    "half of it": (half, "cannot be read, it is damaged or incomplete .*Fetch the file again"),
    "changed": (changed, "cannot be read, it is damaged or incomplete .*Fetch the file again"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read, it is damaged or incomplete .*Fetch the file again"),
    "a web page": (lambda path: path.write_text("<html>"), "cannot be read, .* no Parquet file.*Fetch the file again"),
    "no UTF-8": (other_encoding, "cannot be read, it is damaged or incomplete .*Fetch the file again"),
    "missing": (lambda path: path.unlink(), r"does not exist: .*must hold odd/train\.parquet and odd/test\.parquet"),
    "a folder": (folder, r"does not exist: .*must hold odd/train\.parquet and odd/test\.parquet"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_data_is_named(tmp_path: Path, kind: str, split: str) -> None:
    damage, message = FILES[kind]
    damage(write(tmp_path, plain(["a", "b"])) / "odd" / f"{split}.parquet")
    with pytest.raises(DataError, match=rf"odd/{split}\.parquet {message}"):
        data.load("odd", tmp_path)


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    first = data.load("odd", write(tmp_path, plain([0, 1])))
    assert data.load("odd", tmp_path) is first
    again = data.load("odd", write(tmp_path, plain([0, 1, 2])))
    assert len(again.train) == 3
    assert again.digest != first.digest


@pytest.mark.parametrize("option", ["image_column", "label_column", "colour"])
@pytest.mark.parametrize("name", ["digits", "docstrings"])
def test_options_without_effect_are_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} has no effect with the data set {name}, leave it out"):
        data.load(name, **{option: "L"})  # type: ignore[arg-type]
    status, text = invoke("train", "--dataset", name, f"--{option.replace('_', '-')}", "L")
    assert status == 2
    assert "no effect" in text


@pytest.mark.parametrize("name", ["my leaves", "leaves 2.0 of-us", "Blätter"])
def test_a_name_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a folder", plain([0, 1] * 8))
    shutil.move(tmp_path / "a folder" / "odd", tmp_path / "a folder" / name)
    status, text = invoke("train", "--dataset", name, "--data-dir", "a folder", "--epochs", "1", "--batch-size", "4")
    assert status == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{name}-mlp-ar-seed0-")
    assert invoke("show", run.name)[0] == 0
    status, text = invoke(
        "convergence", "--dataset", name, "--data-dir", "a folder", "--num-steps", "2", "--step-size", "1"
    )
    assert status == 0
    assert f"figures/convergence-{name}" in text


@pytest.mark.parametrize("command", [("train",), ("convergence",), ("reproduce", "figure1")])
@pytest.mark.parametrize("name", [" leaves", "leaves ", "my  leaves", "a/b", "a:b", "a\nb", "", ".", ".."])
def test_a_name_that_no_run_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
    status, text = invoke(*command, "--dataset", name, "--data-dir", "data")
    assert status == 2
    assert "--dataset" in text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(ValueError, match="data set"):
        data.check_name(name, tmp_path / "data")


def test_the_names_of_runs_that_are_kept() -> None:
    """results/figure1-b-d has this one, whose data set's digest is that of the complete MNIST."""
    kept = RunConfig(dataset="mnist", data="a63d816db5", rule="backprop")
    assert kept.id == "mnist-mlp-backprop-seed0-3c5e23df7e"


def test_what_is_chosen_is_part_of_a_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, pyarrow.table({
        "left": masks(8), "right": pictures(8), "kind": ["b", "a"] * 4, "place": [4, 3, 3, 4] * 2,
    }))  # fmt: skip
    choices = [("left", "kind", None), ("right", "kind", None), ("right", "place", None), ("right", "place", "RGB")]
    for image, label, colour in choices:
        args = ["--image-column", image, "--label-column", label, *(("--colour", colour) if colour else ())]
        args += ["--dataset", "odd", "--data-dir", str(folder), "--epochs", "1", "--batch-size", "4"]
        assert invoke("train", *args)[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == len(choices)
    # Grey images are grey as they are: the same data, and so the same run.
    args = ["--image-column", "right", "--label-column", "place", "--colour", "L", "--batch-size", "4"]
    status, _ = invoke("train", *args, "--dataset", "odd", "--data-dir", str(folder), "--epochs", "1")
    assert status == 0
    assert len(list((tmp_path / "runs").iterdir())) == len(choices)


@pytest.mark.parametrize("command", [("train",), ("convergence",), ("reproduce", "figure1")])
def test_bad_data_end_a_command_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", plain([0, 1]), plain([0, 2]))
    with pytest.raises(DataError, match="class '2' is none of those of"):
        invoke(*command, "--dataset", "odd", "--data-dir", "data")
    assert not list((tmp_path / "runs").glob("*"))
    with pytest.raises(DataError, match="--image-column must name a column"):
        invoke(*command, "--dataset", "odd", "--data-dir", "data", "--image-column", "x")
