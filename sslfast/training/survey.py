"""What a plan is made for: the classes and channels of a dataset, its headers, a sample of its voxels, the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nibabel.orientations import io_orientation

from sslfast.data.channels import named_channels
from sslfast.data.classes import Classes, choose_classes, find_values
from sslfast.data.demo.cohorts import data_folder
from sslfast.data.folder import Case, Dataset, TrainingSplit, open_dataset, split_training
from sslfast.data.nifti import on_grid_of, read_channels, read_header, read_label
from sslfast.data.volumes import spacing_of
from sslfast.errors import UserError, plural
from sslfast.inference import choose_device
from sslfast.methods import find_method
from sslfast.methods.method import Method
from sslfast.training.config import TrainConfig

SAMPLE = 6  # labelled and unlabelled scans whose voxels are read


@dataclass(frozen=True)
class Survey:
    """What the headers of all volumes and the voxels of some say."""

    count: int
    spacings: np.ndarray  # [N, 3] mm, along R, A, S
    extents: np.ndarray  # [N, 3] mm
    lows: np.ndarray  # [n, M] a low percentile of the voxels of each scan in the sample, M channels
    inside: np.ndarray  # [n, M] foreground voxels of the labelled ones
    smallest: float  # median volume of the smallest class, mm^3; 0 if it is not known


@dataclass(frozen=True)
class Situation:
    """What a plan is made for."""

    classes: Classes
    channels: tuple[str, ...]
    survey: Survey
    device: torch.device
    unlabelled: int  # volumes


def look(config: TrainConfig) -> Situation:
    """Opens the dataset and reads headers and a sample of voxels.

    Raises:
        UserError: the dataset cannot be opened, or no volume of it can be read.
    """
    dataset = open_dataset(data_folder(config.data))
    split = split_training(dataset, config.labeled, config.validation)
    classes = find_classes(config, dataset, split)
    channels = named_channels(dataset.channels, split.labelled[0].images)
    survey = survey_cases(split, classes, dataset.ignores(config.labels.ignore_label), len(channels))
    return Situation(classes, channels, survey, choose_device(config.device), len(split.unlabelled))


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """The method of a run.

    Raises:
        UserError: its options, or the number of classes, cannot be.
    """
    method = find_method(config.method)
    try:
        built: Method = method(num_classes, config.steps, config.seed, config.options or method.Options())
    except ValueError as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return built


def find_classes(config: TrainConfig, dataset: Dataset, split: TrainingSplit) -> Classes:
    """The classes of a run."""
    ignore_label = dataset.ignores(config.labels.ignore_label)
    cases = (*split.labelled, *split.validation, *dataset.test)
    labels = [case.label for case in cases if case.label]
    return choose_classes(
        config.labels.classes, dataset.classes, lambda: find_values(labels, ignore_label), ignore_label
    )


def survey_cases(split: TrainingSplit, classes: Classes, ignore_label: int, channels: int = 1) -> Survey:
    """Reads headers and a sample of voxels of labelled and unlabelled scans. What cannot be read is passed over here.

    Raises:
        UserError: no volume can be read.
    """
    spacings, extents = [], []
    cases = (*split.labelled, *split.unlabelled)
    reason = ""
    for case in (*cases, *split.validation):
        try:
            header = read_header(case.images)
        except UserError as error:
            reason = str(error)
            continue
        order = io_orientation(header.affine)[:, 0].argsort()  # the stored axis that lies along R, A and S
        spacings.append(np.array(spacing_of(header)))
        extents.append(spacings[-1] * np.array(header.shape)[order])
    if not spacings:
        raise UserError(f"none of {plural(len(cases), 'volume')} can be read: {reason}")
    lows, inside, volumes = [], [], []
    for case in (*_spread(split.labelled, SAMPLE), *_spread(split.unlabelled, SAMPLE)):
        try:
            image = read_channels(case.images)
            voxels = image.array.reshape(channels, *image.shape)
            lows.append(np.percentile(voxels, 0.5, axis=(1, 2, 3)))
            if case.label is None:
                continue
            label = read_label(case.label, classes=[*classes.names], merged=classes.merged, ignore_label=ignore_label)
            drawn = on_grid_of(image, label, case.image, case.label).array
            inner = np.argwhere(drawn > 0)
        except (UserError, ValueError):  # ValueError: of another number of channels
            continue  # training names it
        inside.append(voxels[(slice(None), *inner[:: max(1, len(inner) // 20000)].T)].T)
        counts = np.bincount(drawn[drawn > 0], minlength=len(classes.names))[1:]
        if counts.any():
            volumes.append(counts[counts > 0].min() * float(np.prod(image.spacing)))
    smallest = float(np.median(volumes)) if volumes else 0.0
    low = np.array(lows).reshape(-1, channels)
    every = np.concatenate([np.zeros((0, channels)), *inside])
    return Survey(len(spacings), np.array(spacings), np.array(extents), low, every, smallest)


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    """Up to so many cases, evenly spread."""
    return [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int))]
