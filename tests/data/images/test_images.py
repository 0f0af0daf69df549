"""Datasets of images: their shapes and schemas, held-out images, decoding against Pillow, and what is refused."""

import io
import pickle
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PilImage

from hf_rskip import RSkipResNetConfig
from hf_rskip.cli.corpus import load_test_images
from hf_rskip.data.images.arguments import ImageDataArguments
from hf_rskip.data.images.augmentation import normalize
from hf_rskip.data.images.loading import load_image_dataset
from hf_rskip.data.images.pixels import (
    CroppedImages,
    ImageTensors,
    collate,
    decode_images,
    make_image_processor,
    random_resized_crop,
    stream_images,
)
from hf_rskip.errors import UserError

NAMES = ["ant", "bee", "cat"]


def encode(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def noise(width, height, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PilImage.fromarray(pixels).convert(mode)


PICTURE = encode(noise(8, 8))


def save(folder, split, labels, images=None, label_feature=None, image_name="img"):
    """A split of a folder; the images are bytes, a picture for each label unless given."""
    images = [PICTURE] * len(labels) if images is None else images
    features = Features({image_name: Image(), "label": label_feature or ClassLabel(names=NAMES)})
    rows = {image_name: [{"bytes": image, "path": None} for image in images], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def arguments(folder, **kwargs):
    return ImageDataArguments(dataset_name=str(folder), **{"image_size": 8, **kwargs})


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    # `datasets` rests for seconds at the end of a stream that is shuffled.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "train", [0, 1, 2] * 10)
    save(tmp_path, "test", [2, 1, 0])
    return tmp_path


# Schemas


def test_the_schema_of_cifar(cifar_folder):
    images = load_image_dataset(ImageDataArguments(dataset_name=cifar_folder))
    assert images.class_names == ["blue", "green", "red", "yellow"] and images.splits.keys() == {"train", "test"}
    assert images.splits["train"]["label"][:6] == [0, 1, 2, 3, 0, 1]
    assert images.splits["test"]["row"][:3] == [0, 1, 2]


def test_labels_that_are_names(tmp_path):
    save(tmp_path, "train", ["cat", "ant", "cat", "bee"], label_feature=Value("string"))
    save(tmp_path, "test", ["bee"], label_feature=Value("string"))
    images = load_image_dataset(arguments(tmp_path))
    assert images.class_names == NAMES
    assert images.splits["train"]["label"][:] == [2, 0, 2, 1] and images.splits["test"]["label"][:] == [1]


def test_labels_that_are_numbers(tmp_path):
    save(tmp_path, "train", [2, 0, 2], label_feature=Value("int32"))
    save(tmp_path, "test", [0], label_feature=Value("int32"))
    images = load_image_dataset(arguments(tmp_path))
    assert images.class_names == ["0", "1", "2"] and images.splits["train"]["label"][:] == [2, 0, 2]


@pytest.mark.parametrize("labels", [["9", "3", "9"], [9, 3, 9]])
def test_labels_of_a_trained_model(tmp_path, labels):
    """They are found by name, in a folder of the test split alone that lacks some; others are refused with the row."""
    save(tmp_path, "test", labels, label_feature=Value("string" if "3" in labels else "int32"))
    images = load_image_dataset(arguments(tmp_path), ("test",), ["3", "5", "9"])
    assert images.class_names == ["3", "5", "9"] and images.splits["test"]["label"][:] == [2, 0, 2]
    with pytest.raises(UserError, match="'test', row 1 .* has the label '?3'?, which is not one of 5, 9"):
        load_image_dataset(arguments(tmp_path), ("test",), ["5", "9"])


def test_classes_of_a_model_are_found_by_name(tmp_path):
    """In the columns of its training; evaluate and probe load their images so."""
    args = Namespace(
        dataset_name=str(tmp_path), dataset_config_name=None, split=None, image_column=None, label_column=None
    )
    config = RSkipResNetConfig(id2label=dict(enumerate(["cat", "dog", "ant", "bee"])), label_column="label")
    save(tmp_path, "test", [0, 1, 2, 0])
    assert load_test_images(args, config)[1].splits["test"]["label"][:] == [2, 3, 0, 2]
    config.id2label = {0: "ant", 1: "bee"}
    message = "'test', row 2 \\(counted from 0\\) has the label 'cat', which is not one of ant, bee\\."
    with pytest.raises(UserError, match=message):
        load_test_images(args, config)
    config.id2label = {0: "crane", 1: "ant", 2: "crane"}
    with pytest.raises(UserError, match="The model has 2 classes 'crane', and the classes of a dataset are found by"):
        load_test_images(args, config)


def test_a_folder_of_pictures(tmp_path):
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            noise(8, 8).save(tmp_path / split / name / "1.png")
    images = load_image_dataset(arguments(tmp_path))
    assert images.class_names == NAMES
    assert len(decode_images(images.splits["train"], arguments(tmp_path), "train")) == 3


def test_columns_by_name(tmp_path):
    features = Features({"front": Image(), "back": Image(), "kind": ClassLabel(names=NAMES)})
    rows = [{"front": noise(8, 8, 1), "back": noise(8, 8, 2), "kind": label} for label in (0, 1)]
    for split in ("train", "test"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="has 2 columns of images \\(front, back, kind\\): set image_column"):
        load_image_dataset(arguments(tmp_path))
    args = arguments(tmp_path, image_column="back")
    images = decode_images(load_image_dataset(args).splits["train"], args, "train")
    np.testing.assert_array_equal(images.pixel_values[0].permute(1, 2, 0), np.asarray(noise(8, 8, 2)))


def test_the_first_so_many(folder):
    splits = load_image_dataset(arguments(folder, max_train_samples=7, max_predict_samples=2)).splits
    assert [len(splits[split]) for split in ("train", "test")] == [7, 2]


def test_a_folder_sorted_by_class_keeps_its_classes(tmp_path, caplog):
    """The first so many would be of one class only; row numbers stay those of the whole split."""
    labels = [0] * 10 + [1] * 10 + [2] * 10
    save(tmp_path, "train", labels)
    save(tmp_path, "test", labels)
    limits = {"max_train_samples": 6, "max_predict_samples": 2, "max_eval_samples": 4, "validation_size": 3}
    splits = load_image_dataset(arguments(tmp_path, **limits)).splits
    assert sorted(splits["train"]["label"][:] + splits["validation"]["label"][:]) == [0, 0, 1, 1, 2, 2]
    assert sorted(splits["train"]["row"][:] + splits["validation"]["row"][:]) == [0, 5, 10, 15, 20, 25]
    assert (splits["test"]["label"][:], splits["test"]["row"][:]) == ([0, 1], [0, 15])
    assert [record.message.split(", ", 1)[1] for record in caplog.records] == [
        f"split {split!r}, lacks classes among its first {number} images: {number} at even distances are used."
        for split, number in (("train", 6), ("test", 2))
    ]


# Held-out images


def test_held_out_images_are_as_many_of_each_class(folder):
    first = load_image_dataset(arguments(folder, validation_size=6)).splits
    assert Counter(first["validation"]["label"][:]) == {0: 2, 1: 2, 2: 2}
    rows = [set(first[split]["row"][:]) for split in ("train", "validation")]
    assert rows[0] | rows[1] == set(range(30)) and not rows[0] & rows[1]
    second = load_image_dataset(arguments(folder, validation_size=6)).splits
    assert first["validation"]["row"][:] == second["validation"]["row"][:]
    assert all(label == row % 3 for label, row in zip(first["train"]["label"], first["train"]["row"], strict=True))


# Decoding


def reference(image, size, crop_pct):
    """The shorter edge to `size / crop_pct`, and the centre, by Pillow alone."""
    image = image.convert("RGB")
    edge = int(size / crop_pct)
    width, height = (edge, int(edge * image.height / image.width))
    if image.width > image.height:
        width, height = int(edge * image.width / image.height), edge
    image = image.resize((width, height), PilImage.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


KINDS = [(8, 8, "RGB"), (21, 13, "RGB"), (5, 30, "RGB"), (16, 16, "L"), (16, 9, "RGBA"), (9, 16, "P"), (12, 12, "1")]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_pixels_are_those_of_pillow_and_of_the_image_processor(tmp_path, crop_pct):
    pictures = [noise(width, height, seed, mode) for seed, (width, height, mode) in enumerate(KINDS)]
    for split in ("train", "test"):
        save(tmp_path, split, [seed % 3 for seed in range(len(KINDS))], [encode(picture) for picture in pictures])
    args = arguments(tmp_path, crop_pct=crop_pct)
    images = decode_images(load_image_dataset(args).splits["test"], args, "test")
    assert images.pixel_values.dtype == torch.uint8 and images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    processor = make_image_processor(args)
    processed = processor([example["img"] for example in load_dataset(str(tmp_path))["test"]], return_tensors="pt")
    normalized = normalize(images.pixel_values, args.image_mean, args.image_std)
    torch.testing.assert_close(normalized, processed["pixel_values"].float(), rtol=1e-5, atol=1e-5)
    for picture, pixels in zip(pictures, images.pixel_values, strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), reference(picture, 8, crop_pct))


def test_pictures_are_put_upright(tmp_path):
    exif = PilImage.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for split in ("train", "test"):
        save(tmp_path, split, [0, 1], [encode(noise(8, 8), exif=exif), PICTURE])
    args = arguments(tmp_path)
    turned, upright = decode_images(load_image_dataset(args).splits["test"], args, "test").pixel_values
    assert torch.equal(turned, upright.rot90(-1, (1, 2)))


def test_decoded_images_are_reused(folder, monkeypatch):
    args = arguments(folder)
    first = decode_images(load_image_dataset(args).splits["train"], args, "train")
    monkeypatch.setattr("PIL.Image.open", None)
    again = decode_images(load_image_dataset(args).splits["train"], args, "train")
    assert torch.equal(first.pixel_values, again.pixel_values)
    with pytest.raises(UserError, match="has no image that can be decoded"):
        decode_images(load_image_dataset(args).splits["train"], arguments(folder, image_size=4), "train")


def test_several_processes_decode_the_same(folder):
    args = arguments(folder, preprocessing_num_workers=2, image_size=6)
    images = decode_images(load_image_dataset(args).splits["train"], args, "train")
    expected = torch.from_numpy(reference(noise(8, 8), 6, 1.0).copy()).permute(2, 0, 1)
    assert len(images) == 30 and all(torch.equal(pixels, expected) for pixels in images.pixel_values)


def test_a_batch_is_one_indexing():
    images = ImageTensors(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([5, 6]))
    batch = collate(images.__getitems__([1, 0, 1]))
    assert batch["labels"].tolist() == [6, 5, 6] and batch["pixel_values"].shape == (3, 3, 2, 2)
    single = collate([images[1], images[0], images[1]])
    assert all(torch.equal(batch[name], single[name]) for name in batch)


# Streaming and random crops


def test_streamed_images_are_the_decoded_ones(imagenet_folder):
    args = {"dataset_name": imagenet_folder, "test_split": "validation", "image_size": 16}
    whole, streamed = ImageDataArguments(**args), ImageDataArguments(**args, streaming=True)
    expected = decode_images(load_image_dataset(whole).splits["test"], whole, "test")
    stream = stream_images(load_image_dataset(streamed).splits["test"], streamed, "test", seed=0)
    batch = collate(list(stream))
    assert torch.equal(batch["pixel_values"], expected.pixel_values)
    assert torch.equal(batch["labels"], expected.labels)


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_that_are_not_forked_get_the_training_images(imagenet_folder, streaming):
    args = ImageDataArguments(dataset_name=imagenet_folder, test_split="validation", image_size=16, streaming=streaming)
    dataset = load_image_dataset(args).splits["train"]
    images = stream_images(dataset, args, "train", seed=0) if streaming else CroppedImages(dataset, args, "train")
    for row, copy in zip(images, pickle.loads(pickle.dumps(images)), strict=True):
        assert row["labels"] == copy["labels"] and torch.equal(row["pixel_values"], copy["pixel_values"])


def test_training_images_are_streamed_in_another_order_with_the_same_labels(imagenet_folder):
    args = ImageDataArguments(
        dataset_name=imagenet_folder, test_split="validation", image_size=16, streaming=True, shuffle_buffer_size=50
    )
    splits = load_image_dataset(args).splits
    in_order = collate(list(stream_images(splits["train"], args, "test", seed=0)))
    shuffled = collate(list(stream_images(splits["train"], args, "train", seed=0)))
    places = [
        (in_order["pixel_values"] == pixels).flatten(1).all(1).nonzero().item() for pixels in shuffled["pixel_values"]
    ]
    assert sorted(places) == list(range(96)) and places != sorted(places)
    assert torch.equal(shuffled["labels"], in_order["labels"][places])


def test_random_resized_crops_are_parts_of_the_image():
    """On an image whose colours tell the place: 8% to 100% of the area, 3:4 to 4:3 in shape, all over the image."""
    width, height, size = 120, 80, 64
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    image = PilImage.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8))
    torch.manual_seed(0)
    areas, ratios, lefts = [], [], []
    for _ in range(300):
        crop = np.asarray(random_resized_crop(image, size)).astype(float)
        # A linear ramp that is resized is a linear ramp: its slope gives the size of the part.
        across = (crop[32, 48, 0] - crop[32, 16, 0]) / 32 * size
        down = (crop[48, 32, 1] - crop[16, 32, 1]) / 32 * size
        areas.append(across * down / (width * height))
        ratios.append(across / down)
        lefts.append(crop[32, 0, 0])
    assert 0.06 < min(areas) < 0.2 and 0.75 < max(areas) <= 1.05
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.43
    assert min(lefts) < 5 and max(lefts) > 70


def test_random_crops_without_streaming(folder):
    args = arguments(folder, random_resized_crop=True)
    images = CroppedImages(load_image_dataset(args).splits["train"], args, "train")
    torch.manual_seed(0)
    batch = collate([images[index] for index in (0, 0, 1)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["labels"].tolist() == [0, 0, 1]
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


# What is refused


BROKEN = PICTURE[: len(PICTURE) // 2]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"no picture", "it is of no known format"),
        (BROKEN, ""),
        (b"", ""),
    ],
    ids=["text", "cut off", "empty"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_corrupt_image(tmp_path, image, reason, streaming):
    save(tmp_path, "train", [0, 1, 2, 0, 1, 2], [PICTURE] * 4 + [image, PICTURE])
    save(tmp_path, "test", [0])
    args = arguments(tmp_path, streaming=streaming)
    dataset = load_image_dataset(args).splits["train"]
    with pytest.raises(UserError) as error:
        list(stream_images(dataset, args, "train", seed=0)) if streaming else decode_images(dataset, args, "train")
    message = str(error.value)
    assert f"Dataset '{tmp_path}', split 'train', row 4 (counted from 0) has no image that can be decoded: " in message
    assert reason in message and "\n" not in message


def test_a_row_without_an_image(tmp_path):
    save(tmp_path, "train", [0, 1])
    features = Features({"img": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"img": [{"bytes": PICTURE, "path": None}, None], "label": [0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    args = arguments(tmp_path)
    with pytest.raises(UserError, match="'test', row 1 \\(counted from 0\\) has no image\\."):
        decode_images(load_image_dataset(args).splits["test"], args, "test")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_bits_than_a_pixel_has(tmp_path, mode):
    deep = encode(noise(8, 8, mode="L").convert(mode), "PNG" if mode == "I;16" else "TIFF")
    save(tmp_path, "train", [0, 1], [PICTURE, deep])
    save(tmp_path, "test", [0])
    args = arguments(tmp_path)
    with pytest.raises(UserError, match="row 1 \\(counted from 0\\) has an image of more than 8 bits"):
        decode_images(load_image_dataset(args).splits["train"], args, "train")


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 3_000_000, 1], Value("int64"), "has the label 3000000 in only 3 images"),
        ([True, False, True], Value("bool"), "has labels of type bool, no names or whole numbers"),
        ([0.0, 1.0, 2.0], Value("float32"), "has labels of type float32"),
        ([[0], [1], [2]], List(Value("int64")), "no names or whole numbers"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, feature, message):
    save(tmp_path, "train", labels, label_feature=feature)
    save(tmp_path, "test", labels[:1], label_feature=feature)
    with pytest.raises(UserError, match=message):
        load_image_dataset(arguments(tmp_path))


def test_a_corrupt_image_among_held_out_ones(tmp_path):
    """The row is that of the training split, wherever the image went."""
    save(tmp_path, "train", [0, 1, 2] * 4, [PICTURE] * 7 + [b"?"] + [PICTURE] * 4)
    save(tmp_path, "test", [0])
    args = arguments(tmp_path, validation_size=6)
    splits = load_image_dataset(args).splits
    with pytest.raises(UserError, match="split 'train', row 7 \\(counted from 0\\) has no image"):
        for split in ("train", "validation"):
            decode_images(splits[split], args, split)


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ([0, None, 1], [0], {}, "split 'train', row 1 (counted from 0) has no label"),
        ([0, 1], [0, -1], {}, "split 'test', row 1 (counted from 0) has no label"),
        ([0, 0, 0], [0], {}, "split 'train', has one class only"),
        (
            [0, 0, 1, 2, 2, 2],
            [0],
            {"validation_size": 3},
            "split 'train', row 2 (counted from 0) is the only image of class 'bee', of which none could be held out",
        ),
        ([0, 0, 1, 1], [0], {"validation_size": 3}, "validation_size must leave an image of each of the 2 classes"),
        ([0, 1], [0], {"validation_split": "dev"}, "has no split 'dev', only train, test: set validation_split"),
        ([0, 1], [0], {"label_column": "labels"}, "has no column 'labels', only img, label: set label_column"),
        ([0, 1], [0], {"image_column": "label"}, "image_column and label_column are both 'label'"),
    ],
)
def test_labels_and_columns_that_cannot_be(tmp_path, train, test, options, message):
    save(tmp_path, "train", train)
    save(tmp_path, "test", test)
    with pytest.raises(UserError) as error:
        load_image_dataset(arguments(tmp_path, **options))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("label", ["dog", "Ant"])
def test_a_label_that_the_training_split_does_not_know(tmp_path, label):
    save(tmp_path, "train", NAMES, label_feature=Value("string"))
    save(tmp_path, "test", ["ant", label], label_feature=Value("string"))
    with pytest.raises(UserError, match=f"'test', row 1 .* has the label '{label}', which is not one of ant, bee, cat"):
        load_image_dataset(arguments(tmp_path))


def test_a_stream_of_unknown_columns(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("image,label\na.png,ant\n")
    with pytest.raises(UserError, match="'train', is a stream that does not tell its columns before it is read: set"):
        load_image_dataset(arguments(tmp_path, streaming=True))


def test_a_missing_label_in_a_stream(tmp_path):
    save(tmp_path, "train", [0, 1, -1])
    save(tmp_path, "test", [0])
    args = arguments(tmp_path, streaming=True)
    with pytest.raises(UserError, match="row 2 \\(counted from 0\\) has no label"):
        list(stream_images(load_image_dataset(args).splits["train"], args, "test", seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "set dataset_name"),
        ({"crop_pct": 0}, "crop_pct must be a number from 0.1 to 1"),
        ({"crop_padding": -1}, "crop_padding must be at least 0"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std must be above 0"),
        ({"validation_size": 5, "validation_split": "dev"}, "are both set"),
        ({"validation_size": 5, "streaming": True}, "validation_size cannot hold out images that are streamed"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        ImageDataArguments(**{"dataset_name": "folder", **options})


def test_pictures_in_one_class_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number in range(2):
            PilImage.new("RGB", (8, 8)).save(tmp_path / split / "cat" / f"{number}.png")
    with pytest.raises(UserError, match="has pictures without labels: give each class a folder of its own, and"):
        load_image_dataset(ImageDataArguments(dataset_name=str(tmp_path)))
