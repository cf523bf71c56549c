"""Pixels against torchvision's transforms, written out here with PIL; odd images; the distributions of what is drawn."""

import contextlib
import io
import math

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from simam_jax.data import augment, images
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError
from simam_jax.preprocessing import Preprocessing

SIZE = 96


def as_jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


PHOTOGRAPHS = [
    as_jpeg(Image.fromarray(photo).resize(size), subsampling=subsampling)
    for photo, size, subsampling in zip(load_sample_images().images, [(500, 375), (333, 500)], [0, 2], strict=True)
]


def opened(encoded):
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def pil_eval(image, size, resize):
    """torchvision's Resize(resize), CenterCrop(size)."""
    width, height = image.size
    if not resize:
        return np.asarray(image.resize((size, size), Image.BILINEAR))
    if width <= height:
        image = image.resize((resize, int(resize * height / width)), Image.BILINEAR)
    else:
        image = image.resize((int(resize * width / height), resize), Image.BILINEAR)
    left, top = (round((length - size) / 2.0) for length in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def pil_box(width, height, uniform, min_area):
    """torchvision's RandomResizedCrop.get_params, with given random numbers: left, top, width, height."""
    for area, ratio, vertical, horizontal in uniform.reshape(4, -1).T.astype(float):
        target = width * height * (min_area + (1 - min_area) * area)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(horizontal * (width - w + 1)), int(vertical * (height - h + 1)), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def draws(count, *key):
    return tf.random.stateless_uniform((count,), key).numpy()


@tf.function(autograph=False, input_signature=[tf.TensorSpec((), tf.string)])
def eval_image(encoded):
    return images.centre_crop(encoded, size=SIZE, resize=112)


@tf.function(autograph=False, input_signature=[tf.TensorSpec((), tf.string)])
def squeezed_image(encoded):
    return images.centre_crop(encoded, size=SIZE, resize=0)


def _cropper(antialias):
    @tf.function(autograph=False, input_signature=[tf.TensorSpec((), tf.string), tf.TensorSpec((40,), tf.float32)])
    def crop(encoded, uniform):
        return images.random_resized_crop(encoded, uniform, size=SIZE, min_area=0.08, antialias=antialias)

    return crop


exact_crop, fast_crop = _cropper(antialias=True), _cropper(antialias=False)


def each(rows, function):
    """`function` of every row of a tensor."""
    return np.stack(list(tf.data.Dataset.from_tensor_slices(rows).map(function).as_numpy_iterator()))


def distance(ours, theirs):
    """Mean and largest absolute difference, in 1/255."""
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
    return difference.mean(), difference.max()


@pytest.mark.parametrize("encoded", PHOTOGRAPHS)
def test_eval_pixels_are_torchvisions(encoded):
    mean, largest = distance(eval_image(encoded), pil_eval(opened(encoded), SIZE, 112))
    assert mean < 0.4
    assert largest <= 2
    mean, largest = distance(squeezed_image(encoded), pil_eval(opened(encoded), SIZE, 0))
    assert mean < 0.4
    assert largest <= 2


@pytest.mark.parametrize("size", [(97, 113), (113, 97), (301, 112), (112, 112), (113, 511), (640, 255), (30, 20)])
def test_eval_sizes_and_offsets_are_rounded_as_torchvision_rounds_them(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    mean, largest = distance(eval_image(buffer.getvalue()), pil_eval(Image.fromarray(noise), SIZE, 112))
    assert mean < 0.4
    assert largest <= 2


@pytest.mark.parametrize("encoded", PHOTOGRAPHS)
def test_training_pixels_are_torchvisions(encoded):
    image = opened(encoded)
    exact, fast = [], []
    for i in range(12):
        uniform = draws(images.CROP_UNIFORMS, 7, i)
        left, top, width, height = pil_box(*image.size, uniform, 0.08)
        expected = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.BILINEAR)
        exact.append(distance(exact_crop(encoded, uniform), expected)[0])
        fast.append(distance(fast_crop(encoded, uniform), expected)[0])
    assert max(exact) < 0.4
    assert np.mean(fast) < 6


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1000, 40), (40, 1000), (8, 8), (1, 1)])
def test_crops_are_those_of_torchvision(size):
    width, height = size
    boxes = []
    for i in range(60):
        uniform = draws(images.CROP_UNIFORMS, 1, i)
        box = [int(x) for x in images.random_box(tf.constant(height), tf.constant(width), tf.constant(uniform), 0.08)]
        top, left, h, w = box
        boxes.append((left, top, w, h))
        expected = np.array(pil_box(width, height, uniform, 0.08))
        assert np.abs(np.array(boxes[-1]) - expected).max() <= 1  # float32 against float64, once in a while
        assert 0 <= left <= width - w
        assert 0 <= top <= height - h
    if width == 1000:
        assert len(set(boxes)) == 1  # nothing fits: the fallback


def test_the_distribution_of_crops():
    uniform = tf.random.stateless_uniform((4000, images.CROP_UNIFORMS), (0, 0))
    boxes = each(uniform, lambda u: tf.stack(images.random_box(tf.constant(4000), tf.constant(4000), u, 0.08)))
    top, left, height, width = boxes.T.astype(float)
    area, ratio = height * width / 4000**2, np.log(width / height) / np.log(4 / 3)
    fits = area < 0.7  # larger ones are rarer: not every ratio fits
    assert abs(np.mean(area[fits]) - (0.08 + 0.7) / 2) < 0.02
    assert abs(np.mean(ratio)) < 0.05
    assert abs(np.std(ratio[fits]) - 1 / math.sqrt(3)) < 0.03
    for offset, length in ((top, height), (left, width)):
        share = offset / np.maximum(4000 - length, 1)
        assert abs(np.mean(share) - 0.5) < 0.02
        assert abs(np.std(share) - 1 / math.sqrt(12)) < 0.02


def odd_images():
    photo = opened(PHOTOGRAPHS[0])
    yield "grey JPEG", as_jpeg(photo.convert("L")), None
    yield "CMYK JPEG", as_jpeg(photo.convert("CMYK")), photo
    yield "progressive JPEG", as_jpeg(photo, progressive=True), None
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    yield "EXIF-rotated JPEG", as_jpeg(photo, exif=exif.tobytes()), None
    for name, image in {
        "PNG": photo,
        "grey PNG": photo.convert("L"),
        "PNG with a palette": photo.quantize(64),
        "PNG with transparency": photo.convert("RGBA"),
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield name, buffer.getvalue(), None
    grey = np.asarray(photo.convert("L"))
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(buffer, "PNG")
    yield "16-bit PNG", buffer.getvalue(), Image.fromarray(grey).convert("RGB")
    yield "smaller than the crop", as_jpeg(photo.resize((50, 31))), None


@pytest.mark.parametrize(("encoded", "expected"), [pytest.param(e, p, id=name) for name, e, p in odd_images()])
def test_odd_images(encoded, expected):
    expected = pil_eval(expected or opened(encoded), SIZE, 112)
    mean, _ = distance(eval_image(encoded), expected)
    assert mean < 1.5 if opened(encoded).size == (500, 375) and encoded[:2] == b"\xff\xd8" else mean < 0.4
    assert exact_crop(encoded, draws(40, 0, 0)).shape == (SIZE, SIZE, 3)
    assert fast_crop(encoded, draws(40, 0, 0)).shape == (SIZE, SIZE, 3)


MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")


def in_every_mode(kind):
    """(mode, encoded) for each of PIL's modes that a format can hold, with transparency where it has any."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((64, 48))
    grey = np.asarray(photo.convert("L"))
    numbers = {"I;16": np.uint16(257) * grey, "I": np.int32(257) * grey, "F": grey / np.float32(255)}
    slope = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1)))
    for mode in MODES:
        options = {}
        if mode in numbers:
            image = Image.fromarray(numbers[mode])
        elif mode == "P":
            image, options = photo.quantize(64), {"transparency": 3} if kind in ("PNG", "GIF", "WEBP") else {}
        else:
            image = photo.convert("LA" if mode == "La" else "RGBA" if mode == "RGBa" else mode)
            if image.mode in ("LA", "RGBA"):
                image.putalpha(slope)
            image = image.convert(mode)
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, ValueError):  # not in this format
            image.save(buffer, kind, **options)
            Image.open(io.BytesIO(buffer.getvalue())).load()  # PIL 12.3 writes TIFFs in YCbCr that it cannot read
            yield mode, buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_training_and_prediction_see_the_same_pixels_of_every_mode_and_format(kind):
    how, seen = Preprocessing(48, 0, (0, 0, 0), (1, 1, 1)), 0
    for mode, encoded in in_every_mode(kind):
        image = Image.open(io.BytesIO(encoded))
        seen += 1
        if image.mode == "F":
            for read in (how, lambda encoded: images.centre_crop(encoded, size=48, resize=0)):
                with pytest.raises(Exception, match="floating-point values: save it with 8 or 16 bits"):
                    read(encoded)
            continue
        if image.mode == "I" and kind == "TIFF":  # which value is white is not said
            for read in (how, lambda encoded: images.centre_crop(encoded, size=48, resize=0)):
                with pytest.raises(Exception, match="in 32 bits: save it with 8 or 16 bits"):
                    read(encoded)
            continue
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        expected = np.asarray(image.convert("RGB").resize((48, 48), Image.BILINEAR))
        np.testing.assert_array_equal(how(encoded), expected, err_msg=mode)
        trained = images.centre_crop(encoded, size=48, resize=0).numpy()
        assert np.abs(trained.astype(int) - expected).max() <= 1, mode
    assert seen >= 5  # what a format can hold depends on the version of PIL


def test_training_and_prediction_see_the_same_pixels_of_a_ycck_jpeg():
    encoded = bytearray(as_jpeg(opened(PHOTOGRAPHS[0]).convert("CMYK")))
    encoded[encoded.find(b"Adobe") + 11] = 2  # Adobe's marker: the four channels are YCCK
    trained = images.centre_crop(bytes(encoded), size=48, resize=0).numpy()
    predicted = Preprocessing(48, 0, (0, 0, 0), (1, 1, 1))(bytes(encoded))
    assert np.abs(trained.astype(int) - predicted).max() <= 1


def test_an_animation_is_its_first_picture():
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    trained = images.centre_crop(buffer.getvalue(), size=48, resize=0).numpy()
    np.testing.assert_array_equal(trained, np.full((48, 48, 3), (255, 0, 0)))
    np.testing.assert_array_equal(Preprocessing(48, 0, (0, 0, 0), (1, 1, 1))(buffer.getvalue()), trained)


@pytest.mark.parametrize("value", [200, 70_000])  # 200 of 2 ** 31 would be black, which is not what was meant
def test_integers_of_32_bits_are_refused(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.int32)).save(buffer, "TIFF")
    with pytest.raises(UserError, match=f"values of {value} to {value} in 32 bits: save it with 8 or 16 bits"):
        Preprocessing(4, 0, (0, 0, 0), (1, 1, 1))(buffer.getvalue())


def test_large_photographs_are_shrunk_by_the_jpeg_decoder_where_fast_is_asked_for():
    photo = opened(PHOTOGRAPHS[0]).resize((2000, 1500), Image.LANCZOS)
    noisy = np.asarray(photo, np.int16) + np.random.default_rng(0).integers(-60, 61, (1500, 2000, 3))
    encoded = as_jpeg(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    whole = np.zeros(images.CROP_UNIFORMS, np.float32)
    whole[:10], whole[10:20] = 0.9, 1.0
    left, top, width, height = pil_box(2000, 1500, whole, 0.08)
    expected = opened(encoded).crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.BILINEAR)
    assert distance(fast_crop(encoded, whole), expected)[0] < 6  # picking single pixels would leave the noise: over 20


def test_pad_and_crop_reaches_every_offset_alike():
    image = tf.constant(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    padded = np.pad(image.numpy(), ((2, 2), (2, 2), (0, 0)))
    windows = {padded[t : t + 8, l : l + 8].tobytes(): (t, l) for t in range(5) for l in range(5)}  # noqa: E741
    uniform = draws(2 * 1500, 0, 0).reshape(-1, 2)
    counts = np.zeros((5, 5), int)
    for crop in each(uniform, lambda u: images.pad_and_crop(image, u, padding=2)):
        counts[windows[crop.tobytes()]] += 1
    assert counts.min() > 30  # 60 expected
    assert counts.max() < 95


def test_random_erasing():
    image = tf.fill((64, 48, 3), tf.constant(200, tf.uint8))
    uniform = tf.random.stateless_uniform((1000, augment.ERASING_UNIFORMS), (0, 0))
    erased = each(uniform, lambda u: augment.random_erasing(image, u, probability=0.25, fill=(0.5, 0.0, 1.0)))
    changed = (erased != 200).any(-1)
    share = changed.mean((1, 2))
    assert 0.2 < np.mean(share > 0) < 0.3
    assert share[share > 0].min() > 0.015
    assert share.max() < 0.36
    assert abs(share[share > 0].mean() - 0.175) < 0.02
    assert (erased[changed] == (128, 0, 255)).all()
    rows, columns = np.nonzero(changed[share.argmax()])
    assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows)  # one solid rectangle


@pytest.fixture(scope="module")
def patch():
    return tf.constant(np.minimum(opened(PHOTOGRAPHS[0]).resize((64, 48)), 250).astype(np.uint8))


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_each_operation_changes_the_image_as_its_level_says(name, patch):
    operation = augment.OPERATIONS[name]
    results = [operation(patch, tf.constant(level)).numpy() for level in (0.0, 0.5, 1.0, -1.0)]
    assert all(result.shape == patch.shape and result.dtype == np.uint8 for result in results)
    if name in ("auto_contrast", "equalize"):  # without a strength
        assert len({result.tobytes() for result in results}) == 1
        return
    changes = [distance(result, patch)[0] for result in results]
    assert changes[0] < 0.5
    assert changes[2] >= changes[1] >= changes[0]
    assert (changes[2] > 1) == (name != "identity")


def test_operations_against_pil(patch):
    from PIL import ImageEnhance, ImageOps

    image = Image.fromarray(patch.numpy())
    half, full = tf.constant(0.5), tf.constant(1.0)
    for name, level, expected in (
        ("brightness", half, ImageEnhance.Brightness(image).enhance(1.45)),
        ("colour", half, ImageEnhance.Color(image).enhance(1.45)),
        ("contrast", half, ImageEnhance.Contrast(image).enhance(1.45)),
        ("sharpness", full, ImageEnhance.Sharpness(image).enhance(1.9)),
        ("posterize", full, ImageOps.posterize(image, 4)),
        ("solarize", half, ImageOps.solarize(image, 128)),
        ("auto_contrast", half, ImageOps.autocontrast(image)),
        ("equalize", half, ImageOps.equalize(image)),
        ("rotate", full, image.rotate(-30)),
        ("translate_x", tf.constant(0.1), image.transform(image.size, Image.AFFINE, (1, 0, 3, 0, 1, 0))),
    ):
        mean, _ = distance(augment.OPERATIONS[name](patch, level), expected)
        assert mean < 1, name


def test_rand_augment_draws_every_operation_alike(patch):
    counts = []
    for i in range(len(augment.OPERATIONS)):
        draw = (i + 0.5) / len(augment.OPERATIONS)
        ours = augment.rand_augment(patch, tf.constant([draw, 0.2]), layers=1, magnitude=15.0)
        theirs = list(augment.OPERATIONS.values())[i](patch, tf.constant(0.5))
        counts.append(np.array_equal(ours, theirs))
    assert all(counts)
