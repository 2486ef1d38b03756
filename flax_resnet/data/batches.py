"""Batches on the devices, from a tfds set or a folder.

The rows of batch k are a pure function of (seed, k): permutations of the training split are joined
end to end, each row ``repeats`` times in a row, and cut into batches. So no example is dropped, and
without repeats none is seen twice in an epoch; with r an epoch is as long and has some 1/r of the
examples, and r epochs have each r times. The position in the data is the step number, and a set
that lives on the device gives the same batches as one that streams.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet.data import folders, sources
from flax_resnet.data.config import SPLITS, DataConfig, Split, contents, open_sources
from flax_resnet.data.folders import Contents, changes
from flax_resnet.data.order import (
    BatchReader,
    decode_chunks,
    decode_rows,
    is_repaid,
    read_ahead,
    take,
)
from flax_resnet.distributed import sharding, workers
from flax_resnet.errors import UserError
from flax_resnet.records.files import digest

# Images are decoded and summed up this many bytes of pixels at a time.
CHUNK_BYTES = 2**24


class Data:
    """A training and an evaluation split, opened and checked, as batches on a mesh.

    Attributes:
      image_shape: (H, W, C) of a training image.
      eval_shape: (H, W, C) of an evaluation image.
      batch_shape: image_shape, or (F,) of the features in its place: a training example.
      mesh: what batches are split over.
      class_names: name of each label.
      num_train: training examples.
      num_eval: evaluation examples.
      resident: True where both splits live on the devices.
      eval_part: what is evaluated: a split, or "" for what a folder holds out.
      notes: lines to be said of a folder: what is evaluated, and what was left out.
      num_unreadable: images of a folder that cannot be read and were left out.
    """

    def __init__(
        self, config: DataConfig, mesh: Mesh, num_classes: int, *, with_rows: bool = False
    ):
        """Opens the set.

        Args:
          config: which, and how it is read.
          mesh: that batches are split over.
          num_classes: of the network.
          with_rows: training batches have "row" (of the split) and "epoch" too, int32 (B,).

        Raises:
          UserError: it is missing, damaged, has labels of ``num_classes`` and above, or
            images of several sizes and no ``image_size``.
        """
        self._config, self.mesh, self._with_rows = config, mesh, with_rows
        self._sources = dict(zip(SPLITS, open_sources(config), strict=True))
        train, evaluation = self._sources.values()
        self.class_names = train.class_names
        if len(self.class_names) > num_classes:
            raise UserError(
                f"model.num_classes={num_classes} and the data has labels 0 to "
                f"{len(self.class_names) - 1}: set --model.num-classes {len(self.class_names)}"
            )
        self.num_train, self.num_eval = len(train), len(evaluation)
        self.notes: tuple[str, ...] = getattr(train, "notes", ())
        self.eval_part = getattr(evaluation, "part", config.eval_split or folders.TEST_NAMES[0])
        self.num_unreadable: int = getattr(train, "num_unreadable", 0)
        if not self.num_train or not self.num_eval:
            what = "evaluation" if self.num_train else "training"
            raise UserError(f"the {what} split of {config.title} is empty")
        self.image_shape = _image_shape(config, train, config.image_size)
        self.eval_shape = _image_shape(config, train, config.eval_image_size or config.image_size)
        self._shapes = {"train": self.image_shape, "eval": self.eval_shape}
        self.batch_shape: tuple[int, ...] = self.image_shape
        self._decoders = {split: config.decoder(self.image_shape[2], split) for split in SPLITS}
        self._chunk = max(1, CHUNK_BYTES // math.prod(self.image_shape))
        counts = (self.num_train, self.num_eval)
        pixels = sum(n * math.prod(x) for n, x in zip(counts, self._shapes.values(), strict=True))
        self.resident = not config.random_resized_crop and pixels <= config.resident_mb * 2**20
        if self.resident:
            self._keep({split: self._decoded(split) for split in SPLITS})

    @functools.cached_property
    def contents(self) -> Contents | None:
        """What is in a folder of images, by split; None of a tfds set."""
        return contents(self._config, self._sources.values())

    def check_shared_memory(self, num_steps: int, batch_size: int, eval_batch_size: int) -> None:
        """Raises UserError where worker processes would run out of memory for their batches."""
        steps = {"train": num_steps, "eval": -(-self.num_eval // eval_batch_size)}
        sizes = {"train": batch_size, "eval": eval_batch_size}
        count, num_bytes = self._config.num_workers, 0
        for split in SPLITS if not self.resident else ():
            if is_repaid(count, steps[split]):
                batch = sizes[split] * math.prod(self._shapes[split]) // jax.process_count()
                num_bytes += count * (workers.BATCHES_PER_WORKER + 1) * batch
        if num_bytes:
            workers.check_shared_memory(num_bytes)

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON values."""
        return {
            **({} if self.contents is None else {"contents": self.contents}),
            "num_train": self.num_train,
            "num_eval": self.num_eval,
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            **({"num_unreadable": self.num_unreadable} if self.num_unreadable else {}),
        }

    def check_same(self, recorded: Mapping[str, Any], workdir: Path) -> None:
        """Raises UserError unless these are the data that the run in ``workdir`` recorded."""
        there = recorded.get("contents")  # earlier versions recorded none
        if there is not None and (changed := changes(there, self.contents)):
            raise UserError(
                f"{workdir} was trained on other images than {self._config.title} has now "
                f"({changed}): put the same images back, or name another directory"
            )
        for name, here in self.describe().items():
            if name != "contents" and recorded.get(name) != here:
                raise UserError(
                    f"{workdir} was trained on data with {name} {recorded.get(name)!s:.80} and it "
                    f"is {here!s:.80} now: put the same data back, or name another directory"
                )

    @property
    def sizes(self) -> str:
        """Of the images, to be printed."""
        train, evaluated = ("x".join(map(str, shape)) for shape in self._shapes.values())
        return train if train == evaluated else f"{train} and {evaluated}"

    def _decoded(self, split: Split) -> dict[str, np.ndarray]:
        parts = self._decode(split, np.arange(len(self._sources[split])))
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        return {"image": images, "label": labels}

    def examples(self, split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 (n, H, W, C), not cropped at random, labels int32 (n,)) of some rows."""
        return decode_rows(self._sources[split], self._decoders[split], rows)

    def train_images(self, most: int | None = None) -> Iterator[np.ndarray]:
        """Training images for statistics, uint8 (n, H, W, C) a time.

        Evenly spread ones where there are more than ``most`` or ``statistics_examples``.
        """
        count = min(self.num_train, self._config.statistics_examples, most or self.num_train)
        rows = np.linspace(0, self.num_train - 1, count).round().astype(np.int32)
        if self.resident:
            images = self._resident["train"]["image"]
            for start in range(0, count, self._chunk):
                yield np.asarray(images[rows[start : start + self._chunk]])
        else:
            for pixels, _ in self._decode("train", rows):
                yield pixels

    def _decode(self, split: Split, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(images uint8 (n, H, W, C), labels int32 (n,)) of a split's rows, some at a time."""
        try:
            yield from decode_chunks(self._sources[split], self._decoders[split], rows, self._chunk)
        except sources.Unreadable:
            self.check_readable()
            raise

    def check_readable(self) -> None:
        """Decodes this process's part of all images once, at an eighth where that is quicker.

        Raises:
          UserError: some do not decode; all are named.
        """
        bad: dict[str, str] = {}
        for split, source in self._sources.items():
            decoder = self._decoders[split]
            if decoder.size is not None:
                decoder = dataclasses.replace(decoder, size=sources.CHECK_SIZE)
            rows = range(jax.process_index(), len(source), jax.process_count())
            bad |= sources.undecodable_rows(source, rows, decoder)
        if bad:
            raise sources.unreadable(bad)

    def begin_check(self, say: Callable[[str], None]) -> Callable[[], None]:
        """Begins ``check_readable`` in a thread for a folder that streams; returns what ends it.

        That calls ``say`` with a line where it has to wait.
        """
        if self.resident or self._config.folder is None or self._config.skip_unreadable:
            return lambda: None
        checked: Future[None] = Future()

        def check() -> None:
            try:
                self.check_readable()
                checked.set_result(None)
            except BaseException as error:
                checked.set_exception(error)

        def finish() -> None:
            if not checked.done():
                count = self.num_train + self.num_eval
                say(f"decodes all {count:,} images once, to find those that cannot be read")
            checked.result()

        threading.Thread(target=check, daemon=True).start()
        return finish

    def train_batches(
        self, seed: int | Sequence[int], batch_size: int, start_step: int, stop_step: int
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches of ``batch_size`` from ``start_step`` to before ``stop_step``.

        ``seed`` is that of the order; a resident set takes several, for networks that train
        together.

        Yields:
          {"image" uint8 (B, H, W, C), "label" int32 (B,)}, and with_rows "row" and "epoch" int32
          (B,), split over the devices. Of S seeds (S, B, ...): a batch of each seed's order.
        """
        parts = self.host_batches(seed, batch_size, start_step, stop_step)
        with contextlib.closing(parts):
            yield from map(self.place, parts)

    def host_batches(
        self, seed: int | Sequence[int], batch_size: int, start_step: int, stop_step: int
    ) -> Generator[dict[str, np.ndarray]]:
        """This process's part of each training batch, on the host, as ``train_batches`` has it.

        Of a resident set only which examples a batch has: "row", and with_rows "epoch".
        """
        if isinstance(seed, int):
            return self._batches(self._reader("train", batch_size, seed), start_step, stop_step)
        readers = [self._reader("train", batch_size, one) for one in seed]
        each = (self._batches(reader, start_step, stop_step) for reader in readers)
        stacked = lambda parts: jax.tree.map(lambda *x: np.stack(x), *parts)  # noqa: E731
        return (stacked(parts) for parts in zip(*each, strict=True))

    def place(self, batch: dict[str, np.ndarray], split: Split = "train") -> dict[str, jax.Array]:
        """A batch on the devices, from what ``host_batches`` gives."""
        placed = sharding.put_batch(self.mesh, batch)
        if not self.resident:
            return placed
        mask = {"mask": placed.pop("mask")} if "mask" in placed else {}
        return {**self._take(self._resident[split], placed), **mask}

    def in_order(self, split: Split, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """A split once, in order; "mask" is False on the padding of the last batch."""
        stop = -(-len(self._sources[split]) // batch_size)
        parts = self._batches(self._reader(split, batch_size), 0, stop)
        with contextlib.closing(parts):  # ends the workers, also where the caller stops early
            for part in parts:
                yield self.place(part, split)

    def eval_batches(self, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """The evaluation split by ``in_order``."""
        return self.in_order("eval", batch_size)

    def fingerprint(self, split: Split) -> str:
        """A hash of a split's stored images, of how they are decoded, and of its labels."""
        source = self._sources[split]
        sha256 = hashlib.sha256(repr(self._decoders[split]).encode())
        for start in range(0, len(source), 256):
            encoded, labels = source.read(range(start, min(start + 256, len(source))))
            sha256.update(digest([labels, *encoded]).encode())
        return sha256.hexdigest()

    def class_counts(self, split: Split) -> np.ndarray | None:
        """Examples of each class: int (K,); None where a streamed set would have to be read."""
        in_memory = self._resident[split]["label"] if self.resident else None
        labels = getattr(self._sources[split], "labels", in_memory)
        if labels is None:
            return None
        return np.bincount(np.asarray(labels), minlength=len(self.class_names))

    def with_features(self, features: Mapping[Split, np.ndarray], labels: Any) -> Data:
        """The same splits with each image's features (N, F) in its place, on the devices.

        ``labels`` are int32 (N,) of each split.
        """
        other = copy.copy(self)
        other.batch_shape = features["train"].shape[1:]
        other.resident = True
        other._keep({split: {"image": features[split], "label": labels[split]} for split in SPLITS})
        return other

    def _keep(self, arrays: Mapping[Split, dict[str, np.ndarray]]) -> None:
        """Puts the splits on the devices."""
        self._resident = {
            split: sharding.put_replicated(self.mesh, part) for split, part in arrays.items()
        }
        self._take = jax.jit(take, out_shardings=sharding.batch_sharding(self.mesh))

    @property
    def train_arrays(self) -> dict[str, jax.Array]:
        """The training split on the devices, where it is ``resident``."""
        return self._resident["train"]

    def _reader(self, split: Split, batch_size: int, seed: int | None = None) -> BatchReader:
        """What knows and reads a split's batches; without a seed in order, and not cropped."""
        config, decoder = self._config, self._decoders[split]
        if seed is not None:
            decoder = dataclasses.replace(decoder, random_crop=config.random_resized_crop)
        shard, source = (jax.process_index(), jax.process_count()), self._sources[split]
        return BatchReader(
            source, decoder, batch_size, seed, shard, config.repeats, self._with_rows
        )

    def _batches(
        self, reader: BatchReader, start: int, stop: int
    ) -> Generator[dict[str, np.ndarray]]:
        if self.resident:
            yield from map(reader.rows, range(start, stop))
        else:
            yield from read_ahead(reader, start, stop, self._config.num_workers)


def _image_shape(
    config: DataConfig, source: sources.Source, side: int | None
) -> tuple[int, int, int]:
    """(H, W, C) of decoded images: resized to ``side``, or as they are stored, and padded."""
    height, width, channels = source.image_shape
    height, width = side or height, side or width
    if height is None or width is None:
        raise UserError(
            f"images of {config.title} differ in size: set --data.image-size, for example 224"
        )
    return height + 2 * config.pad, width + 2 * config.pad, config.channels or channels
