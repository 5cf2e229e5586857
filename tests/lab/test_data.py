"""Data sets as they are read, and the models that are built for them."""

from __future__ import annotations

import argparse
import inspect
import math
import string
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from relaxprop import ActivationRelaxation, feedback_alignment
from relaxprop.feedback import FeedbackRule
from relaxprop.lab import data
from relaxprop.lab.data import DataError
from relaxprop.lab.models import Part, build, memory_format
from tests.lab.conftest import write_split


def test_digits_are_scikit_learns_real_digits() -> None:
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.classes == tuple("0123456789")
    everything = torch.cat((digits.train.images, digits.test.images))
    assert everything.min() == 0
    assert everything.max() == 1
    # Every class has its share in both splits.
    assert (digits.test.labels.bincount() >= 34).all()


def test_docstrings_are_the_standard_librarys_own_text() -> None:
    text = data.load("docstrings")
    assert text.classes == tuple(sorted(string.printable))
    everything = torch.cat([text.train.images, text.test.images]).flatten().tolist()
    written = "".join(text.classes[i] for i in everything)
    documentation = inspect.cleandoc(argparse.__doc__ or "")
    assert len(documentation) > 100
    assert "".join(c for c in documentation if c in string.printable) in written
    assert len(written) > 300_000
    for split in (text.train, text.test):  # each label is the character that follows
        assert split.images.shape == split.labels.shape == (len(split), data.TEXT_LENGTH)
        assert torch.equal(split.images[:, 1:], split.labels[:, :-1])
        assert torch.equal(split.images[1:, 0], split.labels[:-1, -1])
    assert not text.is_images
    assert "Python 3" in text.title


def test_images_come_back_as_they_were_written(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    for split in ("train", "test"):
        write_split(tmp_path / "fashion_mnist" / f"{split}.parquet", images, [3, 1, 4, 1, 5, 9, 2])
    loaded = data.load("fashion_mnist", tmp_path)
    assert loaded.image_shape == (1, 5, 4)
    torch.testing.assert_close(loaded.train.images[:, 0] * 255, torch.tensor(images).float())
    assert loaded.test.labels.tolist() == [3, 1, 4, 1, 5, 9, 2]


def test_the_folder_may_come_from_the_environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAXPROP_DATA", str(data_dir))
    assert len(data.load("mnist").train) == 50


def test_an_unknown_data_set_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of digits, docstrings, mnist, .*svhn, or .*--data-dir.* got 'imagenet'"
    ):
        data.load("imagenet")


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    for split in ("train", "test"):
        write_split(tmp_path / "leaves" / f"{split}.parquet", images, [0, 1, 2, 3, 4, 5])
    loaded = data.load("leaves", tmp_path)
    assert loaded.image_shape == (3, 5, 4)
    torch.testing.assert_close(loaded.train.images.permute(0, 2, 3, 1) * 255, torch.tensor(images).float())
    assert loaded.title == "leaves"


def test_a_part_of_published_data_is_called_so(data_dir: Path) -> None:
    assert data.load("mnist", data_dir).title == "mnist (subset: 50 / 20 images)"


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (n, 4), dtype=np.uint8) for n in (4, 5)]
    for split in ("train", "test"):
        write_split(tmp_path / "leaves" / f"{split}.parquet", images, [0, 1])
    with pytest.raises(DataError, match=r"all images must have one size, and these have \(4, 4\), \(5, 4\)"):
        data.load("leaves", tmp_path)


def test_a_missing_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mnist/train\.parquet does not exist.*--data-dir.*RELAXPROP_DATA"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "image"])
def test_a_damaged_file_is_named(data_dir: Path, damage: str) -> None:
    path = data_dir / "mnist" / "test.parquet"
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no parquet")
    else:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
        rows = {"image": [{"bytes": b"\x89PNG but not really", "path": None}], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    with pytest.raises(DataError, match=r"mnist/test\.parquet cannot be read.*Fetch the file again"):
        data.load("mnist", data_dir)


def test_a_file_without_images_is_named(data_dir: Path) -> None:
    path = data_dir / "mnist" / "train.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(path)
    with pytest.raises(DataError, match=r"train\.parquet cannot be read.*Image and a ClassLabel column"):
        data.load("mnist", data_dir)


def test_the_papers_mlp_and_its_initial_weights() -> None:
    digits = data.load("digits")
    model = build("mlp", digits, seed=3)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [
        (300, 64),
        (300, 300),
        (100, 300),
        (10, 100),
    ]
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() == 2])
    # 140,000 draws of N(0, 0.05²): both moments within five standard errors.
    assert abs(float(weights.mean())) < 5 * 0.05 / len(weights) ** 0.5
    assert abs(float(weights.std()) - 0.05) < 5 * 0.05 / (2 * len(weights)) ** 0.5
    assert all((p == 0).all() for p in model.parameters() if p.dim() == 1)
    same, other = build("mlp", digits, seed=3), build("mlp", digits, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.linear1.weight, other.linear1.weight)  # type: ignore[arg-type,union-attr]
    with pytest.raises(ValueError, match="model must be one of mlp, cnn, cnn-as-coded, resnet, transformer, got 'vgg'"):
        build("vgg", digits, seed=0)


def images(*shape: int) -> data.Dataset:
    split = data.Split(torch.rand(4, *shape), torch.arange(4))
    return data.Dataset("random", ("a", "b", "c", "d", "e"), split, split)


@pytest.mark.parametrize(("name", "filters", "hidden"), [("cnn", (32, 64), 64), ("cnn-as-coded", (6, 16), 120)])
def test_the_papers_cnns(name: str, filters: tuple[int, int], hidden: int) -> None:
    model = build(name, images(3, 32, 32), seed=1)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("weight")}
    assert shapes == {
        "convolutional.conv1.weight": (filters[0], 3, 5, 5),
        "convolutional.conv2.weight": (filters[1], filters[0], 5, 5),
        "fully_connected.linear1.weight": (hidden, filters[1] * 10 * 10),
        "fully_connected.linear2.weight": (120, hidden),
        "fully_connected.linear3.weight": (5, 120),
    }
    assert any("conv" in n and n.endswith("bias") for n, _ in model.named_parameters()) == (name == "cnn")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="at least 14×14 pixels, got 13×20"):
        build(name, images(1, 13, 20), seed=0)


def test_simplifications_of_parts() -> None:
    model = build("cnn", images(1, 14, 14), seed=1, feedback={"convolutional": "learned"}, dropped={"all": "update"})
    names = {n for n, _ in model.named_parameters() if n.endswith("feedback")}
    assert names == {"convolutional.conv1.feedback", "convolutional.conv2.feedback"}
    assert str(model).count("dropped derivative in update") == 4
    again = build("cnn", images(1, 14, 14), seed=1, feedback={"convolutional": "learned"})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"no part 'convolutional': name one of all$"):
        build("mlp", images(1, 14, 14), seed=1, feedback={"convolutional": "learned"})


@pytest.mark.parametrize("feedback", [{}, {"all": "learned"}])
@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn-as-coded"])
def test_the_papers_initial_weights(name: str, feedback: dict[Part, FeedbackRule]) -> None:
    """N(0, 0.05²) in the order of the layers, from the seed alone: a kept result can be computed again."""
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in build(name, images(3, 16, 16), seed=3, feedback=feedback).named_parameters():
        if parameter_name.endswith("weight"):
            expected = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
            assert torch.equal(parameter, expected), parameter_name
        elif parameter_name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("rule", ["learned", "random"])
@pytest.mark.parametrize("part", ["all", "convolutional", "fully_connected"])
@pytest.mark.parametrize("seed", [0, 1])
def test_backwards_weights_start_independent_of_the_weights(rule: FeedbackRule, part: Part, seed: int) -> None:
    """No weight transport by way of the seed: cosines of n independent pairs are 0 ± 1/√n."""
    model = build("cnn", images(3, 32, 32), seed=seed, feedback={part: rule})
    found = feedback_alignment(model)
    assert len(found) == {"all": 5, "convolutional": 2, "fully_connected": 3}[part]
    for name, alignment in found.items():
        assert abs(alignment.cosine) < 5 / math.sqrt(model.get_parameter(f"{name}.weight").numel())
        assert alignment.norm_ratio == pytest.approx(1, abs=0.15)
    plain = dict(build("cnn", images(3, 32, 32), seed=seed).named_parameters())
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters() if n in plain)


@pytest.mark.parametrize("feedback", [{}, {"all": "learned"}])
def test_channels_lie_innermost_in_a_cnn_and_nothing_else_changes(feedback: dict[Part, FeedbackRule]) -> None:
    dataset = images(3, 16, 16)
    model = build("cnn", dataset, seed=1, feedback=feedback).double()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)
    laid_out = dataset.to("cpu", memory_format("cnn")).train.images
    assert laid_out[torch.tensor([2, 0])].is_contiguous(memory_format=torch.channels_last)

    def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        (ActivationRelaxation(model)(x) ** 2).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = build("cnn", dataset, seed=1, feedback=feedback).double().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    pairs = zip(gradients(model, laid_out.double()), gradients(plain, dataset.train.images.double()), strict=True)
    for g, expected in pairs:
        torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def test_signed_inputs() -> None:
    dataset = images(1, 14, 14)
    torch.testing.assert_close(dataset.signed().test.images, 2 * dataset.test.images - 1)
