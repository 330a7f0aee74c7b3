"""Pictures of one handwritten digit each, for pretraining by classification.

They are made of what the digits dataset is made of (see :mod:`.digits`), and look like windows of
its images: a digit of random size, place and colour on a random part of a photograph. No
handwritten sample is used in both splits, and the splits are those of that dataset, so a backbone
that is pretrained on "train" has seen none of the digits of ``digits_val``.
"""

from typing import Tuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import digits

_MIN_CROP_SIZE = 32
# Of a digit's height to the crop's. A higher one might not fit when it is turned and stretched as
# far as digits are.
_RELATIVE_HEIGHT = (0.5, 0.69)
# A crop is this much narrower than an image of the dataset that shows as much of the photograph, so
# that texture and digits have sizes as there.
_CROPS_PER_IMAGE_WIDTH = 3


class DigitCrops(Dataset):
    """A sequence of random crops, made when they are asked for.

    A classifier that starts from random weights needs long to find digits that are lighter or
    darker than a photograph behind them, so a sequence for training may begin with easy ones. A
    crop of difficulty d, from 0 to 1, is a blend of a white digit on black (d = 0) and the digit in
    its colour on the photograph (d = 1). The difficulty of crop i is uniformly random, but at least
    ``i / (easy_fraction * num_crops)``; those after the easy ones, or all by default, have 1.

    Crop i depends on the arguments and i only.
    """

    def __init__(
        self,
        split: str,
        num_crops: int,
        crop_size: int = 32,
        seed: int = 0,
        easy_fraction: float = 0.0,
    ) -> None:
        """
        Args:
            split: "train" or "val".
            num_crops: length of the sequence, at least 1.
            crop_size: width and height in pixels, at least 32. The digits grow with it.
            seed: of everything random, at least 0.
            easy_fraction: part of the sequence, from 0 to 1, that is easier than the rest.

        Raises:
            ValueError: an argument is not one of these, or too small.
            ImportError: scikit-learn is not installed.
        """
        if split not in digits.SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(digits.SPLITS)}")
        for name, value, minimum in (
            ("num_crops", num_crops, 1),
            ("crop_size", crop_size, _MIN_CROP_SIZE),
            ("seed", seed, 0),
        ):
            digits.check_integer(name, value, minimum)
        if not 0.0 <= easy_fraction <= 1.0:
            raise ValueError(f"easy_fraction is {easy_fraction}; it must be from 0 to 1")
        self._split_index = digits.SPLITS.index(split)
        self._num_crops = num_crops
        self._crop_size = crop_size
        self._seed = seed
        self._num_easy = easy_fraction * num_crops
        self._material = digits.load_materials()[split]

    def __len__(self) -> int:
        return self._num_crops

    def __getitem__(self, index: int) -> Tuple[Tensor, int]:
        """
        Returns:
            The crop, (3, crop_size, crop_size), uint8 RGB, and its digit, 0 to 9.
        """
        sample, rng = self._choose_sample(index)
        size = self._crop_size
        # Drawn in any case, so that the crops after the easy ones are those of a sequence without.
        difficulty = rng.random()
        difficulty = max(difficulty, index / self._num_easy) if index < self._num_easy else 1.0
        photo = digits.crop_photo(self._material.photos, _CROPS_PER_IMAGE_WIDTH * size, rng)
        photo = photo[_place(size, len(photo), rng), _place(size, len(photo), rng)]
        pixels = photo * np.float32(difficulty / 255)
        low, high = np.log(_RELATIVE_HEIGHT)
        height = size * np.exp(rng.uniform(low, high))
        opacity = digits.render(self._material.inks[sample], height, rng)
        window = tuple(_place(length, size, rng) for length in opacity.shape)
        color = 1 + difficulty * (digits.choose_color(pixels[window], rng) - 1)
        pixels[window] += opacity[..., None] * (color - pixels[window])
        image = torch.from_numpy(np.round(pixels * 255).astype(np.uint8))
        return image.permute(2, 0, 1), int(self._material.labels[sample])

    def sample_id(self, index: int) -> int:
        """The index, into scikit-learn's ``load_digits``, of the digit of a crop."""
        return int(self._material.sample_ids[self._choose_sample(index)[0]])

    def _choose_sample(self, index: int) -> Tuple[int, np.random.Generator]:
        if not 0 <= index < self._num_crops:
            raise IndexError(f"there are {self._num_crops} crops, and none with index {index}")
        rng = np.random.default_rng([self._seed, self._split_index, index])
        return int(rng.integers(len(self._material.inks))), rng


def _place(length: int, available: int, rng: np.random.Generator) -> slice:
    """A random part of this length."""
    start = int(rng.integers(available - length + 1))
    return slice(start, start + length)
