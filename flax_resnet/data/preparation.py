"""Putting a tfds set on disk as ArrayRecord, the one format that is read at train time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from flax_resnet.data import sources
from flax_resnet.errors import UserError


def prepare(name: str, data_dir: str | None = None) -> str:
    """Makes a set readable: builds the digits, converts TFRecord files, or downloads.

    Args:
      name: a tfds name, such as "cifar10".
      data_dir: where ``name/version`` is or goes; None is tfds's default.

    Returns:
      The directory that holds the set, with its examples as ArrayRecord.

    Raises:
      UserError: the name is unknown, the directory cannot be written, or the download needs
        TensorFlow and that is not installed.
    """
    builder = sources.find_builder(name, data_dir)
    try:
        if builder is None:
            builder = _build(name, sources.data_root(data_dir))
        elif not sources.is_array_record(builder):
            _convert_tfrecord(builder)
    except OSError as error:
        ready = sources.find_builder(name, data_dir)
        if ready is not None and sources.is_array_record(ready):
            return str(ready.data_path)  # another process was faster
        raise UserError(
            f"dataset {name!r} cannot be prepared in {sources.data_root(data_dir)} ({error}): "
            "give a directory that can be written by --data-dir (--data.data-dir in training), "
            "or set TFDS_DATA_DIR"
        ) from error
    return str(builder.data_path)


def _build(name: str, root: str) -> Any:
    import tensorflow_datasets as tfds

    if name == sources.DIGITS:
        from flax_resnet.data.sklearn_digits import SklearnDigits

        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(None):
            builder = SklearnDigits(data_dir=root, file_format="array_record")
            builder.download_and_prepare()
        tfds.enable_progress_bar()
        return builder
    sources.check_known(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"tfds needs TensorFlow to prepare {name!r} (not to read it later): run "
            "pip install 'flax_resnet[prepare]', from a checkout pip install -e '.[prepare]'"
        )
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return builder


def _convert_tfrecord(builder: Any) -> None:
    """Writes an ArrayRecord shard beside each TFRecord shard, then names the new format.

    Each shard is renamed into place when whole, and the format is recorded last, so a
    conversion that was broken off is started again by the same command.
    """
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    info = builder.info
    if info.file_format.value != "tfrecord":
        raise UserError(
            f"{builder.data_path} is stored as {info.file_format.value}: only tfrecord can be "
            "converted"
        )
    for split in info.splits.values():
        template = split.filename_template.replace(filetype_suffix="array_record")
        for shard, source in enumerate(split.filepaths):
            target = Path(template.sharded_filepath(shard_index=shard, num_shards=split.num_shards))
            partial = target.with_name(f"{target.name}.partial")
            writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
            count = 0
            for record in grain.experimental.TFRecordIterDataset(os.fspath(source)):
                writer.write(record)
                count += 1
            writer.close()
            if count != split.shard_lengths[shard]:
                raise UserError(
                    f"{source} holds {count} records, {split.shard_lengths[shard]} are recorded: "
                    "the set is damaged, prepare it again"
                )
            partial.replace(target)
    info.add_alternative_file_format("array_record")
    info.write_to_directory(builder.data_path, all_metadata=False)
