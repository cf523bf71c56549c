"""Prepares a data set once, in TFDS's form: `python -m simam_jax.data.prepare cifar10`.

For ImageNet, get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (an account is needed), then

    python -m simam_jax.data.prepare imagenet2012 --tars FOLDER_WITH_BOTH_FILES

It takes hours and, beside the tar files, about twice 150 GB while it runs.
"""

import argparse
from pathlib import Path

from simam_jax import errors
from simam_jax.errors import UserError
from simam_jax.paths import local

IMAGENET_TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(name: str, *, data_dir: str = "", tars: str = "") -> str:
    """Prepares the TFDS data set `name` (with or without a version), or "digits"; where it lies is returned.

    Args:
        data_dir: where prepared data lie; "": TFDS's own default.
        tars: imagenet2012: the folder with the two tar files; "": `data_dir`/downloads/manual.

    Raises:
        UserError: an unknown name, missing tar files.
    """
    import tensorflow_datasets as tfds

    from simam_jax.data import tfds as tfds_records

    tars = str(local(tars)) if tars else ""
    builder = tfds_records.builder_of(name, data_dir)
    if builder.info.splits:
        return str(builder.data_dir)
    if builder.name == "imagenet2012":
        folder = Path(tars or builder.data_dir_root / "downloads" / "manual")
        missing = [tar for tar in IMAGENET_TARS if not (folder / tar).is_file()]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} not found in {folder}. Get them from https://image-net.org/download-images "
                "and name their folder with --tars."
            )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=tars or None, try_download_gcs=False)
    )
    return str(builder.data_dir)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="a TFDS name, such as cifar10 or imagenet2012:5.1.0, or digits")
    parser.add_argument(
        "--data_dir", default="", help="where prepared data lie (default: TFDS's, ~/tensorflow_datasets)"
    )
    parser.add_argument("--tars", default="", help="imagenet2012: the folder with the two downloaded tar files")
    args = parser.parse_args()
    print(f"Ready in {prepare(args.name, data_dir=args.data_dir, tars=args.tars)}")


if __name__ == "__main__":
    errors.run_cli(main)
