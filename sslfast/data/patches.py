"""Training patches: a labelled and an unlabelled stream, cropped and augmented with one seed per sample.

The patches of a step depend only on the seed, the step and the process. A resumed run continues with the same patches,
whatever its number of workers.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandAffineGrid,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialCrop,
    SpatialPad,
)
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sslfast.data.mirror import mirrors
from sslfast.data.nifti import IGNORE
from sslfast.data.volumes import DecodedCase
from sslfast.errors import UserError
from sslfast.options import MIRROR, Augment, MirrorAxis
from sslfast.views import ZOOM, largest_angles

SHARED_MEMORY = Path("/dev/shm")  # where tensors pass from process to process; 64 MB in most containers
BLOCKED = {signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set()  # in workers; macOS cannot wait for it


@dataclass(frozen=True)
class Batch:
    """N patches, the first L labelled."""

    images: Tensor  # [N, M, D, H, W] float32
    labels: Tensor  # [L, D, H, W] int64, -1 where not annotated
    names: list[str]  # N case names


class TwoStreamSampler(Sampler[list[tuple[int, int]]]):
    """Yields the samples of each step as (case, seed): `labelled` labelled ones, then `unlabelled` unlabelled ones.

    Cases 0..labelled_cases-1 are labelled, the next `unlabelled_cases` are not. Each stream passes through all of its
    cases in random order before it repeats one. With several processes, each draws this many samples per step, and the
    processes share one such order.
    """

    def __init__(
        self,
        labelled_cases: int,
        unlabelled_cases: int,
        labelled: int,
        unlabelled: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.streams = [(0, labelled_cases, labelled), (labelled_cases, unlabelled_cases, unlabelled)]
        self.seed = seed
        self.steps = range(first_step, last_step)
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            samples = []
            for stream, (first, cases, count) in enumerate(self.streams):
                batch_index = step * self.world_size + self.rank
                for draw in range(batch_index * count, (batch_index + 1) * count):
                    lap, position = divmod(draw, cases)
                    order = np.random.default_rng((self.seed, stream, lap)).permutation(cases)
                    seed = np.random.SeedSequence((self.seed, stream, draw)).generate_state(1)[0]
                    samples.append((first + int(order[position]), int(seed)))
            yield samples


class PatchDataset(Dataset[dict[str, Any]]):
    """Random patches of decoded cases. The key of an item is (case, seed)."""

    def __init__(
        self,
        cases: Sequence[DecodedCase],
        patch: tuple[int, int, int],
        *,
        augment: Augment,
        foreground: float,
        affine_unlabelled: bool = True,
        mirror: Sequence[MirrorAxis] = MIRROR,
        names: Sequence[str] = (),
        spacing: Sequence[float] = (1, 1, 1),
    ) -> None:
        """Builds the transforms.

        Args:
            foreground: fraction of the labelled patches that are centred on a foreground voxel, of each class alike.
            affine_unlabelled: True if unlabelled patches are rotated and zoomed too.
            mirror: axes of the flips.
            names: class names, of which left and right ones change places in a mirror.
            spacing: length of a voxel along each axis; patches are rotated in space, not on their grid.
        """
        self.cases = cases
        self.patch = patch
        self.foreground = foreground
        both = {"keys": ("image", "label"), "allow_missing_keys": True}
        ranges = {
            "rotate_range": largest_angles([n * length for n, length in zip(patch, spacing, strict=True)]),
            "scale_range": [tuple(zoom - 1 for zoom in ZOOM)] * 3,
        }
        affine = RandAffined(**both, **ranges, prob=0.3, mode=("bilinear", "nearest"), padding_mode="border")
        affine.rand_affine.rand_affine_grid = _GridInSpace(spacing, **ranges)
        intensity = [
            RandScaleIntensityd("image", factors=0.2, prob=0.5),
            RandShiftIntensityd("image", offsets=0.2, prob=0.5),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.4)),
            RandGaussianNoised("image", prob=0.3, std=0.1),
        ]
        parts = {"affine": [affine], "flip": mirrors(mirror, names), "intensity": intensity}
        used = {"all": tuple(parts), "no-flip": ("affine", "intensity"), "none": ()}.get(augment, (augment,))
        chosen = {name: parts[name] for name in used}
        without_affine = {name: part for name, part in chosen.items() if name != "affine"}
        self.labelled, self.unlabelled = (
            Compose([transform for part in of.values() for transform in part])
            for of in (chosen, chosen if affine_unlabelled else without_affine)
        )

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        case = self.cases[index]
        random = np.random.default_rng(seed)
        sample = self._crop(case, random)
        augmentation = self.labelled if case.label_entry else self.unlabelled
        augmentation.set_random_state(seed=int(random.integers(2**32)))
        plain = convert_to_tensor(augmentation(sample), track_meta=False)  # else MONAI carries it through the networks
        return {**plain, "name": case.name}

    def _crop(self, case: DecodedCase, random: np.random.Generator) -> dict[str, Tensor]:
        image, label, foreground = case.image, case.label, case.foreground
        size = image.shape[1:]
        shape = np.maximum(size, self.patch)
        low, high = np.array(self.patch) // 2, shape - (np.array(self.patch) + 1) // 2
        if foreground is not None and len(foreground) and random.random() < self.foreground:
            centre = _draw_voxel(foreground, random) + (shape - size) // 2
            centre = np.clip(centre, low, high)
        else:
            centre = random.integers(low, high, endpoint=True)
        crop = SpatialCrop(roi_center=centre.tolist(), roi_size=self.patch)
        sample = {"image": torch.from_numpy(image)}
        if label is not None:
            sample["label"] = torch.from_numpy(label)[None]
        if (shape != size).any():  # pad a volume smaller than the patch; the padding is not annotated
            air = [float(channel.min()) for channel in image]
            sample = {
                name: torch.cat([SpatialPad(self.patch, value=v)(c[None]) for c, v in zip(value, values, strict=True)])
                for name, value in sample.items()
                for values in [air if name == "image" else [IGNORE]]
            }
        return {name: crop(value).as_tensor() for name, value in sample.items()}


class _GridInSpace(RandAffineGrid):
    """A random affine map of lengths instead of voxels."""

    def __init__(self, spacing: Sequence[float], **ranges: Any) -> None:
        super().__init__(**ranges)
        self.lengths = torch.tensor([*(length / min(spacing) for length in spacing), 1.0]).view(4, 1, 1, 1)

    def __call__(self, spatial_size: Any = None, grid: Any = None, **options: Any) -> Tensor:
        """The voxels [4, D, H, W] from which those of `grid` are taken."""
        moved: Tensor = super().__call__(spatial_size, grid * self.lengths, **options)
        return moved / self.lengths


def _draw_voxel(foreground: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The indices of a voxel of the foreground [M, 4], of each class that the case has with the same probability.

    Drawn from all voxels alike, small structures would hardly ever be at the centre of a patch.
    """
    classes = foreground[:, 3]  # rising
    ends = np.searchsorted(classes, np.arange(1, classes[-1] + 2))
    present = np.flatnonzero(np.diff(ends))
    c = present[0] if len(present) == 1 else random.choice(present)
    return foreground[random.integers(ends[c], ends[c + 1]), :3]


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stacks the samples of one step."""
    return Batch(
        images=torch.stack([sample["image"] for sample in samples]).float(),
        labels=torch.stack([sample["label"][0] for sample in samples if "label" in sample]).long(),
        names=[sample["name"] for sample in samples],
    )


class PipedBatch(Batch):
    """A batch that is sent to another process through a pipe, as arrays."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_arrays, (self.images.numpy(), self.labels.numpy(), self.names)


def _from_arrays(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Batch:
    return Batch(torch.from_numpy(images), torch.from_numpy(labels), names)


def collate_to_send(samples: list[dict[str, Any]]) -> Batch:
    """`collate` in a worker: into shared memory, or for a pipe if there is no room for it.

    The room is tested here, because a worker that fails to send a batch makes the training process wait for ever.
    """
    batch = collate(samples)
    size = batch.images.nbytes + batch.labels.nbytes
    try:
        if not SHARED_MEMORY.exists() or size < shutil.disk_usage(SHARED_MEMORY).free:
            batch.images.share_memory_()
            batch.labels.share_memory_()
            return batch
    except RuntimeError:  # another process took the room in between
        pass
    return PipedBatch(batch.images, batch.labels, batch.names)


def patch_loader(dataset: PatchDataset, sampler: TwoStreamSampler, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """A loader that yields one `Batch` per step. See `worker_faults`.

    Raises:
        UserError: this machine cannot start workers.
    """
    if workers:
        try:
            torch.multiprocessing.Lock()
        except OSError as error:
            raise UserError(f"--workers {workers}: there is no room for a lock ({error}). Use --workers 0.") from error
    return _Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_to_send if workers else collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
    )


class _Loader(DataLoader[Any]):
    """Its workers outlive Ctrl-C and SIGTERM, which often reach every process of a run; their parent ends them.

    Nothing is left for them to collect: the iterator of an older loader fails in a process that is not its own.
    """

    def __iter__(self) -> Any:
        gc.collect()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # for every thread of the workers
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if BLOCKED:
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(BLOCKED).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def worker_faults(workers: int) -> Iterator[None]:
    """Turns the end of a worker, and what it cannot read, into a UserError with the reason."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError, UserError) as error:
        lines = str(error).strip().splitlines() or [""]
        if lines[0].startswith("DataLoader worker"):
            reason = lines[0]
        elif workers and isinstance(error, ConnectionError | EOFError):
            reason = "a worker ended before it had sent its patches"
        elif "in DataLoader worker" in lines[0] and not isinstance(error, RuntimeError):
            reason = lines[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        else:
            raise
        raise UserError(
            f"--workers {workers}: {reason.rstrip(' .')}. The last checkpoint is unchanged. If the machine is short of "
            "memory, continue with fewer --workers, or with 0."
        ) from error
